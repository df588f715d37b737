// The recurrent room's interface between recurrent.cpp (tensors) and the files compiled per instruction set: plain
// pointers and numbers, no torch type.
//
// A sequence is packed: tokens are sorted by time, step t has sizes[t] rows from token offsets[t] on, and sizes do not
// increase. Everything here is about one layer in one direction. Work is split by rows of the batch, which are
// independent: a thread runs the whole time loop for its rows and never waits for another.
//
// Matrices are row-major. H is the hidden size; gates have the weights' order: i f g o, or r z n.
#pragma once
#include <cstdint>

namespace pk {

enum class Cell : uint8_t { kLstm, kGru, kTanh, kRelu };

// Gates in the weights.
constexpr int64_t gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }
// Columns of what forward keeps of a token (the GRU adds n' = h W_hn^T + b_hn; a vanilla RNN keeps nothing but its
// output), and of a token's gate gradients: (di df dg do), (dn dr dz dn'), (da). In the GRU's order the first three are
// the gradients of the input's gates and the last three those of the state's, each contiguous.
constexpr int64_t width_of(Cell cell) { return cell == Cell::kLstm || cell == Cell::kGru ? 4 : 1; }

struct Steps {
  int64_t count;
  const int64_t* sizes;
  const int64_t* offsets;
  bool reverse;

  // The step processed n-th.
  int64_t at(int64_t n) const { return reverse ? count - 1 - n : n; }
  // Rows of the n-th step that continue a sequence begun before it; the rest begin there.
  int64_t continued(int64_t n) const { return n == 0 ? 0 : smaller(sizes[at(n)], sizes[at(n - 1)]); }
  // Rows of the n-th step that go on after it; the rest end there.
  int64_t going_on(int64_t n) const { return n + 1 == count ? 0 : smaller(sizes[at(n)], sizes[at(n + 1)]); }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

struct ForwardArgs {
  Cell cell;
  Steps steps;
  int64_t hidden;
  const float* weight;  // W_hh as pack_forward leaves it
  const float* bias;    // of the gates from the input (gates_of H): b_ih + b_hh, but for the GRU's n b_ih alone
  const float* bias_n;  // GRU: b_hn (H)
  const float* h0;      // (B, H)
  float* state;         // LSTM: running c (B, H), c0 before and c_n after
  float* gates;         // (tokens, width): gates from the input before, activations after; RNN: this is the output
  bool keep;            // activations (and cells) are wanted
  float* cells;         // LSTM: c (tokens, H)
  float* output;        // (tokens, H)
};

struct BackwardArgs {
  Cell cell;
  Steps steps;
  int64_t hidden;
  const float* weight;  // W_hh as pack_backward leaves it
  const float *h0, *c0;
  const float *gates, *cells, *output;  // as forward left them
  const float* dy;                      // (tokens, H), rows dy_stride apart
  int64_t dy_stride;
  const float* dhn;     // (B, H)
  float* carry;         // (B, H). LSTM: gradient of c, dc_n before and dc0 after. GRU: the part of dh that skips the gates
  float* dgates;        // gate gradients (tokens, width) of the steps processed in this call
  const float* later;   // gate gradients of the step processed just before this call, or null
};

struct RecurrentKernels {
  int64_t (*packed_forward)(Cell, int64_t hidden);  // floats that pack_forward writes
  int64_t (*packed_backward)(Cell, int64_t hidden);
  void (*pack_forward)(Cell, int64_t hidden, const float* w, float* packed);
  void (*pack_backward)(Cell, int64_t hidden, const float* w, float* packed);
  // The steps processed first-th to last-th (exclusive), for the rows [row, row_end) of the batch. `gates`, `dgates` point
  // at token 0 even where only a chunk of them exists.
  void (*forward)(const ForwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end);
  // The same steps, last to first.
  void (*backward)(const BackwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end);
  // sums[c] += sum over rows of a[r][c], in partial sums of 256 rows: one running sum would lose digits on long inputs.
  void (*add_column_sums)(const float* a, int64_t rows, int64_t cols, float* sums);
};

const RecurrentKernels* recurrent_kernels_avx2();
const RecurrentKernels* recurrent_kernels_avx512();

}  // namespace pk
