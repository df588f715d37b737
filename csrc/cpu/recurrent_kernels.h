// The recurrent room's interface between recurrent.cpp (tensors) and the files compiled per instruction set: plain
// pointers and numbers, no torch type.
//
// A sequence is packed: tokens are sorted by time, step t has sizes[t] rows from token offsets[t] on, and sizes do not
// increase. Everything here is about one direction of a layer. Work is split by directions and rows of the batch, which
// are independent: a thread runs the whole time loop for its rows and never waits for another.
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

// always_inline: the files compiled per instruction set must not leave a copy that the linker might keep for all.
#define PK_HERE __attribute__((always_inline))

struct Steps {
  int64_t count;
  const int64_t* sizes;
  const int64_t* offsets;
  bool reverse;

  // The step processed n-th.
  PK_HERE int64_t at(int64_t n) const { return reverse ? count - 1 - n : n; }
  // Rows of the n-th step that continue a sequence begun before it; the rest begin there.
  PK_HERE int64_t continued(int64_t n) const { return n == 0 ? 0 : smaller(sizes[at(n)], sizes[at(n - 1)]); }
  // Rows of the n-th step that go on after it; the rest end there.
  PK_HERE int64_t going_on(int64_t n) const { return n + 1 == count ? 0 : smaller(sizes[at(n)], sizes[at(n + 1)]); }

 private:
  PK_HERE static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};

struct ForwardArgs {
  Cell cell;
  Steps steps;
  int64_t hidden, state_size;  // H, and columns of h: H or, LSTM with projections, P
  const float* weight;         // W_hh as pack_forward leaves it
  // The input's product, where it is made in the loop (LSTM, RNN): x (tokens, inputs) with rows x_stride apart, W_ih
  // packed. Otherwise x_weight is null and `gates` hold the product.
  const float *x, *x_weight;
  int64_t x_stride, inputs;
  const float* bias;      // of the gates from the input (gates_of H): b_ih + b_hh, but for the GRU's n b_ih alone
  const float* bias_n;    // GRU: b_hn (H)
  const float* h0;        // (B, H)
  float* state;           // LSTM: running c (B, H), c0 before and c_n after
  float* gates;           // (tokens, width): gates from the input before, activations after; RNN: this is the output
  bool keep;              // activations (and cells) are wanted
  float* cells;           // LSTM: c (tokens, H)
  float* output;          // (tokens, state_size); null: not wanted (only if `ready`)
  int64_t output_stride;  // between its rows: of two directions they lie side by side
  // All products are in `gates` already (the GRU's n' = h W_hn^T behind the input's three): what is left is
  // elementwise.
  bool ready;
  const float* peephole;    // LSTM: p_i, p_f, p_o (3 H), or null
  const float* projection;  // W_hr^T as pack_columns leaves it, or null
  float* unprojected;       // scratch (B, H) where there is a projection, otherwise null
};

struct BackwardArgs {
  Cell cell;
  Steps steps;
  int64_t hidden, state_size;
  const float* weight;  // W_hh as pack_columns leaves it
  const float *h0, *c0;
  const float *gates, *cells, *output;  // as forward left them
  int64_t output_stride;
  const float* dy;  // (tokens, H), rows dy_stride apart
  int64_t dy_stride;
  const float* dhn;  // (B, H), or null
  float* carry;      // (B, H). LSTM: gradient of c, dc_n before and dc0 after. GRU: the part of dh that skips the gates
  float* dgates;     // gate gradients (tokens, width) of the steps processed in this call
  const float* later;                  // gate gradients of the step processed just before this call, or null
  const float *peephole, *projection;  // as forward has them, but W_hr as pack_columns leaves it
  float* dprojected;                   // gradients of the projected h (tokens, P) of the steps processed in this call
};

