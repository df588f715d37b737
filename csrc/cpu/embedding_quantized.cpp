// The `.cpu` operators on tables of 8- and 4-bit codes. Schemas are defined in pykernels/ops/embedding/quantized.py;
// loops are in embedding_quantized.inc.
#include "embedding_quantized.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "embedding_tables.h"
#include "isa.h"
#include "pages.h"

namespace pk {
namespace {

using at::Tensor;

const QuantizedKernels& quantized_kernels() {
  static const QuantizedKernels* const table = isa() == Isa::kAvx512 ? quantized_kernels_avx512()
                                               : isa() == Isa::kAvx2 ? quantized_kernels_avx2()
                                                                     : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

TableDtype narrow_dtype(const Tensor& tensor, const char* function) {
  const TableDtype dtype = table_dtype(tensor, function);
  TORCH_CHECK_NOT_IMPLEMENTED(dtype != TableDtype::kDouble, function, "(): float64 is not served by native code");
  return dtype;
}

Tensor embedding_bag_quantized_forward(const Tensor& packed, const Tensor& ids, const std::optional<Tensor>& offsets,
                                       const std::optional<Tensor>& per_sample_weights, int64_t bits,
                                       c10::string_view mode, bool include_last_offset, int64_t padding_idx,
                                       at::ScalarType dtype, int64_t) {
  constexpr auto name = "embedding_bag_quantized";
  TORCH_CHECK((bits == 8 || bits == 4) && packed.dim() == 2 && packed.size(1) >= bits && packed.device().is_cpu() &&
                  packed.scalar_type() == at::kByte,
              name, "(): argument 'packed' must be 2-D uint8 on the CPU, of at least ", bits, " columns");
  const HeldIds held(ids, packed.size(0), name, "indices");
  const bool lookup = mode == "none";
  const std::optional<HeldBags> bags =
      lookup ? std::nullopt : std::optional<HeldBags>(std::in_place, ids, offsets, include_last_offset, name);
  const Tensor table = with_rows(packed);
  QuantizedBagArgs args{bits, mode == "mean", held.ids, lookup ? Bags{nullptr, 1, ids.numel()} : bags->bags,
                        padding_idx};
  args.table = table.const_data_ptr<uint8_t>();
  args.table_stride = table.stride(0);
  args.cols = (packed.size(1) - bits) * (8 / bits);
  Tensor scale;
  if (per_sample_weights) {
    TORCH_CHECK(per_sample_weights->numel() == ids.numel() && per_sample_weights->scalar_type() == at::kFloat &&
                    per_sample_weights->device().is_cpu(),
                name, "(): argument 'per_sample_weights' does not fit the ids");
    scale = per_sample_weights->contiguous();
    args.scale = scale.const_data_ptr<float>();
  }
  std::vector<int64_t> shape = lookup ? ids.sizes().vec() : std::vector<int64_t>{args.bags.count};
  shape.push_back(args.cols);
  Tensor out = empty_large(shape, packed.options().dtype(dtype));
  args.dtype = narrow_dtype(out, name);
  args.out = out.mutable_data_ptr();
  for_bags(args.bags, args.cols, [&](int64_t begin, int64_t end) { quantized_kernels().bag(args, begin, end); });
  return out;
}

Tensor quantize_rows_forward(const Tensor& weight, int64_t bits) {
  constexpr auto name = "quantize_rows";
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu() && (bits == 8 || (bits == 4 && weight.size(1) % 2 == 0)),
              name, "(): argument 'weight' must be 2-D on the CPU, of an even number of columns with 4 bits");
  const Tensor table = with_rows(weight);
  const int64_t rows = weight.size(0), cols = weight.size(1), bytes = cols * bits / 8 + bits;
  Tensor out = empty_large({rows, bytes}, weight.options().dtype(at::kByte));
  const QuantizeArgs args{
      bits, narrow_dtype(table, name), table.const_data_ptr(), table.stride(0), cols, out.mutable_data_ptr<uint8_t>(),
      bytes};
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(cols, 1)),
                   [&](int64_t begin, int64_t end) { quantized_kernels().quantize(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("embedding_bag_quantized_forward.cpu", &embedding_bag_quantized_forward);
  m.impl("quantize_rows_forward.cpu", &quantize_rows_forward);
}

}  // namespace pk
