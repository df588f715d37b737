// Losses whose rows have their own few classes (per-row negatives, paths of a tree), and the gradient of their table.
// Schemas are defined in Python (pykernels/ops/sampled_softmax); loops are in sampled_softmax.inc.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "embedding_tables.h"
#include "sampled_softmax_tables.h"

namespace pk {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> logistic_rows_forward(const Tensor& input, const Tensor& weight, const Tensor& ids,
                                                         const std::optional<Tensor>& signs, bool gradients) {
  constexpr auto name = "logistic_rows_forward";
  TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && ids.dim() == 2 && input.size(0) == ids.size(0) &&
                  input.size(1) == weight.size(1) && input.scalar_type() == weight.scalar_type() &&
                  weight.device().is_cpu(),
              name, ": input ", input.sizes(), ", weight ", weight.sizes(), " and ids ", ids.sizes(), " do not fit");
  const Tensor held = ids.contiguous(), x = with_rows(input), table = with_rows(weight);
  check_classes(held, -1, weight.size(0), name, "ids");
  const int64_t rows = x.size(0), cols = x.size(1), per_row = held.size(1);
  const auto options = input.options().dtype(at::kFloat);
  Tensor loss = at::empty({rows}, options);
  Tensor coefficient = gradients ? at::empty({rows, per_row}, options) : at::empty({0}, options);
  Tensor dx = gradients ? at::empty({rows, cols}, options) : at::empty({0}, options);
  Tensor held_signs;
  if (signs) {
    TORCH_CHECK(signs->sizes() == ids.sizes() && signs->scalar_type() == at::kChar && signs->device().is_cpu(), name,
                ": signs must be int8 of the shape ", ids.sizes());
    held_signs = signs->contiguous();
  }
  LogisticArgs args{loss_dtype(input, name), ids_of(held), per_row};
  args.signs = signs ? held_signs.const_data_ptr<int8_t>() : nullptr;
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.cols = cols;
  args.table = table.const_data_ptr();
  args.table_stride = table.stride(0);
  args.loss = loss.mutable_data_ptr<float>();
  args.gradients = gradients;
  args.coefficient = coefficient.mutable_data_ptr<float>();
  args.dx = dx.mutable_data_ptr<float>();
  for_rows(rows, per_row * cols,
           [&](int64_t begin, int64_t end) { sampled_softmax_kernels().logistic(args, begin, end); });
  return {loss, coefficient, dx};
}

std::tuple<Tensor, Tensor> table_gradient(const Tensor& dloss, const Tensor& input, const Tensor& ids,
                                          const Tensor& coefficient, int64_t rows, bool sparse) {
  constexpr auto name = "row_gradient";
  TORCH_CHECK(input.dim() == 2 && ids.dim() == 2 && ids.size(0) == input.size(0) &&
                  coefficient.sizes() == ids.sizes() && dloss.dim() == 1 && dloss.size(0) == input.size(0) &&
                  coefficient.scalar_type() == at::kFloat && dloss.scalar_type() == at::kFloat &&
                  input.size(0) < int64_t{1} << 32,
              name, ": dloss ", dloss.sizes(), ", input ", input.sizes(), ", ids ", ids.sizes(), " and coefficient ",
              coefficient.sizes(), " do not fit");
  loss_dtype(input, name);
  Tensor held = ids.contiguous();
  check_classes(held, -1, rows, name, "ids");
  const int64_t batch = held.size(0), per_row = held.size(1);
  bool missing = false;
  const auto look = [&](const auto* p) {
    for (int64_t i = 0; i < held.numel(); ++i) missing |= p[i] < 0;
  };
  held.scalar_type() == at::kInt ? look(held.const_data_ptr<int32_t>()) : look(held.const_data_ptr<int64_t>());
  if (missing) held = held.to(at::kLong).masked_fill(held.lt(0), rows);
  const Tensor row_of = at::empty({held.numel()}, at::kInt), factors = at::empty({held.numel()}, coefficient.options());
  const Tensor scale = dloss.contiguous(), slopes = coefficient.contiguous(), x = with_rows(input);
  uint32_t* const row = reinterpret_cast<uint32_t*>(row_of.mutable_data_ptr<int32_t>());
  float* const factor = factors.mutable_data_ptr<float>();
  const float *const d = scale.const_data_ptr<float>(), *const slope = slopes.const_data_ptr<float>();
  for_rows(batch, per_row, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t p = i * per_row; p < (i + 1) * per_row; ++p) {
        row[p] = static_cast<uint32_t>(i);
        factor[p] = slope[p] * d[i];
      }
    }
  });
  return sum_terms({held, rows, rows, x, row, factor}, input.scalar_type(), sparse);
}

Tensor row_gradient(const Tensor& dloss, const Tensor& input, const Tensor& ids, const Tensor& coefficient,
                    int64_t rows) {
  return std::get<1>(table_gradient(dloss, input, ids, coefficient, rows, false));
}

std::tuple<Tensor, Tensor> row_gradient_sparse(const Tensor& dloss, const Tensor& input, const Tensor& ids,
                                               const Tensor& coefficient, int64_t rows) {
  return table_gradient(dloss, input, ids, coefficient, rows, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("logistic_rows_forward.cpu", &logistic_rows_forward);
  m.impl("row_gradient.cpu", &row_gradient);
  m.impl("row_gradient_sparse.cpu", &row_gradient_sparse);
}

}  // namespace pk
