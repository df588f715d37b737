// What the float32 and the bfloat16 attention share beside tiles: scratch memory, row statistics, results.
// Included once per instruction set, everything in an anonymous namespace.
#pragma once
#include "attention_tile.h"

namespace pk {
namespace {

constexpr int64_t kLongestBlock = 64;    // queries
constexpr float kRowHidden = kInfinity;  // lse of a row without keys, as backward needs it: exp2(s - inf) = 0

// Hands out the scratch memory piece by piece; with a null start it only counts.
struct Arena {
  char* next;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

struct Factor {  // a number in two floats: rounded to one it would be an error that all scores share
  float high, low;
  explicit Factor(double x) : high(static_cast<float>(x)), low(static_cast<float>(x - high)) {}
};

// What q is multiplied with when it is packed: the product is then a score in units of log 2, or the argument of the
// cap.
PK_INLINE Factor query_factor(const AttentionArgs& a) {
  return Factor(a.softcap > 0.f ? a.scale / a.softcap : a.scale / kLn2);
}

PK_INLINE int64_t lse_index(const AttentionArgs& a, const Head& x, int64_t i) {
  return x.b * a.lse.batch + x.h * a.lse.head + (x.q_start + i) * a.lse.row;
}

// Forward's last step for a block of queries: lse, and out = O / total from O^T (value_size x ld); `nothing`: no key
// was seen. `total` becomes the factor of each row.
__attribute__((noinline)) void finish_block(const AttentionArgs& a, const Head& x, int64_t q0, int64_t nq, bool nothing,
                                            int64_t ld, const float* top, float* total, const float* ot) {
  double logarithm[kLongestBlock];
  for (int64_t i = 0; i < ld; ++i) logarithm[i] = total[i];
  for (int64_t i = 0; i < ld; i += VecD::size()) VecD::loadu(logarithm + i).log().store(logarithm + i);
  for (int64_t i = 0; i < nq; ++i) {
    const int64_t at = lse_index(a, x, q0 + i);
    const double exact = top[i] * kLn2 + logarithm[i];
    const float lse = total[i] == 0.f ? -kInfinity : static_cast<float>(exact);
    static_cast<float*>(a.lse.data)[at] = lse;
    a.lse_low[at] = std::isfinite(lse) ? static_cast<float>(exact - lse) : 0.f;
    total[i] = (total[i] == 0.f ? 0.f : 1.f / total[i]) * a.keep_scale;
  }
  char* const out = at_mutable(a.out, a.element, x.b, x.h, x.q_start + q0);
  const int64_t step = a.out.row * size_of(a.element);
  transpose_columns(ot, ld, nq, a.value_size, [&](int64_t r, int64_t c, VecF v, int64_t n) PK_LAMBDA {
    store_row(a.element, out + r * step, c, nothing ? VecF(0.f) : v * VecF(total[r]), n);
  });
}

// delta_i = <dout_i, out_i> - dlse_i: what every dS of the row has subtracted.
PK_INLINE float delta_of(const AttentionArgs& a, const Head& x, int64_t i) {
  const char* const out = at(a.out, a.element, x.b, x.h, x.q_start + i);
  const char* const dout = at(a.dout, a.element, x.b, x.h, x.q_start + i);
  VecF sum(0.f);
  for (int64_t d = 0; d < a.value_size; d += kWidth) {
    const int64_t n = smaller(kWidth, a.value_size - d);
    sum = fmadd(load_row(a.element, out, d, n), load_row(a.element, dout, d, n), sum);
  }
  return sum_of(sum) - a.dlse[lse_index(a, x, i)];
}

// lse in units of log 2, in two floats (rounding it to one would be an error that all of the row's P share), and delta,
// of the queries [q0, q0 + block); queries behind the last one get no P.
__attribute__((noinline)) void row_statistics(const AttentionArgs& a, const Head& x, int64_t q0, int64_t block,
                                              float* lse, float* low, float* delta) {
  for (int64_t i = 0; i < block; ++i) {
    const bool real = q0 + i < x.q_length;
    const int64_t at = lse_index(a, x, q0 + i);
    const float value = real ? static_cast<const float*>(a.lse.data)[at] : -kInfinity;
    const double exact = value == -kInfinity ? 0. : (static_cast<double>(value) + a.lse_low[at]) * (1 / kLn2);
    lse[i] = value == -kInfinity ? kRowHidden : static_cast<float>(exact);
    low[i] = value == -kInfinity ? 0.f : static_cast<float>(exact - lse[i]);
    delta[i] = real ? delta_of(a, x, q0 + i) : 0.f;
  }
}

// Which keys some query of a key head sees, by position, mask and bias together, among those that `seen` has as 1.
__attribute__((noinline)) void find_seen(const AttentionArgs& a, int64_t b, int64_t kv, uint8_t* seen) {
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t j = 0; j < a.k_length; ++j) seen[j] *= 2;  // 2: allowed to be seen
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const Head x = head_of(a, b, h);
    const float lowest = lowest_of(a.bias_element);
    for (int64_t i = 0; i < x.q_length; ++i) {
      const Span keys = keys_of(a, x, i);
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        if (seen[j] != 2) continue;
        if (x.mask && !x.mask[i * a.mask.query + j * a.mask.key]) continue;
        if (x.bias) {
          const int64_t at = i * a.bias.query + j * a.bias.key;
          alignas(64) float bias[kWidth];
          load_row(a.bias_element, x.bias + at * size_of(a.bias_element), 0, 1).store(bias);
          if (bias[0] <= lowest) continue;
        }
        seen[j] = 1;
      }
    }
  }
  for (int64_t j = 0; j < a.k_length; ++j) seen[j] &= 1;
}

// dq of nq queries from (dS K)^T (head_size x ld).
__attribute__((noinline)) void store_dq(const AttentionArgs& a, const Head& x, int64_t q0, int64_t nq, int64_t ld,
                                        const float* dqt) {
  if (!a.dq.data) return;
  char* const dq = at_mutable(a.dq, a.element, x.b, x.h, x.q_start + q0);
  const int64_t step = a.dq.row * size_of(a.element);
  transpose_columns(dqt, ld, nq, a.head_size, [&](int64_t r, int64_t c, VecF v, int64_t n) PK_LAMBDA {
    store_row(a.element, dq + r * step, c, v * VecF(static_cast<float>(a.scale)), n);
  });
}

// dk or dv of one key head from float rows of `width`; nothing where it is not wanted.
__attribute__((noinline)) void store_rows(const AttentionArgs& a, const Strided& x, const Head& head, const float* src,
                                          int64_t width, int64_t size, float factor) {
  if (!x.data) return;
  for (int64_t j = 0; j < head.k_length; ++j) {
    char* const row = at_mutable(x, a.element, head.b, head.kv, head.k_start + j);
    for (int64_t d = 0; d < size; d += kWidth) {
      const VecF v = VecF::loadu(src + j * width + d) * VecF(factor);
      store_row(a.element, row, d, v, smaller(kWidth, size - d));
    }
  }
}

}  // namespace
}  // namespace pk
