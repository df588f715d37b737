// The sampled_softmax room's products on tile registers. Compiled with the AVX-512 and AMX flags setup.py gives to
// *_amx.cpp.
#include "amx_float.h"
#include "sampled_softmax_kernels.h"

namespace pk {
namespace {

void product(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b, float* c,
             int64_t ldc, bool add) {
  const Tiles tiles;
  tile_product(rows, columns, depth, a, lda, b, columns, c, ldc, add);
}

void pair(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to) {
  pair_rows(from, stride, rows, columns, to);
}

// Two successive elements of a row are one word, and words are what is transposed.
void pair_transposed(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to) {
  transpose_words(from, stride / 2, to, rows, rows, columns / 2);
}

void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to, uint16_t* buffer) {
  transpose_rows_bf16(from, stride, rows, columns, to, buffer);
}

bool split(const float* from, int64_t stride, int64_t rows, int64_t depth, bool turned, uint16_t* to) {
  const Tiles tiles;  // for its control of denormal numbers
  return turned ? split_left_turned(from, stride, rows, depth, to) : split_left(from, stride, rows, depth, to);
}

bool fits_whole(const float* from, int64_t stride, int64_t rows, int64_t columns) {
  return fits(from, stride, rows, columns);
}

void product_of_split(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, const float* b, int64_t ldb,
                      bool turned, float* c, int64_t ldc, bool add) {
  const Tiles tiles;
  split_product(rows, columns, depth, a, b, ldb, turned, c, ldc, add);
}

constexpr SampledSoftmaxAmx kAmx{product, pair, pair_transposed, transpose, split, fits_whole, product_of_split};

}  // namespace

const SampledSoftmaxAmx* sampled_softmax_amx() { return &kAmx; }

}  // namespace pk
