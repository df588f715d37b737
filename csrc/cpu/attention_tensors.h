// What the attention room's operators do alike with tensors: element types, strides, layouts of outputs.
#pragma once
#include <ATen/ops/empty.h>

#include <algorithm>

#include "attention_kernels.h"
#include "isa.h"

namespace pk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const AttentionKernels& vector_kernels() {
  TORCH_CHECK(isa() != Isa::kNone, "pykernels: ", isa_refusal());
  return isa() == Isa::kAvx2 ? *attention_kernels_avx2() : *attention_kernels_avx512();
}

inline const AttentionKernels& kernels(Element element) {
  return element == Element::kBFloat16 && has_tile_registers() ? *attention_kernels_amx() : vector_kernels();
}

// Tile registers take the columns of a group together, with nothing of their own; one alone nearly leaves them empty,
// which pays from as many keys on (measured at head size 64: 1.2 times as fast with 512, 0.9 with 128).
inline const AttentionKernels& decode_kernels(const AttentionArgs& a) {
  constexpr int64_t kManyKeys = 512;
  const bool few = a.heads == a.kv_heads && a.q_length == 1 && a.k_length < kManyKeys;
  return few || a.bias.data || a.mask.data || a.dropout ? vector_kernels() : kernels(a.element);
}

inline Element element_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Element::kFloat;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "attention: ", name, " must be float32, bfloat16 or float16, got ",
                                  x.scalar_type());
  }
}

// A side of a window: no sum of it and a position overflows.
inline int64_t side_of(int64_t window) { return std::min(window, int64_t{1} << 40); }

inline Tensor unit_rows(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

inline Strided strided(const Tensor& x) {
  void* const data = const_cast<void*>(x.const_data_ptr());
  if (x.dim() == 3) return {data, 0, x.stride(1), x.stride(0)};  // packed: (total, heads, head size)
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// A dense tensor with x's order of heads and positions.
inline Tensor rows_like(const Tensor& x, at::IntArrayRef shape) {
  if (x.dim() == 4 && x.stride(1) < x.stride(2)) {
    return at::empty({shape[0], shape[2], shape[1], shape[3]}, x.options()).transpose(1, 2);
  }
  return at::empty(shape, x.options());
}

}  // namespace pk
