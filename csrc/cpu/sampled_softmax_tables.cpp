#include "sampled_softmax_tables.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <sstream>

#include "embedding_sort.h"
#include "embedding_tables.h"
#include "isa.h"
#include "pages.h"

namespace pk {

using at::Tensor;

namespace {

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

template <class Id>
int64_t first_outside(const Id* ids, int64_t count, int64_t least, int64_t rows) {
  bool fine = true;
  for (int64_t i = 0; i < count; ++i) fine &= ids[i] >= least && ids[i] < rows;
  if (fine) return -1;
  int64_t i = 0;
  while (ids[i] >= least && ids[i] < rows) ++i;
  return i;
}

}  // namespace

const SampledSoftmaxKernels& sampled_softmax_kernels() {
  static const SampledSoftmaxKernels* const found =
      isa() == Isa::kAvx512 ? sampled_softmax_kernels_avx512() : sampled_softmax_kernels_avx2();
  TORCH_CHECK(isa() != Isa::kNone, isa_refusal());
  return *found;
}

TableDtype loss_dtype(const Tensor& x, const char* function) {
  TORCH_CHECK(x.device().is_cpu(), function, ": expected CPU tensors, not ", x.device());
  if (x.scalar_type() == at::kFloat) return TableDtype::kFloat;
  if (x.scalar_type() == at::kBFloat16) return TableDtype::kBFloat16;
  TORCH_CHECK(x.scalar_type() == at::kHalf, function, ": ", x.scalar_type(), " is not served");
  return TableDtype::kHalf;
}

void check_classes(const Tensor& ids, int64_t least, int64_t rows, const char* function, const char* argument) {
  TORCH_CHECK(
      ids.device().is_cpu() && ids.is_contiguous() && (ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong),
      function, ": argument '", argument, "' must be contiguous, int32 or int64, on the CPU");
  const bool narrow = ids.scalar_type() == at::kInt;
  const int64_t at = narrow ? first_outside(ids.const_data_ptr<int32_t>(), ids.numel(), least, rows)
                            : first_outside(ids.const_data_ptr<int64_t>(), ids.numel(), least, rows);
  if (at < 0) return;
  std::ostringstream where;
  int64_t inner = ids.numel(), rest = at;
  for (int64_t d = 0; d < ids.dim(); ++d) {
    inner /= ids.size(d);
    where << (d ? ", " : "[") << rest / inner;
    rest %= inner;
  }
  const int64_t value = narrow ? ids.const_data_ptr<int32_t>()[at] : ids.const_data_ptr<int64_t>()[at];
  TORCH_CHECK_INDEX(false, function, "(): argument '", argument, "': ", argument, where.str(), "] is ", value,
                    ", which is not in [", least, ", ", rows, ")");
}

void for_rows(int64_t rows, int64_t elements, const std::function<void(int64_t, int64_t)>& run) {
  if (rows == 0) return;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)), run);
}

std::tuple<Tensor, Tensor> sum_terms(const RowTerms& terms, at::ScalarType dtype, bool sparse) {
  const auto options = terms.rows.options().dtype(dtype);
  // Sums are formed in the rows' own type: a table of another one takes rounded copies of the few rows there are.
  const bool converts = dtype != terms.rows.scalar_type(), direct = !sparse && !converts;
  const int64_t cols = terms.rows.size(1);
  const Ids ids = ids_of(terms.ids);
  const SortedIds sorted = sort_ids(ids, terms.skipped + 1, terms.skipped, ids.count);
  const int64_t runs = sorted.count;
  Tensor found = at::empty({1, sparse ? runs : 0}, at::kLong);
  for (int64_t r = 0; sparse && r < runs; ++r) found.mutable_data_ptr<int64_t>()[r] = sorted.runs[r].id;
  Tensor summed = direct ? zeros_large({terms.count, cols}, options) : empty_large({runs, cols}, terms.rows.options());
  if (runs && cols) {
    SegmentArgs args{loss_dtype(terms.rows, "sum_terms")};
    args.dy = terms.rows.const_data_ptr();
    args.dy_stride = terms.rows.stride(0);
    args.cols = cols;
    args.bag_of = terms.row_of;
    args.coefficient = terms.coefficient;
    args.entries = sorted.entries;
    args.last = ids.count - 1;
    args.position_mask = (uint64_t{1} << sorted.position_bits) - 1;
    args.runs = sorted.runs;
    const Tensor partials = at::empty({sorted.pieces, cols}, options.dtype(at::kFloat));
    args.partials = partials.mutable_data_ptr();
    args.out = summed.mutable_data_ptr();
    args.dense = direct;
    const EmbeddingKernels& kernels = embedding_kernels();
    for (int64_t r = 0; sorted.pieces && r < runs; ++r) {
      const Run& run = sorted.runs[r];
      if (run.partial < 0) continue;
      for_rows((run.end - run.begin + kPiece - 1) / kPiece, kPiece * cols,
               [&](int64_t begin, int64_t end) { kernels.piece(args, r, begin, end); });
    }
    for_rows(runs, cols, [&](int64_t begin, int64_t end) { kernels.segment(args, begin, end); });
  }
  if (direct) return {found, summed};
  if (converts) summed = summed.to(dtype);
  if (sparse) return {found, summed};
  Tensor out = zeros_large({terms.count, cols}, options);
  const int64_t bytes = cols * out.element_size();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const char* const from = static_cast<const char*>(summed.const_data_ptr());
  for (int64_t r = 0; r < runs; ++r) std::copy_n(from + r * bytes, bytes, to + sorted.runs[r].id * bytes);
  return {found, out};
}

}  // namespace pk
