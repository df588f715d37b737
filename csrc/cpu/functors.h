// The activations, each written once: its value and its derivative, for any `Math` policy (see math.h).
//
//   value(x)              y
//   backward(x, g, y)     g * dy/dx from the input; also gives y, which a gated backward needs beside it
//   from_output(y, g)     g * dy/dx from the output, where the output determines it (sigmoid, tanh, relu)
//   parametric ones take their parameter w with each call and add dy/dw:  backward(x, w, g, dw)
//
// At +-inf and NaN they give what torch's operators give in float64: gelu(-inf) and silu(-inf) are NaN, gelu(inf) is
// inf.
#pragma once
#include "math.h"

namespace pk {
namespace {

template <class M>
struct Identity {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return x; }
  PK_INLINE V backward(V x, V g, V& y) const {
    y = x;
    return g;
  }
};

template <class M>
struct Sigmoid {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return sigmoid<M>(x); }
  PK_INLINE V backward(V x, V g, V& y) const {
    V c;
    y = sigmoid<M>(x, c);
    return g * (y * c);
  }
  PK_INLINE V from_output(V y, V g) const { return g * ((V(1) - y) * y); }
};

template <class M>
struct Tanh {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return M::tanh(x); }
  PK_INLINE V from_output(V y, V g) const { return g * (V(1) - y * y); }
};

template <class M>
struct Relu {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return at_least(x, V(0)); }
  PK_INLINE V backward(V x, V g, V& y) const {
    y = value(x);
    return from_output(x, g);
  }
  PK_INLINE V from_output(V y, V g) const { return zero_unless_positive(y, g); }
};

template <class M>
struct LeakyRelu {
  using V = typename M::V;
  V slope;
  PK_INLINE V value(V x) const { return select_positive(x, x, x * slope); }
  PK_INLINE V backward(V x, V g, V& y) const {
    y = value(x);
    return select_positive(x, g, g * slope);
  }
};

template <class M>
struct Elu {
  using V = typename M::V;
  V alpha;
  PK_INLINE V value(V x) const { return select_positive(x, x, M::expm1_nonpositive(at_most(x, V(0))) * alpha); }
  PK_INLINE V backward(V x, V g, V& y) const {
    y = value(x);
    return select_nonpositive(x, M::exp_nonpositive(at_most(x, V(0))) * alpha * g, g);  // NaN passes g on, as torch
  }
};

// x Phi(x);  derivative Phi(x) + x exp(-x^2/2) / sqrt(2 pi).
template <class M>
struct Gelu {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return M::gelu(x); }
  PK_INLINE V backward(V x, V g, V& y) const { return M::gelu_backward(x, g, y); }
};

// x (1 + tanh u) / 2 = x sigmoid(2u),  2u = 2 sqrt(2/pi) (x + 0.044715 x^3).
template <class M>
struct GeluTanh {
  using V = typename M::V;
  static constexpr double kLinear = 1.59576912160573071176, kCubic = kLinear * 0.044715;
  PK_INLINE V value(V x) const { return x * sigmoid<M>(x * fmadd(x * x, V(kCubic), V(kLinear))); }
  PK_INLINE V backward(V x, V g, V& y) const {
    const V square = x * x;
    V c;
    const V s = sigmoid<M>(x * fmadd(square, V(kCubic), V(kLinear)), c);
    const V slope = at_most(fmadd(square, V(3 * kCubic), V(kLinear)), V(1e30));  // x^2 = inf must not meet c = 0
    y = x * s;
    return g * fmadd(y * c, slope, s);
  }
};

// x sigmoid(x);  derivative s + y (1 - s).
template <class M>
struct Silu {
  using V = typename M::V;
  PK_INLINE V value(V x) const { return x * sigmoid<M>(x); }
  PK_INLINE V backward(V x, V g, V& y) const {
    V c;
    const V s = sigmoid<M>(x, c);
    y = x * s;
    return g * fmadd(y, c, s);
  }
};

// x sigmoid(beta x), beta a constant.
template <class M>
struct Swish {
  using V = typename M::V;
  V beta;
  PK_INLINE V value(V x) const { return x * sigmoid<M>(x * beta); }
  PK_INLINE V backward(V x, V g, V& y) const {
    V c;
    const V s = sigmoid<M>(x * beta, c);
    y = x * s;
    return g * fmadd(y * c, beta, s);
  }
};

template <class M>
struct Prelu {  // w: the slope
  using V = typename M::V;
  PK_INLINE V value(V x, V w) const { return select_positive(x, x, x * w); }
  PK_INLINE V backward(V x, V w, V g, V& dw) const {
    dw = select_positive(x, V(0), x * g);
    return select_positive(x, g, g * w);
  }
};

template <class M>
struct SwishBeta {  // w: beta
  using V = typename M::V;
  PK_INLINE V value(V x, V w) const { return x * sigmoid<M>(x * w); }
  PK_INLINE V backward(V x, V w, V g, V& dw) const {
    V c;
    const V s = sigmoid<M>(x * w, c);
    const V slope = x * s * c;  // dy/dw = x * slope
    dw = g * (x * slope);
    return g * fmadd(slope, w, s);
  }
};

}  // namespace
}  // namespace pk
