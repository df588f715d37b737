// What the rooms need beyond at::vec: sign and order selections without a mask-to-vector round trip, a fast reciprocal,
// exponent arithmetic.
//
// Included once per instruction set. Everything sits in an anonymous namespace: an inline function with a shared name
// would let the linker keep the AVX-512 body for all callers. For the same reason no static data, no standard
// containers.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#define PK_INLINE __attribute__((always_inline)) inline

namespace pk {
namespace {

using at::vec::fmadd;
using VecF = at::vec::Vectorized<float>;
using VecD = at::vec::Vectorized<double>;

#if defined(CPU_CAPABILITY_AVX512)

// sign bit of x set ? negative : other  (the sign bit, so -0 and a negative NaN count as negative)
PK_INLINE VecF select_sign(VecF x, VecF negative, VecF other) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), other, negative);
}
// x > 0 ? positive : other  (NaN takes `other`)
PK_INLINE VecF select_positive(VecF x, VecF positive, VecF other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), other, positive);
}
// x <= 0 ? nonpositive : other  (NaN takes `other`)
PK_INLINE VecF select_nonpositive(VecF x, VecF nonpositive, VecF other) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LE_OQ), other, nonpositive);
}
// x <= 0 ? 0 : value  (NaN keeps the value)
PK_INLINE VecF zero_unless_positive(VecF x, VecF value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), value);
}
// 2^n for an integral n in the low bits of `shifted` (see math.h)
PK_INLINE VecF power_of_two(VecF shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(127 << 23)));
}
// n < -125 ? 0 : p * 2^n  (a NaN stays; nothing is denormal)
PK_INLINE VecF scale_or_zero(VecF p, VecF, VecF n) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(-125.f), _CMP_NLT_UQ), p, n);
}
PK_INLINE VecF fraction(VecF y) {  // y - floor(y)
  return _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// y < -125 ? 0 : p * 2^floor(y), given y - floor(y)
PK_INLINE VecF scale_or_zero_floor(VecF p, VecF y, VecF) { return scale_or_zero(p, y, y); }  // scalef takes the floor
PK_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sign),
                                                       _mm512_castps_si512(magnitude), 0xCA));
}
// 1 / d for 1 <= d < 2^126, to 2^-14 (a division would occupy its unit for 16 cycles)
PK_INLINE VecF reciprocal_estimate(VecF d) { return _mm512_rcp14_ps(d); }
PK_INLINE VecF negated_fmadd(VecF a, VecF b, VecF c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
PK_INLINE VecD select_sign(VecD x, VecD negative, VecD other) {
  return _mm512_mask_blend_pd(_mm512_movepi64_mask(_mm512_castpd_si512(x)), other, negative);
}
PK_INLINE VecD select_positive(VecD x, VecD positive, VecD other) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_GT_OQ), other, positive);
}
PK_INLINE VecD select_nonpositive(VecD x, VecD nonpositive, VecD other) {
  return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_LE_OQ), other, nonpositive);
}
PK_INLINE VecD zero_unless_positive(VecD x, VecD value) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_NLE_UQ), value);
}
// x, which the compiler may then not fuse with an addition: a product is rounded before it is added.
PK_INLINE VecF rounded(VecF x) {
  __m512 raw = x;
  asm("" : "+v"(raw));
  return raw;
}
PK_INLINE VecD rounded(VecD x) {
  __m512d raw = x;
  asm("" : "+v"(raw));
  return raw;
}

#else  // AVX2

PK_INLINE VecF select_sign(VecF x, VecF negative, VecF other) { return _mm256_blendv_ps(other, negative, x); }
PK_INLINE VecF select_positive(VecF x, VecF positive, VecF other) {
  return _mm256_blendv_ps(other, positive, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}
PK_INLINE VecF select_nonpositive(VecF x, VecF nonpositive, VecF other) {
  return _mm256_blendv_ps(other, nonpositive, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LE_OQ));
}
PK_INLINE VecF zero_unless_positive(VecF x, VecF value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), value);
}
PK_INLINE VecF power_of_two(VecF shifted) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
}
// An exact 0 under the bound: left to underflow, denormals made a backward pass 9x slower.
PK_INLINE VecF scale_or_zero(VecF p, VecF shifted, VecF n) {
  return _mm256_and_ps(_mm256_cmp_ps(n, _mm256_set1_ps(-125.f), _CMP_NLT_UQ), p * power_of_two(shifted));
}
PK_INLINE VecF fraction(VecF y) { return _mm256_sub_ps(y, _mm256_floor_ps(y)); }
PK_INLINE VecF scale_or_zero_floor(VecF p, VecF y, VecF fraction) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(y - fraction), 23);
  const VecF power = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
  return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_set1_ps(-125.f), _CMP_NLT_UQ), p * power);
}
PK_INLINE VecF copy_sign(VecF magnitude, VecF sign) {
  const __m256 bit = _mm256_set1_ps(-0.f);
  return _mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, magnitude));
}
// rcpps has 12 bits, too few for float16 without a Newton step that costs what the division does.
PK_INLINE VecF reciprocal_estimate(VecF d) { return _mm256_div_ps(_mm256_set1_ps(1.f), d); }
PK_INLINE VecF negated_fmadd(VecF a, VecF b, VecF c) { return _mm256_fnmadd_ps(a, b, c); }
PK_INLINE VecD select_sign(VecD x, VecD negative, VecD other) { return _mm256_blendv_pd(other, negative, x); }
PK_INLINE VecD select_positive(VecD x, VecD positive, VecD other) {
  return _mm256_blendv_pd(other, positive, _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_GT_OQ));
}
PK_INLINE VecD select_nonpositive(VecD x, VecD nonpositive, VecD other) {
  return _mm256_blendv_pd(other, nonpositive, _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_LE_OQ));
}
PK_INLINE VecD zero_unless_positive(VecD x, VecD value) {
  return _mm256_and_pd(_mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NLE_UQ), value);
}
// x, which the compiler may then not fuse with an addition: a product is rounded before it is added.
PK_INLINE VecF rounded(VecF x) {
  __m256 raw = x;
  asm("" : "+v"(raw));
  return raw;
}
PK_INLINE VecD rounded(VecD x) {
  __m256d raw = x;
  asm("" : "+v"(raw));
  return raw;
}

#endif

// NaN in x survives all three.
template <class V>
PK_INLINE V at_least(V x, V bound) {
  return at::vec::clamp_min(x, bound);
}
template <class V>
PK_INLINE V at_most(V x, V bound) {
  return at::vec::clamp_max(x, bound);
}
template <class V>
PK_INLINE V negative_abs(V x) {
  return x | V(-0.);
}

// c0 + x c1 + x^2 c2 + ..., Horner
template <class V>
PK_INLINE V polynomial(V, V c) {
  return c;
}
template <class V, class... Rest>
PK_INLINE V polynomial(V x, V c0, V c1, Rest... rest) {
  return fmadd(x, polynomial(x, c1, V(rest)...), c0);
}

}  // namespace
}  // namespace pk
