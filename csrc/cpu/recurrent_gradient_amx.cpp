// What the LSTM in bfloat16 does after its loop backward: gradients of weights and biases, sums over all tokens.
#include "recurrent_amx.h"

namespace pk {
namespace {

constexpr int64_t kRow = 2 * kTile;    // of the other side's columns, which four tiles of sums are wide
constexpr int64_t kBlock = 16 * kRow;  // floats of 16 x 64 sums; half as many words are 32 tokens by 16 columns
constexpr int64_t kColumns = 512;      // of the transposed side: with kTokens 1 MiB, half of a second-level cache
constexpr int64_t kTokens = 1024;
constexpr int64_t kPanel = 256;  // tokens of the other side in one sweep over the first: 32 KiB, which stay in L1

// 32 tokens by 32 columns from x on, as pairs of tokens side by side: low[i] has tokens 2i and 2i + 1 of the first 16
// columns, high[i] of the last 16. What is not there is zero.
PK_INLINE void load_pairs(const Word* x, int64_t stride, int64_t tokens, __mmask32 m, __m512 (&low)[16],
                          __m512 (&high)[16]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i even = load_words(x + 2 * i * stride, 2 * i < tokens ? m : 0);
    const __m512i odd = load_words(x + (2 * i + 1) * stride, 2 * i + 1 < tokens ? m : 0);
    low[i] = _mm512_castsi512_ps(interleaved_low(even, odd));
    high[i] = _mm512_castsi512_ps(interleaved_high(even, odd));
  }
}
PK_INLINE void store_rows(Word* to, const __m512 (&rows)[16]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, _mm512_castps_si512(rows[i]));
}

// to[columns / 16][tokens / 32][16 columns][32 tokens]: the transpose, tile by tile.
void transposed_tiles(const Word* x, int64_t stride, int64_t tokens, int64_t columns, Word* to) {
  const int64_t strip = round_up(tokens, kTile) * 16;
  for (int64_t t = 0; t < tokens; t += kTile) {
    for (int64_t c = 0; c < columns; c += kTile) {
      __m512 low[16], high[16];
      load_pairs(x + t * stride + c, stride, tokens - t, columns_of(columns - c), low, high);
      transpose(low);
      transpose(high);
      store_rows(to + (c / 16) * strip + t * 16, low);
      store_rows(to + (c / 16 + 1) * strip + t * 16, high);
    }
  }
}

// to[tokens / 32][4][16 pairs of tokens][16 columns][2], of at most 64 columns.
void paired_tiles(const Word* d, int64_t stride, int64_t tokens, int64_t columns, Word* to) {
  for (int64_t t = 0; t < tokens; t += kTile) {
    for (int64_t c = 0; c < kRow; c += kTile, to += kBlock) {
      __m512 low[16], high[16];
      load_pairs(d + t * stride + c, stride, tokens - t, columns_of(columns - c), low, high);
      store_rows(to, low);
      store_rows(to + kBlock / 2, high);
    }
  }
}

// sums (16 x 64, four tiles one after another) = or += a strip of the transposed side times a panel of the other. One
// tile of the first, which comes from the second-level cache, serves four products.
PK_INLINE void add_block(bool fresh, int64_t tokens, const Word* left, const Word* panel, float* sums) {
  if (fresh) {
    zero_sums();
  } else {
    load_tile<0>(sums, 64);
    load_tile<1>(sums + 256, 64);
    load_tile<2>(sums + 512, 64);
    load_tile<3>(sums + 768, 64);
  }
  for (int64_t t = 0; t < tokens; t += kTile) {
    const Word* const b = panel + t * kRow;
    load_tile<4>(left + t * 16, 64);
    load_tile<5>(b, 64);
    _tile_dpbf16ps(0, 4, 5);
    load_tile<6>(b + 512, 64);
    _tile_dpbf16ps(1, 4, 6);
    load_tile<7>(b + 1024, 64);
    _tile_dpbf16ps(2, 4, 7);
    load_tile<5>(b + 1536, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  store_tile<0>(sums, 64);
  store_tile<1>(sums + 256, 64);
  store_tile<2>(sums + 512, 64);
  store_tile<3>(sums + 768, 64);
}

// out[n][c], 64 x 32 with rows `stride` apart, = the transpose of two blocks of sums [c][n], rounded.
PK_INLINE void round_blocks(const float* sums, int64_t columns, int64_t rows, Word* out, int64_t stride) {
  const __mmask32 m = columns_of(columns);
  for (int64_t n = 0; n < kRow && n < rows; n += 16) {
    __m512 low[16], high[16];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      low[i] = _mm512_loadu_ps(sums + (n + i) * 16);
      high[i] = _mm512_loadu_ps(sums + kBlock + (n + i) * 16);
    }
    transpose(low);
    transpose(high);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      const V row[2] = {low[i], high[i]};
      if (n + i < rows) store_bfloat16(out + (n + i) * stride, m, row);
    }
  }
}

}  // namespace

