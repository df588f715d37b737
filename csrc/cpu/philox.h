// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised.
// The library's one layout: key = the 64-bit seed, counter = (offset low, offset high, 0, 0), first output word; offset
// is the element's row-major index in its logical tensor.
#pragma once
#include "simd.h"

namespace pk {
namespace {

// One counter word per 64-bit lane: the widening multiply reads the low halves only, so a product serves as the next
// word without being split, and the other half may hold anything.
#if defined(CPU_CAPABILITY_AVX512)
struct Word64 {
  __m512i v;
  static constexpr int kLanes = 8;
  static PK_INLINE Word64 ramp(int64_t start, int64_t step) {
    return {_mm512_set_epi64(start + 7 * step, start + 6 * step, start + 5 * step, start + 4 * step, start + 3 * step,
                             start + 2 * step, start + step, start)};
  }
  static PK_INLINE Word64 set(uint32_t x) { return {_mm512_set1_epi64(x)}; }
  friend PK_INLINE Word64 operator*(Word64 a, Word64 b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  friend PK_INLINE Word64 operator^(Word64 a, Word64 b) { return {_mm512_xor_si512(a.v, b.v)}; }
  PK_INLINE Word64 high() const { return {_mm512_srli_epi64(v, 32)}; }
};
// even lanes from a, odd lanes from b; (word >> 8) * 2^-24
PK_INLINE VecF uniform_from(Word64 a, Word64 b) {
  const __m512i word = _mm512_mask_blend_epi32(0xAAAA, a.v, _mm512_slli_epi64(b.v, 32));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(word, 8)), _mm512_set1_ps(5.9604644775390625e-8f));
}
PK_INLINE VecD low_half(VecF v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
PK_INLINE VecD high_half(VecF v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
#else
struct Word64 {
  __m256i v;
  static constexpr int kLanes = 4;
  static PK_INLINE Word64 ramp(int64_t start, int64_t step) {
    return {_mm256_set_epi64x(start + 3 * step, start + 2 * step, start + step, start)};
  }
  static PK_INLINE Word64 set(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
  friend PK_INLINE Word64 operator*(Word64 a, Word64 b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  friend PK_INLINE Word64 operator^(Word64 a, Word64 b) { return {_mm256_xor_si256(a.v, b.v)}; }
  PK_INLINE Word64 high() const { return {_mm256_srli_epi64(v, 32)}; }
};
PK_INLINE VecF uniform_from(Word64 a, Word64 b) {
  const __m256i word = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)), _mm256_set1_ps(5.9604644775390625e-8f));
}
PK_INLINE VecD low_half(VecF v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
PK_INLINE VecD high_half(VecF v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }
#endif

PK_INLINE Word64 philox_words(uint64_t seed, Word64 offsets) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  Word64 c0 = offsets, c1 = offsets.high(), c2 = Word64::set(0), c3 = c2;
  for (int round = 0; round < 10; ++round) {
    const Word64 p0 = c0 * Word64::set(0xD2511F53u), p1 = c2 * Word64::set(0xCD9E8D57u);
    c0 = p1.high() ^ c1 ^ Word64::set(k0);
    c1 = p1;
    c2 = p0.high() ^ c3 ^ Word64::set(k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Uniforms in [0, 1) of the elements at start, start + step, ...: multiples of 2^-24, equal on every backend.
PK_INLINE VecF philox_uniform(uint64_t seed, int64_t start, int64_t step) {
  return uniform_from(philox_words(seed, Word64::ramp(start, 2 * step)),
                      philox_words(seed, Word64::ramp(start + step, 2 * step)));
}

}  // namespace
}  // namespace pk
