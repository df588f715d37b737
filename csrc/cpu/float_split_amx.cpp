// Compiled with the AVX-512 and AMX flags setup.py gives to *_amx.cpp.
#include "float_split.h"

#include "amx_float.h"

namespace pk {

bool split(const float* from, int64_t stride, int64_t rows, int64_t depth, bool turned, uint16_t* to) {
  const Tiles tiles;  // for its control of denormal numbers
  return turned ? split_left_turned(from, stride, rows, depth, to) : split_left(from, stride, rows, depth, to);
}

uint32_t largest_bits(const float* from, int64_t stride, int64_t rows, int64_t columns) {
  return largest(from, stride, rows, columns);
}

void product_of_split(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, const float* b, int64_t ldb,
                      bool turned, float* c, int64_t ldc, bool add) {
  const Tiles tiles;
  split_product(rows, columns, depth, a, b, ldb, turned, c, ldc, add);
}

}  // namespace pk
