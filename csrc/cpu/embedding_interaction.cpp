// The pairwise interaction on the CPU: one pass over the samples each way.
#include "embedding_interaction.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "embedding_tables.h"
#include "isa.h"
#include "pages.h"
#include "scratch.h"

namespace pk {
namespace {

using at::Tensor;

const InteractionKernels& interaction_kernels() {
  static const InteractionKernels* const table = isa() == Isa::kAvx512 ? interaction_kernels_avx512()
                                                 : isa() == Isa::kAvx2 ? interaction_kernels_avx2()
                                                                       : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

struct Held {
  Tensor dense, sparse;
  InteractionArgs args;
  int64_t samples;

  Held(const Tensor& given_dense, const Tensor& given_sparse, bool self_interaction)
      : dense(with_rows(given_dense)), samples(given_dense.size(0)) {
    TORCH_CHECK(given_dense.dim() == 2 && given_sparse.dim() == 3 && given_sparse.size(0) == samples &&
                    given_sparse.size(2) == given_dense.size(1) && given_dense.device().is_cpu() &&
                    given_sparse.device().is_cpu() && given_dense.scalar_type() == given_sparse.scalar_type(),
                "dot_interaction(): dense is ", given_dense.scalar_type(), given_dense.sizes(), ", sparse ",
                given_sparse.scalar_type(), given_sparse.sizes());
    sparse = given_sparse.stride(2) == 1 || given_sparse.size(2) <= 1 ? given_sparse : given_sparse.contiguous();
    const int64_t rows = sparse.size(1) + 1;
    args.dtype = table_dtype(dense, "dot_interaction");
    args.features = sparse.size(1);
    args.cols = dense.size(1);
    args.diagonal = self_interaction;
    args.dense = dense.const_data_ptr();
    args.sparse = sparse.const_data_ptr();
    args.dense_stride = dense.stride(0);
    args.sparse_batch_stride = sparse.stride(0);
    args.sparse_row_stride = sparse.stride(1);
    args.outputs = args.cols + (self_interaction ? rows * (rows + 1) / 2 : rows * (rows - 1) / 2);
  }

  template <class Kernel>
  void run(Kernel kernel) const {
    const int64_t bytes = interaction_kernels().scratch(args);
    const int64_t grain = std::max<int64_t>(1, 65536 / ((args.features + 1) * (args.cols + args.features + 1)));
    at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) { kernel(args, scratch(bytes), begin, end); });
  }
};

Tensor dot_interaction_forward(const Tensor& dense, const Tensor& sparse, bool self_interaction) {
  Held held(dense, sparse, self_interaction);
  Tensor out = empty_large({held.samples, held.args.outputs}, dense.options());
  held.args.out = out.mutable_data_ptr();
  held.run(interaction_kernels().forward);
  return out;
}

std::tuple<Tensor, Tensor> dot_interaction_backward(const Tensor& dy, const Tensor& dense, const Tensor& sparse,
                                                    bool self_interaction, const c10::List<bool>& output_mask) {
  Held held(dense, sparse, self_interaction);
  TORCH_CHECK(dy.dim() == 2 && dy.size(0) == held.samples && dy.size(1) == held.args.outputs &&
                  dy.scalar_type() == dense.scalar_type() && dy.device().is_cpu() && output_mask.size() == 2,
              "dot_interaction_backward: dy is ", dy.scalar_type(), dy.sizes());
  const Tensor rows = with_rows(dy);
  held.args.dy = rows.const_data_ptr();
  held.args.dy_stride = rows.stride(0);
  const auto wanted = [&](bool asked, const Tensor& like) {
    return asked ? empty_large(like.sizes(), like.options()) : at::empty({0}, like.options());
  };
  Tensor ddense = wanted(output_mask[0], dense), dsparse = wanted(output_mask[1], sparse);
  held.args.ddense = output_mask[0] ? ddense.mutable_data_ptr() : nullptr;
  held.args.dsparse = output_mask[1] ? dsparse.mutable_data_ptr() : nullptr;
  held.run(interaction_kernels().backward);
  return {ddense, dsparse};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("dot_interaction_forward.cpu", &dot_interaction_forward);
  m.impl("dot_interaction_backward.cpu", &dot_interaction_backward);
}

}  // namespace pk
