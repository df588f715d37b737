// Each activation once, for every kernel that needs it: value(x, alpha) and gradient(dy, x, alpha) = dy * value'(x), in
// float32.  PRECISE: good to float32's rounding.  Otherwise a relative error of 3e-4 is allowed, a fraction of the
// rounding to 16 bits that follows, for fewer instructions: in half precision these kernels are close to issue-bound.
// Kinks select, as torch does, rather than multiply by 0 or 1: a NaN or infinity takes the side torch gives it.
#pragma once
#include "platform.h"

namespace pk {

constexpr float kLog2e = 1.4426950408889634f;

template <bool PRECISE>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (PRECISE)
    return expf(x);
  else
    return ex2(x * kLog2e);
}

// a / b within 2 ulp; 0 for b >= 2^126.  The IEEE division's slow path would be a call for each element.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

template <bool PRECISE>
__device__ __forceinline__ float sigmoid(float x) {
  return quotient(1.f, 1.f + exponential<PRECISE>(-x));
}

struct SigmoidSlope {
  float value, slope;  // s, s * (1 - s)
};

// Where s is near 1, 1 - s has lost its digits, which shows once the product is scaled by a large x: PRECISE multiplies
// exp(-|x|) instead.  Where s is near 1/2 it is the difference that is exact.
template <bool PRECISE>
__device__ __forceinline__ SigmoidSlope sigmoid_slope(float x) {
  if constexpr (PRECISE) {
    const float e = expf(-fabsf(x)), larger = quotient(1.f, 1.f + e);
    const float smaller = e > 0.25f ? 1.f - larger : e * larger;
    return {x < 0.f ? smaller : larger, smaller * larger};
  } else {
    const float s = sigmoid<PRECISE>(x);
    return {s, s * (1.f - s)};
  }
}

// 1 - 2 / (exp(2 x) + 1); near 0, where that difference cancels, its series.
template <bool PRECISE>
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  if constexpr (PRECISE) return tanhf(x);
  const float square = x * x;
  const float small = x + x * square * -0.33333334f;
  return square < 0.00390625f ? small : 1.f - quotient(2.f, ex2(x * (2.f * kLog2e)) + 1.f);
}

// exp(x) - 1, with relative accuracy near 0.
template <bool PRECISE>
__device__ __forceinline__ float exponential_minus_1(float x) {
  if constexpr (PRECISE) return expm1f(x);
  const float series = x + x * x * (0.5f + x * 0.16666667f);
  return x > -0.0625f ? series : ex2(x * kLog2e) - 1.f;
}

// Phi(x) = (1 + erf(x / sqrt(2))) / 2 to float32's rounding, with relative accuracy in the lower tail too: an odd
// polynomial on [-1, 1]; beyond, the tail is exp(-x^2/2) times a polynomial in 1 / (1 + 0.4 |x|), as Abramowitz and
// Stegun 7.1.26.  Both were fitted (minimax) for this library; erff takes a third more instructions, and 1 + erf loses
// the tail.
__device__ __forceinline__ float normal_cdf(float x) {
  const float s = x * x;
  float p = -0.0011863530380651355f + s * (0.00011351265857229009f + s * -7.664679287699983e-06f);
  p = 0.3989422917366028f + s * (-0.06649035960435867f + s * (0.009973331354558468f + s * p));
  const float t = quotient(1.f, 1.f + 0.4f * fabsf(x));
  float q = 0.10536323487758636f + t * (-0.18642807006835938f + t * 0.06812139600515366f);
  q = 0.1590999960899353f + t * (0.13900232315063477f + t * (0.05554052069783211f + t * q));
  const float tail = ex2(s * (-0.5f * kLog2e)) * (t * (0.159595787525177f + t * q));
  return s < 1.f ? 0.5f + x * p : (x < 0.f ? tail : 1.f - tail);
}

// Phi(-a), a >= 0, for results of 16 bits: its logarithm is a polynomial, so there is no erf and no division.  Relative
// error 2.3e-4 up to 5.4, where Phi is 3e-8; the polynomial falls on beyond.
__device__ __forceinline__ float normal_tail(float a) {
  const float p =
      -0.46909815073013306f + a * (-0.0449480339884758f + a * (0.004953416995704174f + a * -0.00024016056f));
  return ex2(-1.0003297328948975f + a * (-1.1465929746627808f + a * p));
}

