// Losses over classes that all rows share: sampled softmax, noise-contrastive estimation, negative sampling.
// Schemas are defined in Python (pykernels/ops/sampled_softmax).
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "embedding_tables.h"
#include "pages.h"
#include "sampled_softmax_logits.h"

namespace pk {
namespace {

using at::Tensor;

Tensor wide_ids(const Tensor& ids) { return ids.to(at::kLong).contiguous(); }

// What a call looks at, checked: nothing is read or written before.
struct Samples {
  LossKind kind;
  int64_t batch, classes, count, labels;  // count: of the sample; labels: of a row
  Tensor label_ids, sampled_ids, rows;    // rows: those of the sample, gathered
  Tensor add;                             // (count) float32: bias - log of the expected count
  Tensor true_add;                        // (batch, labels) float32
  std::vector<int64_t> starts;
  std::vector<int32_t> places;

  Samples(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& given_labels,
          const Tensor& sampled, const std::optional<Tensor>& true_log, const std::optional<Tensor>& sampled_log,
          c10::string_view given_kind, bool remove_hits) {
    constexpr auto name = "sampled_rows";
    TORCH_CHECK(given_kind == "softmax" || given_kind == "logistic", name, ": unknown kind ", given_kind);
    kind = given_kind == "softmax" ? LossKind::kSoftmax : LossKind::kLogistic;
    TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && given_labels.dim() == 2 && sampled.dim() == 1 &&
                    weight.size(1) == input.size(1) && given_labels.size(0) == input.size(0) &&
                    weight.scalar_type() == input.scalar_type() && given_labels.size(1) > 0 &&
                    weight.device().is_cpu() && sampled.numel() < int64_t{1} << 31 &&
                    input.size(0) + sampled.numel() < int64_t{1} << 32,
                name, ": input ", input.sizes(), ", weight ", weight.sizes(), ", labels ", given_labels.sizes(),
                " and sampled ", sampled.sizes(), " do not fit");
    batch = input.size(0), classes = weight.size(0), count = sampled.numel(), labels = given_labels.size(1);
    label_ids = wide_ids(given_labels);
    sampled_ids = wide_ids(sampled);
    check_classes(label_ids, 0, classes, name, "labels");
    check_classes(sampled_ids, 0, classes, name, "sampled");
    rows = at::index_select(weight, 0, sampled_ids);
    const auto options = input.options().dtype(at::kFloat);
    const auto addend = [&](const Tensor& ids, const std::optional<Tensor>& logs) {
      Tensor sum = at::zeros(ids.sizes(), options);
      if (bias) {
        TORCH_CHECK(bias->dim() == 1 && bias->size(0) == classes, name, ": bias has the shape ", bias->sizes());
        sum = at::index_select(*bias, 0, ids.view(-1)).view(ids.sizes()).to(at::kFloat);
      }
      if (logs) {
        TORCH_CHECK(logs->sizes() == ids.sizes(), name, ": logs of the shape ", logs->sizes(), " for ", ids.sizes());
        sum = sum.sub(logs->to(at::kFloat));
      }
      return sum.contiguous();
    };
    add = addend(sampled_ids, sampled_log);
    true_add = addend(label_ids, true_log);
    if (remove_hits) find_hits();
  }

  Hits hits() const { return starts.empty() ? Hits{nullptr, nullptr} : Hits{starts.data(), places.data()}; }

  DotArgs label_dots(const Tensor& x, const Tensor& table) const {
    DotArgs args{loss_dtype(table, "sampled_rows"), ids_of(label_ids), labels};
    args.x = x.defined() ? x.const_data_ptr() : nullptr;
    args.x_stride = x.defined() ? x.stride(0) : 0;
    args.cols = table.size(1);
    args.table = table.const_data_ptr();
    args.table_stride = table.stride(0);
    return args;
  }

 private:
  // All places of each label in the sample, in ascending order.
  void find_hits() {
    const int64_t* const ids = sampled_ids.const_data_ptr<int64_t>();
    std::vector<int32_t> order(count);
    for (int64_t j = 0; j < count; ++j) order[j] = static_cast<int32_t>(j);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return ids[a] < ids[b]; });
    const int64_t* const label = label_ids.const_data_ptr<int64_t>();
    starts.assign(batch + 1, 0);
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t t = 0; t < labels; ++t) {
        const int64_t id = label[i * labels + t];
        auto found = std::lower_bound(order.begin(), order.end(), id, [&](int32_t j, int64_t v) { return ids[j] < v; });
        for (; found != order.end() && ids[*found] == id; ++found) places.push_back(*found);
      }
      std::sort(places.begin() + starts[i], places.end());
      starts[i + 1] = static_cast<int64_t>(places.size());
    }
  }
};

double softplus(double z) { return std::max(z, 0.) + std::log1p(std::exp(-std::abs(z))); }
double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

