// What the LSTM's loops and its weights' gradients share on AMX tiles: words in memory as two float vectors, and the
// product of a block. Included only by *_amx.cpp, everything in an anonymous namespace.
#pragma once
#include <algorithm>
#include <cstring>

#include "amx.h"
#include "recurrent_kernels.h"

namespace pk {
namespace {

using V = VecF;
using Word = uint16_t;  // bfloat16 or, in the saved gates, float16
constexpr int64_t kTile = 32;

// A block's 32 columns are two vectors of floats and one of words: a cache line, loaded and stored whole.
PK_INLINE __mmask32 columns_of(int64_t count) {
  return count >= kTile ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(count, 0)) - 1;
}
PK_INLINE __m512i load_words(const Word* p, __mmask32 m) { return _mm512_maskz_loadu_epi16(m, p); }
template <int kHalf>
PK_INLINE __m256i half_of(__m512i words) {
  if constexpr (kHalf) return _mm512_extracti64x4_epi64(words, 1);
  return _mm512_castsi512_si256(words);
}
template <int kHalf>
PK_INLINE V from_bfloat16(__m512i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_of<kHalf>(words)), 16));
}
template <int kHalf>
PK_INLINE V from_float16(__m512i words) {
  return _mm512_cvtph_ps(half_of<kHalf>(words));
}
PK_INLINE void store_words(Word* p, __mmask32 m, __m512i words) { _mm512_mask_storeu_epi16(p, m, words); }
PK_INLINE void store_bfloat16(Word* p, __mmask32 m, const V (&v)[2]) { store_words(p, m, narrow(v[0], v[1])); }
PK_INLINE void store_float16(Word* p, __mmask32 m, const V (&v)[2]) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(v[0], kNearest));
  store_words(p, m, _mm512_inserti64x4(low, _mm512_cvtps_ph(v[1], kNearest), 1));
}
template <int kHalf>
PK_INLINE V load_floats(const float* p, __mmask32 m) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(m >> 16 * kHalf), p + 16 * kHalf);
}
template <int kHalf>
PK_INLINE void store_floats(float* p, __mmask32 m, V v) {
  _mm512_mask_storeu_ps(p + 16 * kHalf, static_cast<__mmask16>(m >> 16 * kHalf), v);
}

// body(constant 0), body(constant 1): the two vectors of a line.
template <class Body>
PK_INLINE void both_halves(Body body) {
  body(std::integral_constant<int, 0>{});
  body(std::integral_constant<int, 1>{});
}

// c (rows x 32) = or += a (rows x depth) panel, rows 16 or 32, depth a multiple of 32. A panel holds pairs of rows of
// the right side interleaved: panel[depth / 2][32][2]. between() is called once for every 32 of depth.
template <bool kTwo, class Between>
PK_INLINE void multiply_tiles(bool fresh, int64_t depth, const Word* a, int64_t stride, const Word* panel, float* c,
                              Between between) {
  if (fresh) {
    zero_sums();
  } else {
    load_tile<0>(c, kTile * 4);
    load_tile<1>(c + 16, kTile * 4);
    if constexpr (kTwo) {
      load_tile<2>(c + 16 * kTile, kTile * 4);
      load_tile<3>(c + 16 * kTile + 16, kTile * 4);
    }
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    load_tile<6>(panel + k * kTile, 2 * kTile * 2);
    load_tile<4>(a + k, stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    between();
    load_tile<7>(panel + k * kTile + 32, 2 * kTile * 2);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      load_tile<5>(a + 16 * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_tile<0>(c, kTile * 4);
  store_tile<1>(c + 16, kTile * 4);
  if constexpr (kTwo) {
    store_tile<2>(c + 16 * kTile, kTile * 4);
    store_tile<3>(c + 16 * kTile + 16, kTile * 4);
  }
}

// The products of a block of rows with `count` panels one after another, 32 x 32 sums each. Depth goes in parts of
// which the left side stays in the first-level cache while all panels stream past it. Meanwhile ahead(row) is to fetch
// what a row needs afterwards into the second-level cache: lines a token apart, which no prefetcher finds, and few at a
// time, as the tiles wait for the same buffers.
constexpr int64_t kPart = 256, kPanels = 4;
template <class Ahead>
PK_INLINE void multiply(int64_t rows, int64_t depth, const Word* a, int64_t stride, int64_t count, const Word* panels,
                        float* sums, Ahead ahead) {
  const int64_t products = depth / kTile * count, share = (rows + products - 1) / products;
  int64_t row = 0;
  const auto between = [&]() PK_LAMBDA {
    for (const int64_t end = std::min(rows, row + share); row < end; ++row) ahead(row);
  };
  for (int64_t k = 0; k < depth; k += kPart) {
    const int64_t part = std::min(kPart, depth - k);
    for (int64_t q = 0; q < count; ++q) {
      const Word* const panel = panels + (q * depth + k) * kTile;
      float* const c = sums + q * kTile * kTile;
      rows > 16 ? multiply_tiles<true>(k == 0, part, a + k, stride, panel, c, between)
                : multiply_tiles<false>(k == 0, part, a + k, stride, panel, c, between);
    }
  }
}

PK_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
PK_INLINE void fetch_floats(const float* p) {  // of a block's row
  fetch(p);
  fetch(p + 16);
}

}  // namespace
}  // namespace pk
