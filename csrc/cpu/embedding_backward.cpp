// Gradients of the embedding room on the CPU: positions sorted by id, each row of the gradient the sum of a run of
// them. No atomics, and no number of threads changes a bit.
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "embedding_sort.h"
#include "embedding_tables.h"
#include "pages.h"

namespace pk {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking

struct Options {
  int64_t rows, padding;
  bool by_frequency, sparse;
};

void check_gradient(const Tensor& dy, int64_t rows, const char* function) {
  TORCH_CHECK(dy.dim() == 2 && dy.size(0) == rows && dy.device().is_cpu(), function, ": dy has shape ", dy.sizes(),
              ", expected ", rows, " rows on the CPU");
}

// The rows of the gradient: (unique ids, their rows), or an empty tensor and all rows.
std::tuple<Tensor, Tensor> sum_rows(SegmentArgs args, const Tensor& dy, const Ids& ids, int64_t limit,
                                    const Options& options) {
  const SortedIds sorted = sort_ids(ids, options.rows, options.padding, limit);
  const int64_t runs = static_cast<int64_t>(sorted.runs.size()), cols = dy.size(1);
  Tensor found = at::empty({1, options.sparse ? runs : 0}, at::kLong);
  Tensor out =
      options.sparse ? empty_large({runs, cols}, dy.options()) : zeros_large({options.rows, cols}, dy.options());
  if (options.sparse) {
    int64_t* const unique = found.mutable_data_ptr<int64_t>();
    for (int64_t r = 0; r < runs; ++r) unique[r] = sorted.runs[r].id;
  }
  if (runs == 0 || cols == 0) return {found, out};
  const Tensor partials = at::empty({sorted.pieces, cols}, dy.options().dtype(at::toOpMathType(dy.scalar_type())));
  args.entries = sorted.entries.get();
  args.last = ids.count - 1;
  args.position_mask = (uint64_t{1} << sorted.position_bits) - 1;
  args.runs = sorted.runs.data();
  args.by_frequency = options.by_frequency;
  args.partials = partials.mutable_data_ptr();
  args.out = out.mutable_data_ptr();
  args.dense = !options.sparse;
  const EmbeddingKernels& kernels = embedding_kernels();
  if (sorted.pieces) {
    for (int64_t r = 0; r < runs; ++r) {
      const Run& run = sorted.runs[r];
      if (run.partial < 0) continue;
      at::parallel_for(0, (run.end - run.begin + kPiece - 1) / kPiece, std::max<int64_t>(1, kGrain / (kPiece * cols)),
                       [&](int64_t begin, int64_t end) { kernels.piece(args, r, begin, end); });
    }
  }
  at::parallel_for(0, runs, std::max<int64_t>(1, kGrain / cols),
                   [&](int64_t begin, int64_t end) { kernels.segment(args, begin, end); });
  return {found, out};
}

std::tuple<Tensor, Tensor> lookup_gradient(const Tensor& dy, const Tensor& ids, const Options& options) {
  constexpr auto name = "embedding_backward";
  TORCH_CHECK(dy.dim() == ids.dim() + 1, name, ": dy has shape ", dy.sizes(), " for ids of shape ", ids.sizes());
  const HeldIds held(ids, options.rows, name);
  const Tensor rows = with_rows(dy.reshape({ids.numel(), dy.size(-1)}));
  SegmentArgs args{table_dtype(dy, name)};
  args.dy = rows.const_data_ptr();
  args.dy_stride = rows.stride(0);
  args.cols = rows.size(1);
  return sum_rows(args, rows, held.ids, held.ids.count, options);
}

template <class Sum, class Id>
void fill_coefficients(const Id* ids, const Bags& bags, int64_t padding, const Sum* scale, bool mean, Sum* out,
                       int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t from = bags.begin(b), to = bags.begin(b + 1);
    Sum size = 1;
    if (mean) {
      int64_t counted = 0;
      for (int64_t p = from; p < to; ++p) counted += ids[p] != padding;
      size = static_cast<Sum>(std::max<int64_t>(counted, 1));
    }
    for (int64_t p = from; p < to; ++p) out[p] = (scale ? scale[p] : Sum{1}) / size;
  }
}

template <class Sum>
void coefficients(const Ids& ids, const Bags& bags, int64_t padding, const Tensor& scale, bool mean, Tensor& out) {
  const Sum* const given = scale.defined() ? scale.const_data_ptr<Sum>() : nullptr;
  Sum* const to = out.mutable_data_ptr<Sum>();
  for_bags(bags, 1, [&](int64_t begin, int64_t end) {
    ids.narrow ? fill_coefficients(static_cast<const int32_t*>(ids.data), bags, padding, given, mean, to, begin, end)
               : fill_coefficients(static_cast<const int64_t*>(ids.data), bags, padding, given, mean, to, begin, end);
  });
}

