// Products of float32 on the tile registers, which multiply bfloat16: each factor is the sum of three bfloat16 numbers,
// which hold its 24 bits, and six of the nine products are made (the other three are below 2^-24 of the result). Sums
// are float32, those of the five small products first: one rounding of the whole sum for every two terms, where a chain
// of fused multiply-adds makes one for each. Included only by *_amx.cpp, everything in an anonymous namespace.
//
// Numbers below 2^-110 lose their last bits (tile registers take denormal numbers for zeros). Products of parts have
// signs of their own: where the largest overflows to one infinity a smaller one may to the other, and their sum is NaN
// where that of whole numbers is infinite. So no factor may be so large, and none NaN: who calls looks first
// (`largest`).
#pragma once
#include "amx.h"
#include "float_split.h"

namespace pk {
namespace {

constexpr int64_t kPart = 1024;     // bfloat16 of one part of a block of 32 x 32: two tiles
constexpr int64_t kBlock = kSplit;  // the parts, largest first
constexpr int64_t kDepth = 128;     // of a panel of 32 columns, 24 KiB: half of L1

struct Parts {
  __m512i part[3];  // of 16 lanes, then of 16 more
};

PK_INLINE VecF low_half(__m512i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16));
}
PK_INLINE VecF high_half(__m512i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16));
}

PK_INLINE Parts parts_of(__m512 a, __m512 b) {
  Parts p;
  for (int i = 0; i < 3; ++i) {
    p.part[i] = narrow(a, b);
    a = _mm512_sub_ps(a, low_half(p.part[i]));  // exact
    b = _mm512_sub_ps(b, high_half(p.part[i]));
  }
  return p;
}

PK_INLINE __m512 some(const float* p, int64_t n) {
  return n >= 16 ? _mm512_loadu_ps(p) : n > 0 ? _mm512_maskz_loadu_ps(first_lanes(n), p) : _mm512_setzero_ps();
}

// A block of 16 x 16 of a matrix with so many rows and columns left, transposed; zeros beyond them.
PK_INLINE void load_turned(const float* from, int64_t stride, int64_t rows, int64_t columns, __m512 (&block)[16]) {
  for (int r = 0; r < 16; ++r) block[r] = r < rows ? some(from + r * stride, columns) : _mm512_setzero_ps();
  transpose(block);
}

struct Magnitude {
  __m512i top = _mm512_setzero_si512();
  PK_INLINE void take(__m512 x) {
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  PK_INLINE uint32_t bits() const { return _mm512_reduce_max_epu32(top); }
  PK_INLINE bool fits() const { return bits() < kUnsplittable; }
};

PK_INLINE uint32_t largest(const float* from, int64_t stride, int64_t rows, int64_t columns) {
  Magnitude found;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += 16) found.take(some(from + r * stride + c, columns - c));
  }
  return found.bits();
}

// The left factor of a product: blocks of 32 x 32, row of blocks by row of blocks, zeros beyond the matrix. Whether all
// of it fits.
PK_INLINE bool split_left(const float* from, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
  Magnitude found;
  for (int64_t m = 0; m < rows; m += 32) {
    for (int64_t k = 0; k < depth; k += 32, to += kBlock) {
      for (int64_t r = 0; r < 32; ++r) {
        const float* const p = from + (m + r) * stride + k;
        const bool inside = m + r < rows;
        const __m512 a = some(p, inside ? depth - k : 0), b = some(p + 16, inside ? depth - k - 16 : 0);
        found.take(a), found.take(b);
        const Parts parts = parts_of(a, b);
        for (int i = 0; i < 3; ++i) _mm512_storeu_si512(to + i * kPart + r * 32, parts.part[i]);
      }
    }
  }
  return found.fits();
}

// The same of the transpose of `from` (depth x rows).
PK_INLINE bool split_left_turned(const float* from, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
  Magnitude found;
  for (int64_t m = 0; m < rows; m += 32) {
    for (int64_t k = 0; k < depth; k += 32, to += kBlock) {
      for (int64_t r = 0; r < 32; r += 16) {
        __m512 a[16], b[16];
        const float* const p = from + k * stride + m + r;
        load_turned(p, stride, depth - k, rows - m - r, a);
        load_turned(p + 16 * stride, stride, depth - k - 16, rows - m - r, b);
        for (int i = 0; i < 16; ++i) {
          found.take(a[i]), found.take(b[i]);
          const Parts parts = parts_of(a[i], b[i]);
          for (int j = 0; j < 3; ++j) _mm512_storeu_si512(to + j * kPart + (r + i) * 32, parts.part[j]);
        }
      }
    }
  }
  return found.fits();
}

PK_INLINE void store_pair(__m512 even, __m512 odd, bf16* to) {
  const Parts parts = parts_of(even, odd);
  for (int i = 0; i < 3; ++i) _mm512_storeu_si512(to + i * kPart, interleave_words(parts.part[i]));
}

