// Rows in memory <-> one compute vector at a time. lanes.h reads two and asks for what follows, which is right for a
// stream; rows of a table follow nothing, their addresses come from the ids.
//
// Included once per instruction set, anonymous namespace: see simd.h.
#pragma once
#include <bit>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace pk {
namespace {

template <class T>
struct RowLanes {  // float, double
  using Scalar = T;
  using V = at::vec::Vectorized<T>;
  using Sum = T;
  static constexpr int64_t kSize = V::size();

  static PK_INLINE V load(const T* p) { return V::loadu(p); }
  static PK_INLINE V load(const T* p, int64_t n) { return V::loadu(p, n); }
  static PK_INLINE void store(T* p, V v) { v.store(p); }
  static PK_INLINE void store(T* p, V v, int64_t n) { v.store(p, n); }
  static PK_INLINE T scalar(const T* p) { return *p; }
};

template <class Derived>
struct SixteenBitRow {
  using Scalar = uint16_t;
  using V = VecF;
  using Sum = float;
  static constexpr int64_t kSize = VecF::size();

#if defined(CPU_CAPABILITY_AVX512)
  using Words = __m256i;
  static PK_INLINE Words words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(p)); }
  static PK_INLINE void put(uint16_t* p, Words w) { _mm256_storeu_si256(reinterpret_cast<Words*>(p), w); }
#else
  using Words = __m128i;
  static PK_INLINE Words words(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const Words*>(p)); }
  static PK_INLINE void put(uint16_t* p, Words w) { _mm_storeu_si128(reinterpret_cast<Words*>(p), w); }
#endif
  static PK_INLINE V load(const uint16_t* p) { return Derived::widen(words(p)); }
  static PK_INLINE V load(const uint16_t* p, int64_t n) {
    alignas(32) uint16_t buffer[kSize] = {};
    std::memcpy(buffer, p, n * sizeof(uint16_t));
    return load(buffer);
  }
  static PK_INLINE void store(uint16_t* p, V v) { put(p, Derived::narrow(v)); }
  static PK_INLINE void store(uint16_t* p, V v, int64_t n) {
    alignas(32) uint16_t buffer[kSize];
    store(buffer, v);
    std::memcpy(p, buffer, n * sizeof(uint16_t));
  }
};

struct BFloat16Row : SixteenBitRow<BFloat16Row> {
  static PK_INLINE float scalar(const uint16_t* p) { return std::bit_cast<float>(uint32_t{*p} << 16); }

  // To nearest even on the bits; NaN as in lanes.h: each has a zero low half, which rounding leaves alone.
#if defined(CPU_CAPABILITY_AVX512)
  static PK_INLINE VecF widen(Words w) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16)); }
  static PK_INLINE Words narrow(VecF v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
#else
  static PK_INLINE VecF widen(Words w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
  static PK_INLINE Words narrow(VecF v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
#endif
};

struct HalfRow : SixteenBitRow<HalfRow> {
  static PK_INLINE float scalar(const uint16_t* p) { return _cvtsh_ss(*p); }

  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(CPU_CAPABILITY_AVX512)
  static PK_INLINE VecF widen(Words w) { return _mm512_cvtph_ps(w); }
  static PK_INLINE Words narrow(VecF v) { return _mm512_cvtps_ph(v, kNearest); }
#else
  static PK_INLINE VecF widen(Words w) { return _mm256_cvtph_ps(w); }
  static PK_INLINE Words narrow(VecF v) { return _mm256_cvtps_ph(v, kNearest); }
#endif
};

// Takes x, and with kPlaces its place, where x is larger than the best so far, or the first NaN.
template <bool kPlaces, class V>
PK_INLINE void take_larger(V& best, V& at, V x, V place) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, VecF>) {
    const __mmask16 better = _mm512_cmp_ps_mask(x, best, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(best, best, _CMP_ORD_Q);
    best = _mm512_mask_mov_ps(best, better, x);
    if constexpr (kPlaces) at = _mm512_mask_mov_ps(at, better, place);
    return;
  }
#endif
  const V better = (x > best) | ((x != x) & (best == best));
  best = V::blendv(best, x, better);
  if constexpr (kPlaces) at = V::blendv(at, place, better);
}

// Lines of a row that is needed soon. More than these would push out what is in use; long rows are the hardware's.
constexpr int64_t kLines = 16;

PK_INLINE void ask_for_row(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  for (int64_t line = 0; line < bytes && line < 64 * kLines; line += 64) _mm_prefetch(p + line, _MM_HINT_T0);
}

// Calls step(column, Count<K>, n) over all columns: K whole vectors from `column` (n = K vectors), or the last n < one.
template <int K>
struct Count {
  static constexpr int value = K;
};
template <class L, int kMost = 8, class Step>
PK_INLINE void for_columns(int64_t cols, Step step) {
  constexpr int64_t s = L::kSize;
  int64_t c = 0;
  for (; c + kMost * s <= cols; c += kMost * s) step(c, Count<kMost>{}, kMost * s);
  if constexpr (kMost > 4) {
    if (c + 4 * s <= cols) step(c, Count<4>{}, 4 * s), c += 4 * s;
  }
  if (c + 2 * s <= cols) step(c, Count<2>{}, 2 * s), c += 2 * s;
  if (c + s <= cols) step(c, Count<1>{}, s), c += s;
  if (c < cols) step(c, Count<0>{}, cols - c);
}

// K vectors (one incomplete one for K = 0) of a row.
template <class L, int K>
struct Block {
  static constexpr int kVectors = K ? K : 1;
  typename L::V v[kVectors];

  PK_INLINE void load(const typename L::Scalar* p, int64_t n) {
    if constexpr (K == 0) {
      v[0] = L::load(p, n);
    } else {
      for (int k = 0; k < K; ++k) v[k] = L::load(p + k * L::kSize);
    }
  }
  PK_INLINE void store(typename L::Scalar* p, int64_t n) const {
    if constexpr (K == 0) {
      L::store(p, v[0], n);
    } else {
      for (int k = 0; k < K; ++k) L::store(p + k * L::kSize, v[k]);
    }
  }
};

}  // namespace
}  // namespace pk
