// The LSTM's time loop in bfloat16 on AMX tiles. As in recurrent.inc each step's product with W_hh is followed at once
// by the cell, here through a block of 32 rows by 32 units a gate in L1; c and all arithmetic beside the products are
// float32.
//
// The state of a thread's rows is kept in scratch of its own, padded so that tiles may be loaded whole: rows to 32,
// columns to 32 and one cache line more (rows of a power of two of bytes would share the sets of L1). Compiled with the
// AVX-512 and AMX flags setup.py gives to *_amx.cpp.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "math.h"
#include "recurrent_kernels.h"

namespace pk {
namespace {

using V = VecF;
using M = Math<float, false>;
using Word = uint16_t;  // bfloat16 or, in the saved gates, float16
constexpr int64_t kTile = 32;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t padded(int64_t columns) { return round_up(columns, kTile) + 32; }

PK_INLINE __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}
PK_INLINE V load(const Word* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
PK_INLINE void store(Word* p, __mmask16 m, V v) {
  _mm256_mask_storeu_epi16(p, m, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
PK_INLINE V load_half(const Word* p, __mmask16 m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
PK_INLINE void store_half(Word* p, __mmask16 m, V v) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PK_INLINE V load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
PK_INLINE void store(float* p, __mmask16 m, V v) { _mm512_mask_storeu_ps(p, m, v); }

// The tile configuration is state of the thread that torch's own products use too: ours is taken back at the end.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(old_);
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes a row
      config[48 + i] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~Tiles() {
    if (old_[0]) {
      _tile_loadconfig(old_);
    } else {
      _tile_release();
    }
  }

 private:
  alignas(64) uint8_t old_[64];
};

// c (rows x 32) = a (rows x depth) panel, rows 16 or 32, depth a multiple of 32. A panel holds pairs of rows of the
// right side interleaved: panel[depth / 2][32][2].
template <bool kTwo>
PK_INLINE void multiply_tiles(int64_t depth, const Word* a, int64_t stride, const Word* panel, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTile) {
    _tile_loadd(6, panel + k * kTile, 2 * kTile * 2);
    _tile_loadd(4, a + k, stride * 2);
    _tile_loadd(7, panel + k * kTile + 32, 2 * kTile * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, a + 16 * stride + k, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, kTile * 4);
  _tile_stored(1, c + 16, kTile * 4);
  if constexpr (kTwo) {
    _tile_stored(2, c + 16 * kTile, kTile * 4);
    _tile_stored(3, c + 16 * kTile + 16, kTile * 4);
  }
}
PK_INLINE void multiply(int64_t rows, int64_t depth, const Word* a, int64_t stride, const Word* panel, float* c) {
  rows > 16 ? multiply_tiles<true>(depth, a, stride, panel, c) : multiply_tiles<false>(depth, a, stride, panel, c);
}

// ---- packing

int64_t packed_forward(int64_t H) { return round_up(H, kTile) * 4 * round_up(H, kTile); }
int64_t packed_backward(int64_t H) { return round_up(H, kTile) * round_up(4 * H, kTile); }

// [unit / 32][gate][H / 2][32][2]
void pack_forward(int64_t H, const Word* w, Word* packed) {
  const int64_t depth = round_up(H, kTile);
  std::fill(packed, packed + packed_forward(H), Word{0});
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(H)));
  for (int64_t unit = 0; unit < H; unit += kTile) {
    for (int64_t q = 0; q < 4; ++q, packed += depth * kTile) {
      for (int64_t u = 0; u < kTile; u += 16) {
        const __mmask16 m = lanes(H - unit - u);
        const Word* from = w + (q * H + unit + u) * H;
        Word* to = packed + 2 * u;
        if (!m) continue;
        for (int64_t k = 0; k + 1 < H; k += 2) {
          _mm512_storeu_si512(to + k * kTile,
                              _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), m, rows, from + k, 2));
        }
        for (int64_t j = 0; H % 2 && j < std::min<int64_t>(16, H - unit - u); ++j) {
          to[(H - 1) * kTile + 2 * j] = from[j * H + H - 1];
        }
      }
    }
  }
}

