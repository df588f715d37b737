// The LSTM's time loop in bfloat16 on AMX tiles. As in recurrent.inc each step's product is followed at once by the
// cell, here through a block of 32 rows by 32 units a gate in L1; c and all arithmetic beside the products are float32.
// Where the weights of the state and of the input fit the second-level cache together, the product is that of both:
// gates are then never rounded to bfloat16, nor stored before the cell. Larger weights are read by odd steps in the
// reverse of the order of even ones: what the step before read last is still in the cache.
//
// The state of a thread's rows is kept in scratch of its own, padded so that tiles may be loaded whole: rows to 32,
// columns to 32 and one cache line more (rows of a power of two of bytes would share the sets of L1). Compiled with the
// AVX-512 and AMX flags setup.py gives to *_amx.cpp.
#include "math.h"
#include "recurrent_amx.h"

namespace pk {
namespace {

using M = Math<float, false>;

int64_t padded(int64_t columns) { return round_up(columns, kTile) + 32; }
// Weights larger than this do not stay in a second-level cache of 2 MiB beside what streams through it.
constexpr int64_t kStays = int64_t{5} << 18;

// ---- packing

int64_t packed_forward(int64_t H, int64_t inputs) {
  return round_up(H, kTile) * 4 * (round_up(H, kTile) + round_up(inputs, kTile));
}
int64_t packed_backward(int64_t depth, int64_t columns) { return round_up(columns, kTile) * round_up(depth, kTile); }

// One gate's rows of a panel, [depth / 2][32][2], of w (rows, depth); what is there no more is zero.
void pack_rows(int64_t rows, int64_t depth, const Word* w, Word* packed) {
  const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                        _mm512_set1_epi32(static_cast<int>(depth)));
  std::fill(packed, packed + kTile * round_up(depth, kTile), Word{0});
  for (int64_t u = 0; u < rows && u < kTile; u += 16) {
    const Word* from = w + u * depth;
    Word* to = packed + 2 * u;
    const __mmask16 m = static_cast<__mmask16>(columns_of(rows - u));
    for (int64_t k = 0; k + 1 < depth; k += 2) {
      _mm512_storeu_si512(to + k * kTile, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), m, at, from + k, 2));
    }
    for (int64_t j = 0; depth % 2 && j < std::min<int64_t>(16, rows - u); ++j) {
      to[(depth - 1) * kTile + 2 * j] = from[j * depth + depth - 1];
    }
  }
}

// [unit / 32][gate][(H + inputs) / 2][32][2], H and inputs rounded up to 32 each
void pack_forward(int64_t H, int64_t inputs, const Word* w_hh, const Word* w_ih, Word* packed) {
  for (int64_t unit = 0; unit < H; unit += kTile) {
    for (int64_t q = 0; q < 4; ++q) {
      pack_rows(H - unit, H, w_hh + (q * H + unit) * H, packed);
      packed += kTile * round_up(H, kTile);
      if (inputs == 0) continue;
      pack_rows(H - unit, inputs, w_ih + (q * H + unit) * inputs, packed);
      packed += kTile * round_up(inputs, kTile);
    }
  }
}

// [column / 32][depth / 2][32][2] of w (depth, columns), whose depth is even
void pack_backward(int64_t depth, int64_t columns, const Word* w, Word* packed) {
  const int64_t whole = round_up(depth, kTile);
  for (int64_t c = 0; c < columns; c += kTile) {
    const __mmask32 m = columns_of(columns - c);
    for (int64_t k = 0; k < whole; k += 2, packed += 2 * kTile) {
      const __m512i even = load_words(w + k * columns + c, k < depth ? m : 0);
      const __m512i odd = load_words(w + (k + 1) * columns + c, k < depth ? m : 0);
      _mm512_storeu_si512(packed, interleaved_low(even, odd));
      _mm512_storeu_si512(packed + kTile, interleaved_high(even, odd));
    }
  }
}

// ---- the loops

