// Rows of word2vec's tables in vectors: products with six of them at a time, and their updates.
//
// Included once per instruction set, anonymous namespace: see simd.h.
#pragma once
#include <algorithm>

#include "simd.h"

namespace pk {
namespace {

constexpr int64_t kLanes = VecF::size();
constexpr int kGroup = 6;  // rows whose dot products share the loads of x; their sums fill one vector of eight

PK_INLINE VecF load_some(const float* p, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  return VecF::loadu(p, n);
#endif
}
PK_INLINE void store_some(float* p, VecF v, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#else
  v.store(p, n);
#endif
}

// Calls step(column, Count<vectors>, n): `kVectors` whole vectors at once where the width is known to be that,
// otherwise blocks of four, single ones, and a last incomplete one (Count<0>, n columns).
template <int K>
struct Count {
  static constexpr int value = K;
};
template <int kVectors, class Step>
PK_INLINE void for_blocks(int64_t width, Step step) {
  if constexpr (kVectors > 0) {
    step(0, Count<kVectors>{}, kVectors * kLanes);
  } else {
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes) step(c, Count<4>{}, 4 * kLanes);
    for (; c + kLanes <= width; c += kLanes) step(c, Count<1>{}, kLanes);
    if (c < width) step(c, Count<0>{}, width - c);
  }
}
template <int K>
PK_INLINE VecF load_one(const float* p, int k, int64_t n) {
  return K ? VecF::loadu(p + k * kLanes) : load_some(p, n);
}
template <int K>
PK_INLINE void store_one(float* p, int k, VecF v, int64_t n) {
  K ? v.store(p + k * kLanes) : store_some(p, v, n);
}

PK_INLINE void ask_for_row(const float* row, int64_t width) {
  for (int64_t c = 0; c < std::min<int64_t>(width, 256); c += 16) _mm_prefetch(row + c, _MM_HINT_T0);
}

#if defined(CPU_CAPABILITY_AVX512)
PK_INLINE __m256 halves(VecF v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
#else
PK_INLINE __m256 halves(VecF v) { return v; }
#endif

// The sums over the lanes of each of six vectors, in six lanes.
PK_INLINE __m256 lane_sums(const VecF (&a)[kGroup]) {
  const __m256 x = _mm256_hadd_ps(halves(a[0]), halves(a[1])), y = _mm256_hadd_ps(halves(a[2]), halves(a[3]));
  const __m256 z = _mm256_hadd_ps(halves(a[4]), halves(a[5]));
  const __m256 four = _mm256_hadd_ps(x, y), two = _mm256_hadd_ps(z, _mm256_setzero_ps());
  const __m128 low = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
  const __m128 high = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  return _mm256_set_m128(high, low);
}

// The dot products of x with six rows, in six lanes.
template <int kVectors>
PK_INLINE __m256 dots(const float* x, const float* const* rows, int64_t width) {
  VecF sums[kGroup];
  for (int k = 0; k < kGroup; ++k) sums[k] = VecF(0.f);
  for_blocks<kVectors>(width, [&](int64_t c, auto block, int64_t n) __attribute__((always_inline)) {
    constexpr int kBlock = decltype(block)::value, kCount = kBlock ? kBlock : 1;
#pragma GCC unroll 16
    for (int b = 0; b < kCount; ++b) {
      const VecF v = load_one<kBlock>(x + c, b, n);
#pragma GCC unroll 6
      for (int k = 0; k < kGroup; ++k) sums[k] = fmadd(v, load_one<kBlock>(rows[k] + c, b, n), sums[k]);
    }
  });
  return lane_sums(sums);
}

// y += sum_k g[k] rows[k], rows[k] += g[k] x, one row after the other; y may be x.
template <int kVectors>
PK_INLINE void update_rows(float* y, const float* x, float* const* rows, const float* g, int count, int64_t width) {
  for_blocks<kVectors>(width, [&](int64_t c, auto block, int64_t n) __attribute__((always_inline)) {
    constexpr int kBlock = decltype(block)::value, kCount = kBlock ? kBlock : 1;
    VecF vx[kCount], vy[kCount];
#pragma GCC unroll 16
    for (int b = 0; b < kCount; ++b) {
      vx[b] = load_one<kBlock>(x + c, b, n);
      vy[b] = load_one<kBlock>(y + c, b, n);
    }
    for (int k = 0; k < count; ++k) {
      const VecF gk(g[k]);
      float* const row = rows[k] + c;
#pragma GCC unroll 16
      for (int b = 0; b < kCount; ++b) {
        const VecF v = load_one<kBlock>(row, b, n);
        vy[b] = fmadd(gk, v, vy[b]);
        store_one<kBlock>(row, b, fmadd(gk, vx[b], v), n);
      }
    }
#pragma GCC unroll 16
    for (int b = 0; b < kCount; ++b) store_one<kBlock>(y + c, b, vy[b], n);
  });
}

// The same for six rows and all of a window at once: a row is read and written once for the window. g: eight a word.
template <int kBlock>
PK_INLINE void update_window(float* const* words, int count, float* const* rows, const float* g, int64_t c, int64_t n) {
  constexpr int kCount = kBlock ? kBlock : 1;
  VecF v[kGroup][kCount], d[kGroup][kCount];
#pragma GCC unroll 6
  for (int k = 0; k < kGroup; ++k) {
#pragma GCC unroll 2
    for (int b = 0; b < kCount; ++b) {
      v[k][b] = load_one<kBlock>(rows[k] + c, b, n);
      d[k][b] = VecF(0.f);
    }
  }
  for (int j = 0; j < count; ++j) {
    VecF x[kCount], y[kCount];
#pragma GCC unroll 2
    for (int b = 0; b < kCount; ++b) x[b] = y[b] = load_one<kBlock>(words[j] + c, b, n);
#pragma GCC unroll 6
    for (int k = 0; k < kGroup; ++k) {
      const VecF gk(g[8 * j + k]);
#pragma GCC unroll 2
      for (int b = 0; b < kCount; ++b) {
        y[b] = fmadd(gk, v[k][b], y[b]);
        d[k][b] = fmadd(gk, x[b], d[k][b]);
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < kCount; ++b) store_one<kBlock>(words[j] + c, b, y[b], n);
  }
#pragma GCC unroll 6
  for (int k = 0; k < kGroup; ++k) {  // a row that is there twice gets both
#pragma GCC unroll 2
    for (int b = 0; b < kCount; ++b) {
      store_one<kBlock>(rows[k] + c, b, load_one<kBlock>(rows[k] + c, b, n) + d[k][b], n);
    }
  }
}

}  // namespace
}  // namespace pk
