// Gradients of the embedding room on the CPU: positions sorted by id, each row of the gradient the sum of a run of
// them. No atomics, and no number of threads changes a bit.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "embedding_gradient.h"
#include "pages.h"

namespace pk {
namespace {

using at::Tensor;

struct Options {
  int64_t rows, padding;
  bool by_frequency, sparse;
};

// The rows of the gradient: (unique ids, their rows), or an empty tensor and all rows.
std::tuple<Tensor, Tensor> sum_rows(const GradientSource& source, const Options& options) {
  SortedGradient gradient(source, options.rows, options.padding, options.by_frequency);
  const int64_t runs = gradient.runs(), cols = gradient.args.cols;
  const at::TensorOptions like = source.rows.options();
  Tensor found = at::empty({1, options.sparse ? runs : 0}, at::kLong);
  Tensor out = options.sparse ? empty_large({runs, cols}, like) : zeros_large({options.rows, cols}, like);
  if (options.sparse) {
    int64_t* const unique = found.mutable_data_ptr<int64_t>();
    for (int64_t r = 0; r < runs; ++r) unique[r] = gradient.sorted.runs[r].id;
  }
  if (runs == 0 || cols == 0) return {found, out};
  gradient.args.out = out.mutable_data_ptr();
  gradient.args.dense = !options.sparse;
  at::parallel_for(0, runs, std::max<int64_t>(1, kGradientGrain / cols),
                   [&](int64_t begin, int64_t end) { embedding_kernels().segment(gradient.args, begin, end); });
  return {found, out};
}

// ---- operators

Tensor embedding_backward(const Tensor& dy, const Tensor& ids, int64_t rows, int64_t padding_idx, bool by_frequency) {
  const Options options{rows, padding_idx, by_frequency, false};
  return std::get<1>(sum_rows(lookup_source(dy, ids, rows, "embedding_backward"), options));
}

std::tuple<Tensor, Tensor> embedding_backward_sparse(const Tensor& dy, const Tensor& ids, int64_t rows,
                                                     int64_t padding_idx, bool by_frequency) {
  const Options options{rows, padding_idx, by_frequency, true};
  return sum_rows(lookup_source(dy, ids, rows, "embedding_backward"), options);
}

Tensor embedding_bag_backward(const Tensor& dy, const Tensor& ids, const std::optional<Tensor>& offsets,
                              const std::optional<Tensor>& per_sample_weights, const std::optional<Tensor>& maxima,
                              int64_t rows, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
                              bool by_frequency) {
  return std::get<1>(sum_rows(bag_source(dy, ids, offsets, per_sample_weights, maxima, mode, include_last_offset,
                                         padding_idx, rows, "embedding_bag_backward"),
                              {rows, padding_idx, by_frequency, false}));
}

std::tuple<Tensor, Tensor> embedding_bag_backward_sparse(const Tensor& dy, const Tensor& ids,
                                                         const std::optional<Tensor>& offsets,
                                                         const std::optional<Tensor>& per_sample_weights,
                                                         const std::optional<Tensor>& maxima, int64_t rows,
                                                         c10::string_view mode, bool include_last_offset,
                                                         int64_t padding_idx, bool by_frequency) {
  return sum_rows(bag_source(dy, ids, offsets, per_sample_weights, maxima, mode, include_last_offset, padding_idx, rows,
                             "embedding_bag_backward"),
                  {rows, padding_idx, by_frequency, true});
}

Tensor embedding_bag_backward_weights(const Tensor& dy, const Tensor& ids, const Tensor& weight,
                                      const std::optional<Tensor>& offsets, c10::string_view mode,
                                      bool include_last_offset, int64_t padding_idx) {
  constexpr auto name = "embedding_bag_backward_weights";
  const HeldIds held(ids, weight.size(0), name);
  const HeldBags bags(ids, offsets, include_last_offset, name);
  check_gradient(dy, bags.bags.count, name);
  TORCH_CHECK(dy.scalar_type() == weight.scalar_type() && dy.size(1) == weight.size(1), name, ": dy is ",
              dy.scalar_type(), dy.sizes(), ", the table ", weight.scalar_type(), weight.sizes());
  const Tensor table = with_rows(weight), rows = with_rows(dy);
  Tensor out = at::empty(ids.sizes(), weight.options());
  if (bags.limit < ids.numel()) out.zero_();
  const ScaleArgs args{table_dtype(weight, name),
                       held.ids,
                       bags.bags,
                       padding_idx,
                       table.const_data_ptr(),
                       table.stride(0),
                       table.size(1),
                       rows.const_data_ptr(),
                       rows.stride(0),
                       bag_mode(mode) == BagMode::kMean,
                       out.mutable_data_ptr()};
  for_bags(bags.bags, args.cols, [&](int64_t begin, int64_t end) { embedding_kernels().scale(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("embedding_backward.cpu", &embedding_backward);
  m.impl("embedding_backward_sparse.cpu", &embedding_backward_sparse);
  m.impl("embedding_bag_backward.cpu", &embedding_bag_backward);
  m.impl("embedding_bag_backward_sparse.cpu", &embedding_bag_backward_sparse);
  m.impl("embedding_bag_backward_weights.cpu", &embedding_bag_backward_weights);
}

}  // namespace pk
