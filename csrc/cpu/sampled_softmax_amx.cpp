// The sampled_softmax room's products of bfloat16 on tile registers. Compiled with the AVX-512 and AMX flags setup.py
// gives to
// *_amx.cpp.
#include "amx.h"
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

constexpr SampledSoftmaxAmx kAmx{product, pair, pair_transposed, transpose};

}  // namespace

const SampledSoftmaxAmx* sampled_softmax_amx() { return &kAmx; }

}  // namespace pk
