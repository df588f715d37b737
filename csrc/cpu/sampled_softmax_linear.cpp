// Cross entropy of a linear layer over all classes, without its logits. The schema is defined in Python
// (pykernels/ops/sampled_softmax).
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <limits>
#include <vector>

#include "embedding_tables.h"
#include "pages.h"
#include "sampled_softmax_logits.h"

namespace pk {
namespace {

using at::Tensor;

// What a call looks at, checked. Rows with the target `ignore_index` are left out of everything.
struct Rows {
  int64_t batch, classes;
  Tensor index;    // (kept) int64: the rows that count; not defined: all
  Tensor x;        // those rows
  Tensor target;   // (kept) int64
  Tensor bias;     // (classes) float32, or not defined
  Tensor factors;  // (classes) float32, or not defined
  double total;    // sum of the class factors

  Rows(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& given_bias, const Tensor& given_target,
       const std::optional<Tensor>& class_weight, int64_t ignore_index, const char* name) {
    const auto fits = [&](const std::optional<Tensor>& v) {
      return !v || (v->dim() == 1 && v->size(0) == weight.size(0) && v->device().is_cpu());
    };
    TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1) && weight.device().is_cpu() &&
                    weight.scalar_type() == input.scalar_type() && given_target.dim() == 1 &&
                    given_target.size(0) == input.size(0) && fits(given_bias) && fits(class_weight),
                name, ": input ", input.sizes(), ", weight ", weight.sizes(), " and target ", given_target.sizes(),
                " do not fit");
    loss_dtype(input, name);
    batch = input.size(0), classes = weight.size(0);
    target = given_target.to(at::kLong).contiguous();
    x = input;
    const int64_t* const ids = target.const_data_ptr<int64_t>();
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < batch; ++i) {
      if (ids[i] != ignore_index) kept.push_back(i);
    }
    if (static_cast<int64_t>(kept.size()) < batch) {
      index = at::empty({static_cast<int64_t>(kept.size())}, target.options());
      std::copy(kept.begin(), kept.end(), index.mutable_data_ptr<int64_t>());
      x = at::index_select(input, 0, index);
      target = at::index_select(target, 0, index);
    }
    check_classes(target, 0, classes, name, "target");
    if (given_bias) bias = given_bias->to(at::kFloat).contiguous();
    total = static_cast<double>(classes);
    if (class_weight) {
      factors = class_weight->to(at::kFloat).contiguous();
      total = factors.sum(at::kDouble).item<double>();
    }
  }

  int64_t count() const { return x.size(0); }
  int64_t row(int64_t i) const { return index.defined() ? index.const_data_ptr<int64_t>()[i] : i; }
  float factor(int64_t i) const {
    return factors.defined() ? factors.const_data_ptr<float>()[target.const_data_ptr<int64_t>()[i]] : 1.f;
  }

  TileArgs tile(const Tensor& statistics) const {
    TileArgs t{LossKind::kSoftmax};
    t.add = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
    t.factors = factors.defined() ? factors.const_data_ptr<float>() : nullptr;
    t.target = target.const_data_ptr<int64_t>();
    t.statistics = {statistics.mutable_data_ptr<float>(), 2};
    return t;
  }
};

std::tuple<Tensor, Tensor> linear_rows_forward(const Tensor& input, const Tensor& weight,
                                               const std::optional<Tensor>& bias, const Tensor& target,
                                               const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                               double label_smoothing, double z_loss) {
  constexpr auto name = "linear_rows_forward";
  const Rows rows(input, weight, bias, target, class_weight, ignore_index, name);
  const auto options = input.options().dtype(at::kFloat);
  Tensor loss = at::zeros({rows.batch}, options), statistics = at::zeros({rows.batch, 2}, options);
  // (maximum, sum) of the rows that count, without gaps.
  Tensor own = at::empty({rows.count(), 2}, options);
  own.select(1, 0).fill_(-std::numeric_limits<float>::infinity());
  own.select(1, 1).zero_();
  const Tensor logit = at::zeros({rows.count()}, options);
  const Tensor weighted = at::zeros({label_smoothing != 0 ? rows.count() : 0}, options.dtype(at::kDouble));
  TileArgs tile = rows.tile(own);
  tile.weighted = label_smoothing != 0 ? weighted.mutable_data_ptr<double>() : nullptr;
  tile.target_logit = logit.mutable_data_ptr<float>();
  Logits(rows.x, weight, name).reduce(tile, {});
  for (int64_t i = 0; i < rows.count(); ++i) {
    const double top = tile.statistics.maximum(i), log_sum = std::log(static_cast<double>(tile.statistics.sum(i)));
    const double factor = rows.factor(i), lse = top + log_sum;
    double value = (1 - label_smoothing) * factor * ((top - tile.target_logit[i]) + log_sum);
    if (label_smoothing != 0) value += label_smoothing / rows.classes * (rows.total * lse - tile.weighted[i]);
    if (z_loss != 0) value += z_loss * factor * lse * lse;
    loss.mutable_data_ptr<float>()[rows.row(i)] = static_cast<float>(value);
    std::copy_n(&tile.statistics.maximum(i), 2, statistics.mutable_data_ptr<float>() + 2 * rows.row(i));
  }
  return {loss, statistics};
}

