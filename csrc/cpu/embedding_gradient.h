// What a gradient of the embedding room is made of: rows of dy, and the positions that point to them, sorted by id.
#pragma once
#include "embedding_sort.h"
#include "embedding_tables.h"

namespace pk {

// Which rows of dy a lookup or its bags gave each position, before anything is sorted; keeps alive what `args` names.
struct GradientSource {
  HeldIds ids;
  int64_t limit = 0;  // positions from here on are in no bag
  at::Tensor rows;    // dy, 2-D, unit inner stride
  at::Tensor bag_of, place, factors, maxima;
  SegmentArgs args;

  GradientSource(const at::Tensor& given, int64_t table_rows, const char* function, const std::string& argument)
      : ids(given, table_rows, function, argument) {}
};

GradientSource lookup_source(const at::Tensor& dy, const at::Tensor& ids, int64_t table_rows, const char* function,
                             const std::string& argument = "input");
GradientSource bag_source(const at::Tensor& dy, const at::Tensor& ids, const std::optional<at::Tensor>& offsets,
                          const std::optional<at::Tensor>& per_sample_weights, const std::optional<at::Tensor>& maxima,
                          c10::string_view mode, bool include_last_offset, int64_t padding, int64_t table_rows,
                          const char* function, const std::string& argument = "input");

// The source sorted, with the pieces of long runs summed. `args` is complete but for `out`.
struct SortedGradient {
  SortedIds sorted;
  at::Tensor partials;
  SegmentArgs args;

  SortedGradient(const GradientSource& source, int64_t table_rows, int64_t padding, bool by_frequency);
  int64_t runs() const { return sorted.count; }
};

void check_gradient(const at::Tensor& dy, int64_t rows, const char* function);

constexpr int64_t kGradientGrain = 16384;  // elements a thread must have to be worth waking

}  // namespace pk
