// From tensors to what the loops of the sampled_softmax room are told, and the gradient of a table from the rows that
// were used: sorted runs, as in the embedding room.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <tuple>
#include <vector>

#include "sampled_softmax_kernels.h"

namespace pk {

const SampledSoftmaxKernels& sampled_softmax_kernels();

// float32, bfloat16 or float16; raises naming the operator otherwise.
TableDtype loss_dtype(const at::Tensor& x, const char* function);

// Raises IndexError naming position and value of the first id outside [least, rows).
void check_classes(const at::Tensor& ids, int64_t least, int64_t rows, const char* function, const char* argument);

inline Ids ids_of(const at::Tensor& contiguous) {
  return {contiguous.const_data_ptr(), contiguous.scalar_type() == at::kInt, contiguous.numel()};
}

// The gradient of a table: row v is the sum over the entries p with ids[p] = v of coefficient[p] * rows[row_of[p]],
// entries with the id `skipped` left out. Gives (unique ids (1, U), their rows), or (empty, all `count` rows).
struct RowTerms {
  at::Tensor ids;            // contiguous int32 or int64, in [0, skipped]
  int64_t count, skipped;    // rows of the table; skipped >= count
  at::Tensor rows;           // unit inner stride
  const uint32_t* row_of;    // entry -> row
  const float* coefficient;  // entry -> factor
};
std::tuple<at::Tensor, at::Tensor> sum_terms(const RowTerms& terms, at::ScalarType dtype, bool sparse);

// Calls run(begin, end) on ranges of rows, each with at least `grain` elements of work.
void for_rows(int64_t rows, int64_t elements, const std::function<void(int64_t, int64_t)>& run);

}  // namespace pk