// [unit / 32][4H / 2][32][2]
void pack_backward(int64_t H, const Word* w, Word* packed) {
  const int64_t depth = 4 * H, whole = round_up(depth, kTile);
  for (int64_t unit = 0; unit < H; unit += kTile) {
    for (int64_t k = 0; k < whole; k += 2, packed += 2 * kTile) {
      for (int64_t u = 0; u < kTile; u += 16) {
        const __mmask16 m = k < depth ? lanes(H - unit - u) : 0;  // 4H is even: pairs are whole
        const Word* from = w + k * H + unit + u;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, from + H));
        _mm512_storeu_si512(packed + 2 * u, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }
}

// Scratch of a call: two states, so that a step's result does not overwrite what its later panels still read.
struct Pair {
  Word *now, *next;
  int64_t stride;
  Pair(void* memory, int64_t rows, int64_t columns) : stride(padded(columns)) {
    now = static_cast<Word*>(memory);
    next = now + round_up(rows, kTile) * stride;
    std::memset(memory, 0, bytes(rows, columns));
  }
  static int64_t bytes(int64_t rows, int64_t columns) { return 2 * 2 * round_up(rows, kTile) * padded(columns); }
};

int64_t scratch_bytes(int64_t H, int64_t rows) { return Pair::bytes(rows, 4 * H); }

void forward(const AmxForwardArgs& a, int64_t first, int64_t last, int64_t row, int64_t row_end, void* memory) {
  const int64_t H = a.hidden, G = 4 * H, depth = round_up(H, kTile);
  Tiles tiles;
  Pair h(memory, row_end - row, H);
  alignas(64) float sums[4][kTile * kTile];
  const auto copy_in = [&](const Word* from, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::memcpy(h.now + (r - row) * h.stride, from + r * stride, 2 * H);
  };
  for (int64_t step = first; step < last; ++step) {
    const int64_t t = a.steps.at(step), token = a.steps.offsets[t], end = std::min(row_end, a.steps.sizes[t]);
    const int64_t continued = std::min(row_end, a.steps.continued(step));
    if (step == first && step) {
      copy_in(a.output + a.steps.offsets[a.steps.at(step - 1)] * a.output_stride, a.output_stride, row, continued);
    }
    copy_in(a.h0, H, std::max(row, continued), end);
    for (int64_t unit = 0; unit < H; unit += kTile) {
      const Word* panel = a.weight + unit * 4 * depth;
      for (int64_t block = row; block < end; block += kTile) {
        const int64_t rows = std::min(kTile, end - block);
        for (int64_t q = 0; q < 4; ++q) {
          multiply(rows, depth, h.now + (block - row) * h.stride, h.stride, panel + q * depth * kTile, sums[q]);
        }
        for (int64_t u = 0; u < kTile && unit + u < H; u += 16) {
          const int64_t n = unit + u;
          const __mmask16 m = lanes(H - n);
          const V bi = load(a.bias + n, m), bf = load(a.bias + H + n, m), bg = load(a.bias + 2 * H + n, m),
                  bo = load(a.bias + 3 * H + n, m);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t s = r * kTile + u, at = (token + block + r) * H + n;
            Word* p = a.gates + (token + block + r) * G + n;
            float* state = a.state + (block + r) * H + n;
            const V i = sigmoid<M>(V::loadu(sums[0] + s) + bi + load(p, m));
            const V f = sigmoid<M>(V::loadu(sums[1] + s) + bf + load(p + H, m));
            const V g = M::tanh(V::loadu(sums[2] + s) + bg + load(p + 2 * H, m));
            const V o = sigmoid<M>(V::loadu(sums[3] + s) + bo + load(p + 3 * H, m));
            const V c = fmadd(f, load(state, m), i * g), y = o * M::tanh(c);
            store(state, m, c);
            store(a.output + (token + block + r) * a.output_stride + n, m, y);
            store(h.next + (block + r - row) * h.stride + n, m, y);
            if (a.keep) {
              store(a.cells + at, m, c);
              store_half(p, m, i);
              store_half(p + H, m, f);
              store_half(p + 2 * H, m, g);
              store_half(p + 3 * H, m, o);
            }
          }
        }
      }
    }
    std::swap(h.now, h.next);
  }
}

