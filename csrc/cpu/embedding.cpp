// The embedding room's `.cpu` operators: lookup and bags. Schemas are defined in Python (pykernels/ops/embedding);
// loops are in embedding.inc, gradients in embedding_backward.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <deque>

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

// One table's bags, as they were given and as the loops take them.
struct HeldBag {
  HeldIds ids;
  HeldBags bags;
  Tensor table, scale;
  BagArgs args;

  HeldBag(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& offsets,
          const std::optional<Tensor>& per_sample_weights, c10::string_view mode, bool include_last_offset,
          int64_t padding_idx, const char* function, const std::string& argument)
      : ids(given, weight.size(0), function, argument),
        bags(given, offsets, include_last_offset, function),
        table(with_rows(weight)),
        args{table_dtype(weight, function), bag_mode(mode), ids.ids, bags.bags, padding_idx} {
    args.table = table.const_data_ptr();
    args.table_stride = table.stride(0);
    args.cols = table.size(1);
    if (!per_sample_weights) return;
    TORCH_CHECK(per_sample_weights->numel() == given.numel() &&
                    per_sample_weights->scalar_type() == weight.scalar_type() &&
                    per_sample_weights->device().is_cpu() && args.mode != BagMode::kMax,
                function, "(): argument 'per_sample_weights' does not fit the ids and the table");
    scale = per_sample_weights->contiguous();
    args.scale = scale.const_data_ptr();
  }
};

// Output of `cols` columns and, where they are asked for, the places of the maxima.
std::tuple<Tensor, Tensor> bag_outputs(const HeldBag& first, const Tensor& weight, int64_t cols, bool with_maxima) {
  Tensor out = empty_large({first.args.bags.count, cols}, weight.options());
  Tensor maxima = at::empty({0}, weight.options().dtype(at::kInt));
  if (with_maxima && first.args.mode == BagMode::kMax) maxima.resize_({first.args.bags.count, cols});
  return {out, maxima};
}

void run_bag(BagArgs args, const Tensor& out, const Tensor& maxima, int64_t column) {
  args.out = static_cast<char*>(out.mutable_data_ptr()) + column * out.element_size();
  args.out_stride = out.size(1);
  if (maxima.numel()) {
    TORCH_CHECK(args.ids.count <= std::numeric_limits<int32_t>::max(),
                "embedding_bag(): mode 'max' takes up to 2^31 - 1 ids");
    args.maxima = maxima.mutable_data_ptr<int32_t>() + column;
  }
  for_bags(args.bags, args.cols, [&](int64_t begin, int64_t end) { embedding_kernels().bag(args, begin, end); });
}

std::tuple<Tensor, Tensor> embedding_bag_forward(const Tensor& ids, const Tensor& weight,
                                                 const std::optional<Tensor>& offsets,
                                                 const std::optional<Tensor>& per_sample_weights, c10::string_view mode,
                                                 bool include_last_offset, int64_t padding_idx, bool with_maxima,
                                                 int64_t) {
  constexpr auto name = "embedding_bag";
  check_table(weight, name);
  const HeldBag held(ids, weight, offsets, per_sample_weights, mode, include_last_offset, padding_idx, name, "input");
  const auto outputs = bag_outputs(held, weight, weight.size(1), with_maxima);
  run_bag(held.args, std::get<0>(outputs), std::get<1>(outputs), 0);
  return outputs;
}

std::tuple<Tensor, Tensor> embedding_bag_multi_forward(const at::TensorList ids,
                                                       const c10::List<std::optional<Tensor>>& offsets,
                                                       const at::TensorList weights,
                                                       const at::TensorList per_sample_weights, c10::string_view mode,
                                                       bool include_last_offset, bool with_maxima, int64_t) {
  constexpr auto name = "embedding_bag_multi";
  const size_t count = weights.size();
  TORCH_CHECK(count && ids.size() == count && offsets.size() == count &&
                  (per_sample_weights.empty() || per_sample_weights.size() == count),
              name, "(): lists of different lengths");
  std::deque<HeldBag> tables;  // the arguments of a table point into it
  int64_t cols = 0;
  for (size_t t = 0; t < count; ++t) {
    check_table(weights[t], name);
    const auto scale = per_sample_weights.empty() ? std::nullopt : std::optional<Tensor>(per_sample_weights[t]);
    tables.emplace_back(ids[t], weights[t], offsets[t], scale, mode, include_last_offset, -1, name,
                        "indices[" + std::to_string(t) + "]");
    TORCH_CHECK(tables[t].args.bags.count == tables[0].args.bags.count && tables[t].args.dtype == tables[0].args.dtype,
                name, "(): tables of different dtypes or numbers of bags");
    cols += weights[t].size(1);
  }
  const auto outputs = bag_outputs(tables[0], weights[0], cols, with_maxima);
  int64_t column = 0;
  for (const HeldBag& table : tables) {
    run_bag(table.args, std::get<0>(outputs), std::get<1>(outputs), column);
    column += table.args.cols;
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("embedding_forward.cpu", &embedding_forward);
  m.impl("embedding_bag_forward.cpu", &embedding_bag_forward);
  m.impl("embedding_bag_multi_forward.cpu", &embedding_bag_multi_forward);
}

}  // namespace pk
