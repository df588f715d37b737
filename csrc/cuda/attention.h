// Launchers of the attention room, and what all of its kernels are told.  Tensors are (batch, heads, length, size), or
// packed: (total, heads, size) with the ends of the sequences; rows of `size` adjacent elements, 16-byte aligned.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pk {

// Sizes, strides (in elements) and options, one int64 each and in this order: Python passes them as one tuple.
struct AttentionLayout {
  int64_t q[3], k[3], v[3];     // strides of batch, head, position; packed: batch 0
  int64_t bias[4], mask[4];     // strides of batch, head, query, key; 0 where broadcast, as below
  int64_t seen[3];              // batch, head, key
  int64_t span[2], slopes;      // batch, head; slopes: batch
  int64_t batch, heads, group;  // group: query heads that share a key head
  int64_t lq, lk;               // packed: the totals
  int64_t max_q, max_k;         // packed: bounds of one sequence's lengths
  int64_t d, dv;                // head sizes: whole 16-byte units
  int64_t left, right;          // window, at most lq + lk (unbounded)
  int64_t top_left;
  int64_t bias_float;  // the bias is float32, whatever the other tensors are
  int64_t exact;       // float32 products to float32 accuracy; 0: tf32 is enough
  int64_t threshold;   // dropout keeps a weight whose random word is at least this
};

// scale: gives logits in powers of two; with a softcap the argument of tanh, and `softcap` (0: none) the rest.
// gradient_scale: d score / d product before the cap.  lowest: a bias up to this forbids.
struct AttentionNumbers {
  float scale, gradient_scale, softcap, keep_scale, lowest;
};

// Null: absent.  seen: whether a key is seen by any query of the head, as far as mask, padding and bias say; span: the
// first and one past the last such key.  prefix: keys below it are seen whatever `right` says.
struct Attention {
  const void *q, *k, *v, *bias;
  const uint8_t *mask, *seen;
  const int32_t* span;
  const int64_t* prefix;
  const float* slopes;
  const int64_t *cu_q, *cu_k, *seed;
  AttentionLayout n;
  AttentionNumbers x;
};

// Strides of batch, head, position.
struct RowStrides {
  int64_t batch, head, position;
};

// out and, for each query, the log-sum-exp of its logits with what rounding it left out; sinks: one logit a head.
void attention_forward(const Attention& a, void* out, float* lse, float* lse_low, const float* sinks, RowStrides out_n,
                       RowStrides lse_n, DType dtype, void* stream);

// The same by the kernels for sm_90a alone: float16 and bfloat16, no dropout, at least one key.
void attention_forward_sm90(const Attention& a, void* out, float* lse, float* lse_low, const float* sinks,
                            RowStrides out_n, RowStrides lse_n, DType dtype, void* stream);

// For each query delta = <dout, out> - dlse, and base: its lse in powers of two, +inf where it sees no key.  Both are
// (batch, heads, length), packed (heads, total).
void attention_rows(const Attention& a, const void* dout, const void* out, const float* lse, const float* lse_low,
                    const float* dlse, float* base, float* delta, RowStrides dout_n, RowStrides out_n,
                    RowStrides dlse_n, RowStrides lse_n, DType dtype, void* stream);

void attention_dq(const Attention& a, const void* dout, const float* base, const float* delta, void* dq,
                  RowStrides dout_n, RowStrides dq_n, DType dtype, void* stream);

// The same by the kernels for sm_90a alone: float16 and bfloat16, no dropout, at least one key.
void attention_dq_sm90(const Attention& a, const void* dout, const float* base, const float* delta, void* dq,
                       RowStrides dout_n, RowStrides dq_n, DType dtype, void* stream);
void attention_dkdv_sm90(const Attention& a, const void* dout, const float* base, const float* delta, void* dk,
                         void* dv, RowStrides dout_n, RowStrides dk_n, RowStrides dv_n, DType dtype, void* stream);

// dk or dv may be null: not wanted.
void attention_dkdv(const Attention& a, const void* dout, const float* base, const float* delta, void* dk, void* dv,
                    RowStrides dout_n, RowStrides dk_n, RowStrides dv_n, DType dtype, void* stream);

// dbias: contiguous (batch, heads, rows, columns), each the full size or 1; columns: more than 1.
void attention_dbias(const Attention& a, const void* dout, const float* base, const float* delta, void* dbias,
                     RowStrides dout_n, int64_t batch, int64_t heads, int64_t rows, int64_t columns, DType dtype,
                     void* stream);

// The same for a bias with one column, from the sums of dscore along each query's keys (laid out as base).
void attention_dbias_rows(const Attention& a, const float* sums, void* dbias, int64_t batch, int64_t heads,
                          int64_t rows, DType dtype, void* stream);

}  // namespace pk