// Scratch of a call: two states, so that a step's result does not overwrite what its later panels still read.
struct States {
  Word *now, *next;
  int64_t stride;
  States(void* memory, int64_t rows, int64_t columns) : stride(padded(columns)) {
    now = static_cast<Word*>(memory);
    next = now + round_up(rows, kTile) * stride;
    std::memset(memory, 0, bytes(rows, columns));
  }
  static int64_t bytes(int64_t rows, int64_t columns) { return 2 * 2 * round_up(rows, kTile) * padded(columns); }
};

int64_t scratch_bytes(int64_t H, int64_t inputs, int64_t rows) {
  return States::bytes(rows, std::max(4 * H, round_up(H, kTile) + inputs));
}

// body(index) for the panels, or groups of them, of a step.
template <class Body>
PK_INLINE void over_panels(int64_t count, int64_t step, bool stays, Body body) {
  for (int64_t i = 0; i < count; ++i) body(stays || step % 2 == 0 ? i : count - 1 - i);
}

// 1 / (1 + 2^y), y = -x / ln 2, to what float16 keeps. Of any x: the power overflows to infinity, whose reciprocal is
// 0.
PK_INLINE V sigmoid_of(V x) {
  const V y = x * V(-1.44269504f), f = fraction(y);
  const V p = polynomial(f, V(0.99992520f), V(0.69583356f), V(0.22606716f), V(0.07802452f));  // as exp's in math.h
  return _mm512_rcp14_ps(V(_mm512_scalef_ps(p, y)) + V(1.f));
}

// A block's cell, from its gates without biases: i f g o, 32 x 32 each.
template <bool kWhole>
void cell_forward(const AmxForwardArgs& a, const float* sums, int64_t token, int64_t block, int64_t rows, int64_t unit,
                  Word* h, int64_t stride) {
  const int64_t H = a.hidden;
  const __mmask32 m = kWhole ? ~__mmask32{0} : columns_of(H - unit);
  const float* bias = a.bias + unit;
  for (int64_t r = 0; r < rows; ++r) {
    Word* p = a.gates + (token + block + r) * 4 * H + unit;
    float* state = a.state + (block + r) * H + unit;
    float* cells = a.cells + (token + block + r) * H + unit;
    __m512i words[4] = {};
    if (a.inputs == 0) {
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) words[q] = load_words(p + q * H, m);
    }
    V i[2], f[2], g[2], o[2], y[2];
    both_halves([&](auto z) PK_LAMBDA {
      V gate[4];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        gate[q] = V::loadu(sums + (q * kTile + r) * kTile + 16 * z) + load_floats<z>(bias + q * H, m);
      }
      if (a.inputs == 0) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) gate[q] = gate[q] + from_bfloat16<z>(words[q]);
      }
      i[z] = sigmoid_of(gate[0]);
      f[z] = sigmoid_of(gate[1]);
      g[z] = M::tanh(gate[2]);
      o[z] = sigmoid_of(gate[3]);
      const V c = fmadd(f[z], load_floats<z>(state, m), i[z] * g[z]);
      y[z] = o[z] * M::tanh(c);
      store_floats<z>(state, m, c);
      if (a.keep) store_floats<z>(cells, m, c);
    });
    store_bfloat16(a.output + (token + block + r) * a.output_stride + unit, m, y);
    store_bfloat16(h + r * stride + unit, m, y);
    if (!a.keep) continue;
    store_float16(p, m, i);
    store_float16(p + H, m, f);
    store_float16(p + 2 * H, m, g);
    store_float16(p + 3 * H, m, o);
  }
}

