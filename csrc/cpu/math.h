// Elementary functions as policies: `Math<float, true>` to float32 rounding, `Math<float, false>` for results that are
// rounded to 16 bits afterwards (relative error below 3e-4, a third of the eps of float16), and
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
      const V shifted = fmadd(x, V(kLog2E), V(kShift)), n = shifted - V(kShift);
      return scale_or_zero(exp_reduced(subtract_ln2(n, x)), shifted, n);
    } else {
      return exp2_nonpositive(x * V(kLog2E));
    }
  }

  // exp(-x^2 / 2). Relative accuracy in the far tail too: -x^2/2 is never rounded, the reduction starts with a fused
  // operation on the exact square (its result w is -2 times the usual remainder).
  static PK_INLINE V exp_minus_half_square(V x) {
    const V t = x * V(-0.5f * kLog2E);
    if constexpr (kExact) {
      const V shifted = fmadd(t, x, V(kShift)), n = shifted - V(kShift);
      const V w = fmadd(n, V(2 * kLn2Low), fmadd(x, x, n * V(2 * kLn2High)));
      const V p = polynomial(w, V(1.f), V(-0.5f), V(0.124999985f), V(-0.020833038f), V(0.0026042503f),
                             V(-0.00026169361f), V(2.1630636e-5f));
      return scale_or_zero(p, shifted, n);
    } else {
      return exp2_nonpositive(t * x);
    }
  }

  // exp(x) - 1, x <= 0, without cancellation.
  static PK_INLINE V expm1_nonpositive(V x) {
    x = at_least(x, V(-30.f));  // the result is -1 from there on
    const V shifted = fmadd(x, V(kLog2E), V(kShift)), n = shifted - V(kShift);
    const V scale = power_of_two(shifted);
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

  // 1 / (1 + v), 0 <= v < 1e9. The exact form corrects the quotient by the residual 1 - r - r v, in which 1 + v is
  // never rounded: half a unit in the last place where dividing by the rounded sum has one and a half.
  static PK_INLINE V reciprocal_1p(V v) {
    const V r = reciprocal_estimate(v + V(1.f));
    if constexpr (kExact) return fmadd(r, negated_fmadd(r, v, V(1.f) - r), r);
    return r;
  }

  // x Phi(x) = max(x, 0) - |x| q,  q = Phi(-|x|), by its own relative accuracy: the tail keeps the digits that 1 + erf
  // cancels.
  static PK_INLINE V gelu(V x) {
    V e, q;
    return gelu(x, e, q);
  }

  // g * (Phi(x) + x phi(x)); y is the value.
  static PK_INLINE V gelu_backward(V x, V g, V& y) {
    V e, q;
    y = gelu(x, e, q);
    if constexpr (kExact) {
      return g * fmadd(x * V(0.39894228040143267794f), e, select_sign(x, q, V(1.f) - q));
    } else {
      // q - |x| phi(x) = q - |x| q m, with m = phi / q nearly linear. At +-inf it is NaN, as in torch.
      const V a = x.abs();
      const V m = polynomial(at_most(a, V(6.f)), V(-0.79473948f), V(-0.64817977f), V(-0.09568795f), V(0.014385989f),
                             V(-0.00088925770f));
      const V h = fmadd(a * q, m, q);
      return g * select_sign(x, h, V(1.f) - h);
    }
  }

  // Odd, exact to the sign; |x| large gives 1, not inf / inf.
  //   |x| < 0.625: x + x^3 P(x^2) (Cephes tanhf);  else 1 - 2 e / (1 + e), e = exp(-2|x|)
  // For 16 bits x P(x^2) / Q(x^2) up to 5, where tanh is within 1e-4 of 1 and rounds to it.
  static PK_INLINE V tanh(V x) {
    if constexpr (!kExact) {
      const V b = at_least(at_most(x, V(5.f)), V(-5.f)), s = b * b;
      const V n = polynomial(s, V(0.99994808f), V(0.10241786f), V(0.00067056878f));
      return b * n * reciprocal_estimate(polynomial(s, V(1.f), V(0.43543270f), V(0.012819926f)));
    }
    const V a = x.abs(), e = exp_nonpositive(a * V(-2.f));
    const V large = negated_fmadd(e * V(2.f), reciprocal_1p(e), V(1.f));
    const V s = x * x;
    const V small = fmadd(a * s,
                          polynomial(s, V(-3.33332819422e-1f), V(1.33314422036e-1f), V(-5.37397155531e-2f),
                                     V(2.06390887954e-2f), V(-5.70498872745e-3f)),
                          a);
    return copy_sign(select_sign(a - V(0.625f), small, large), x);
  }

 private:
  // e = exp(-x^2 / 2) in the exact form only. There q = e R(|x|), R rational with positive coefficients (nothing
  // cancels); for 16 bits log2(q) is a polynomial, which spares the exponential's argument, R and the reciprocal.
  static PK_INLINE V gelu(V x, V& e, V& q) {
    // q is 0 long before the bound, which keeps d finite. At inf, inf * 0 must not reach the result; at -inf, NaN is
    // right.
    const V bounded = at_most(x, V(1e4f)), factor = bounded.abs();
    if constexpr (kExact) {
      const V a = at_most(factor, V(1e4f));
      e = exp_minus_half_square(bounded);
      const V n = polynomial(a, V(0.5f), V(0.43614575f), V(0.18164547f), V(0.040097937f), V(0.0040369793f));
      const V d = polynomial(a, V(1.f), V(1.6701765f), V(1.1958947f), V(0.46527435f), V(0.10051783f), V(0.010119068f));
      const V r = reciprocal_estimate(d), quotient = n * r;
      q = e * fmadd(negated_fmadd(quotient, d, n), r, quotient);
    } else {
      q = exp2_nonpositive(polynomial(factor, V(-1.0003297f), V(-1.1465930f), V(-0.46909815f), V(-0.044948034f),
                                      V(0.0049534170f), V(-0.00024016056f)));
    }
    return negated_fmadd(factor, q, at_least(x, V(0.f)));
  }

  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // n * kLn2High is exact
  // Adding 1.5 * 2^23 rounds to an integer (cheaper than the rounding instruction) and leaves it in the low bits.
  static constexpr float kShift = 12582912.f;

  static PK_INLINE V subtract_ln2(V n, V x) { return fmadd(n, V(-kLn2Low), fmadd(n, V(-kLn2High), x)); }

  static PK_INLINE V exp_reduced(V r) {  // |r| <= ln(2) / 2
    return polynomial(r, V(1.f), V(1.f), V(0.49999994f), V(0.1666643f), V(0.041668005f), V(0.0083741955f),
                      V(0.0013843607f));
  }
  static PK_INLINE V exp2_nonpositive(V y) {
    const V f = fraction(y);
    const V p = polynomial(f, V(0.99992520f), V(0.69583356f), V(0.22606716f), V(0.07802452f));
    return scale_or_zero_floor(p, y, f);
  }
};

template <>
struct Math<double, true> {
  using V = VecD;

  static PK_INLINE V exp_nonpositive(V x) { return x.exp(); }
  static PK_INLINE V expm1_nonpositive(V x) { return x.expm1(); }
  static PK_INLINE V reciprocal_1p(V v) { return V(1.) / (v + V(1.)); }
  static PK_INLINE V tanh(V x) { return x.tanh(); }
  static PK_INLINE V gelu(V x) { return x * normal_cdf(x); }
  static PK_INLINE V gelu_backward(V x, V g, V& y) {
    const V cdf = normal_cdf(x), density = (x * x * V(-0.5)).exp() * V(0.39894228040143267794);
    y = x * cdf;
    return g * fmadd(x, density, cdf);
  }

 private:
  static PK_INLINE V normal_cdf(V x) {
    const V q = (x.abs() * V(0.70710678118654752440)).erfc() * V(0.5);
    return select_sign(x, q, V(1.) - q);
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
