// Launchers of one step of a layer with layer normalisation or zoneout (recurrent_rows.cu); products are made
// elsewhere. All numbers are float.  Rows are those of the batch that the step has, `begun` of them with the state
// before at token `previous` + row, the others with the initial one; rows from `staying` on end here.  H: hidden size,
// G: gates.
#pragma once
#include <cstdint>

#include "recurrent.h"

namespace pk {

struct RowStep {
  int hidden, gates;
  bool relu;
  int64_t offset, previous, begun, staying;
};

// What of the state before and after a step is the state after it.
struct RowZone {
  enum Mode : int { kOff, kBlend, kMask } mode;
  float share;
  uint64_t threshold;  // new where a word is at least this
  int64_t first;       // offset of token 0's, column 0's word
  const int64_t* seed;
};

struct RowForward {
  const float* x;   // (N, G H): the input's gates with every bias but the GRU's b_hn
  float* products;  // (rows, G H): h W_hh^T of this step; overwritten
  const float *bias_n, *peephole, *norm_hh, *norm_c, *norm_c_bias;  // each may be null
  const float* h0;
  const int64_t* places;               // (N), or null: 0, 1, ...
  float *output, *h_n, *c;             // (N, H); (B, H); an LSTM's running (B, H)
  float *hats, *kept, *cells, *stats;  // (N, G H), (N, 4 H or H), (N, H), (N, 3); null: not wanted
  float* scratch;                      // (B, 2 H) of an LSTM
  int rounding;
  RowStep step;
  RowZone zone_h, zone_c;
};

struct RowBackward {
  const float* dy;
  int64_t dy_stride;
  const float* through;  // (B, H): dh by way of the product, of rows that end dh_n
  const float *peephole, *norm_hh, *norm_c, *norm_c_bias, *h0, *c0, *output, *hats, *kept, *cells, *stats;
  const int64_t* places;
  float *carry_h, *carry_c, *dgates, *dstate, *dproducts, *fresh, *dnorm;
  RowStep step;
  RowZone zone_h, zone_c;
};

// `rounding`: the dtype that h is rounded to.  seeds: of the masks of h and c, or null.
void recurrent_row_forward(const float* x, float* products, const float* bias_n, const float* peephole,
                           const float* norm_hh, const float* norm_c, const float* norm_c_bias, const float* h0,
                           float* output, float* h_n, float* c, float* hats, float* kept, float* cells, float* stats,
                           float* scratch, const int64_t* seeds, const int64_t* places, int mode_h, int mode_c,
                           float share_h, float share_c, int64_t threshold_h, int64_t threshold_c, int64_t first_h,
                           int64_t first_c, int hidden, int64_t rows, int64_t offset, int64_t previous, int64_t begun,
                           int64_t staying, int cell, DType rounding, void* stream);
void recurrent_row_backward(const float* dy, int64_t dy_stride, const float* through, const float* peephole,
                            const float* norm_hh, const float* norm_c, const float* norm_c_bias, const float* h0,
                            const float* c0, const float* output, const float* hats, const float* kept,
                            const float* cells, const float* stats, float* carry_h, float* carry_c, float* dgates,
                            float* dstate, float* dproducts, float* fresh, float* dnorm, const int64_t* seeds,
                            const int64_t* places, int mode_h, int mode_c, float share_h, float share_c,
                            int64_t threshold_h, int64_t threshold_c, int64_t first_h, int64_t first_c, int hidden,
                            int64_t rows, int64_t offset, int64_t previous, int64_t begun, int cell, void* stream);

}  // namespace pk
