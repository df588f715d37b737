// Tables of 8- and 4-bit codes: what the loops are told, and their table for each instruction set.
#pragma once
#include "embedding_kernels.h"

namespace pk {

// A row: cols * bits / 8 bytes of codes, then scale and bias, as float (8 bits) or half (4), at any alignment. With 4
// bits the code of an even column is in the low half of its byte.
struct QuantizedBagArgs {
  int64_t bits{};
  bool mean{};
  Ids ids{};
  Bags bags{};  // a lookup: bags of one id
  int64_t padding{};
  const uint8_t* table{};
  int64_t table_stride{};  // bytes
  int64_t cols{};
  const float* scale{};  // one a position; or null
  TableDtype dtype{};    // of out; not double
  void* out{};           // (bags, cols)
};

struct QuantizeArgs {
  int64_t bits{};
  TableDtype dtype{};  // of the table; not double
  const void* table{};
  int64_t table_stride{}, cols{};  // elements
  uint8_t* out{};
  int64_t out_stride{};
};

struct QuantizedKernels {
  void (*bag)(const QuantizedBagArgs&, int64_t begin, int64_t end);   // bags
  void (*quantize)(const QuantizeArgs&, int64_t begin, int64_t end);  // rows
};

const QuantizedKernels* quantized_kernels_avx2();
const QuantizedKernels* quantized_kernels_avx512();

}  // namespace pk
