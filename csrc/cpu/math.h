// Elementary functions as policies: `Math<float, true>` to float32 rounding, `Math<float, false>` for results that are
// rounded to 16 bits afterwards (relative error below 1e-4 of the value, a fifth of a float16 rounding), and
// `Math<double>` on at::vec's own functions, accuracy first.
//
// The float32 forms are written out because a call into Sleef spills every vector register (32 zmm) around it: inlined,
// a GELU forward took 4.6 ms where the calls took 6.3. Exponentials are of non-positive arguments only, which is all an
// activation needs, cannot overflow, and flush to an exact 0 before the result would be denormal.
// Coefficients: minimax fits of relative error (Lawson iteration in float64), rounded to float32.
#pragma once
#include <type_traits>

#include "simd.h"

namespace pk {
namespace {

template <class T, bool kExact = true>
struct Math;

template <bool kExact>
struct Math<float, kExact> {
  using V = VecF;

  // exp(x), x <= 0.
  static PK_INLINE V exp_nonpositive(V x) {
    if constexpr (kExact) {
      const V n = round_nearest(x * V(kLog2E));
      return scale_or_zero(exp_reduced(subtract_ln2(n, x)), n, x, V(kLogSmallest));
    } else {
      return exp2_nonpositive(x * V(kLog2E));
    }
  }

  // exp(-x^2 / 2), relative accuracy in the far tail too: -x^2/2 is never rounded, the first step of the reduction is
  // one fused operation on the exact product.
  static PK_INLINE V exp_minus_half_square(V x) {
    const V y = x * V(-0.5f * kLog2E) * x;
    if constexpr (kExact) {
      const V n = round_nearest(y);
      const V r = fmadd(n, V(-kLn2Low), fmadd(x * V(-0.5f), x, n * V(-kLn2High)));
      return scale_or_zero(exp_reduced(r), n, y, V(-126.f));
    } else {
      return exp2_nonpositive(y);
    }
  }

  // exp(x) - 1, x <= 0, without cancellation.
  static PK_INLINE V expm1_nonpositive(V x) {
    x = at_least(x, V(-30.f));  // the result is -1 from there on
    const V n = round_nearest(x * V(kLog2E));
    const V scale = power_of_two(n);
    V r, p;
    if constexpr (kExact) {
      r = subtract_ln2(n, x);
      p = polynomial(r, V(1.f), V(0.49999997f), V(0.16666507f), V(0.041667137f), V(0.008369104f), V(0.0013888873f));
    } else {
      r = fmadd(n, V(-0.69314718f), x);
      p = polynomial(r, V(0.9999851f), V(0.5000125f), V(0.16766813f), V(0.041666586f));
    }
    return fmadd(scale, r * p, scale - V(1.f));
  }

  // 1 / (1 + v), 0 <= v < 1e9. The exact form corrects the quotient by the residual 1 - r - r v, in which 1 + v is never
  // rounded: half a unit in the last place where dividing by the rounded sum has one and a half.
  static PK_INLINE V reciprocal_1p(V v) {
    const V r = reciprocal_estimate(v + V(1.f));
    if constexpr (kExact) return fmadd(r, negated_fmadd(r, v, V(1.f) - r), r);
    return r;
  }

  // The normal distribution function; `e` = exp(-x^2 / 2).
  //   Phi(-|x|) = e t Q(u),  t = 1 / (1 + p |x|),  u = 1 - t = p |x| t
  // (Abramowitz-Stegun 7.1.26 has a polynomial in t; refitted for relative error, so that the negative tail keeps its
  // digits where 1 + erf cancels, and in u, whose rounding does not matter near 0, where t's would count threefold.)
  static PK_INLINE V normal_cdf(V x, V& e) {
    e = exp_minus_half_square(x);
    const V a = at_most(x.abs(), V(1e4f));
    V r;
    if constexpr (kExact) {
      const V v = a * V(0.38f), t = reciprocal_1p(v);
      r = t * polynomial(v * t, V(0.5f), V(-0.54984784f), V(0.13160165f), V(0.12085304f), V(-0.0071020755f),
                         V(-0.047550984f), V(0.007976967f), V(-0.04961129f), V(0.069614746f), V(-0.024345626f));
    } else {
      const V t = reciprocal_1p(a * V(0.375f));
      r = t * polynomial(t, V(0.14906102f), V(0.15773395f), V(0.08356417f), V(0.20028152f), V(-0.09064275f));
    }
    const V q = r * e;
    return select_sign(x, q, V(1.f) - q);
  }

  // Odd, exact to the sign; |x| large gives 1, not inf / inf.
  //   |x| < 0.625: x + x^3 P(x^2) (Cephes tanhf);  else 1 - 2 e / (1 + e), e = exp(-2|x|)
  static PK_INLINE V tanh(V x) {
    const V a = x.abs(), e = exp_nonpositive(a * V(-2.f));
    const V large = negated_fmadd(e * V(2.f), reciprocal_1p(e), V(1.f));
    const V s = x * x;
    const V small = fmadd(a * s, polynomial(s, V(-3.33332819422e-1f), V(1.33314422036e-1f), V(-5.37397155531e-2f),
                                            V(2.06390887954e-2f), V(-5.70498872745e-3f)), a);
    return copy_sign(select_sign(a - V(0.625f), small, large), x);
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  static constexpr float kLogSmallest = -87.33654f;                           // log of the smallest normal

  static PK_INLINE V subtract_ln2(V n, V x) { return fmadd(n, V(-kLn2Low), fmadd(n, V(-kLn2High), x)); }

  static PK_INLINE V exp_reduced(V r) {  // |r| <= ln(2) / 2
    return polynomial(r, V(1.f), V(1.f), V(0.49999994f), V(0.1666643f), V(0.041668005f), V(0.0083741955f),
                      V(0.0013843607f));
  }

  static PK_INLINE V exp2_nonpositive(V y) {
    const V f = fraction(y);
    const V p = polynomial(f, V(1.0000026f), V(0.69300383f), V(0.24144275f), V(0.052011464f), V(0.013534168f));
    return scale_or_zero(p, floor_of(y, f), y, V(-126.f));
  }
};

template <>
struct Math<double, true> {
  using V = VecD;

  static PK_INLINE V exp_nonpositive(V x) { return x.exp(); }
  static PK_INLINE V expm1_nonpositive(V x) { return x.expm1(); }
  static PK_INLINE V reciprocal_1p(V v) { return V(1.) / (v + V(1.)); }
  static PK_INLINE V tanh(V x) { return x.tanh(); }
  static PK_INLINE V normal_cdf(V x, V& e) {
    e = (x * x * V(-0.5)).exp();
    return (x * V(-0.70710678118654752440)).erfc() * V(0.5);
  }
};

// s = sigmoid(x), c = 1 - s, each to its own relative accuracy.
template <class M>
PK_INLINE typename M::V sigmoid(typename M::V x, typename M::V& c) {
  using V = typename M::V;
  const V e = M::exp_nonpositive(negative_abs(x));
  const V r = M::reciprocal_1p(e);
  const V er = e * r;
  c = select_sign(x, r, er);
  return select_sign(x, er, r);
}

template <class M>
PK_INLINE typename M::V sigmoid(typename M::V x) {
  typename M::V c;
  return sigmoid<M>(x, c);
}

}  // namespace
}  // namespace pk
