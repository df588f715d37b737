// One block of rows and units of a step: its product, and the cell applied to the accumulators. Each step is a product
// of the state with W_hh whose accumulators, the gates of the same units, stay in registers until the cell has been
// applied to them: gates are neither stored before nor loaded after the product.
//
// Included by recurrent.inc, once per instruction set; see simd.h for why nothing here may have external linkage.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "math.h"
#include "recurrent_kernels.h"

namespace pk {
namespace {

#define PK_LAMBDA __attribute__((always_inline))
#define PK_UNROLL _Pragma("GCC unroll 16")
#define PK_ROLLED _Pragma("GCC unroll 1")

using V = VecF;
using M = Math<float, true>;
constexpr int64_t kV = V::size();

// Rows of a block: accumulators, one row of weights and a broadcast fill the register file (32 or 16).
template <int kGroups>
constexpr int kRows = kV == 16 ? (kGroups == 3 ? 8 : 6) : (kGroups == 3 ? 4 : 3);

// How many of the kV units from `unit` on exist.
PK_INLINE int64_t count_at(int64_t unit, int64_t hidden) { return std::clamp<int64_t>(hidden - unit, 0, kV); }

template <bool kPart>
PK_INLINE V load(const float* p, int64_t count) {
  if constexpr (kPart) return V::loadu(p, count);
  return V::loadu(p);
}
template <bool kPart>
PK_INLINE void store(float* p, V v, int64_t count) {
  if constexpr (kPart) {
    v.store(p, static_cast<int>(count));
  } else {
    v.store(p);
  }
}

// sum[r][q] += sum_k a[r * stride + k] panel[k][q]. `ahead` is as much of what is read next, fetched into L2 meanwhile.
template <int R, int Q>
PK_INLINE void multiply_chain(V (&sum)[R][Q], int64_t depth, const float* a, int64_t stride, const float* panel,
                              const float* ahead) {
  for (int64_t k = 0; k < depth; ++k, panel += Q * kV, ++a) {
    V w[Q];
    PK_UNROLL for (int q = 0; q < Q; ++q) w[q] = V::loadu(panel + q * kV);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + k * 16), _MM_HINT_T1);
    PK_UNROLL for (int r = 0; r < R; ++r) {
      const V b(a[r * stride]);
      PK_UNROLL for (int q = 0; q < Q; ++q) sum[r][q] = fmadd(b, w[q], sum[r][q]);
    }
  }
}

// The same in partial sums of at most kChain products: one chain of additions would lose digits with its length.
template <int64_t kChain = 128, int R, int Q>
PK_INLINE void multiply(V (&sum)[R][Q], int64_t depth, const float* a, int64_t stride, const float* panel,
                        const float* ahead) {
  const int64_t chains = (depth + kChain - 1) / kChain, most = chains ? (depth + chains - 1) / chains : 0;
  for (int64_t k = 0; k < depth; k += most) {
    V part[R][Q];
    PK_UNROLL for (int r = 0; r < R; ++r) { PK_UNROLL for (int q = 0; q < Q; ++q) part[r][q] = V(0.f); }
    multiply_chain(part, std::min(most, depth - k), a + k, stride, panel + k * Q * kV, ahead + k * 16);
    PK_UNROLL for (int r = 0; r < R; ++r) { PK_UNROLL for (int q = 0; q < Q; ++q) sum[r][q] = sum[r][q] + part[r][q]; }
  }
}

// Sums start from zero and meet what they are added to (gates, dy: larger than they are) at the end: begun from there,
// every one of the partial sums would be rounded to its magnitude, which cost a factor of five in the error.
template <int R, int Q>
PK_INLINE void clear(V (&sum)[R][Q]) {
  PK_UNROLL for (int r = 0; r < R; ++r) { PK_UNROLL for (int q = 0; q < Q; ++q) sum[r][q] = V(0.f); }
}

// Sums to memory. What follows a product goes through them row by row in a loop that is not unrolled: it is a fraction
// of the product, and unrolled with it most of what there was to compile.
template <int R, int Q>
PK_INLINE void put_aside(const V (&sum)[R][Q], float* to) {
  PK_UNROLL for (int r = 0; r < R; ++r) {
    PK_UNROLL for (int q = 0; q < Q; ++q) sum[r][q].store(to + (r * Q + q) * kV);
  }
}

