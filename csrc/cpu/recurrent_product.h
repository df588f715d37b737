// A product of rows with a matrix that is packed once a call, and nothing after it.
//
// Included once per instruction set; see simd.h for why nothing here may have external linkage.
#pragma once
#include "recurrent_block.h"

namespace pk {
namespace {

constexpr int64_t kBackwardUnits = 4 * kV;  // columns of a panel

// out (rows, columns) = left (rows, depth) w, rows left_stride and out_stride apart; w as pack_columns leaves it.
struct PlainArgs {
  const float *left, *weight;
  float* out;
  int64_t depth, columns, left_stride, out_stride;
};

// out = left w (+ add + final where given) for rows [begin, end); w packed by panels of kBackwardUnits columns.
void plain_product(const PlainArgs& a, int64_t begin, int64_t end, const float* add, int64_t add_stride,
                   const float* final) {
  for (int64_t unit = 0; unit < a.columns; unit += kBackwardUnits) {
    Block b{};
    b.hidden = a.columns;
    b.unit = unit;
    b.depth = a.left ? a.depth : 0;
    b.stride = a.left_stride;
    b.panel = b.ahead = a.weight + unit * a.depth;
    b.dy_stride = add_stride;
    b.out_stride = a.out_stride;
    for_row_blocks<kRows<4>>(begin, end, [&](int64_t r, auto count) PK_LAMBDA {
      b.left = a.left ? a.left + r * a.left_stride : nullptr;
      b.dy = add ? add + r * add_stride + unit : nullptr;
      b.final = final ? final + r * a.columns + unit : nullptr;
      b.output = a.out + r * a.out_stride + unit;
      unit + kBackwardUnits <= a.columns ? Plain::forward<count, false>(b) : Plain::forward<count, true>(b);
    });
  }
}

}  // namespace
}  // namespace pk
