// What the sampled_softmax room's loops are told (raw memory, no tensors), and the table of them for each instruction
// set.
#pragma once
#include <cstdint>

#include "embedding_kernels.h"

namespace pk {

// Rows of x against a few rows of a table each; id -1 means none.
struct LogisticArgs {
  TableDtype dtype{};
  Ids ids{};  // (rows, per_row)
  int64_t per_row{};
  const int8_t* signs{};  // (rows, per_row); null: + for the first, - for the others
  const void* x{};
  int64_t x_stride{}, cols{};  // elements
  const void* table{};
  int64_t table_stride{};
  float* loss{};  // (rows)
  bool gradients{};
  float* coefficient{};  // (rows, per_row): d loss / d logit
  float* dx{};           // (rows, cols)
};

// dots[i] = x[i / per_row] . table[ids[i]], and the other way: dx[i] += sum_k coefficient[i, k] table[ids[i, k]].
struct DotArgs {
  TableDtype dtype{};
  Ids ids{};
  int64_t per_row{};
  const void* x{};
  int64_t x_stride{}, cols{};
  const void* table{};
  int64_t table_stride{};
  float* dots{};
  const float* coefficient{};
  float* dx{};
};

enum class LossKind { kSoftmax, kLogistic };

// Places of a row's labels in the sample, ascending: [places[starts[i]], places[starts[i + 1]]).
struct Hits {
  const int64_t* starts;  // null: none
  const int32_t* places;
};

// The largest logit of a row and the sum of exp(z - maximum) over its classes; "logistic": the sum of softplus(z).
struct Statistics {
  float* data;  // (batch): maximum, sum, ... `stride` apart
  int64_t stride;

  float& maximum(int64_t row) const { return data[row * stride]; }
  float& sum(int64_t row) const { return data[row * stride + 1]; }
};

// A tile of logits: rows [row, row + rows) of the batch, columns [column, column + columns) of the classes.
struct TileArgs {
  LossKind kind{};
  float* z{};  // (rows, columns), rows `z_stride` apart
  int64_t z_stride{}, row{}, rows{}, column{}, columns{};
  const float* add{};  // (classes), to the logits; or null
  Hits hits{};
  Statistics statistics{};
  const float* factors{};   // (classes), of the class weights; null: 1
  const int64_t* target{};  // (batch); or null

  // forward, with targets
  double* weighted{};     // (batch): sum of factor * logit; or null
  float* target_logit{};  // (batch)

  // backward: dz = scale * p - [column is the target] * at_target - smooth * factor, p the softmax or the sigmoid
  const float* scale{};      // (batch)
  const float* at_target{};  // (batch), with targets
  const float* smooth{};     // (batch), or null
  bool narrow{};             // dz is bfloat16, else float
  void* dz{};                // (rows, columns), rows `dz_stride` apart; may be z
  int64_t dz_stride{};
  float* column_sums{};  // (columns), added to; or null
};

struct SampledSoftmaxKernels {
  void (*logistic)(const LogisticArgs&, int64_t begin, int64_t end);  // rows
  void (*dots)(const DotArgs&, int64_t begin, int64_t end);           // rows
  void (*add_rows)(const DotArgs&, int64_t begin, int64_t end);       // rows: dx += coefficient * table
  void (*finish_logits)(const TileArgs&);                             // adds `add`, takes hits out
  void (*reduce)(const TileArgs&);                                    // into the statistics
  void (*gradient)(const TileArgs&);                                  // z -> dz
  void (*widen)(TableDtype, const void* from, float* to, int64_t count);
  void (*narrow)(TableDtype, const float* from, void* to, int64_t count);
};

// Products of bfloat16 on tile registers: rows, columns and depths are multiples of 32; the right side is in pairs of
// rows, [depth / 2][columns][2].
struct SampledSoftmaxAmx {
  // c (rows, columns) = or += a (rows, depth) b
  void (*product)(int64_t rows, int64_t columns, int64_t depth, const uint16_t* a, int64_t lda, const uint16_t* b,
                  float* c, int64_t ldc, bool add);
  void (*pair)(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to);
  void (*pair_transposed)(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to);
  // to (columns, rows) = from (rows, columns) transposed; buffer: as large
  void (*transpose)(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to,
                    uint16_t* buffer);
};

const SampledSoftmaxAmx* sampled_softmax_amx();
const SampledSoftmaxKernels* sampled_softmax_kernels_avx2();
const SampledSoftmaxKernels* sampled_softmax_kernels_avx512();

}  // namespace pk