// One block of rows and one panel of units. Pointers are at the block's first row and the panel's first unit; `stride`
// is the distance between rows of the product's left side, out_stride between those of the output (and of a vanilla
// RNN's gates, which are its output); everything else without a stride has H or the width between rows.
struct Block {
  int64_t hidden, unit, depth, stride;
  const float *left, *panel, *ahead;
  const float *x, *x_panel;  // the input's side, if its product is made here
  int64_t x_depth, x_stride;
  // forward
  const float *bias, *bias_n, *before;  // GRU: b_hn, h before the step
  const float* peephole;                // LSTM: p_i, p_f, p_o at the first unit, H apart, or null
  float *state, *gates, *cells, *output;
  bool keep, ready;
  // backward
  const float *saved, *saved_cells, *saved_output, *previous, *dy, *final;
  int64_t previous_stride, dy_stride, out_stride;
  float *carry, *dgates;
};

struct Lstm {
  static constexpr int kForward = 4;  // vectors of accumulators a row
  static constexpr int64_t kWidth = 4, kGates = 4;
  static constexpr int64_t kSkip = 0;  // of a token's gate gradients, those that are not the state's
  static constexpr bool kWidePanel = false;

  template <int R, bool kPart>
  static void forward(const Block& b) {
    const int64_t H = b.hidden, n = count_at(b.unit, H);
    V a[R][4];
    clear(a);
    if (b.x_panel) multiply(a, b.x_depth, b.x, b.x_stride, b.x_panel, b.x_panel);
    multiply(a, b.depth, b.left, b.stride, b.panel, b.ahead);
    alignas(64) float sums[R * 4 * kV];
    put_aside(a, sums);
    PK_ROLLED for (int r = 0; r < R; ++r) {
      V gate[4];
      PK_UNROLL for (int q = 0; q < 4; ++q) {
        const V bias = load<kPart>(b.bias + q * H, n);
        gate[q] =
            V::loadu(sums + (r * 4 + q) * kV) + (b.x_panel ? bias : load<kPart>(b.gates + r * 4 * H + q * H, n) + bias);
      }
      const V before = load<kPart>(b.state + r * H, n);
      if (b.peephole) {
        gate[0] = fmadd(load<kPart>(b.peephole, n), before, gate[0]);
        gate[1] = fmadd(load<kPart>(b.peephole + H, n), before, gate[1]);
      }
      const V i = sigmoid<M>(gate[0]), f = sigmoid<M>(gate[1]), g = M::tanh(gate[2]);
      const V c = fmadd(f, before, i * g);
      if (b.peephole) gate[3] = fmadd(load<kPart>(b.peephole + 2 * H, n), c, gate[3]);
      const V o = sigmoid<M>(gate[3]);
      store<kPart>(b.state + r * H, c, n);
      if (b.output) store<kPart>(b.output + r * b.out_stride, o * M::tanh(c), n);
      if (b.keep) {
        float* p = b.gates + r * 4 * H;
        store<kPart>(b.cells + r * H, c, n);
        store<kPart>(p, i, n);
        store<kPart>(p + H, f, n);
        store<kPart>(p + 2 * H, g, n);
        store<kPart>(p + 3 * H, o, n);
      }
    }
  }

