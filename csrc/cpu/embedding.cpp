// The embedding room's `.cpu` operators: lookup and bags. Schemas are defined in Python (pykernels/ops/embedding);
// loops are in embedding.inc, gradients in embedding_backward.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include "embedding_tables.h"
#include "pages.h"

namespace pk {
namespace {

using at::Tensor;

void check_table(const Tensor& weight, const char* function) {
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu(), function, "(): argument 'weight' must be 2-D on the CPU");
}

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, int64_t) {
  constexpr auto name = "embedding";
  check_table(weight, name);
  const HeldIds held(ids, weight.size(0), name);
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  // Columns apart in memory: torch's gather reads the rows asked for, a copy into rows would read the whole table.
  if (weight.stride(1) != 1 && weight.size(1) > 1) return at::index_select(weight, 0, held.tensor.view(-1)).view(shape);
  Tensor out = empty_large(shape, weight.options());
  const int64_t element = weight.element_size(), row = weight.size(1) * element;
  const GatherArgs args{held.ids, static_cast<const char*>(weight.const_data_ptr()), weight.stride(0) * element, row,
                        static_cast<char*>(out.mutable_data_ptr())};
  if (row == 0) return out;
  at::parallel_for(0, held.ids.count, std::max<int64_t>(1, 65536 / row),
                   [&](int64_t begin, int64_t end) { embedding_kernels().gather(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> embedding_bag_forward(const Tensor& ids, const Tensor& weight,
                                                 const std::optional<Tensor>& offsets,
                                                 const std::optional<Tensor>& per_sample_weights, c10::string_view mode,
                                                 bool include_last_offset, int64_t padding_idx, bool with_maxima,
                                                 int64_t) {
  constexpr auto name = "embedding_bag";
  check_table(weight, name);
  const HeldIds held(ids, weight.size(0), name);
  const HeldBags bags(ids, offsets, include_last_offset);
  const Tensor table = with_rows(weight);
  BagArgs args{table_dtype(weight, name), bag_mode(mode), held.ids, bags.bags, padding_idx};
  args.table = table.const_data_ptr();
  args.table_stride = table.stride(0);
  args.cols = table.size(1);
  Tensor scale;
  if (per_sample_weights) {
    TORCH_CHECK(per_sample_weights->numel() == ids.numel() &&
                    per_sample_weights->scalar_type() == weight.scalar_type() &&
                    per_sample_weights->device().is_cpu() && args.mode != BagMode::kMax,
                "embedding_bag(): argument 'per_sample_weights' does not fit input and weight");
    scale = per_sample_weights->contiguous();
    args.scale = scale.const_data_ptr();
  }
  Tensor out = empty_large({bags.bags.count, args.cols}, weight.options());
  args.out = out.mutable_data_ptr();
  Tensor maxima = at::empty({0}, weight.options().dtype(at::kInt));
  if (with_maxima && args.mode == BagMode::kMax) {
    TORCH_CHECK(ids.numel() <= std::numeric_limits<int32_t>::max(),
                "embedding_bag(): mode 'max' takes up to 2^31 - 1 ids");
    maxima.resize_({bags.bags.count, args.cols});
    args.maxima = maxima.mutable_data_ptr<int32_t>();
  }
  for_bags(args.bags, args.cols, [&](int64_t begin, int64_t end) { embedding_kernels().bag(args, begin, end); });
  return {out, maxima};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("embedding_forward.cpu", &embedding_forward);
  m.impl("embedding_bag_forward.cpu", &embedding_bag_forward);
}

}  // namespace pk