std::tuple<Tensor, Tensor> bag_gradient(const Tensor& dy, const Tensor& ids, const std::optional<Tensor>& offsets,
                                        const std::optional<Tensor>& per_sample_weights,
                                        const std::optional<Tensor>& maxima, c10::string_view mode,
                                        bool include_last_offset, const Options& options) {
  constexpr auto name = "embedding_bag_backward";
  const HeldIds held(ids, options.rows, name);
  const HeldBags bags(ids, offsets, include_last_offset);
  check_gradient(dy, bags.bags.count, name);
  TORCH_CHECK(bags.bags.count < int64_t{1} << 32, name, ": more than 2^32 bags");
  const Tensor rows = with_rows(dy);
  const BagMode parsed = bag_mode(mode);
  const at::ScalarType sum = at::toOpMathType(dy.scalar_type());
  SegmentArgs args{table_dtype(dy, name)};
  args.dy = rows.const_data_ptr();
  args.dy_stride = rows.stride(0);
  args.cols = rows.size(1);

  const Tensor bag_of = at::empty({ids.numel()}, at::kInt), place = at::empty({maxima ? ids.numel() : 0}, at::kInt);
  uint32_t* const bag = reinterpret_cast<uint32_t*>(bag_of.mutable_data_ptr<int32_t>());
  uint32_t* const places = maxima ? reinterpret_cast<uint32_t*>(place.mutable_data_ptr<int32_t>()) : nullptr;
  std::fill_n(bag + bags.limit, ids.numel() - bags.limit, 0u);  // in no bag: asked for ahead of time, never summed
  for_bags(bags.bags, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = bags.bags.begin(b), to = bags.bags.begin(b + 1);
      std::fill(bag + from, bag + to, static_cast<uint32_t>(b));
      for (int64_t p = from; places && p < to; ++p) places[p] = static_cast<uint32_t>(p - from);
    }
  });
  args.bag_of = bag;

  Tensor factors, scale;
  if (parsed == BagMode::kMax) {
    TORCH_CHECK(maxima && maxima->sizes() == dy.sizes() && maxima->scalar_type() == at::kInt && maxima->is_contiguous(),
                name, ": mode 'max' needs the places of the maxima");
    args.maxima = maxima->const_data_ptr<int32_t>();
    args.place = places;
  } else if (per_sample_weights || parsed == BagMode::kMean) {
    if (per_sample_weights) {
      TORCH_CHECK(per_sample_weights->numel() == ids.numel() && per_sample_weights->device().is_cpu(), name,
                  ": per_sample_weights has shape ", per_sample_weights->sizes(), ", expected ", ids.sizes());
      scale = per_sample_weights->to(sum).contiguous();
    }
    factors = at::empty({ids.numel()}, dy.options().dtype(sum));
    sum == at::kDouble
        ? coefficients<double>(held.ids, bags.bags, options.padding, scale, parsed == BagMode::kMean, factors)
        : coefficients<float>(held.ids, bags.bags, options.padding, scale, parsed == BagMode::kMean, factors);
    args.coefficient = factors.const_data_ptr();
  }
  return sum_rows(args, rows, held.ids, bags.limit, options);
}

// ---- operators

Tensor embedding_backward(const Tensor& dy, const Tensor& ids, int64_t rows, int64_t padding_idx, bool by_frequency) {
  return std::get<1>(lookup_gradient(dy, ids, {rows, padding_idx, by_frequency, false}));
}

std::tuple<Tensor, Tensor> embedding_backward_sparse(const Tensor& dy, const Tensor& ids, int64_t rows,
                                                     int64_t padding_idx, bool by_frequency) {
  return lookup_gradient(dy, ids, {rows, padding_idx, by_frequency, true});
}

Tensor embedding_bag_backward(const Tensor& dy, const Tensor& ids, const std::optional<Tensor>& offsets,
                              const std::optional<Tensor>& per_sample_weights, const std::optional<Tensor>& maxima,
                              int64_t rows, c10::string_view mode, bool include_last_offset, int64_t padding_idx,
                              bool by_frequency) {
  return std::get<1>(bag_gradient(dy, ids, offsets, per_sample_weights, maxima, mode, include_last_offset,
                                  {rows, padding_idx, by_frequency, false}));
}

std::tuple<Tensor, Tensor> embedding_bag_backward_sparse(const Tensor& dy, const Tensor& ids,
                                                         const std::optional<Tensor>& offsets,
                                                         const std::optional<Tensor>& per_sample_weights,
                                                         const std::optional<Tensor>& maxima, int64_t rows,
                                                         c10::string_view mode, bool include_last_offset,
                                                         int64_t padding_idx, bool by_frequency) {
  return bag_gradient(dy, ids, offsets, per_sample_weights, maxima, mode, include_last_offset,
                      {rows, padding_idx, by_frequency, true});
}

Tensor embedding_bag_backward_weights(const Tensor& dy, const Tensor& ids, const Tensor& weight,
                                      const std::optional<Tensor>& offsets, c10::string_view mode,
                                      bool include_last_offset, int64_t padding_idx) {
  constexpr auto name = "embedding_bag_backward_weights";
  const HeldIds held(ids, weight.size(0), name);
  const HeldBags bags(ids, offsets, include_last_offset);
  check_gradient(dy, bags.bags.count, name);
  TORCH_CHECK(dy.scalar_type() == weight.scalar_type() && dy.size(1) == weight.size(1), name, ": dy is ",
              dy.scalar_type(), dy.sizes(), ", the table ", weight.scalar_type(), weight.sizes());
  const Tensor table = with_rows(weight), rows = with_rows(dy);
  Tensor out = at::empty(ids.sizes(), weight.options());
  if (bags.limit < ids.numel()) out.zero_();
  const ScaleArgs args{table_dtype(weight, name),
                       held.ids,
                       bags.bags,
                       padding_idx,
                       table.const_data_ptr(),
                       table.stride(0),
                       table.size(1),
                       rows.const_data_ptr(),
                       rows.stride(0),
                       bag_mode(mode) == BagMode::kMean,
                       out.mutable_data_ptr()};
  for_bags(bags.bags, args.cols, [&](int64_t begin, int64_t end) { embedding_kernels().scale(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("embedding_backward.cpu", &embedding_backward);
  m.impl("embedding_backward_sparse.cpu", &embedding_backward_sparse);
  m.impl("embedding_bag_backward.cpu", &embedding_bag_backward);
  m.impl("embedding_bag_backward_sparse.cpu", &embedding_bag_backward_sparse);
  m.impl("embedding_bag_backward_weights.cpu", &embedding_bag_backward_weights);
}

}  // namespace pk
