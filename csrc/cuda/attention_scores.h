// From a tile of products to its logits: the cap, ALiBi, the bias, masks given as tensors, and masks by position.
#pragma once
#include "attention_head.h"
#include "math.h"
#include "philox.h"

namespace pk {

template <class T>
__device__ __forceinline__ bool bias_is_float(const Attention& a) {
  return std::is_same_v<T, float> || a.n.bias_float;
}

// One query head's tensors.  GENERAL: any of them may be there; else the logits are the products times a positive
// scale, masked by position alone, and nothing of this costs a register.
template <class T, bool GENERAL>
struct Features {
  const Attention& a;
  const Head& x;
  const unsigned char* bias = nullptr;
  const uint8_t *mask = nullptr, *seen = nullptr;
  float slope = 0.f;
  float factor;  // of what logits() leaves: in the exponent it costs one fused multiply-add, and no rounding
  uint64_t seed = 0;
  int64_t counter = 0;

  __device__ __forceinline__ Features(const Attention& a_, const Head& x_) : Features(a_, x_, x_.h) {}
  // Those of query head h, where x_.h is not it.
  __device__ __forceinline__ Features(const Attention& a_, const Head& x_, int h) : a(a_), x(x_), factor(a_.x.scale) {
    if (!GENERAL) return;
    if (a.bias || a.slopes || a.x.softcap != 0.f || !(factor > 0.f)) factor = 1.f;
    const int64_t size = bias_is_float<T>(a) ? 4 : 2;
    if (a.bias) bias = static_cast<const unsigned char*>(a.bias) + (x.b * a.n.bias[0] + h * a.n.bias[1]) * size;
    if (a.mask) mask = a.mask + x.b * a.n.mask[0] + h * a.n.mask[1];
    if (a.seen) seen = a.seen + x.b * a.n.seen[0] + h * a.n.seen[1];
    if (a.slopes) slope = a.slopes[x.b * a.n.slopes + h] * kLog2e;
    if (a.seed) {
      seed = static_cast<uint64_t>(*a.seed);
      counter = x.pairs * a.n.heads + static_cast<int64_t>(h) * x.lq * x.lk;
    }
  }

  // Whether key j may hold a number: it is read as 0 otherwise, for a weight of 0 does not silence NaN.
  __device__ __forceinline__ bool reads(Interval some, int j) const {
    if (j < some.begin || j >= some.end) return false;
    return !GENERAL || !seen || seen[j * a.n.seen[2]];
  }

  __device__ __forceinline__ float bias_at(int i, int j) const {
    const int64_t k = i * a.n.bias[2] + j * a.n.bias[3];
    if (bias_is_float<T>(a)) return reinterpret_cast<const float*>(bias)[k];
    if constexpr (std::is_same_v<T, float>)
      return 0.f;
    else
      return to_float(reinterpret_cast<const T*>(bias)[k]);
  }

  // s: products in, logits in powers of two out, still to be multiplied by `factor`.  TRANSPOSED: rows are keys.  row,
  // column: of this thread's first element.  cap: the cap's slope, where wanted.
  template <bool TRANSPOSED, bool CAP, int M, int N>
  __device__ __forceinline__ void logits(float (&s)[M][N][4], float (&cap)[M][N][4], int row, int column) const {
    static_assert(GENERAL);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (factor == 1.f) s[m][n][e] *= a.x.scale;
          if constexpr (CAP) cap[m][n][e] = 1.f;
        }
    if (a.x.softcap != 0.f) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float u = hyperbolic_tangent<std::is_same_v<T, float>>(s[m][n][e]);
            s[m][n][e] = u * a.x.softcap;
            if constexpr (CAP) cap[m][n][e] = 1.f - u * u;
          }
    }
    if (!bias && !mask && !seen && !a.slopes) return;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = row + 16 * m + 8 * (e >> 1), c = column + 8 * n + (e & 1);
          const int i = min(TRANSPOSED ? c : r, x.lq - 1), j = min(TRANSPOSED ? r : c, x.lk - 1);
          float t = s[m][n][e] - slope * fabsf(static_cast<float>(i + x.shift - j));
          if (bias) {
            const float y = bias_at(i, j);
            t = y <= a.x.lowest ? -kInfinity : t + y * kLog2e;
          }
          if (mask && !mask[i * a.n.mask[2] + j * a.n.mask[3]]) t = -kInfinity;
          if (seen && !seen[j * a.n.seen[2]]) t = -kInfinity;
          s[m][n][e] = t;
        }
  }

  // One bit for each of the thread's elements, in order: what dropout keeps.  A loop that is not unrolled: ten rounds
  // for each element would fill the instruction cache.
  template <bool TRANSPOSED, int N>
  __device__ __forceinline__ uint32_t kept(int row, int column) const {
    static_assert(N <= 8);
    if (!GENERAL || !a.seed) return 0xffffffffu;
    uint32_t bits = 0;
#pragma unroll 1
    for (int k = 0; k < 4 * N; ++k) {
      const int r = row + 8 * (k >> 1 & 1), c = column + 8 * (k >> 2) + (k & 1);
      const int64_t i = TRANSPOSED ? c : r, j = TRANSPOSED ? r : c;
      const uint32_t word = philox_word(seed, static_cast<uint64_t>(counter + i * x.lk + j));
      bits |= static_cast<uint32_t>(word >= static_cast<uint64_t>(a.n.threshold)) << k;
    }
    return bits;
  }
};

// For each block of 8 columns a word whose halves are all ones where the thread's two columns have a weight in any of
// the warp's rows.  What several masks hide together no list of keys tells; it may be NaN, which a weight of 0 does not
// silence.  `some`: there are masks that can do so.
template <int N>
__device__ __forceinline__ void seen_columns(uint32_t (&seen)[N], const float (&s)[1][N][4], bool some) {
  const uint32_t lanes = 0x11111111u << threadIdx.x % 4;  // those with the same columns
#pragma unroll
  for (int n = 0; n < N; ++n) {
    seen[n] = 0xffffffffu;
    if (!some) continue;
    const uint32_t low = __ballot_sync(kAllLanes, s[0][n][0] != -kInfinity || s[0][n][2] != -kInfinity);
    const uint32_t high = __ballot_sync(kAllLanes, s[0][n][1] != -kInfinity || s[0][n][3] != -kInfinity);
    seen[n] = (low & lanes ? 0xffffu : 0u) | (high & lanes ? 0xffff0000u : 0u);
  }
}

// -inf where a column lies outside its row's interval.
template <int M, int N>
__device__ __forceinline__ void mask_by_position(float (&s)[M][N][4], const Interval (&allowed)[2 * M], int column) {
#pragma unroll
  for (int i = 0; i < 2 * M; ++i)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = column + 8 * n + e;
        if (c < allowed[i].begin || c >= allowed[i].end) s[i / 2][n][i % 2 * 2 + e] = -kInfinity;
      }
}

// Whether a tile of columns [begin, begin + SIZE) has any column that rows with these first and last intervals see,
// and whether some pair in it is not allowed.
template <int SIZE>
__device__ __forceinline__ bool visits(Interval first, Interval last, int begin) {
  return begin < last.end && begin + SIZE > first.begin;
}
template <int SIZE>
__device__ __forceinline__ bool has_hidden(Interval first, Interval last, int begin) {
  return begin < last.begin || begin + SIZE > first.end;
}

}  // namespace pk
