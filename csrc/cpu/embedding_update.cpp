// Row updates of the embedding room on the CPU: the gradient of a row is summed and stepped at once, so that neither
// the rows of the gradient nor anything of the table's size is stored. Threads own whole rows: no number of them
// changes a bit.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "embedding_gradient.h"
#include "isa.h"
#include "scratch.h"

namespace pk {
namespace {

using at::Tensor;

UpdateKernel update_kernel() {
  static const UpdateKernel kernel = isa() == Isa::kAvx512 ? embedding_update_avx512()
                                     : isa() == Isa::kAvx2 ? embedding_update_avx2()
                                                           : nullptr;
  TORCH_CHECK(kernel, "pykernels: ", isa_refusal());
  return kernel;
}

RowRule row_rule(c10::string_view rule) {
  if (rule == "sgd") return RowRule::kSgd;
  if (rule == "adagrad") return RowRule::kAdagrad;
  if (rule == "rowwise_adagrad") return RowRule::kRowwiseAdagrad;
  TORCH_CHECK(rule == "adam", "embedding_update: rule must be sgd, adagrad, rowwise_adagrad or adam, not '", rule, "'");
  return RowRule::kAdam;
}

void* state_of(const std::optional<Tensor>& state, const Tensor& weight, bool wanted, bool by_row) {
  if (!wanted) return nullptr;
  const auto sum = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(state && state->device().is_cpu() && state->scalar_type() == sum && state->is_contiguous() &&
                  state->sizes() == (by_row ? weight.sizes().slice(0, 1) : weight.sizes()),
              "embedding_update: the state must be contiguous ", sum, " of the shape of ",
              by_row ? "the table's rows" : "the table");
  return state->mutable_data_ptr();
}

void embedding_update(const Tensor& weight, const std::optional<Tensor>& state,
                      const std::optional<Tensor>& second_state, const Tensor& ids, const Tensor& dy,
                      const std::optional<Tensor>& offsets, const std::optional<Tensor>& per_sample_weights,
                      const std::optional<Tensor>& maxima, c10::string_view mode, bool include_last_offset,
                      int64_t padding_idx, bool by_frequency, c10::string_view rule, double lr, double weight_decay,
                      double eps, double beta1, double beta2, int64_t step, const std::optional<Tensor>& seed,
                      int64_t) {
  const std::string name = "embedding_" + std::string(rule) + "_";
  TORCH_CHECK(weight.dim() == 2 && weight.device().is_cpu() && (weight.stride(1) == 1 || weight.size(1) <= 1), name,
              "(): argument 'weight' must be 2-D on the CPU, its rows contiguous");
  TORCH_CHECK(dy.scalar_type() == weight.scalar_type() && dy.dim() && dy.size(-1) == weight.size(1), name,
              "(): grad_output is ", dy.scalar_type(), dy.sizes(), ", the table ", weight.scalar_type(),
              weight.sizes());
  const int64_t rows = weight.size(0), cols = weight.size(1);
  UpdateArgs args{row_rule(rule)};
  const bool by_row = args.rule == RowRule::kRowwiseAdagrad;
  args.state = state_of(state, weight, args.rule != RowRule::kSgd, by_row);
  args.second_state = state_of(second_state, weight, args.rule == RowRule::kAdam, false);
  args.table_stride = weight.stride(0);
  args.lr = lr, args.weight_decay = weight_decay, args.eps = eps, args.beta1 = beta1, args.beta2 = beta2;
  args.step_size = lr / (1 - std::pow(beta1, static_cast<double>(step)));
  args.root_correction = std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
  if (seed) {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && seed->scalar_type() == at::kLong && seed->numel() == 1, name,
                "(): stochastic rounding takes a bfloat16 table and one int64 as seed");
    args.stochastic = true;
    args.seed = static_cast<uint64_t>(seed->item<int64_t>());
  }
  const GradientSource source = mode == "none"
                                    ? lookup_source(dy, ids, rows, name.c_str(), "indices")
                                    : bag_source(dy, ids, offsets, per_sample_weights, maxima, mode,
                                                 include_last_offset, padding_idx, rows, name.c_str(), "indices");
  if (cols == 0) return;
  const SortedGradient gradient(source, rows, padding_idx, by_frequency);
  args.table = weight.mutable_data_ptr();
  const size_t bytes = static_cast<size_t>(cols) * (weight.scalar_type() == at::kDouble ? 8 : 4);
  at::parallel_for(0, gradient.runs(), std::max<int64_t>(1, kGradientGrain / cols), [&](int64_t begin, int64_t end) {
    update_kernel()(gradient.args, args, scratch(bytes), begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("embedding_update.cpu", &embedding_update); }

}  // namespace pk
