// Launchers of the sampled_softmax room.  Matrices have a row and a column stride in elements.  Ids are int32
// (`narrow`) or int64, contiguous; those outside [0, classes) add nothing.  Float arrays without a type of their own
// are float32 and contiguous.
#pragma once
#include <cstdint>
#include <string>

#include "dtype.h"

namespace pk {

// z_ik = x_i . w[ids_ik] for each row's `count` classes.  With `loss`: loss_i = sum_k softplus(-s z), its slopes
// `coefficient` (rows, count) where wanted, and unit_i = sum_k coefficient_ik w[ids_ik].  signs: int8, or null for +1
// in the first column and -1 in the others.
void sampled_softmax_logistic(const void* x, const void* weight, const void* ids, const int8_t* signs, float* loss,
                              float* coefficient, float* unit, bool narrow, int64_t rows, int64_t cols, int64_t count,
                              int64_t classes, int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col,
                              DType dtype, void* stream);
// out_it = x_i . w[labels_it] + bias[labels_it] - log_it; rows of `out` are out_row apart; bias and log may be null.
void sampled_softmax_true_logits(const void* x, const void* weight, const void* bias, const void* labels,
                                 const float* log, float* out, bool narrow, int64_t rows, int64_t cols, int64_t count,
                                 int64_t classes, int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col,
                                 int64_t bias_step, int64_t out_row, DType dtype, void* stream);
// out_i += sum_t factor_it w[ids_it]
void sampled_softmax_add_rows(const void* weight, const void* ids, const float* factor, float* out, bool narrow,
                              int64_t rows, int64_t cols, int64_t count, int64_t classes, int64_t weight_row,
                              int64_t weight_col, DType dtype, void* stream);
// out[key] (with ranks: out[rank]) = sum of factor * values[source] over the entries of each key, in float32, rounded
// once to `dtype`.  keys ascending, the larger of the two null; partial: (chunks, 2, cols).
void sampled_softmax_sum_rows(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks,
                              const int64_t* source, const float* factor, const float* values, void* out,
                              float* partial, int64_t n, int64_t rows, int64_t cols, int64_t chunk_length, DType dtype,
                              void* stream);

// What a part of the classes tells of each row, in `partial` (parts, kPlanes, rows): the largest logit m, the sum of
// exp(z - m) ("logistic": the sum of softplus(z), and only that), z of the target, sum of c (z - m), sum of c.
constexpr int kPlanes = 5;

// Logits of all rows for a sample (`ids`) or for all classes (ids null; labels then are targets).  log: taken from the
// logits of a sample; hits: labels a row whose equals are left out; factors: (classes) weights c, or null for 1.  A
// part has part_length classes.  exact: float32 products to float32's rounding; else tf32.
void sampled_softmax_logits(const void* x, const void* weight, const void* bias, const void* ids, const float* log,
                            const void* labels, const float* factors, float* partial, bool narrow_ids,
                            bool narrow_labels, int64_t rows, int64_t count, int64_t cols, int64_t classes,
                            int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col, int64_t bias_step,
                            int64_t hits, int64_t part_length, int64_t parts, bool logistic, bool smooth, bool exact,
                            DType dtype, void* stream);
// Gradients of the logits of classes [begin, begin + length): dz (rows, dz_row), and their transpose (length,
// transposed_row); either may be null.  They are bfloat16 for bfloat16 and float32 else, with zeros up to those widths,
// multiples of 16 bytes.  statistics: m and the sum of each row.  Of a sample: dz = dloss p.  Of all classes, of which
// rows with the target `ignored` count nothing: g = dloss, c the weight of the target,
// dz_j = (1 - smoothing) g c (p_j - [j is the target]) + smoothing / classes g (p_j all - c_j) + 2 z_loss g c lse p_j;
// all: the sum of the weights, one float, or null for the number of classes.
void sampled_softmax_slopes(const void* x, const void* weight, const void* bias, const void* ids, const float* log,
                            const void* labels, const float* factors, const float* dloss, const float* statistics,
                            const float* all, void* dz, void* transposed, bool narrow_ids, bool narrow_labels,
                            int64_t rows, int64_t count, int64_t cols, int64_t classes, int64_t x_row, int64_t x_col,
                            int64_t weight_row, int64_t weight_col, int64_t bias_step, int64_t hits, int64_t begin,
                            int64_t length, int64_t statistics_row, int64_t dz_row, int64_t transposed_row,
                            int64_t ignored, float smoothing, float z_loss, bool logistic, bool exact, DType dtype,
                            void* stream);
// out[part] = a[:, part] b[rows of the part], (parts, m, n) in float32, or with one part and not wide in b's dtype.
// a: (m, a_row), as `slopes` leaves it.  ids: which row of b each step of the contraction takes, or null.  add: to what
// is there.
void sampled_softmax_product(const void* a, const void* b, const void* ids, void* out, bool narrow_ids, int64_t m,
                             int64_t n, int64_t depth, int64_t b_rows, int64_t a_row, int64_t b_row, int64_t b_col,
                             int64_t part_length, int64_t parts, bool wide, bool add, bool exact, DType dtype,
                             void* stream);

// loss of each row from the parts; statistics (rows, 2 + count): m and the sum are written, true logits read.
void sampled_softmax_join_sample(const float* partial, float* statistics, float* loss, int64_t rows, int64_t parts,
                                 int64_t count, bool logistic, void* stream);
// own_it = dloss_i (p_it - 1 / count), p the softmax or the sigmoid of the true logits.
void sampled_softmax_own(const float* dloss, const float* statistics, float* own, int64_t rows, int64_t count,
                         bool logistic, void* stream);
void sampled_softmax_join_all(const float* partial, const void* target, const float* factors, const float* all,
                              float* statistics, float* loss, bool narrow, int64_t rows, int64_t parts, int64_t classes,
                              int64_t ignored, float smoothing, float z_loss, void* stream);

// Draws of pykernels/reference/sampled_softmax/samplers.py.  kind: log_uniform, uniform, alias.  slots: 2 int64 each of
// `size` hashed classes, a power of two, set to -1, or null without `unique`.
void sampled_softmax_draw(const int64_t* seed, const double* threshold, const int32_t* alias, int64_t* slots,
                          int64_t* ids, int64_t* tries, int64_t count, int64_t classes, int64_t size,
                          double log_classes, const std::string& kind, void* stream);

}  // namespace pk