// 32 columns of the right factor, of which `columns` exist; depth padded to blocks.
PK_INLINE void split_right(const float* from, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
  for (int64_t k = 0; k < depth; k += 32, to += kBlock) {
    for (int64_t r = 0; r < 32; r += 2) {
      for (int64_t c = 0; c < 32; c += 16) {
        const float* const p = from + (k + r) * stride + c;
        store_pair(some(p, k + r < depth ? columns - c : 0), some(p + stride, k + r + 1 < depth ? columns - c : 0),
                   to + c * 32 + r * 16);
      }
    }
  }
}

// The same of the transpose of `from` (columns x depth).
PK_INLINE void split_right_turned(const float* from, int64_t stride, int64_t depth, int64_t columns, bf16* to) {
  for (int64_t k = 0; k < depth; k += 32, to += kBlock) {
    for (int64_t c = 0; c < 32; c += 16) {
      for (int64_t r = 0; r < 32; r += 16) {
        __m512 block[16];
        load_turned(from + c * stride + k + r, stride, columns - c, depth - k - r, block);
        for (int i = 0; i < 16; i += 2) store_pair(block[i], block[i + 1], to + c * 32 + (r + i) * 16);
      }
    }
  }
}

template <int kPartOfA>
PK_INLINE void load_left(const bf16* a) {
  load_tile<4>(a + kPartOfA * kPart, 64);
  load_tile<5>(a + kPartOfA * kPart + kPart / 2, 64);
}
template <int kPartOfB>
PK_INLINE void load_right(const bf16* b) {
  load_tile<6>(b + kPartOfB * kPart, 64);
  load_tile<7>(b + kPartOfB * kPart + kPart / 2, 64);
}
PK_INLINE void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// A block of 32 x 32 of the result that waits to be added to memory.
struct Waiting {
  const float* sums = nullptr;
  float* to = nullptr;
  int64_t stride = 0, rows = 0, columns = 0;
  bool add = false;

  PK_INLINE void emit(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < smaller(end, rows); ++r) {
      for (int64_t i = 0; i < columns; i += 16) {
        float* const p = to + r * stride + i;
        const __mmask16 there = first_lanes(columns - i);
        __m512 v = _mm512_load_ps(sums + r * 32 + i);
        if (add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(there, p));
        _mm512_mask_storeu_ps(p, there, v);
      }
    }
  }
};

// C (rows x columns) = or += A (rows x depth, split) B (depth x columns, or `turned`: columns x depth). Blocks reach
// memory while the next one is on the tile unit, which takes as long to give a result as to make a twelfth of one.
PK_INLINE void split_product(int64_t rows, int64_t columns, int64_t depth, const bf16* a, const float* b, int64_t ldb,
                             bool turned, float* c, int64_t ldc, bool add) {
  alignas(64) bf16 panel[kDepth / 32 * kBlock];
  alignas(64) float sums[2][32 * 32];
  const int64_t blocks = (depth + 31) / 32;
  Waiting last;
  int turn = 0;
  for (int64_t from = 0; from < depth; from += kDepth) {
    const int64_t deep = smaller(kDepth, depth - from), steps = (deep + 31) / 32, each = (31 + steps) / steps;
    for (int64_t n = 0; n < columns; n += 32) {
      const int64_t wide = smaller(32, columns - n);
      if (turned) {
        split_right_turned(b + n * ldb + from, ldb, deep, wide, panel);
      } else {
        split_right(b + from * ldb + n, ldb, deep, wide, panel);
      }
      for (int64_t m = 0; m < rows; m += 32) {
        const bf16* left = a + (m / 32 * blocks + from / 32) * kBlock;
        const bf16* right = panel;
        zero_sums();
        for (int64_t k = 0; k < steps; ++k, left += kBlock, right += kBlock) {
          load_left<2>(left);
          load_right<0>(right);
          multiply_loaded();
          load_left<1>(left);
          multiply_loaded();
          load_right<1>(right);
          multiply_loaded();
          load_left<0>(left);
          multiply_loaded();
          load_right<2>(right);
          multiply_loaded();
          load_right<0>(right);
          multiply_loaded();
          last.emit(k * each, (k + 1) * each);
        }
        float* const block = sums[turn];
        store_tile<0>(block, 128);
        store_tile<1>(block + 16, 128);
        store_tile<2>(block + 512, 128);
        store_tile<3>(block + 528, 128);
        last = {block, c + m * ldc + n, ldc, smaller(32, rows - m), wide, add || from != 0};
        turn ^= 1;
      }
    }
    last.emit(0, 32);  // what is added to it next may be this block
    last.rows = 0;
  }
}

}  // namespace
}  // namespace pk