std::tuple<Tensor, Tensor, Tensor> sampled_rows_forward(const Tensor& input, const Tensor& weight,
                                                        const std::optional<Tensor>& bias, const Tensor& labels,
                                                        const Tensor& sampled, const std::optional<Tensor>& true_log,
                                                        const std::optional<Tensor>& sampled_log, c10::string_view kind,
                                                        bool remove_hits, bool keep) {
  loss_dtype(input, "sampled_rows_forward");
  const Samples s(input, weight, bias, labels, sampled, true_log, sampled_log, kind, remove_hits);
  const auto options = input.options().dtype(at::kFloat);
  const Tensor x = with_rows(input), table = with_rows(weight);
  Tensor true_logits = at::empty({s.batch, s.labels}, options);
  DotArgs dots = s.label_dots(x, table);
  dots.dots = true_logits.mutable_data_ptr<float>();
  for_rows(s.batch, s.labels * x.size(1),
           [&](int64_t begin, int64_t end) { sampled_softmax_kernels().dots(dots, begin, end); });
  true_logits.add_(s.true_add);

  const int64_t stride = 2 + s.labels;
  Tensor loss = at::empty({s.batch}, options), statistics = at::empty({s.batch, stride}, options);
  const Statistics rows{statistics.mutable_data_ptr<float>(), stride};
  const float* const z = true_logits.const_data_ptr<float>();
  for (int64_t i = 0; i < s.batch; ++i) {
    const float* const own = z + i * s.labels;
    float top = own[0], sum = 0;
    for (int64_t t = 1; t < s.labels; ++t) top = own[t] > top || std::isnan(own[t]) ? own[t] : top;
    for (int64_t t = 0; t < s.labels; ++t) sum += std::exp(own[t] - top);
    rows.maximum(i) = top;
    rows.sum(i) = s.kind == LossKind::kSoftmax ? sum : 0.f;
    std::copy_n(own, s.labels, &rows.sum(i) + 1);
  }
  const Tensor kept = keep ? empty_large({s.batch, s.count}, options) : Tensor();
  TileArgs tile{s.kind};
  tile.add = s.add.const_data_ptr<float>();
  tile.hits = s.hits();
  tile.statistics = rows;
  Logits(input, s.rows, "sampled_rows_forward").reduce(tile, kept);

  float* const out = loss.mutable_data_ptr<float>();
  for (int64_t i = 0; i < s.batch; ++i) {
    double total = 0;
    for (int64_t t = 0; t < s.labels; ++t) {
      const double logit = z[i * s.labels + t];
      total += s.kind == LossKind::kSoftmax ? (rows.maximum(i) - logit) / s.labels : softplus(logit) - logit / s.labels;
    }
    out[i] = static_cast<float>(total + (s.kind == LossKind::kSoftmax ? std::log(rows.sum(i)) : rows.sum(i)));
  }
  return {loss, statistics, keep ? kept : at::empty({0}, options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& dloss, const Tensor& statistics,
                                                     const Tensor& logits, const Tensor& input, const Tensor& weight,
                                                     const Samples& s, std::array<bool, 3> mask, bool sparse) {
  constexpr auto name = "sampled_rows_backward";
  const int64_t cols = input.size(1), stride = 2 + s.labels;
  TORCH_CHECK(dloss.sizes() == at::IntArrayRef{s.batch} && dloss.scalar_type() == at::kFloat &&
                  statistics.sizes() == at::IntArrayRef({s.batch, stride}) && statistics.is_contiguous() &&
                  (logits.numel() == 0 || (logits.sizes() == at::IntArrayRef({s.batch, s.count}) &&
                                           logits.is_contiguous() && logits.scalar_type() == at::kFloat)),
              name, ": dloss ", dloss.sizes(), ", statistics ", statistics.sizes(), " and logits ", logits.sizes(),
              " do not fit");
  const auto options = input.options().dtype(at::kFloat);
  const Tensor table = with_rows(weight), scale = dloss.contiguous();
  const Statistics rows{const_cast<float*>(statistics.const_data_ptr<float>()), stride};
  // The labels' own part: d loss / d z_t.
  Tensor coefficient = at::empty({s.count + s.batch * s.labels}, options);
  float* const factor = coefficient.mutable_data_ptr<float>();
  float* const own = factor + s.count;
  std::fill_n(factor, s.count, 1.f);
  const float* const d = scale.const_data_ptr<float>();
  for (int64_t i = 0; i < s.batch; ++i) {
    for (int64_t t = 0; t < s.labels; ++t) {
      const double z = (&rows.sum(i) + 1)[t];
      const double p = s.kind == LossKind::kSoftmax ? std::exp(z - rows.maximum(i)) / rows.sum(i) : sigmoid(z);
      own[i * s.labels + t] = static_cast<float>(d[i] * (p - 1. / s.labels));
    }
  }
  // Rows of the sample's gradient, and behind them those of the batch: the gradient of the table is a sum of both.
  Tensor terms = mask[1] ? at::empty({s.count + s.batch, cols}, options) : Tensor();
  Tensor sums = mask[2] ? at::empty({s.count}, options) : Tensor();
  TileArgs tile{s.kind};
  tile.add = s.add.const_data_ptr<float>();
  tile.hits = s.hits();
  tile.statistics = rows;
  tile.scale = d;
  Logits::Store store;
  if (mask[1] || mask[2]) {
    store = [&](int64_t column, int64_t columns, const float* gradient, int64_t pitch, const float* sum) {
      for (int64_t r = 0; mask[1] && r < columns; ++r) {
        std::copy_n(gradient + r * pitch, cols, terms.mutable_data_ptr<float>() + (column + r) * cols);
      }
      if (mask[2]) std::copy_n(sum, columns, sums.mutable_data_ptr<float>() + column);
    };
  }
  Tensor dinput =
      Logits(input, s.rows, name).gradient(tile, logits.numel() ? logits : Tensor(), mask[0], store, mask[2]);
  const Tensor none = at::empty({0}, input.options());
  if (mask[0]) {
    DotArgs dots = s.label_dots(Tensor(), table);
    dots.coefficient = own;
    dots.dx = dinput.mutable_data_ptr<float>();
    for_rows(s.batch, s.labels * cols,
             [&](int64_t begin, int64_t end) { sampled_softmax_kernels().add_rows(dots, begin, end); });
    dinput = dinput.to(input.scalar_type());
  }
  Tensor found = at::empty({1, 0}, input.options().dtype(at::kLong)), dweight = none;
  if (mask[1]) {
    terms.narrow(0, s.count, s.batch).copy_(input);
    const Tensor ids = at::empty({s.count + s.batch * s.labels}, s.label_ids.options());
    const Tensor row_of = at::empty({ids.numel()}, ids.options().dtype(at::kInt));
    std::copy_n(s.sampled_ids.const_data_ptr<int64_t>(), s.count, ids.mutable_data_ptr<int64_t>());
    std::copy_n(s.label_ids.const_data_ptr<int64_t>(), s.batch * s.labels, ids.mutable_data_ptr<int64_t>() + s.count);
    uint32_t* const row = reinterpret_cast<uint32_t*>(row_of.mutable_data_ptr<int32_t>());
    for (int64_t p = 0; p < ids.numel(); ++p) {
      row[p] = static_cast<uint32_t>(p < s.count ? p : s.count + (p - s.count) / s.labels);
    }
    std::tie(found, dweight) = sum_terms({ids, s.classes, s.classes, terms, row, factor}, input.scalar_type(), sparse);
  }
  Tensor dbias = none;
  if (mask[2]) {
    dbias = at::zeros({s.classes}, options);
    float* const db = dbias.mutable_data_ptr<float>();
    const int64_t *const sampled = s.sampled_ids.const_data_ptr<int64_t>(), *const label =
                                                                                s.label_ids.const_data_ptr<int64_t>();
    for (int64_t j = 0; j < s.count; ++j) db[sampled[j]] += sums.const_data_ptr<float>()[j];
    for (int64_t p = 0; p < s.batch * s.labels; ++p) db[label[p]] += own[p];
    dbias = dbias.to(input.scalar_type());
  }
  return {mask[0] ? dinput : none, found, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> sampled_rows_backward(
    const Tensor& dloss, const Tensor& statistics, const Tensor& logits, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& sampled,
    const std::optional<Tensor>& true_log, const std::optional<Tensor>& sampled_log, c10::string_view kind,
    bool remove_hits, std::array<bool, 3> mask) {
  const Samples s(input, weight, bias, labels, sampled, true_log, sampled_log, kind, remove_hits);
  mask[2] = mask[2] && bias;
  auto [dinput, found, dweight, dbias] = gradients(dloss, statistics, logits, input, weight, s, mask, false);
  return {dinput, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampled_rows_backward_sparse(
    const Tensor& dloss, const Tensor& statistics, const Tensor& logits, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& labels, const Tensor& sampled,
    const std::optional<Tensor>& true_log, const std::optional<Tensor>& sampled_log, c10::string_view kind,
    bool remove_hits, std::array<bool, 3> mask) {
  const Samples s(input, weight, bias, labels, sampled, true_log, sampled_log, kind, remove_hits);
  mask[2] = mask[2] && bias;
  return gradients(dloss, statistics, logits, input, weight, s, mask, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("sampled_rows_forward.cpu", &sampled_rows_forward);
  m.impl("sampled_rows_backward.cpu", &sampled_rows_backward);
  m.impl("sampled_rows_backward_sparse.cpu", &sampled_rows_backward_sparse);
}

}  // namespace pk
