// What the loops of the pairwise interaction are told (raw memory, no tensors), and their table for each instruction
// set.
#pragma once
#include <cstdint>

#include "embedding_kernels.h"

namespace pk {

// A sample is rows = features + 1 vectors of `cols`: dense, then the sparse ones. Strides in elements.
struct InteractionArgs {
  TableDtype dtype{};
  int64_t features{}, cols{};
  bool diagonal{};
  const void *dense{}, *sparse{};
  int64_t dense_stride{}, sparse_batch_stride{}, sparse_row_stride{};
  void* out{};  // (samples, outputs)
  int64_t outputs{};
  const void* dy{};  // backward: (samples, outputs), rows of unit inner stride
  int64_t dy_stride{};
  void *ddense{}, *dsparse{};  // contiguous; null: not wanted
};

struct InteractionKernels {
  int64_t (*scratch)(const InteractionArgs&);                                          // bytes a thread needs
  void (*forward)(const InteractionArgs&, void* scratch, int64_t begin, int64_t end);  // samples
  void (*backward)(const InteractionArgs&, void* scratch, int64_t begin, int64_t end);
};

const InteractionKernels* interaction_kernels_avx2();
const InteractionKernels* interaction_kernels_avx512();

}  // namespace pk
