// The interface between recurrent_cells.cpp (tensors) and the files compiled per instruction set. All tensors are
// dense; gates are twice (rows, 4H) in the order i f g o, or (rows, 3H) in the order r z n: the input's and the
// state's.
#pragma once
#include <cstdint>

namespace pk {

enum class CellDtype : uint8_t { kFloat, kBFloat16, kHalf };

struct CellArgs {
  CellDtype dtype;
  int64_t hidden;
  const void *gates, *state_gates;  // the input's and the state's
  const void* state;                // LSTM: c. GRU: h
  const void *dy, *dstate;          // backward: gradients of h' and, LSTM, c'
  void *out, *out_gates,
      *out_state;  // forward: h'; LSTM's c'. Backward: gradients of gates (LSTM: of either), state_gates, state
};

struct CellKernels {  // rows [row, end)
  void (*lstm_forward)(const CellArgs&, int64_t row, int64_t end);
  void (*lstm_backward)(const CellArgs&, int64_t row, int64_t end);
  void (*gru_forward)(const CellArgs&, int64_t row, int64_t end);
  void (*gru_backward)(const CellArgs&, int64_t row, int64_t end);
};

const CellKernels* cell_kernels_avx2();
const CellKernels* cell_kernels_avx512();

}  // namespace pk