struct Sigmoid {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return sigmoid<P>(x);
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    return dy * sigmoid_slope<P>(x).slope;
  }
  static __device__ __forceinline__ float gradient_of_output(float dy, float y) { return dy * y * (1.f - y); }
};

struct Tanh {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return hyperbolic_tangent<P>(x);
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    return gradient_of_output(dy, hyperbolic_tangent<P>(x));
  }
  static __device__ __forceinline__ float gradient_of_output(float dy, float y) { return dy * (1.f - y * y); }
};

struct Relu {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return x <= 0.f ? 0.f : x;
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    return gradient_of_output(dy, x);
  }
  static __device__ __forceinline__ float gradient_of_output(float dy, float y) { return y <= 0.f ? 0.f : dy; }
};

struct LeakyRelu {  // and prelu
  template <bool P>
  static __device__ __forceinline__ float value(float x, float slope) {
    return x > 0.f ? x : x * slope;
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float slope) {
    return x > 0.f ? dy : dy * slope;
  }
  template <bool P>
  static __device__ __forceinline__ float weight_gradient(float dy, float x, float) {
    return x > 0.f ? 0.f : dy * x;
  }
};

struct Elu {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float alpha) {
    return x <= 0.f ? alpha * exponential_minus_1<P>(x) : x;
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float alpha) {
    return x <= 0.f ? dy * (alpha * exponential<P>(x)) : dy;
  }
};

struct Gelu {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    if constexpr (P) return x * normal_cdf(x);
    const float bounded = fabsf(fminf(x, 1e4f));             // inf must not meet a tail of 0; at -inf, NaN is right
    return fmaxf(x, 0.f) - bounded * normal_tail(fabsf(x));  // of x, which keeps a NaN
  }
  // dy (Phi(x) + x phi(x)); for 16 bits phi(x) is Phi(-|x|) times its hazard, which is nearly linear in |x|.
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    if constexpr (P) {
      const float density = 0.3989422804014327f * ex2(x * x * (-0.5f * kLog2e));
      return dy * (normal_cdf(x) + x * density);
    }
    const float a = fabsf(x), tail = normal_tail(a), s = fminf(a, 6.f);
    float hazard = -0.09568795f + s * (0.014385988935828209f + s * -0.0008892577025108039f);
    hazard = -0.7947394847869873f + s * (-0.6481797695159912f + s * hazard);
    const float below = (a * tail) * hazard + tail;  // the derivative at -a
    return dy * (x < 0.f ? below : 1.f - below);
  }
};

struct GeluTanh {
  // z with (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 = sigmoid(z)
  static __device__ __forceinline__ float argument(float x) {
    return x * (1.5957691216057308f + 0.07135481627263583f * (x * x));
  }
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return quotient(x, 1.f + exponential<P>(-argument(x)));
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    const SigmoidSlope s = sigmoid_slope<P>(argument(x));
    // x^2 = inf must not meet a slope of 0
    const float inner = 1.5957691216057308f + 0.21406444881790748f * fminf(x * x, 1e4f);
    return dy * (s.value + x * s.slope * inner);
  }
};

struct Swish {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float beta) {
    return quotient(x, 1.f + exponential<P>(-(beta * x)));
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float beta) {
    const SigmoidSlope s = sigmoid_slope<P>(beta * x);
    return dy * (s.value + x * s.slope * beta);  // x and not beta * x, which may have become infinite
  }
  template <bool P>
  static __device__ __forceinline__ float weight_gradient(float dy, float x, float beta) {
    return dy * (x * sigmoid_slope<P>(beta * x).slope * x);  // not x * x: it overflows
  }
};

struct Silu {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return Swish::value<P>(x, 1.f);
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float x, float) {
    return Swish::gradient<P>(dy, x, 1.f);
  }
};

struct Identity {
  template <bool P>
  static __device__ __forceinline__ float value(float x, float) {
    return x;
  }
  template <bool P>
  static __device__ __forceinline__ float gradient(float dy, float, float) {
    return dy;
  }
};

}  // namespace pk
