// Rows of float, bfloat16 or float16 as float vectors, and their transposes, a register block at a time.
// Included once per instruction set; everything in an anonymous namespace (see simd.h).
#pragma once
#include <cstring>

#include "attention_kernels.h"
#include "simd.h"

#define PK_LAMBDA __attribute__((always_inline))

namespace pk {
namespace {

constexpr int64_t kWidth = VecF::size();

PK_INLINE int64_t size_of(Element e) { return e == Element::kFloat ? 4 : 2; }
PK_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
PK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

PK_INLINE const char* at(const Strided& x, Element e, int64_t b, int64_t h, int64_t row) {
  return static_cast<const char*>(x.data) + (b * x.batch + h * x.head + row * x.row) * size_of(e);
}
PK_INLINE char* at_mutable(const Strided& x, Element e, int64_t b, int64_t h, int64_t row) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + row * x.row) * size_of(e);
}

#if defined(CPU_CAPABILITY_AVX512)

PK_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }
PK_INLINE VecF load_bfloat16(const void* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
PK_INLINE VecF load_half(const void* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
// 0 where the byte is set, -1 where it is not
PK_INLINE VecF load_mask(const uint8_t* p, int64_t n) {
  const __m512i word = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p));
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(word, word), _mm512_set1_ps(-1.f), _mm512_setzero_ps());
}
PK_INLINE void store_bfloat16(void* p, VecF v, int64_t n) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
PK_INLINE void store_half(void* p, VecF v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PK_INLINE VecF maximum(VecF a, VecF b) { return _mm512_max_ps(a, b); }  // the second where either is NaN

PK_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + j + 2]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}
using Register = __m512;

#else  // AVX2

PK_INLINE __m128i load_words(const void* p, int64_t n) {
  if (n >= 8) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  alignas(16) uint16_t words[8] = {};
  std::memcpy(words, p, n * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(words));
}
PK_INLINE void store_words(void* p, __m128i v, int64_t n) {
  if (n >= 8) return _mm_storeu_si128(static_cast<__m128i*>(p), v);
  alignas(16) uint16_t words[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(words), v);
  std::memcpy(p, words, n * sizeof(uint16_t));
}
PK_INLINE VecF load_bfloat16(const void* p, int64_t n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p, n)), 16));
}
PK_INLINE VecF load_half(const void* p, int64_t n) { return _mm256_cvtph_ps(load_words(p, n)); }
PK_INLINE VecF load_mask(const uint8_t* p, int64_t n) {
  uint8_t bytes[8] = {};
  std::memcpy(bytes, p, n < 8 ? n : 8);
  const __m256i word = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(word, _mm256_setzero_si256())), _mm256_set1_ps(-1.f));
}
PK_INLINE void store_bfloat16(void* p, VecF v, int64_t n) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  store_words(p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)), n);
}
PK_INLINE void store_half(void* p, VecF v, int64_t n) {
  store_words(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}
PK_INLINE VecF maximum(VecF a, VecF b) { return _mm256_max_ps(a, b); }

PK_INLINE void transpose(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[4 * i + j]), b = _mm256_castps_pd(t[4 * i + j + 2]);
      r[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
using Register = __m256;

#endif

// The first n (<= kWidth) elements from index i of a row; zeros behind them.
PK_INLINE VecF load_row(Element e, const void* row, int64_t i, int64_t n) {
  if (e == Element::kFloat) {
    const float* p = static_cast<const float*>(row) + i;
    return n >= kWidth ? VecF::loadu(p) : VecF::loadu(p, n);
  }
  const uint16_t* p = static_cast<const uint16_t*>(row) + i;
  return e == Element::kBFloat16 ? load_bfloat16(p, n) : load_half(p, n);
}

PK_INLINE void store_row(Element e, void* row, int64_t i, VecF v, int64_t n) {
  if (e == Element::kFloat) {
    float* p = static_cast<float*>(row) + i;
    n >= kWidth ? v.store(p) : v.store(p, n);
  } else if (e == Element::kBFloat16) {
    store_bfloat16(static_cast<uint16_t*>(row) + i, v, n);
  } else {
    store_half(static_cast<uint16_t*>(row) + i, v, n);
  }
}

PK_INLINE float sum_of(VecF v) {
  alignas(64) float lanes[kWidth];
  v.store(lanes);
  float total = 0.f;
  for (float lane : lanes) total += lane;
  return total;
}

// dst[c * ld + r] = load(r, c, n)[lane c]: `load` gives n <= kWidth elements of row r from column c. Rows from `rows`
// up to `padded` (a multiple of kWidth) become zeros.
template <class Load>
PK_INLINE void transpose_rows(int64_t rows, int64_t padded, int64_t cols, float* dst, int64_t ld, Load load) {
  for (int64_t r = 0; r < padded; r += kWidth) {  // along the rows first: that is how the memory is fetched ahead
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = smaller(kWidth, cols - c);
      Register block[kWidth];
      for (int z = 0; z < kWidth; ++z) block[z] = r + z < rows ? load(r + z, c, n) : VecF(0.f);
      transpose(block);
      for (int64_t z = 0; z < n; ++z) VecF(block[z]).store(dst + (c + z) * ld + r);
    }
  }
}

// The other way: column r of src (cols x ld) becomes row r: store(r, c, vector, n).
template <class Store>
PK_INLINE void transpose_columns(const float* src, int64_t ld, int64_t rows, int64_t cols, Store store) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t n = smaller(kWidth, cols - c);
      Register block[kWidth];
      for (int z = 0; z < kWidth; ++z) block[z] = z < n ? VecF::loadu(src + (c + z) * ld + r) : VecF(0.f);
      transpose(block);
      for (int64_t z = 0; z < smaller(kWidth, rows - r); ++z) store(r + z, c, VecF(block[z]), n);
    }
  }
}

}  // namespace
}  // namespace pk
