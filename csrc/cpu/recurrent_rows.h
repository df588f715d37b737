// Layers whose steps look at whole rows of gates: layer normalisation, and zoneout, which shares their loop. Plain
// pointers; see recurrent_kernels.h for packed sequences, cells and the order of gates.
//
// A step is a product of the state with W_hh, written out, and passes over each row of it: statistics need all gates of
// a token, which the other loop's blocks never hold together. All numbers are float32; a 16-bit dtype shows in the
// rounding of h alone.
#pragma once
#include "recurrent_kernels.h"

namespace pk {

// What of the state before and after a step is the state after it.
struct Zone {
  enum Mode : uint8_t { kOff, kBlend, kMask } mode;
  float p;                // probability of the old element (kMask), or its share (kBlend)
  uint64_t seed, first;   // of the mask's words: that of token 0, column 0
  uint64_t threshold;     // new where a word is at least this
  const int64_t* places;  // of each token in the layout that addresses the mask, or null: as they are
};

enum class Rounding : uint8_t { kNone, kHalf, kBFloat16 };

// G the gates of the cell, H the hidden size, P columns of h, W what is kept of a token: 4 H, of a vanilla RNN H.
struct RowsForward {
  Cell cell;
  Rounding rounding;
  bool keep;
  Steps steps;
  int64_t hidden, state_size;
  const float *weight, *projection;  // W_hh^T (P, G H), W_hr^T (H, P) or null, as pack_columns leaves them
  const float* x;                    // gates from the input with every bias but the GRU's b_hn (tokens, G H)
  const float* bias_n;               // b_hn (H) or null
  const float *peephole, *norm_hh, *norm_c, *norm_c_bias;  // each may be null
  const float* h0;
  float* c;         // LSTM: running c (B, H), c0 before and c_n after
  float* products;  // h W_hh^T, normalised if norm_hh: (tokens, G H), or without `keep` (B, G H)
  float* kept;      // (tokens, W): activations; null without `keep`. A vanilla RNN's: h' before zoneout
  float* cells;     // LSTM: c (tokens, H), or null
  float* stats;     // (tokens, 3): 1 / deviation of the products, mean and 1 / deviation of c'; null without `keep`
  float* output;    // (tokens, P)
  float* scratch;   // (B, 3 H)
  Zone zone_h, zone_c;
};

struct RowsBackward {
  Cell cell;
  Steps steps;
  int64_t hidden, state_size;
  const float *weight, *projection;  // W_hh (G H, P), W_hr (P, H) or null, as pack_columns leaves them
  const float *peephole, *norm_hh, *norm_c, *norm_c_bias;
  const float *h0, *c0, *output, *products, *kept, *cells, *stats;  // as forward has or left them
  const float* dy;                                                  // (tokens, P), rows dy_stride apart
  int64_t dy_stride;
  const float* dhn;           // (B, P)
  float *carry_h, *carry_c;   // (B, P), zeros before, what of dh0 bypasses W_hh after; (B, H), dc_n and dc0
  float *dgates, *dstate;     // of the input's gates and of the state's (tokens, G H): the same but of a GRU
  float* dproducts;           // of h W_hh^T: dstate's memory without norm_hh
  float *dprojected, *inner;  // (tokens, P), (tokens, H): the gradient of W_hr's result, and its right side; or null
  float *fresh, *dnorm;       // LSTM: c' (tokens, H); the gradient of what tanh is taken of (tokens, H)
  float* scratch;             // (B, P + H)
  Zone zone_h, zone_c;
};

struct RowsKernels {
  // All steps for the rows [row, row_end) of the batch.
  void (*forward)(const RowsForward&, int64_t row, int64_t row_end);
  void (*backward)(const RowsBackward&, int64_t row, int64_t row_end);
  // out = x where kept, times scale, else 0: elements [begin, end) of a tensor whose rows of `columns` are at `places`
  void (*drop)(const float* x, float* out, int64_t columns, int64_t begin, int64_t end, const Zone& mask, float scale);
};

const RowsKernels* recurrent_rows_avx2();
const RowsKernels* recurrent_rows_avx512();

}  // namespace pk