int64_t amx_gradient_scratch(int64_t columns, int64_t width, int64_t tokens) {
  const int64_t side = round_up(std::min(columns, kColumns), kTile), depth = round_up(std::min(tokens, kTokens), kTile);
  return (side + kRow) * depth * 2 + (tokens > kTokens ? round_up(width, kRow) : kRow) * side * 4;
}

void amx_weight_gradient(const uint16_t* x, int64_t x_stride, int64_t columns, const uint16_t* d, int64_t d_stride,
                         int64_t width, int64_t tokens, uint16_t* out, int64_t out_stride, void* scratch) {
  const Tiles tiles;
  const int64_t held = round_up(std::min(tokens, kTokens), kTile);
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t some = std::min(kColumns, columns - first), side = round_up(some, kTile);
    Word *const left = static_cast<Word*>(scratch), *const panel = left + side * held;
    float* const sums = reinterpret_cast<float*>(panel + kRow * held);
    for (int64_t begin = 0; begin < tokens; begin += kTokens) {
      const int64_t n = std::min(kTokens, tokens - begin), depth = round_up(n, kTile);
      transposed_tiles(x + begin * x_stride + first, x_stride, n, some, left);
      for (int64_t row = 0; row < width; row += kRow) {
        const Word* const from = d + begin * d_stride + row;
        float* const strip = sums + (tokens > kTokens ? row * side : 0);
        paired_tiles(from, d_stride, n, width - row, panel);
        // Lines of the next panel lie a row apart, where nothing but this fetches them ahead.
        const int64_t blocks = side / 16 * ((depth + kPanel - 1) / kPanel), share = (n + blocks - 1) / blocks;
        int64_t ahead = row + kRow < width ? 0 : n;
        for (int64_t t = 0; t < depth; t += kPanel) {
          for (int64_t c = 0; c < side; c += 16) {
            for (const int64_t end = std::min(n, ahead + share); ahead < end; ++ahead) {
              _mm_prefetch(reinterpret_cast<const char*>(from + ahead * d_stride + kRow), _MM_HINT_T1);
              _mm_prefetch(reinterpret_cast<const char*>(from + ahead * d_stride + kRow + kTile), _MM_HINT_T1);
            }
            add_block(begin + t == 0, std::min(kPanel, depth - t), left + c * depth + t * 16, panel + t * kRow,
                      strip + c * kRow);
          }
        }
        if (begin + n < tokens) continue;
        for (int64_t c = 0; c < some; c += kTile) {
          round_blocks(strip + c * kRow, some - c, width - row, out + row * out_stride + first + c, out_stride);
        }
      }
    }
  }
}

void amx_column_sums(const uint16_t* a, int64_t rows, int64_t cols, float* sums) {
  constexpr int64_t kPartial = 64;
  for (int64_t begin = 0; begin < rows; begin += kPartial) {
    const int64_t end = std::min(rows, begin + kPartial);
    for (int64_t c = 0; c < cols; c += 2 * kTile) {
      const __mmask32 m[2] = {columns_of(cols - c), columns_of(cols - c - kTile)};
      V sum[2][2] = {{V(0.f), V(0.f)}, {V(0.f), V(0.f)}};
      for (int64_t r = begin; r < end; ++r) {
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          const __m512i words = load_words(a + r * cols + c + q * kTile, m[q]);
          both_halves([&](auto z) PK_LAMBDA { sum[q][z] = sum[q][z] + from_bfloat16<z>(words); });
        }
      }
      for (int q = 0; q < 2; ++q) {
        float* const to = sums + c + q * kTile;
        both_halves([&](auto z) PK_LAMBDA { store_floats<z>(to, m[q], load_floats<z>(to, m[q]) + sum[q][z]); });
      }
    }
  }
}

}  // namespace pk
