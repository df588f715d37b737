// Products of bfloat16 matrices on the tile registers, and the layouts they read. Included only by *_amx.cpp,
// everything in an anonymous namespace.
//
// A: rows of bfloat16. B: pairs, [depth / 2][columns][2]: two successive rows of B interleaved, as the instruction
// reads them.
#pragma once
#include "rows_float.h"

namespace pk {
namespace {

using bf16 = uint16_t;

// The tile configuration is state of the thread, and other libraries (oneDNN) keep theirs loaded: it is saved, ours
// loaded (eight tiles of 16 rows of 64 bytes serve every product), and put back. While ours is loaded, denormal numbers
// are zeros: a power of two that underflows costs no more than another.
class Tiles {
 public:
  Tiles() : control_(_mm_getcsr()) {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    _tile_loadconfig(config);
    _mm_setcsr(control_ | 0x8040);  // flush to zero, denormals are zeros
  }
  ~Tiles() {
    _mm_setcsr(control_);
    if (before_[0]) {
      _tile_loadconfig(before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
  uint32_t control_;
};

// Not the compiler's intrinsics: its tile load does not say that it reads memory, so a store could be moved behind it.
template <int kTile>
PK_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
PK_INLINE void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

PK_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

struct Nothing {
  PK_INLINE void operator()() const {}
};

// C (rows x cols) = or += A (rows x depth) B (depth x cols), all multiples of 32. `between` is called once for every 32
// x 32 x 32 of it: what it does with vectors overlaps a little with the tile unit (they share an execution port).
template <class Between = Nothing>
PK_INLINE void tile_product(int64_t rows, int64_t cols, int64_t depth, const bf16* a, int64_t lda, const bf16* b,
                            int64_t ldb, float* c, int64_t ldc, bool add, Between between = {}) {
  const int64_t step_a = lda * 2, step_b = ldb * 4, step_c = ldc * 4;
  for (int64_t n = 0; n < cols; n += 32) {
    for (int64_t m = 0; m < rows; m += 32) {
      float *const c0 = c + m * ldc + n, *const c1 = c0 + 16 * ldc;
      if (add) {
        load_tile<0>(c0, step_c);
        load_tile<1>(c0 + 16, step_c);
        load_tile<2>(c1, step_c);
        load_tile<3>(c1 + 16, step_c);
      } else {
        zero_sums();
      }
      for (int64_t k = 0; k < depth; k += 32) {
        const bf16 *const ak = a + m * lda + k, *const bk = b + 2 * n + k * ldb;
        load_tile<6>(bk, step_b);
        load_tile<4>(ak, step_a);
        load_tile<7>(bk + 32, step_b);
        load_tile<5>(ak + 16 * lda, step_a);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        between();
      }
      store_tile<0>(c0, step_c);
      store_tile<1>(c0 + 16, step_c);
      store_tile<2>(c1, step_c);
      store_tile<3>(c1 + 16, step_c);
    }
  }
}

// 32-bit words: dst (cols x ldd) = src (rows x lds) transposed; rows and cols are multiples of 16, leading sizes in
// words.
PK_INLINE void transpose_words(const void* src, int64_t lds, void* dst, int64_t ldd, int64_t rows, int64_t cols) {
  const auto* const from = static_cast<const float*>(src);
  auto* const to = static_cast<float*>(dst);
  for (int64_t i = 0; i < rows; i += 16) {
    for (int64_t j = 0; j < cols; j += 16) {
      __m512 block[16];
      for (int z = 0; z < 16; ++z) block[z] = _mm512_loadu_ps(from + (i + z) * lds + j);
      transpose(block);
      for (int z = 0; z < 16; ++z) _mm512_storeu_ps(to + (j + z) * ldd + i, block[z]);
    }
  }
}

PK_INLINE __m512i widened_words(const bf16* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// dst[r / 2][c][r % 2] = src[r][c]: the B layout of src (rows x cols).
PK_INLINE void pair_rows(const bf16* src, int64_t lds, int64_t rows, int64_t cols, bf16* dst) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < cols; c += 16) {
      const __m512i odd = _mm512_slli_epi32(widened_words(src + (r + 1) * lds + c), 16);
      _mm512_storeu_si512(dst + r * cols + 2 * c, _mm512_or_si512(widened_words(src + r * lds + c), odd));
    }
  }
}

// dst (cols x rows) = src (rows x cols) transposed; rows and cols are multiples of 32. buffer: rows x cols.
PK_INLINE void transpose_rows_bf16(const bf16* src, int64_t lds, int64_t rows, int64_t cols, bf16* dst, bf16* buffer) {
  pair_rows(src, lds, rows, cols, buffer);
  transpose_words(buffer, cols, dst, rows / 2, rows / 2, cols);
}

// low's 16 lanes, then high's, rounded to bfloat16.
PK_INLINE __m512i narrow(VecF low, VecF high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// The two halves' elements alternating.
PK_INLINE __m512i interleave_words(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}
// Element by element of two rows: of their first 16 elements, of their last.
PK_INLINE __m512i interleaved_low(__m512i even, __m512i odd) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(even, order, odd);
}
PK_INLINE __m512i interleaved_high(__m512i even, __m512i odd) {
  const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                         53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(even, order, odd);
}
PK_INLINE __m512i interleave(VecF even, VecF odd) { return interleave_words(narrow(even, odd)); }

}  // namespace
}  // namespace pk
