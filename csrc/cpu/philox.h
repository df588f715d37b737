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
  static PK_INLINE Word64 set(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
  friend PK_INLINE Word64 operator*(Word64 a, Word64 b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  friend PK_INLINE Word64 operator^(Word64 a, Word64 b) { return {_mm512_xor_si512(a.v, b.v)}; }
  friend PK_INLINE Word64 operator+(Word64 a, Word64 b) { return {_mm512_add_epi64(a.v, b.v)}; }
  PK_INLINE Word64 high() const { return {_mm512_srli_epi64(v, 32)}; }
};
// even lanes from a, odd lanes from b; (word >> 8) * 2^-24
PK_INLINE VecF uniform_from(Word64 a, Word64 b) {
  const __m512i word = _mm512_mask_blend_epi32(0xAAAA, a.v, _mm512_slli_epi64(b.v, 32));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(word, 8)), _mm512_set1_ps(5.9604644775390625e-8f));
}
// bit i: the word of lane i (even lanes from a, odd ones from b) is greater than `bound`
PK_INLINE uint16_t words_above(Word64 a, Word64 b, uint32_t bound) {
  const __m512i word = _mm512_mask_shuffle_epi32(a.v, 0xAAAA, b.v, _MM_PERM_CCAA);
  return _mm512_cmpgt_epu32_mask(word, _mm512_set1_epi32(static_cast<int>(bound)));
}
// x where bit i of `bits` is set, else 0
PK_INLINE VecF keep_lanes(VecF x, uint16_t bits) { return _mm512_maskz_mov_ps(bits, x); }
PK_INLINE VecD keep_lanes(VecD x, uint8_t bits) { return _mm512_maskz_mov_pd(bits, x); }
PK_INLINE VecD low_half(VecF v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
PK_INLINE VecD high_half(VecF v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }
#else
struct Word64 {
  __m256i v;
  static constexpr int kLanes = 4;
  static PK_INLINE Word64 ramp(int64_t start, int64_t step) {
    return {_mm256_set_epi64x(start + 3 * step, start + 2 * step, start + step, start)};
  }
  static PK_INLINE Word64 set(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
  friend PK_INLINE Word64 operator*(Word64 a, Word64 b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  friend PK_INLINE Word64 operator^(Word64 a, Word64 b) { return {_mm256_xor_si256(a.v, b.v)}; }
  friend PK_INLINE Word64 operator+(Word64 a, Word64 b) { return {_mm256_add_epi64(a.v, b.v)}; }
  PK_INLINE Word64 high() const { return {_mm256_srli_epi64(v, 32)}; }
};
PK_INLINE VecF uniform_from(Word64 a, Word64 b) {
  const __m256i word = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA);
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(word, 8)), _mm256_set1_ps(5.9604644775390625e-8f));
}
PK_INLINE uint16_t words_above(Word64 a, Word64 b, uint32_t bound) {
  const __m256i word = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xAA), sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i above =
      _mm256_cmpgt_epi32(_mm256_xor_si256(word, sign), _mm256_set1_epi32(static_cast<int>(bound ^ 0x80000000u)));
  return static_cast<uint16_t>(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
}
PK_INLINE VecF keep_lanes(VecF x, uint16_t bits) {
  const __m256i lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane);
  return _mm256_and_ps(x, _mm256_castsi256_ps(set));
}
PK_INLINE VecD keep_lanes(VecD x, uint8_t bits) {
  const __m256i lane = _mm256_set_epi64x(8, 4, 2, 1);
  const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane);
  return _mm256_and_pd(x, _mm256_castsi256_pd(set));
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

// The words of elements whose offsets have one high half. The counter's other words are 0, which takes four of the
// generator's twenty multiplications away: the first round's product comes from its neighbour's by addition, and the
// second round's c0 is the same for all.
class PhiloxRun {
 public:
  PK_INLINE PhiloxRun(uint64_t seed, uint32_t high) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) k0_[round] = k0, k1_[round] = k1;
    uniform_ = kM0 * (high ^ k0_[0]);
  }

  // M0 times the low halves start, start + step, ...
  static PK_INLINE Word64 products(uint32_t start, int64_t step) {
    return Word64::ramp(start, step) * Word64::set(kM0);
  }
  // What brings products `elements` further.
  static PK_INLINE Word64 advance(uint64_t elements) { return Word64::set(kM0 * elements); }

  PK_INLINE Word64 words(Word64 products) const {
    Word64 c1 = (products.high() ^ Word64::set(k1_[0])) * Word64::set(kM1), c0 = c1.high() ^ Word64::set(k0_[1]);
    Word64 c2 = products ^ Word64::set(uniform_ >> 32 ^ k1_[1]), c3 = Word64::set(uniform_);
#pragma GCC unroll 8
    for (int round = 2; round < 10; ++round) {
      const Word64 p0 = c0 * Word64::set(kM0), p1 = c2 * Word64::set(kM1);
      c0 = p1.high() ^ c1 ^ Word64::set(k0_[round]);
      c1 = p1;
      c2 = p0.high() ^ c3 ^ Word64::set(k1_[round]);
      c3 = p0;
    }
    return c0;
  }

 private:
  static constexpr uint64_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  uint64_t k0_[10], k1_[10], uniform_;  // 64 bits wide, so that each is broadcast by the instruction that uses it
};

// Dropout's decisions for the elements first .. first + count: one number for each vector of VecF::size() of them, bit
// i set iff the word of lane i's element is greater than `bound`. Vectors come in pairs, whose lanes hold the elements
// one after another or, `interleaved`, even ones in the first and odd ones in the second.
PK_INLINE void keep_words(uint64_t seed, uint32_t bound, bool interleaved, int64_t first, int64_t count,
                          uint16_t* words) {
  constexpr int64_t kPair = 2 * VecF::size();
  const int64_t step = interleaved ? 4 : 2, odd = step / 2, second = interleaved ? 1 : VecF::size();
  if ((first ^ (first + count - 1)) >> 32 == 0) {
    const PhiloxRun run(seed, static_cast<uint32_t>(first >> 32));
    const uint32_t low = static_cast<uint32_t>(first);
    Word64 a = run.products(low, step), b = run.products(low + odd, step);
    Word64 c = run.products(low + second, step), d = run.products(low + second + odd, step);
    const Word64 further = run.advance(kPair);
    for (int64_t i = 0; i < count; i += kPair, words += 2) {
      words[0] = words_above(run.words(a), run.words(b), bound);
      words[1] = words_above(run.words(c), run.words(d), bound);
      a = a + further, b = b + further, c = c + further, d = d + further;
    }
    return;
  }
  for (int64_t i = first; i < first + count; i += kPair, words += 2) {
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t start = i + v * second;
      words[v] = words_above(philox_words(seed, Word64::ramp(start, step)),
                             philox_words(seed, Word64::ramp(start + odd, step)), bound);
    }
  }
}

}  // namespace
}  // namespace pk