void backward(const AmxBackwardArgs& a, int64_t first, int64_t last, int64_t row, int64_t row_end, void* memory) {
  const int64_t H = a.hidden, G = 4 * H, depth = round_up(G, kTile);
  Tiles tiles;
  Pair d(memory, row_end - row, G);
  alignas(64) float sums[kTile * kTile];
  const V one(1.f);
  for (int64_t step = last - 1; step >= first; --step) {
    const int64_t t = a.steps.at(step), token = a.steps.offsets[t], end = std::min(row_end, a.steps.sizes[t]);
    const int64_t continued = a.steps.continued(step), going_on = a.steps.going_on(step);
    const float* previous = step ? a.cells + a.steps.offsets[a.steps.at(step - 1)] * H : nullptr;
    for (int64_t unit = 0; unit < H; unit += kTile) {
      for (int64_t block = row; block < end; block += kTile) {
        const int64_t rows = std::min(kTile, end - block), product = std::min(rows, going_on - block);
        if (product > 0)
          multiply(product, depth, d.now + (block - row) * d.stride, d.stride, a.weight + unit * depth, sums);
        for (int64_t u = 0; u < kTile && unit + u < H; u += 16) {
          const int64_t n = unit + u;
          const __mmask16 m = lanes(H - n);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t b = block + r, at = (token + b) * H + n;
            const Word* p = a.gates + (token + b) * G + n;
            Word *out = a.dgates + (token + b) * a.dgates_stride + n, *kept = d.next + (b - row) * d.stride + n;
            float* carry = a.carry + b * H + n;
            const V more = r < product ? V::loadu(sums + r * kTile + u) : load(a.dhn + b * H + n, m);
            const V dh = load(a.dy + (token + b) * a.dy_stride + n, m) + more;
            const V before = load((b < continued ? previous : a.c0) + b * H + n, m);
            const V i = load_half(p, m), f = load_half(p + H, m), g = load_half(p + 2 * H, m),
                    o = load_half(p + 3 * H, m);
            const V tc = M::tanh(load(a.cells + at, m));
            const V e = fmadd(dh * o, negated_fmadd(tc, tc, one), load(carry, m));
            const V di = e * g * negated_fmadd(i, i, i), df = e * before * negated_fmadd(f, f, f);
            const V dg = e * i * negated_fmadd(g, g, one), dout = dh * tc * negated_fmadd(o, o, o);
            store(carry, m, e * f);
            store(out, m, di);
            store(out + H, m, df);
            store(out + 2 * H, m, dg);
            store(out + 3 * H, m, dout);
            store(kept, m, di);
            store(kept + H, m, df);
            store(kept + 2 * H, m, dg);
            store(kept + 3 * H, m, dout);
          }
        }
      }
    }
    std::swap(d.now, d.next);
  }
}

// ---- the weights' gradients

// 16 x 16 transpose of 32-bit words: to[j][i] = from[i][j].
PK_INLINE void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(stride)));
  for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * to_stride, _mm512_i32gather_epi32(rows, from + j, 4));
}