void forward(const AmxForwardArgs& a, int64_t first, int64_t last, int64_t row, int64_t row_end, void* memory) {
  const int64_t H = a.hidden, of_state = round_up(H, kTile), depth = of_state + round_up(a.inputs, kTile);
  const bool stays = packed_forward(H, a.inputs) * 2 <= kStays;
  const Tiles tiles;
  States h(memory, row_end - row, depth);
  alignas(64) float sums[kPanels * kTile * kTile];
  const auto copy_in = [&](const Word* from, int64_t stride, int64_t columns, int64_t begin, int64_t end, Word* to) {
    for (int64_t r = begin; r < end; ++r) std::memcpy(to + (r - row) * h.stride, from + r * stride, 2 * columns);
  };
  for (int64_t step = first; step < last; ++step) {
    const int64_t t = a.steps.at(step), token = a.steps.offsets[t], end = std::min(row_end, a.steps.sizes[t]);
    const int64_t continued = std::min(row_end, a.steps.continued(step));
    if (step == first && step) {
      copy_in(a.output + a.steps.offsets[a.steps.at(step - 1)] * a.output_stride, a.output_stride, H, row, continued,
              h.now);
    }
    copy_in(a.h0, H, H, std::max(row, continued), end, h.now);
    if (a.inputs) copy_in(a.x + token * a.x_stride, a.x_stride, a.inputs, row, end, h.now + of_state);
    over_panels(of_state / kTile, step, stays, [&](int64_t index) PK_LAMBDA {
      const int64_t unit = index * kTile;
      const Word* panel = a.weight + unit * 4 * depth;
      for (int64_t block = row; block < end; block += kTile) {
        const int64_t rows = std::min(kTile, end - block);
        const int64_t at = (token + block) * H + unit;
        const auto ahead = [&](int64_t r) PK_LAMBDA {
          fetch(a.output + (token + block + r) * a.output_stride + unit);
          if (!a.keep) return;
          fetch_floats(a.cells + at + r * H);
          for (int64_t q = 0; q < 4; ++q) fetch(a.gates + (token + block + r) * 4 * H + q * H + unit);
        };
        multiply(rows, depth, h.now + (block - row) * h.stride, h.stride, 4, panel, sums, ahead);
        const auto cell = unit + kTile <= H ? cell_forward<true> : cell_forward<false>;
        cell(a, sums, token, block, rows, unit, h.next + (block - row) * h.stride, h.stride);
      }
    });
    std::swap(h.now, h.next);
  }
}

// A block's derivative of the cell, from the product with the gate gradients of the step after it (`product` rows).
template <bool kWhole>
void cell_backward(const AmxBackwardArgs& a, const float* sums, int64_t product, int64_t token, int64_t block,
                   int64_t rows, int64_t unit, const float* previous, int64_t continued, Word* d, int64_t stride) {
  const int64_t H = a.hidden;
  const __mmask32 m = kWhole ? ~__mmask32{0} : columns_of(H - unit);
  const V one(1.f);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = block + r, at = (token + b) * H + unit;
    const Word* p = a.gates + (token + b) * 4 * H + unit;
    const float* c_before = (b < continued ? previous : a.c0) + b * H + unit;
    float* carry = a.carry + b * H + unit;
    const __m512i dy = load_words(a.dy + (token + b) * a.dy_stride + unit, m);
    const __m512i saved[4] = {load_words(p, m), load_words(p + H, m), load_words(p + 2 * H, m),
                              load_words(p + 3 * H, m)};
    V gradient[4][2];
    both_halves([&](auto z) PK_LAMBDA {
      const V more = r < product ? V::loadu(sums + r * kTile + 16 * z) : load_floats<z>(a.dhn + b * H + unit, m);
      const V dh = from_bfloat16<z>(dy) + more;
      const V i = from_float16<z>(saved[0]), f = from_float16<z>(saved[1]);
      const V g = from_float16<z>(saved[2]), o = from_float16<z>(saved[3]);
      const V tc = M::tanh(load_floats<z>(a.cells + at, m));
      const V e = fmadd(dh * o, negated_fmadd(tc, tc, one), load_floats<z>(carry, m));
      gradient[0][z] = e * g * negated_fmadd(i, i, i);
      gradient[1][z] = e * load_floats<z>(c_before, m) * negated_fmadd(f, f, f);
      gradient[2][z] = e * i * negated_fmadd(g, g, one);
      gradient[3][z] = dh * tc * negated_fmadd(o, o, o);
      store_floats<z>(carry, m, e * f);
    });
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m512i words = narrow(gradient[q][0], gradient[q][1]);
      store_words(a.dgates + (token + b) * a.dgates_stride + q * H + unit, m, words);
      store_words(d + r * stride + q * H + unit, m, words);
    }
  }
}

