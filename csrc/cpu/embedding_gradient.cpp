#include "embedding_gradient.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

namespace pk {
namespace {

using at::Tensor;

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

}  // namespace

void check_gradient(const Tensor& dy, int64_t rows, const char* function) {
  TORCH_CHECK(dy.dim() == 2 && dy.size(0) == rows && dy.device().is_cpu(), function, ": dy has shape ", dy.sizes(),
              ", expected ", rows, " rows on the CPU");
}

GradientSource lookup_source(const Tensor& dy, const Tensor& ids, int64_t table_rows, const char* function,
                             const std::string& argument) {
  TORCH_CHECK(dy.dim() == ids.dim() + 1 && dy.device().is_cpu(), function, ": dy has shape ", dy.sizes(),
              " for ids of shape ", ids.sizes());
  GradientSource found(ids, table_rows, function, argument);
  found.limit = ids.numel();
  found.rows = with_rows(dy.reshape({ids.numel(), dy.size(-1)}));
  found.args.dtype = table_dtype(dy, function);
  found.args.dy = found.rows.const_data_ptr();
  found.args.dy_stride = found.rows.stride(0);
  found.args.cols = found.rows.size(1);
  return found;
}

GradientSource bag_source(const Tensor& dy, const Tensor& ids, const std::optional<Tensor>& offsets,
                          const std::optional<Tensor>& per_sample_weights, const std::optional<Tensor>& maxima,
                          c10::string_view mode, bool include_last_offset, int64_t padding, int64_t table_rows,
                          const char* function, const std::string& argument) {
  GradientSource found(ids, table_rows, function, argument);
  const HeldBags bags(ids, offsets, include_last_offset, function);
  check_gradient(dy, bags.bags.count, function);
  TORCH_CHECK(bags.bags.count < int64_t{1} << 32, function, ": more than 2^32 bags");
  const BagMode parsed = bag_mode(mode);
  const at::ScalarType sum = at::toOpMathType(dy.scalar_type());
  found.limit = bags.limit;
  found.rows = with_rows(dy);
  SegmentArgs& args = found.args;
  args.dtype = table_dtype(dy, function);
  args.dy = found.rows.const_data_ptr();
  args.dy_stride = found.rows.stride(0);
  args.cols = found.rows.size(1);

  found.bag_of = at::empty({ids.numel()}, at::kInt);
  found.place = at::empty({maxima ? ids.numel() : 0}, at::kInt);
  uint32_t* const bag = reinterpret_cast<uint32_t*>(found.bag_of.mutable_data_ptr<int32_t>());
  uint32_t* const places = maxima ? reinterpret_cast<uint32_t*>(found.place.mutable_data_ptr<int32_t>()) : nullptr;
  std::fill_n(bag + bags.limit, ids.numel() - bags.limit, 0u);  // in no bag: asked for ahead of time, never summed
  for_bags(bags.bags, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t from = bags.bags.begin(b), to = bags.bags.begin(b + 1);
      std::fill(bag + from, bag + to, static_cast<uint32_t>(b));
      for (int64_t p = from; places && p < to; ++p) places[p] = static_cast<uint32_t>(p - from);
    }
  });
  args.bag_of = bag;

  if (parsed == BagMode::kMax) {
    TORCH_CHECK(maxima && maxima->sizes() == dy.sizes() && maxima->scalar_type() == at::kInt, function,
                ": mode 'max' needs the places of the maxima");
    found.maxima = maxima->contiguous();
    args.maxima = found.maxima.const_data_ptr<int32_t>();
    args.place = places;
  } else if (per_sample_weights || parsed == BagMode::kMean) {
    Tensor scale;
    if (per_sample_weights) {
      TORCH_CHECK(per_sample_weights->numel() == ids.numel() && per_sample_weights->device().is_cpu(), function,
                  ": per_sample_weights has shape ", per_sample_weights->sizes(), ", expected ", ids.sizes());
      scale = per_sample_weights->to(sum).contiguous();
    }
    found.factors = at::empty({ids.numel()}, dy.options().dtype(sum));
    const bool mean = parsed == BagMode::kMean;
    sum == at::kDouble ? coefficients<double>(found.ids.ids, bags.bags, padding, scale, mean, found.factors)
                       : coefficients<float>(found.ids.ids, bags.bags, padding, scale, mean, found.factors);
    args.coefficient = found.factors.const_data_ptr();
  }
  return found;
}

SortedGradient::SortedGradient(const GradientSource& source, int64_t table_rows, int64_t padding, bool by_frequency)
    : sorted(sort_ids(source.ids.ids, table_rows, padding, source.limit)), args(source.args) {
  const int64_t cols = args.cols;
  partials = at::empty({sorted.pieces, cols}, source.rows.options().dtype(at::toOpMathType(source.rows.scalar_type())));
  args.entries = sorted.entries;
  args.last = source.ids.ids.count - 1;
  args.position_mask = (uint64_t{1} << sorted.position_bits) - 1;
  args.runs = sorted.runs;
  args.by_frequency = by_frequency;
  args.partials = partials.mutable_data_ptr();
  if (sorted.pieces == 0 || cols == 0) return;
  const EmbeddingKernels& kernels = embedding_kernels();
  for (int64_t r = 0; r < runs(); ++r) {
    const Run& run = sorted.runs[r];
    if (run.partial < 0) continue;
    const int64_t grain = std::max<int64_t>(1, kGradientGrain / (kPiece * cols));
    at::parallel_for(0, (run.end - run.begin + kPiece - 1) / kPiece, grain,
                     [&](int64_t begin, int64_t end) { kernels.piece(args, r, begin, end); });
  }
}

}  // namespace pk
