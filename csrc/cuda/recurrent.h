// Launchers of the recurrent room: the time loop of one layer over packed tokens (sorted by time, step t being tokens
// offsets[t] .. offsets[t + 1], rows that end do not come back).  Products with the input and gradients of the weights
// are made elsewhere.  H: hidden size, G: gates (LSTM 4, GRU 3, else 1), W: what is kept of a token (4 H for LSTM and
// GRU, else none).
//
// `ways` is 1, or 2 for both directions of a layer, of which the second goes against time.  Then each tensor below has
// a dimension of two in front, but the output, in which a token's directions lie side by side: rows of 2 H.  Where a
// dimension is N, there is room for `tokens`, at least N, which only the distance between directions depends on.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pk {

enum class Cell : int { lstm = 0, gru = 1, tanh = 2, relu = 3 };

// How the loop is run, from recurrent_plan.
struct RecurrentPlan {
  int way;  // 1: one block runs all steps of its rows; 2: a cooperative grid does; 3: one launch a step; 4: a cluster
  int blocks;  // blocks that share a tile of 16 rows
  int units;   // blocks of 8 hidden units that each owns
  int tiles;   // tiles of rows in one launch
};

// The way that fits the current device (that of `where`, any pointer into it), or `wish` if it is not 0: way 0 where
// that cannot be.  Way 4, for sm_90, comes by a wish only.
RecurrentPlan recurrent_plan(const void* where, int cell, bool backward, int hidden, int64_t batch, int ways, int wish,
                             DType dtype);

// weights: W_hh in the order of the tensor cores' fragments (pykernels/_cuda/recurrent.py, `_packed_weights`).
// x: (N, G H) float, the input's gates; bias: float, (G H), for a GRU the 4 H parts r, z, n, n', or null.
// peephole: (3 H) float, of an LSTM's i, f and o, or null.
// c: (B, H) float, in: c0, out: c_n (LSTM).  h_n: a copy of h0, in which the rows that have steps are replaced.
// kept: gates after their activations, float where dtype is float32 or the cell a GRU, else half; null: not wanted;
// cells: c of every token.  kept may be x.  offsets: steps + 1; tile_steps: for each 16 rows, the steps that have one
// of them; arrived: a zero for each such tile and direction.
void recurrent_forward(const void* weights, const float* x, const float* bias, const float* peephole, const void* h0,
                       void* output, void* h_n, float* c, void* kept, float* cells, const int64_t* offsets,
                       const int* tile_steps, uint32_t* arrived, int64_t batch, int64_t steps, int64_t tokens,
                       int hidden, int ways, int way, int blocks, int units, int tiles, int cell, DType dtype,
                       void* stream);

// weights: W_hh^T, packed in the same way; of way 4, for each block the rows of W_hh that are its units' gates.  dh_n:
// (B, H) float; of a GRU it is `carry`, which comes back as the part of dh0 that bypasses the product.  carry: dc_n in,
// dc0 out of an LSTM.  dgates: (N, W or H): gradients of i, f, g, o; of n, r, z, n'; of the only gate.  Rows of dy lie
// dy_stride apart, directions dy_side.
void recurrent_backward(const void* weights, const void* dy, const float* dh_n, const float* peephole, const void* h0,
                        const void* c0, const void* output, const void* kept, const float* cells, void* dgates,
                        float* carry, const int64_t* offsets, const int* tile_steps, uint32_t* arrived,
                        int64_t dy_stride, int64_t dy_side, int64_t batch, int64_t steps, int64_t tokens, int hidden,
                        int ways, int way, int blocks, int units, int tiles, int cell, DType dtype, void* stream);

// kept and cells from x and the products with the state, (N, G H) float, of all tokens.  LSTM and GRU; kept is of dtype
// f32 or f16.
void recurrent_recompute(const float* x, const float* products, const float* bias, const float* peephole, float* c,
                         void* kept, float* cells, const int64_t* offsets, int64_t batch, int64_t steps, int64_t tokens,
                         int hidden, int ways, int cell, DType dtype, void* stream);

}  // namespace pk
