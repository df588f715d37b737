// Products of float32 matrices on the tile registers, each number in three bfloat16 parts: amx_float.h for raw memory.
#pragma once
#include <cstdint>

namespace pk {

constexpr int64_t kSplit = 3 * 32 * 32;  // bfloat16 for every 32 x 32 of a left factor, split

// From magnitudes of 2^55 on a sum of 2^16 products may overflow; these are also the bits of infinities and NaN.
constexpr uint32_t kUnsplittable = 0x5B000000;
constexpr int64_t kDeepest = int64_t{1} << 16;

// to: the left factor (rows, depth), or `turned`: the transpose of (depth, rows). False where a magnitude is too
// large, and the product may not be used.
bool split(const float* from, int64_t stride, int64_t rows, int64_t depth, bool turned, uint16_t* to);
// The bits of the largest magnitude; those of infinities and NaN are larger than others.
uint32_t largest_bits(const float* from, int64_t stride, int64_t rows, int64_t columns);
// c (rows, columns) = or += a b; b (depth, columns), or `turned`: (columns, depth)
void product_of_split(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, const float* b, int64_t ldb,
                      bool turned, float* c, int64_t ldc, bool add);

}  // namespace pk
