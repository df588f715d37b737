// One step of each cell for one element, in float32.  KIND: an LSTM, a GRU, or a vanilla RNN (tanh or relu).
#pragma once
#include "math.h"
#include "recurrent.h"

namespace pk {

enum class Kind { lstm, gru, rnn };

template <Kind K>
constexpr int kGates = K == Kind::lstm  ? 4
                       : K == Kind::gru ? 3
                                        : 1;
// What is kept of a token, and of its gradient, in hidden sizes.
template <Kind K>
constexpr int kWidth = K == Kind::rnn ? 1 : 4;

struct CellResult {
  float h, c;
  float kept[4];
};

// Weights of c in an LSTM's gates i, f (the old c) and o (the new one); zeros without.
struct Peephole {
  float i, f, o;
};

__device__ __forceinline__ Peephole load_peephole(const float* from, int hidden, int unit) {
  if (!from) return {0.f, 0.f, 0.f};
  return {from[unit], from[hidden + unit], from[2 * hidden + unit]};
}

// x: the input's gates, bias: zero or more parts (a GRU's fourth is added to the state's n), p: the products with the
// state.  Gates are summed as (x + bias) + p: the product comes whole, rounded to the gates' magnitude once.
template <Kind K, bool PRECISE>
__device__ __forceinline__ CellResult cell_forward(const float (&x)[kGates<K>], const float (&bias)[4],
                                                   const float (&p)[kGates<K>], const Peephole& peephole, float h,
                                                   float c, bool relu) {
  CellResult r{};
  if constexpr (K == Kind::lstm) {
    const float i = sigmoid<PRECISE>(x[0] + bias[0] + p[0] + peephole.i * c);
    const float f = sigmoid<PRECISE>(x[1] + bias[1] + p[1] + peephole.f * c);
    const float g = hyperbolic_tangent<PRECISE>(x[2] + bias[2] + p[2]), now = f * c + i * g;
    const float o = sigmoid<PRECISE>(x[3] + bias[3] + p[3] + peephole.o * now);
    r = {o * hyperbolic_tangent<PRECISE>(now), now, {i, f, g, o}};
  } else if constexpr (K == Kind::gru) {
    const float reset = sigmoid<PRECISE>(x[0] + bias[0] + p[0]), z = sigmoid<PRECISE>(x[1] + bias[1] + p[1]);
    const float inner = p[2] + bias[3], n = hyperbolic_tangent<PRECISE>(x[2] + bias[2] + reset * inner);
    r = {n + z * (h - n), 0.f, {reset, z, n, inner}};
  } else {
    const float a = x[0] + bias[0] + p[0];
    r.h = relu ? Relu::value<PRECISE>(a, 0.f) : hyperbolic_tangent<PRECISE>(a);
  }
  return r;
}

struct CellGradient {
  float d[4];   // LSTM: i, f, g, o; GRU: n, r, z, n'; RNN: the first
  float carry;  // LSTM: dc of the step before; GRU: the part of its dh that bypasses the product
};

// kept: as cell_forward gives it; c, before: an LSTM's c after and before the step; a GRU's `before`: the old h; y: an
// RNN's output.
template <Kind K, bool PRECISE>
__device__ __forceinline__ CellGradient cell_backward(const float (&kept)[4], const Peephole& peephole, float dh,
                                                      float carry, float c, float before, float y, bool relu) {
  if constexpr (K == Kind::lstm) {
    const float i = kept[0], f = kept[1], g = kept[2], o = kept[3], t = hyperbolic_tangent<PRECISE>(c);
    const float of_o = dh * t * o * (1.f - o), dc = carry + dh * o * (1.f - t * t) + peephole.o * of_o;
    const float of_i = dc * g * i * (1.f - i), of_f = dc * before * f * (1.f - f);
    return {{of_i, of_f, dc * i * (1.f - g * g), of_o}, dc * f + peephole.i * of_i + peephole.f * of_f};
  } else if constexpr (K == Kind::gru) {
    const float r = kept[0], z = kept[1], n = kept[2], inner = kept[3];
    const float dn = dh * (1.f - z) * (1.f - n * n);
    return {{dn, dn * inner * r * (1.f - r), dh * (before - n) * z * (1.f - z), dn * r}, dh * z};
  } else {
    return {{relu ? Relu::gradient_of_output(dh, y) : Tanh::gradient_of_output(dh, y), 0.f, 0.f, 0.f}, carry};
  }
}

template <Kind K>
__device__ __forceinline__ void load_bias(float (&bias)[4], const float* from, int hidden, int unit) {
#pragma unroll
  for (int part = 0; part < 4; ++part) bias[part] = from && part < kWidth<K> ? from[part * hidden + unit] : 0.f;
}

// The tokens of a step and its neighbours', as one tile of rows meets them.
struct Visit {
  int64_t offset, previous, following;  // first tokens: of this step, of the one visited before it, of the one after it
  int64_t rows, begun, staying;         // of this step; rows below `begun` were visited before, below `staying` will be
};

__device__ __forceinline__ Visit visit(const int64_t* offsets, int64_t steps, int64_t turn, bool reverse) {
  const int64_t t = reverse ? steps - 1 - turn : turn, to = reverse ? -1 : 1;
  Visit v{offsets[t], 0, 0, offsets[t + 1] - offsets[t], 0, 0};
  if (turn > 0) {
    v.previous = offsets[t - to];
    v.begun = min(v.rows, offsets[t - to + 1] - v.previous);
  }
  if (turn + 1 < steps) {
    v.following = offsets[t + to];
    v.staying = min(v.rows, offsets[t + to + 1] - v.following);
  }
  return v;
}

}  // namespace pk