  // c' = f c + i g, h' = o tanh(c'); e is the gradient of c'
  template <bool kPart>
  static PK_INLINE void backward(const Block& b, int r, int64_t u, int64_t n, V dh) {
    const int64_t H = b.hidden;
    const float* p = b.saved + r * 4 * H + u;
    float *d = b.dgates + r * 4 * H + u, *carry = b.carry + r * H + u;
    const V one(1.f), i = load<kPart>(p, n), f = load<kPart>(p + H, n), g = load<kPart>(p + 2 * H, n);
    const V o = load<kPart>(p + 3 * H, n), t = M::tanh(load<kPart>(b.saved_cells + r * H + u, n));
    const V before = load<kPart>(b.previous + r * b.previous_stride + u, n), dout = dh * t * negated_fmadd(o, o, o);
    V e = fmadd(dh * o, negated_fmadd(t, t, one), load<kPart>(carry, n));
    if (b.peephole) e = fmadd(dout, load<kPart>(b.peephole + 2 * H + u, n), e);
    const V di = e * g * negated_fmadd(i, i, i), df = e * before * negated_fmadd(f, f, f);
    V dbefore = e * f;
    if (b.peephole) {
      dbefore = fmadd(df, load<kPart>(b.peephole + H + u, n), dbefore);
      dbefore = fmadd(di, load<kPart>(b.peephole + u, n), dbefore);
    }
    store<kPart>(d, di, n);
    store<kPart>(d + H, df, n);
    store<kPart>(d + 2 * H, e * i * negated_fmadd(g, g, one), n);
    store<kPart>(d + 3 * H, dout, n);
    store<kPart>(carry, dbefore, n);
  }
};

struct Gru {
  static constexpr int kForward = 3;
  static constexpr int64_t kWidth = 4, kGates = 3;
  static constexpr int64_t kSkip = 1;
  static constexpr bool kWidePanel = false;

  template <int R, bool kPart>
  static void forward(const Block& b) {
    const int64_t H = b.hidden, n = count_at(b.unit, H);
    V a[R][3];
    clear(a);
    multiply(a, b.depth, b.left, b.stride, b.panel, b.ahead);
    const V bias_r = load<kPart>(b.bias, n), bias_z = load<kPart>(b.bias + H, n), bias_n = load<kPart>(b.bias_n, n);
    alignas(64) float sums[R * 3 * kV];
    put_aside(a, sums);
    PK_ROLLED for (int r = 0; r < R; ++r) {
      const float* sum = sums + r * 3 * kV;
      float* p = b.gates + r * 4 * H;
      const V reset = sigmoid<M>(V::loadu(sum) + (load<kPart>(p, n) + bias_r));
      const V z = sigmoid<M>(V::loadu(sum + kV) + (load<kPart>(p + H, n) + bias_z));
      const V hidden = (b.ready ? load<kPart>(p + 3 * H, n) : V::loadu(sum + 2 * kV)) + bias_n;
      const V input = load<kPart>(p + 2 * H, n) + load<kPart>(b.bias + 2 * H, n);
      const V candidate = M::tanh(fmadd(reset, hidden, input));
      if (b.output) {
        const V h = load<kPart>(b.before + r * b.stride, n);
        store<kPart>(b.output + r * b.out_stride, fmadd(z, h - candidate, candidate), n);
      }
      if (b.keep) {
        store<kPart>(p, reset, n);
        store<kPart>(p + H, z, n);
        store<kPart>(p + 2 * H, candidate, n);
        store<kPart>(p + 3 * H, hidden, n);
      }
    }
  }

  template <bool kPart>
  static PK_INLINE void backward(const Block& b, int r, int64_t u, int64_t count, V dh) {
    const int64_t H = b.hidden;
    const float* p = b.saved + r * 4 * H + u;
    float* d = b.dgates + r * 4 * H + u;
    const V reset = load<kPart>(p, count), z = load<kPart>(p + H, count), n = load<kPart>(p + 2 * H, count);
    const V h = load<kPart>(b.previous + r * b.previous_stride + u, count);
    const V dn = negated_fmadd(dh, z, dh) * negated_fmadd(n, n, V(1.f));
    store<kPart>(d, dn, count);
    store<kPart>(d + H, dn * load<kPart>(p + 3 * H, count) * negated_fmadd(reset, reset, reset), count);
    store<kPart>(d + 2 * H, dh * (h - n) * negated_fmadd(z, z, z), count);
    store<kPart>(d + 3 * H, dn * reset, count);
    store<kPart>(b.carry + r * H + u, dh * z, count);
  }
};

template <bool kTanh>
struct Vanilla {
  static constexpr int kForward = 4;
  static constexpr int64_t kWidth = 1, kGates = 1;
  static constexpr int64_t kSkip = 0;
  static constexpr bool kWidePanel = true;

