// Launchers of the embedding room.  Ids are int32 (`narrow`) or int64, offsets int64 or null (then every bag has
// `length` ids).  Tables and gradients have a row and a column stride in elements.  `padding` is -1 for none.  Ids
// outside [0, rows) are skipped, and reported to `record` where it is not null (pykernels/_errors.py).
#pragma once
#include <cstdint>
#include <string>

#include "dtype.h"

namespace pk {

// mode: lookup, sum, mean, max.  out (bags, cols), maxima the same or null; scale: one factor for each id, or null.
void embedding_bag_forward(const void* ids, const void* weight, const int64_t* offsets, const void* scale, void* out,
                           int32_t* maxima, int64_t* record, int64_t what, bool narrow, int64_t bags, int64_t length,
                           int64_t n, bool last, int64_t rows, int64_t cols, int64_t padding, int64_t weight_row,
                           int64_t weight_col, const std::string& mode, DType dtype, void* stream);
// How many ids of each bag take part, at least 1.
void embedding_bag_sizes(const void* ids, const int64_t* offsets, float* sizes, bool narrow, int64_t bags,
                         int64_t length, int64_t n, bool last, int64_t rows, int64_t padding, void* stream);
// out[p] = <dy[bag of p], weight[ids[p]]> / size of the bag (1 where sizes is null); 0 for ids that take no part.
void embedding_bag_backward_weights(const void* dy, const void* ids, const void* weight, const int64_t* offsets,
                                    const float* sizes, void* out, bool narrow, int64_t bags, int64_t length, int64_t n,
                                    bool last, int64_t rows, int64_t cols, int64_t padding, int64_t dy_row,
                                    int64_t dy_col, int64_t weight_row, int64_t weight_col, DType dtype, void* stream);

// keys[p] = the id at position p, or `rows` where it adds to no row.
void embedding_keys(const void* ids, const int64_t* offsets, int32_t* keys, int64_t* wide_keys, int64_t* record,
                    int64_t what, bool narrow, int64_t bags, int64_t n, bool last, int64_t rows, int64_t padding,
                    void* stream);
// For each sorted position: its bag, what that row of dy is multiplied by, its place in the bag; the last two if
// wanted.
void embedding_entries(const int64_t* order, const int64_t* offsets, const float* sizes, const void* scale,
                       int64_t* source, float* factor, int32_t* place, int64_t bags, int64_t length, int64_t n,
                       DType dtype, void* stream);
// out[key] (with ranks: out[rank]) = the sum of the rows of dy of each key.  keys ascending, the larger of the two
// null; partial: (chunks, 2, cols).
void embedding_sum_rows(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks, const int64_t* source,
                        const float* factor, const int32_t* place, const int32_t* maxima, const void* dy, void* out,
                        float* partial, int64_t n, int64_t rows, int64_t cols, int64_t dy_row, int64_t dy_col,
                        int64_t chunk_length, bool by_frequency, DType dtype, void* stream);

// Rows of `weight` step by the sums of their rows of dy; rule: sgd, adagrad, rowwise_adagrad, adam.  State: (rows,
// cols), for rowwise_adagrad (rows); seed: one int64 for stochastic rounding, or null.  With ranks (of each entry: how
// many different keys come before it) row-wise Adagrad takes rows of any width, in two passes; second_state then is
// room for a float for each entry and each 32 columns of a row.
void embedding_update(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks, const int64_t* source,
                      const float* factor, const int32_t* place, const int32_t* maxima, const void* dy, void* weight,
                      float* state, float* second_state, const int64_t* seed, float* partial, int64_t n, int64_t rows,
                      int64_t cols, int64_t dy_row, int64_t dy_col, int64_t weight_row, int64_t chunk_length,
                      bool by_frequency, const std::string& rule, float lr, float weight_decay, float eps,
                      float one_minus_beta1, float beta2, float one_minus_beta2, float scale2, DType dtype,
                      void* stream);

// Bags of many tables side by side in out (bags, width).  tables: ten int64 a table: the addresses of ids, table,
// offsets (or 0) and factors (or 0), length, n, rows, cols, row stride, first column.  most_cols: of any of them.
void embedding_bag_multi_forward(const int64_t* tables, void* out, int32_t* maxima, int64_t* record, int64_t what,
                                 int64_t count, int64_t bags, int64_t width, int64_t most_cols, bool narrow, bool last,
                                 bool vectors, const std::string& mode, DType dtype, void* stream);

// packed: rows of codes of `bits` bits with their scale and bias, `packed_row` bytes apart; scale: one factor for each
// id, or null.  A lookup: bags of one id, padding -1.  out (bags, cols), of dtype.
void embedding_bag_quantized(const void* packed, const void* ids, const int64_t* offsets, const float* scale, void* out,
                             int64_t* record, int64_t what, bool narrow, int64_t bags, int64_t length, int64_t n,
                             bool last, int64_t rows, int64_t cols, int64_t padding, int64_t packed_row, int64_t bits,
                             bool mean, DType dtype, void* stream);
// weight, of dtype -> its rows packed: out (rows, cols * bits / 8 + bits) bytes.
void quantize_rows(const void* weight, void* out, int64_t rows, int64_t cols, int64_t weight_row, int64_t weight_col,
                   int64_t bits, DType dtype, void* stream);

// rows: the dense features and the sparse ones.  ddense or dsparse may be null: not wanted.
void dot_interaction_forward(const void* dense, const void* sparse, void* out, int64_t batch, int64_t rows,
                             int64_t cols, int64_t pairs, int64_t dense_b, int64_t dense_d, int64_t sparse_b,
                             int64_t sparse_f, int64_t sparse_d, bool self, DType dtype, void* stream);
void dot_interaction_backward(const void* dy, const void* dense, const void* sparse, void* ddense, void* dsparse,
                              int64_t batch, int64_t rows, int64_t cols, int64_t pairs, int64_t dy_b, int64_t dy_c,
                              int64_t dense_b, int64_t dense_d, int64_t sparse_b, int64_t sparse_f, int64_t sparse_d,
                              bool self, DType dtype, void* stream);

}  // namespace pk