void backward(const AmxBackwardArgs& a, int64_t first, int64_t last, int64_t row, int64_t row_end, void* memory) {
  const int64_t H = a.hidden, depth = round_up(4 * H, kTile);
  const bool stays = packed_backward(depth, H) * 2 <= kStays;
  const Tiles tiles;
  States d(memory, row_end - row, 4 * H);
  constexpr int64_t kGroup = kPanels * kTile;
  const auto panels_in = [](int64_t columns) { return round_up(columns, kTile) / kTile; };
  alignas(64) float sums[kPanels * kTile * kTile];
  for (int64_t step = last - 1; step >= first; --step) {
    const int64_t t = a.steps.at(step), token = a.steps.offsets[t], end = std::min(row_end, a.steps.sizes[t]);
    const int64_t continued = a.steps.continued(step), going_on = a.steps.going_on(step);
    const float* previous = step ? a.cells + a.steps.offsets[a.steps.at(step - 1)] * H : nullptr;
    over_panels((H + kGroup - 1) / kGroup, step, stays, [&](int64_t index) PK_LAMBDA {
      const int64_t group = index * kGroup, group_end = std::min(H, group + kGroup);
      for (int64_t block = row; block < end; block += kTile) {
        const int64_t rows = std::min(kTile, end - block), product = std::min(rows, going_on - block);
        const int64_t at = (block - row) * d.stride;
        const auto ahead = [&](int64_t r) PK_LAMBDA {
          const int64_t b = block + r;
          for (int64_t unit = group; unit < group_end; unit += kTile) {
            fetch(a.dy + (token + b) * a.dy_stride + unit);
            if (b < continued) fetch_floats(previous + b * H + unit);
            for (int64_t q = 0; q < 4; ++q) {
              fetch(a.gates + (token + b) * 4 * H + q * H + unit);
              fetch(a.dgates + (token + b) * a.dgates_stride + q * H + unit);
            }
          }
        };
        if (product > 0) {
          multiply(product, depth, d.now + at, d.stride, panels_in(group_end - group), a.weight + group * depth, sums,
                   ahead);
        }
        for (int64_t unit = group; unit < group_end; unit += kTile) {
          const auto cell = unit + kTile <= H ? cell_backward<true> : cell_backward<false>;
          cell(a, sums + (unit - group) * kTile, product, token, block, rows, unit, previous, continued, d.next + at,
               d.stride);
        }
      }
    });
    std::swap(d.now, d.next);
    // The input's gradient, while those of this step's gates are near.
    for (int64_t group = 0; a.dx && group < a.inputs; group += kGroup) {
      const int64_t group_end = std::min(a.inputs, group + kGroup);
      for (int64_t block = row; block < end; block += kTile) {
        const int64_t rows = std::min(kTile, end - block);
        multiply(rows, depth, d.now + (block - row) * d.stride, d.stride, panels_in(group_end - group),
                 a.x_weight + group * depth, sums, [](int64_t) {});
        for (int64_t c = group; c < group_end; c += kTile) {
          for (int64_t r = 0; r < rows; ++r) {
            const float* from = sums + (c - group + r) * kTile;
            const V v[2] = {V::loadu(from), V::loadu(from + 16)};
            store_bfloat16(a.dx + (token + block + r) * a.inputs + c, columns_of(a.inputs - c), v);
          }
        }
      }
    }
  }
}

}  // namespace

const AmxKernels* recurrent_kernels_amx() {
  static constexpr AmxKernels kernels{
      packed_forward, packed_backward, pack_forward,         pack_backward,       scratch_bytes,  forward,
      backward,       kStays,          amx_gradient_scratch, amx_weight_gradient, amx_column_sums};
  return &kernels;
}

}  // namespace pk