  template <int R, bool kPart>
  static void forward(const Block& b) {
    const int64_t H = b.hidden;
    V a[R][4];
    clear(a);
    if (b.x_panel) multiply(a, b.x_depth, b.x, b.x_stride, b.x_panel, b.x_panel);
    multiply<64>(a, b.depth, b.left, b.stride, b.panel, b.ahead);
    alignas(64) float sums[R * 4 * kV];
    put_aside(a, sums);
    PK_ROLLED for (int i = 0; i < R * 4; ++i) {
      const int64_t r = i / 4, q = i % 4, n = count_at(b.unit + q * kV, H);
      const V bias = load<kPart>(b.bias + q * kV, n);
      const V sum =
          V::loadu(sums + i * kV) + (b.x_panel ? bias : load<kPart>(b.gates + r * b.out_stride + q * kV, n) + bias);
      store<kPart>(b.output + r * b.out_stride + q * kV, kTanh ? M::tanh(sum) : zero_unless_positive(sum, sum), n);
    }
  }

  template <bool kPart>
  static PK_INLINE void backward(const Block& b, int r, int64_t u, int64_t n, V dh) {
    const V y = load<kPart>(b.saved_output + r * b.out_stride + u, n);
    store<kPart>(b.dgates + r * b.hidden + u, kTanh ? dh * negated_fmadd(y, y, V(1.f)) : zero_unless_positive(y, dh),
                 n);
  }
};

// What a product with nothing after it is: projections, and gradients of what a matrix was multiplied with.
struct Plain {
  static constexpr int kForward = 4;
  static constexpr bool kWidePanel = true;

  template <int R, bool kPart>
  static void forward(const Block& b) {
    V a[R][4];
    clear(a);
    multiply<32>(a, b.depth, b.left, b.stride, b.panel, b.ahead);
    alignas(64) float sums[R * 4 * kV];
    put_aside(a, sums);
    PK_ROLLED for (int i = 0; i < R * 4; ++i) {
      const int64_t r = i / 4, q = i % 4, n = count_at(b.unit + q * kV, b.hidden);
      V sum = V::loadu(sums + i * kV);
      if (b.dy) sum = sum + load<kPart>(b.dy + r * b.dy_stride + q * kV, n);
      if (b.final) sum = sum + load<kPart>(b.final + r * b.hidden + q * kV, n);
      store<kPart>(b.output + r * b.out_stride + q * kV, sum, n);
    }
  }
};

// dh of a block of rows and four vectors of units; then the cell's derivative.
template <class C, int R, bool kPart>
void backward_block(const Block& b) {
  const int64_t H = b.hidden;
  V dh[R][4];
  clear(dh);
  multiply(dh, b.depth, b.left, b.stride, b.panel, b.ahead);
  alignas(64) float sums[R * 4 * kV];
  put_aside(dh, sums);
  PK_ROLLED for (int i = 0; i < R * 4; ++i) {
    const int r = i / 4, q = i % 4;
    const int64_t n = count_at(b.unit + q * kV, H);
    V more = b.dy ? load<kPart>(b.dy + r * b.dy_stride + q * kV, n) : V(0.f);
    if (b.final) more = more + load<kPart>(b.final + r * H + q * kV, n);
    if constexpr (C::kSkip) more = more + load<kPart>(b.carry + r * H + q * kV, n);
    C::template backward<kPart>(b, r, q * kV, n, V::loadu(sums + i * kV) + more);
  }
}

template <int R, class Body>
PK_INLINE void with_count(int64_t rows, Body body) {
  if constexpr (R > 1) {
    if (rows < R) return with_count<R - 1>(rows, body);
  }
  body(std::integral_constant<int, R>{});
}

// Calls body(first row, constant R) for blocks of nearly equal size, at most kMost, of the rows [begin, end).
template <int kMost, class Body>
PK_INLINE void for_row_blocks(int64_t begin, int64_t end, Body body) {
  const int64_t rows = end - begin;
  if (rows <= 0) return;
  const int64_t blocks = (rows + kMost - 1) / kMost, base = rows / blocks, more = rows % blocks;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t n = base + (i < more);
    with_count<kMost>(n, [&](auto count) PK_LAMBDA { body(begin, count); });
    begin += n;
  }
}

}  // namespace
}  // namespace pk