// Pairs of rows interleaved: to[rows / 2][columns][2], columns (at most 32) padded with zeros; an odd last row too.
PK_INLINE void interleave(const Word* from, int64_t stride, int64_t rows, int64_t columns, Word* to) {
  const __mmask16 low = lanes(columns), high = lanes(columns - 16);
  for (int64_t k = 0; k < rows; k += 2, to += 2 * kTile) {
    const Word *a = from + k * stride, *b = a + stride;
    const bool whole = k + 1 < rows;
    for (int64_t u = 0; u < 2; ++u) {
      const __mmask16 m = u ? high : low;
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, a + 16 * u));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(whole ? m : 0, b + 16 * u));
      _mm512_storeu_si512(to + 32 * u, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

constexpr int64_t kDepth = 512;  // tokens of a block: the left side of one stays in L2, a panel of the right in L1
constexpr int64_t kDepthStride = kDepth + 32;

int64_t gradient_scratch_words(int64_t columns) {
  return round_up(columns, kTile) * kDepthStride + kDepth * kTile + kDepth * kTile;
}

// sums (round_up(columns, 32) x round_up(width, 32)) += x^T d for x (tokens x columns), d (tokens x width). That is the
// transposed gradient of a weight: of the two sides it is the narrow one that is transposed here.
void add_weight_gradient(const Word* x, int64_t x_stride, int64_t columns, const Word* d, int64_t d_stride,
                         int64_t width, int64_t tokens, float* sums, Word* scratch) {
  Tiles tiles;
  const int64_t rows = round_up(columns, kTile), pitch = round_up(width, kTile);
  Word *left = scratch, *panel = left + rows * kDepthStride, *pairs = panel + kDepth * kTile;
  for (int64_t begin = 0; begin < tokens; begin += kDepth) {
    const int64_t depth = std::min(kDepth, tokens - begin), whole = round_up(depth, kTile);
    for (int64_t c = 0; c < columns; c += kTile) {
      // Interleaved pairs of tokens are 32-bit words (token pair, column); their transpose is x^T.
      std::memset(pairs + round_up(depth, 2) * kTile, 0, (whole - round_up(depth, 2)) * kTile * sizeof(Word));
      interleave(x + begin * x_stride + c, x_stride, depth, columns - c, pairs);
      for (int64_t k = 0; k < whole; k += 32) {
        for (int64_t j = 0; j < kTile; j += 16) {
          transpose_words(reinterpret_cast<const uint32_t*>(pairs + k * kTile) + j, kTile,
                          reinterpret_cast<uint32_t*>(left + (c + j) * kDepthStride + k), kDepthStride / 2);
        }
      }
    }
    for (int64_t n = 0; n < width; n += kTile) {
      std::memset(panel + round_up(depth, 2) * kTile, 0, (whole - round_up(depth, 2)) * kTile * sizeof(Word));
      interleave(d + begin * d_stride + n, d_stride, depth, width - n, panel);
      for (int64_t m = 0; m < rows; m += kTile) {
        const Word* a = left + m * kDepthStride;
        float* c = sums + m * pitch + n;
        _tile_loadd(0, c, pitch * 4);
        _tile_loadd(1, c + 16, pitch * 4);
        _tile_loadd(2, c + 16 * pitch, pitch * 4);
        _tile_loadd(3, c + 16 * pitch + 16, pitch * 4);
        for (int64_t k = 0; k < whole; k += kTile) {
          _tile_loadd(6, panel + k * kTile, 2 * kTile * 2);
          _tile_loadd(4, a + k, kDepthStride * 2);
          _tile_loadd(7, panel + k * kTile + 32, 2 * kTile * 2);
          _tile_loadd(5, a + 16 * kDepthStride + k, kDepthStride * 2);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, pitch * 4);
        _tile_stored(1, c + 16, pitch * 4);
        _tile_stored(2, c + 16 * pitch, pitch * 4);
        _tile_stored(3, c + 16 * pitch + 16, pitch * 4);
      }
    }
  }
}

// out (width x columns) = the transpose of sums (rows at least columns, `pitch` apart), rounded.
void round_transposed(const float* sums, int64_t pitch, int64_t columns, int64_t width, Word* out) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(pitch)));
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 m = lanes(columns - c);
    for (int64_t n = 0; n < width; ++n) {
      store(out + n * columns + c, m,
            V(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, rows, sums + c * pitch + n, 4)));
    }
  }
}

void add_column_sums(const Word* a, int64_t rows, int64_t cols, float* sums) {
  constexpr int64_t kPartial = 64;
  for (int64_t begin = 0; begin < rows; begin += kPartial) {
    const int64_t end = std::min(rows, begin + kPartial);
    for (int64_t c = 0; c < cols; c += 64) {
      V sum[4] = {V(0.f), V(0.f), V(0.f), V(0.f)};
      for (int64_t r = begin; r < end; ++r) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) sum[q] = sum[q] + load(a + r * cols + c + 16 * q, lanes(cols - c - 16 * q));
      }
      for (int q = 0; q < 4; ++q) {
        const __mmask16 m = lanes(cols - c - 16 * q);
        store(sums + c + 16 * q, m, load(sums + c + 16 * q, m) + sum[q]);
      }
    }
  }
}

}  // namespace

const AmxKernels* recurrent_kernels_amx() {
  static constexpr AmxKernels kernels{packed_forward,      packed_backward,  pack_forward,   pack_backward,
                                      scratch_bytes,       forward,          backward,       gradient_scratch_words,
                                      add_weight_gradient, round_transposed, add_column_sums};
  return &kernels;
}

}  // namespace pk