struct RecurrentKernels {
  // floats that pack_forward writes for a weight of (gates_of * H, depth): W_hh, or W_ih
  int64_t (*packed_forward)(Cell, int64_t hidden, int64_t depth);
  int64_t (*packed_columns)(int64_t depth, int64_t columns);
  void (*pack_forward)(Cell, int64_t hidden, int64_t depth, const float* w, float* packed);
  void (*pack_columns)(int64_t depth, int64_t columns, const float* w, float* packed);
  // The steps processed first-th to last-th (exclusive), for the rows [row, row_end) of the batch. `gates`, `dgates`
  // point at token 0 even where only a chunk of them exists.
  void (*forward)(const ForwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end);
  // The same steps, last to first.
  void (*backward)(const BackwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end);
  // sums[c] += sum over rows of a[r][c], in partial sums of 64 rows: one running sum would lose digits on long inputs.
  void (*add_column_sums)(const float* a, int64_t rows, int64_t cols, float* sums);
};

// The LSTM in bfloat16 on AMX: as above, with words of bfloat16 (dhn, carry, cells and c0 are float32) and
// saved gates in float16.
struct AmxForwardArgs {
  Steps steps;
  int64_t hidden;
  const uint16_t* weight;  // as pack_forward leaves it
  const float* bias;
  const uint16_t* h0;
  // The input, where its product is made in the loop; otherwise inputs is 0 and `gates` hold the product (bfloat16).
  const uint16_t* x;
  int64_t x_stride, inputs;
  float* state;
  uint16_t* gates;  // after the step, if kept: activations in float16
  bool keep;
  float* cells;
  uint16_t* output;
  int64_t output_stride;
};

struct AmxBackwardArgs {
  Steps steps;
  int64_t hidden;
  const uint16_t* weight;  // W_hh as pack_backward leaves it
  const float* c0;
  const uint16_t* gates;
  const float* cells;
  const uint16_t* dy;
  int64_t dy_stride;
  const float* dhn;
  float* carry;
  uint16_t* dgates;
  int64_t dgates_stride;
  // The input's gradient (tokens, inputs), where it is made in the loop, and W_ih as pack_backward leaves it; or null.
  const uint16_t* x_weight;
  int64_t inputs;
  uint16_t* dx;
};

struct AmxKernels {
  int64_t (*packed_forward)(int64_t hidden, int64_t inputs);  // words
  int64_t (*packed_backward)(int64_t depth, int64_t columns);
  // W_hh and, unless inputs is 0, W_ih, whose product is then made in the loop
  void (*pack_forward)(int64_t hidden, int64_t inputs, const uint16_t* w_hh, const uint16_t* w_ih, uint16_t* packed);
  // a weight (depth, columns), for products with it from the right
  void (*pack_backward)(int64_t depth, int64_t columns, const uint16_t* w, uint16_t* packed);
  int64_t (*scratch_bytes)(int64_t hidden, int64_t inputs, int64_t rows);  // of forward and backward for so many rows
  void (*forward)(const AmxForwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end, void* scratch);
  // All steps: first is 0, last the number of steps.
  void (*backward)(const AmxBackwardArgs&, int64_t first, int64_t last, int64_t row, int64_t row_end, void* scratch);
  int64_t stays;  // bytes of packed weights that the second-level cache has room for
  // out (width x columns) = d^T x, for x (tokens x columns) and d (tokens x width) of at least one token; every matrix
  // with its distance between rows
  int64_t (*gradient_scratch)(int64_t columns, int64_t width, int64_t tokens);  // bytes
  void (*weight_gradient)(const uint16_t* x, int64_t x_stride, int64_t columns, const uint16_t* d, int64_t d_stride,
                          int64_t width, int64_t tokens, uint16_t* out, int64_t out_stride, void* scratch);
  void (*add_column_sums)(const uint16_t* a, int64_t rows, int64_t cols, float* sums);
};

int64_t amx_gradient_scratch(int64_t columns, int64_t width, int64_t tokens);
void amx_weight_gradient(const uint16_t* x, int64_t x_stride, int64_t columns, const uint16_t* d, int64_t d_stride,
                         int64_t width, int64_t tokens, uint16_t* out, int64_t out_stride, void* scratch);
void amx_column_sums(const uint16_t* a, int64_t rows, int64_t cols, float* sums);
const AmxKernels* recurrent_kernels_amx();
const RecurrentKernels* recurrent_kernels_avx2();
const RecurrentKernels* recurrent_kernels_avx512();

}  // namespace pk
