// float32 between tensors and the kernels of recurrent.inc: what forward and backward share.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include "pages.h"
#include "recurrent.h"

namespace pk {

constexpr int64_t kRowsForThread = 4;  // fewer rows than this a thread, and blocks of rows are no longer full

inline const float* read(const Tensor& t) { return t.const_data_ptr<float>(); }
inline const float* read_or_null(const Tensor& t) { return t.defined() ? read(t) : nullptr; }
inline float* write(const Tensor& t) { return t.mutable_data_ptr<float>(); }
inline Tensor fresh_floats(at::IntArrayRef sizes) { return empty_large(sizes, at::kFloat); }
// Conversions and cuts that change nothing are left out: each costs a microsecond, which a single cell notices.
inline Tensor as_float(const Tensor& t) { return t.scalar_type() == at::kFloat ? t : t.to(at::kFloat); }
inline Tensor dense(const Tensor& t) { return as_float(t).contiguous(); }
inline Tensor cut(const Tensor& t, int64_t dim, int64_t at, int64_t count) {
  return count == t.size(dim) ? t : t.narrow(dim, at, count);
}
inline Tensor dense_or_none(const Optional& t) { return t ? dense(*t) : Tensor(); }

// Rows of unit stride, any distance apart (halves of a two-directional gradient, expanded gradients), without a copy.
inline Tensor rows_of(const Tensor& t) {
  const Tensor x = as_float(t);
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// w (depth, columns) packed for products with it from the right.
inline Tensor packed_columns(const Tensor& w) {
  const int64_t depth = w.size(0), columns = w.size(1);
  Tensor packed = fresh_floats({recurrent_kernels().packed_columns(depth, columns)});
  recurrent_kernels().pack_columns(depth, columns, read(w), write(packed));
  return packed;
}

// One direction's tensors in float32, and its sizes.
struct Wide {
  int64_t hidden, state_size, width, depth, tokens, batch;
  Tensor x, h, w_ih, w, w_hr, peephole;

  // input: of the tokens that are there, without padding
  Wide(Cell cell, const Tensor& input, const Layer& layer)
      : hidden(layer.w_hh.size(0) / gates_of(cell)),
        state_size(layer.w_hh.size(1)),
        width(width_of(cell) * hidden),
        depth(gates_of(cell) * hidden),
        tokens(input.size(0)),
        batch(layer.h0.size(0)),
        x(input),
        h(dense(layer.h0)),
        w_ih(as_float(layer.w_ih)),
        w(dense(layer.w_hh)),
        w_hr(dense_or_none(layer.w_hr)),
        peephole(dense_or_none(layer.peephole)) {}
};

// The input of the tokens that are there, in float32: once for both directions.
inline Tensor present(const Sequence& sequence, const Tensor& input) {
  return rows_of(cut(input, 0, 0, sequence.tokens()));
}

// (tokens, columns) of memory of its own, zero where there is padding.
inline Tensor token_rows(const Sequence& sequence, int64_t room, int64_t columns) {
  const Tensor found = fresh_floats({room, columns});
  if (sequence.tokens() < room) found.narrow(0, sequence.tokens(), room - sequence.tokens()).zero_();
  return found;
}

// Each direction's result in one tensor.
inline Tensor joined(const Tensor& first, const Tensor* second) {
  return !first.defined() || !second ? first : at::stack({first, *second});
}

}  // namespace pk