std::tuple<Tensor, Tensor, Tensor> linear_rows_backward(const Tensor& dloss, const Tensor& statistics,
                                                        const Tensor& input, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& target,
                                                        const std::optional<Tensor>& class_weight, int64_t ignore_index,
                                                        double label_smoothing, double z_loss,
                                                        std::array<bool, 3> mask) {
  constexpr auto name = "linear_rows_backward";
  const Rows rows(input, weight, bias, target, class_weight, ignore_index, name);
  TORCH_CHECK(dloss.dim() == 1 && dloss.size(0) == rows.batch && dloss.scalar_type() == at::kFloat &&
                  statistics.dim() == 2 && statistics.size(0) == rows.batch && statistics.size(1) == 2,
              name, ": dloss ", dloss.sizes(), " and statistics ", statistics.sizes(), " do not fit");
  mask[2] = mask[2] && bias;
  const auto options = input.options().dtype(at::kFloat);
  const Tensor d = rows.index.defined() ? at::index_select(dloss, 0, rows.index) : dloss.contiguous();
  const Tensor own = rows.index.defined() ? at::index_select(statistics, 0, rows.index) : statistics.contiguous();
  const Tensor numbers = at::empty({3, rows.count()}, options);
  float* const scale = numbers.mutable_data_ptr<float>();
  float *const at_target = scale + rows.count(), *const smooth = at_target + rows.count();
  TileArgs tile = rows.tile(own);
  for (int64_t i = 0; i < rows.count(); ++i) {
    const double g = d.const_data_ptr<float>()[i], factor = rows.factor(i);
    const double lse = tile.statistics.maximum(i) + std::log(static_cast<double>(tile.statistics.sum(i)));
    const double at = g * (1 - label_smoothing) * factor, each = g * label_smoothing / rows.classes;
    at_target[i] = static_cast<float>(at);
    smooth[i] = static_cast<float>(each);
    scale[i] = static_cast<float>(at + each * rows.total + 2 * g * z_loss * factor * lse);
  }
  tile.scale = scale;
  tile.at_target = at_target;
  tile.smooth = label_smoothing != 0 ? smooth : nullptr;
  const int64_t cols = input.size(1);
  Tensor dweight = at::empty({0}, input.options()), dbias = dweight;
  if (mask[1]) dweight = rows.count() ? empty_large(weight.sizes(), input.options()) : at::zeros_like(weight);
  const Tensor sums = at::zeros({mask[2] ? rows.classes : 0}, options);
  Logits::Store store;
  if (mask[1] || mask[2]) {
    const TableDtype dtype = loss_dtype(input, name);
    store = [&, dtype](int64_t column, int64_t columns, const float* gradient, int64_t stride, const float* sum) {
      if (mask[1]) {
        char* const to = static_cast<char*>(dweight.mutable_data_ptr()) + column * cols * dweight.element_size();
        for (int64_t r = 0; r < columns; ++r) {
          sampled_softmax_kernels().narrow(dtype, gradient + r * stride, to + r * cols * dweight.element_size(), cols);
        }
      }
      if (mask[2]) std::copy_n(sum, columns, sums.mutable_data_ptr<float>() + column);
    };
  }
  Tensor dinput = at::empty({0}, input.options());
  if (rows.count()) {
    const Tensor dx = Logits(rows.x, weight, name).gradient(tile, {}, mask[0], store, mask[2]);
    if (mask[0] && !rows.index.defined()) dinput = dx.to(input.scalar_type());
    if (mask[0] && rows.index.defined()) {
      dinput = at::zeros(input.sizes(), input.options());
      dinput.index_copy_(0, rows.index, dx.to(input.scalar_type()));
    }
  } else if (mask[0]) {
    dinput = at::zeros(input.sizes(), input.options());
  }
  if (mask[2]) dbias = sums.to(input.scalar_type());
  return {dinput, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("linear_rows_forward.cpu", &linear_rows_forward);
  m.impl("linear_rows_backward.cpu", &linear_rows_backward);
}

}  // namespace pk
