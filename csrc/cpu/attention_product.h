// The matrix product of the float32 attention: C (+)= A B with any strides for A, whose elements are broadcast, so that
// K and V serve as they lie and transposed, without packing. Included once per instruction set, in an anonymous
// namespace.
#pragma once
#include "rows_float.h"

namespace pk {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 6, kVectors = 4;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 4, kVectors = 3;  // 12 of 16
#endif

struct MatrixA {  // element (m, k) at data[m * row + k * col]
  const float* data;
  int64_t row, col;
};

template <int R, int C, bool kAdd>
PK_INLINE void product_block(int64_t depth, MatrixA a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  VecF sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) sum[r][v] = VecF(0.f);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    VecF row[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) row[v] = VecF::loadu(b + k * ldb + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VecF x(a.data[r * a.row + k * a.col]);
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) sum[r][v] = fmadd(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      float* const p = c + r * ldc + v * kWidth;
      // Added at the end: a sum that starts at 0 rounds less than one that starts at what is there.
      (kAdd ? VecF::loadu(p) + sum[r][v] : sum[r][v]).store(p);
    }
  }
}

template <int C, bool kAdd>
__attribute__((noinline)) void product_panel(int64_t rows, int64_t depth, MatrixA a, const float* b, int64_t ldb,
                                             float* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    product_block<kRows, C, kAdd>(depth, {a.data + m * a.row, a.row, a.col}, b, ldb, c + m * ldc, ldc);
  }
  const MatrixA rest{a.data + m * a.row, a.row, a.col};
  switch (rows - m) {
    case 5:
      product_block<(kRows > 5 ? 5 : 1), C, kAdd>(depth, rest, b, ldb, c + m * ldc, ldc);
      break;
    case 4:
      product_block<(kRows > 4 ? 4 : 1), C, kAdd>(depth, rest, b, ldb, c + m * ldc, ldc);
      break;
    case 3:
      product_block<3, C, kAdd>(depth, rest, b, ldb, c + m * ldc, ldc);
      break;
    case 2:
      product_block<2, C, kAdd>(depth, rest, b, ldb, c + m * ldc, ldc);
      break;
    case 1:
      product_block<1, C, kAdd>(depth, rest, b, ldb, c + m * ldc, ldc);
      break;
    default:
      break;
  }
}

// C (rows x cols) (+)= A (rows x depth) B (depth x cols); cols is a multiple of kWidth.
template <bool kAdd>
PK_INLINE void product(int64_t rows, int64_t cols, int64_t depth, MatrixA a, const float* b, int64_t ldb, float* c,
                       int64_t ldc) {
  int64_t n = 0;
  for (; n + kVectors * kWidth <= cols; n += kVectors * kWidth) {
    product_panel<kVectors, kAdd>(rows, depth, a, b + n, ldb, c + n, ldc);
  }
  for (; n + 2 * kWidth <= cols; n += 2 * kWidth) product_panel<2, kAdd>(rows, depth, a, b + n, ldb, c + n, ldc);
  for (; n + kWidth <= cols; n += kWidth) product_panel<1, kAdd>(rows, depth, a, b + n, ldb, c + n, ldc);
}

// C = A B with the depth in pieces, each summed from 0: of scores, the rounding of long sums is what the softmax sees.
PK_INLINE void score_product(int64_t rows, int64_t cols, int64_t depth, MatrixA a, const float* b, int64_t ldb,
                             float* c, int64_t ldc) {
  constexpr int64_t kPiece = 32;
  product<false>(rows, cols, smaller(depth, kPiece), a, b, ldb, c, ldc);
  for (int64_t k = kPiece; k < depth; k += kPiece) {
    product<true>(rows, cols, smaller(depth - k, kPiece), {a.data + k * a.col, a.row, a.col}, b + k * ldb, ldb, c, ldc);
  }
}

}  // namespace
}  // namespace pk
