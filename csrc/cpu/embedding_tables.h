// From tensors to what the loops of the embedding room are told, with the checks that guard memory.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "embedding_kernels.h"

namespace pk {

const EmbeddingKernels& embedding_kernels();
TableDtype table_dtype(const at::Tensor& table, const char* function);

// Raises IndexError naming position and value of the first id outside [0, rows).
void check_ids(const at::Tensor& ids, int64_t rows, const char* function, const std::string& argument);

// Contiguous ids, kept alive.
struct HeldIds {
  at::Tensor tensor;
  Ids ids;

  HeldIds(const at::Tensor& given, int64_t rows, const char* function, const std::string& argument = "input");
};

// Rows of unit inner stride: the tensor itself where it has them, otherwise a copy.
at::Tensor with_rows(const at::Tensor& matrix);

// The bags of flat ids by offsets, or of the rows of 2-D ids. Where offsets do not begin with 0 or exceed
// the number of ids, torch's RuntimeError; where they decrease (torch does not look), ValueError.
struct HeldBags {
  std::vector<int64_t> offsets;
  Bags bags;
  int64_t limit;  // positions from here on are in no bag

  HeldBags(const at::Tensor& ids, const std::optional<at::Tensor>& given, bool include_last_offset,
           const char* function);
};

BagMode bag_mode(c10::string_view mode);

// Calls run(begin, end) on ranges of bags with about the same number of ids.
void for_bags(const Bags& bags, int64_t cols, const std::function<void(int64_t, int64_t)>& run);

}  // namespace pk
