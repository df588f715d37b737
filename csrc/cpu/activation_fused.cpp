// bias + activation + dropout: the `.cpu` operators. The kernels are in activation_fused.inc.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>

#include "activation_arguments.h"
#include "pages.h"
#include "rows.h"

namespace pk {
namespace {

struct GatedName {
  std::string_view text;
  Activation activation;
  bool gate_first;
};
constexpr GatedName kGatedUnits[] = {{"glu", Activation::kSigmoid, false}, {"reglu", Activation::kRelu, true},
                                     {"geglu", Activation::kGelu, true},   {"geglu_tanh", Activation::kGeluTanh, true},
                                     {"swiglu", Activation::kSilu, true},  {"bilinear", Activation::kIdentity, true}};

struct Call {
  FusedArgs args;
  std::vector<int64_t> shape;  // of the output
  int64_t cols = 1;            // last size of the output
  bool gate_first = true;
  Tensor bias;

  // Where gate and up begin in a row of the input, in elements.
  int64_t gate() const { return gate_first ? 0 : cols; }
  int64_t up() const { return gate_first ? cols : 0; }
};

Call parse_call(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
                c10::string_view activation, double alpha, double p, const char* op) {
  Call call{};
  FusedArgs& a = call.args;
  a.dtype = dtype_of(x, op);
  a.alpha = alpha;
  for (const GatedName& name : kGatedUnits) {
    if (name.text != std::string_view(activation.data(), activation.size())) continue;
    a.gated = true;
    a.activation = name.activation;
    call.gate_first = name.gate_first;
  }
  if (!a.gated) a.activation = parse(activation, kUnary, op);
  call.shape = x.sizes().vec();
  if (x.dim() > 0) call.cols = x.size(-1);
  if (a.gated) {
    TORCH_CHECK(x.dim() > 0 && x.size(-1) % 2 == 0, op, ": the last size of x must be even, got ", x.sizes());
    call.cols /= 2;
    call.shape.back() = call.cols;
  }
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && x.dim() > 0 && bias->size(0) == x.size(-1), op, ": bias has shape ", bias->sizes(),
                ", x has shape ", x.sizes());
    TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->device() == x.device(), op, ": bias is ",
                bias->scalar_type(), " on ", bias->device(), ", expected ", x.scalar_type(), " on ", x.device());
    call.bias = bias->contiguous();
  }
  TORCH_CHECK(p >= 0 && p < 1, op, ": p must be in [0, 1), got ", p);
  TORCH_CHECK(p == 0 || seed, op, ": dropout needs a seed");
  a.scale = 1 / (1 - p);
  a.threshold = static_cast<int64_t>(std::nearbyint(p * 4294967296.0));
  if (p > 0) a.seed = seed_of(*seed, op);
  return call;
}

// Pointers into x, and into its gradient, for a call on rows of a.cols elements of the output; `copy` keeps what they
// point to alive.
void place(Call& call, const Tensor& x, const RowLayout& layout, std::array<Tensor, 2>& copy) {
  FusedArgs& a = call.args;
  const int64_t size = x.element_size();
  if (!a.gated) {
    copy[0] = x;
    const int64_t stride = layout.fit(copy[0]);
    a.x = input(copy[0], stride);
  } else if (x.is_contiguous()) {
    a.x = half(input(x, 2 * call.cols), call.gate(), size);
    a.up = half(input(x, 2 * call.cols), call.up(), size);
  } else {
    copy = {x.narrow(-1, call.gate(), call.cols), x.narrow(-1, call.up(), call.cols)};
    const int64_t stride = layout.fit(copy[0]), up_stride = layout.fit(copy[1]);
    a.x = input(copy[0], stride);
    a.up = input(copy[1], up_stride);
  }
  if (!call.bias.defined()) return;
  const char* bias = static_cast<const char*>(call.bias.const_data_ptr());
  a.bias = bias + (a.gated ? call.gate() * size : 0);
  if (a.gated) a.up_bias = bias + call.up() * size;
}

RowLayout layout_of(const Call& call, const Tensor& x) {
  RowLayout layout(call.shape, row_major(static_cast<int64_t>(call.shape.size())));
  if (call.args.gated || call.bias.defined())
    layout.set_cols(call.cols);
  else
    layout.take(x);
  return layout;
}

Tensor fused_forward(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& seed,
                     c10::string_view activation, double alpha, double p) {
  Call call = parse_call(x, bias, seed, activation, alpha, p, "fused_forward");
  Tensor out = empty_large(call.shape, x.options());
  if (out.numel() == 0) return out;
  const RowLayout layout = layout_of(call, x);
  std::array<Tensor, 2> copy;
  place(call, x, layout, copy);
  call.args.cols = layout.cols();
  call.args.out = output(out, layout.cols());
  run(kernels().fused_forward, call.args, out.numel());
  return out;
}

// Sums of the rows in `chunks` pieces -> the gradient of (a half of) the bias: added piece by piece, in double.
template <class T>
void sum_chunks(const Call& call, Tensor& partial, int64_t chunks, int64_t pitch, Tensor sums) {
  T* p = partial.mutable_data_ptr<T>();
  T* out = sums.mutable_data_ptr<T>();
  constexpr int64_t kBlock = 512;
  for (int64_t i = 0; i < chunks; ++i) kernels().fused_order(call.args.dtype, p + i * pitch, call.cols);
  for (int64_t first = 0; first < call.cols; first += kBlock) {
    const int64_t n = std::min(kBlock, call.cols - first);
    double total[kBlock] = {};
    for (int64_t i = 0; i < chunks; ++i) {
      for (int64_t c = 0; c < n; ++c) total[c] += p[i * pitch + first + c];
    }
    for (int64_t c = 0; c < n; ++c) out[first + c] = static_cast<T>(total[c]);
  }
}

std::tuple<Tensor, Tensor, Tensor> fused_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& seed, c10::string_view activation,
                                                  double alpha, double p, std::array<bool, 3> mask) {
  Call call = parse_call(x, bias, seed, activation, alpha, p, "fused_backward");
  FusedArgs& a = call.args;
  TORCH_CHECK(dy.sizes() == call.shape && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
              "fused_backward: dy is ", dy.scalar_type(), dy.sizes(), ", expected ", x.scalar_type(),
              at::IntArrayRef(call.shape));
  const Tensor nothing = at::empty({0}, x.options());
  Tensor dx = mask[0] ? empty_large(x.sizes(), x.options()) : nothing;
  Tensor out = mask[2] ? empty_large(call.shape, x.options()) : nothing;
  const bool sums = mask[1] && bias;
  if (dy.numel() == 0 || !(mask[0] || sums || mask[2])) {
    return {dx, sums ? at::zeros(bias->sizes(), x.options()) : nothing, out};
  }
  RowLayout layout = layout_of(call, x);
  if (!a.gated && !call.bias.defined()) layout.take(dy);
  std::array<Tensor, 2> copy;
  place(call, x, layout, copy);
  Tensor gradient = dy;
  const int64_t dy_stride = layout.fit(gradient), cols = layout.cols(), size = x.element_size();
  a.cols = cols;
  a.dy = input(gradient, dy_stride);
  if (mask[0]) a.dx = a.gated ? half(output(dx, 2 * cols), call.gate(), size) : output(dx, cols);
  if (mask[0] && a.gated) a.dup = half(output(dx, 2 * cols), call.up(), size);
  if (mask[2]) a.out = output(out, cols);
  if (!sums) {
    run(kernels().fused_backward, a, dy.numel());
    return {dx, nothing, out};
  }
  // The pieces depend on the shape only, never on the number of threads.
  const int64_t rows = dy.numel() / cols, halves = a.gated ? 2 : 1, pitch = padded_row(cols);
  const int64_t chunk = std::min<int64_t>(256, std::max((rows + 15) / 16, (16384 + cols - 1) / cols));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const auto accumulate = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor partial = at::zeros({halves, chunks, pitch}, accumulate);
  char* const data = static_cast<char*>(partial.mutable_data_ptr());
  const int64_t row_bytes = pitch * partial.element_size();
  at::parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (chunk * cols)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      FusedArgs mine = a;
      mine.dbias = data + i * row_bytes;
      if (a.gated) mine.dup_bias = data + (chunks + i) * row_bytes;
      kernels().fused_backward(mine, i * chunk * cols, std::min(rows, (i + 1) * chunk) * cols);
    }
  });
  Tensor dbias = at::empty(bias->sizes(), accumulate);
  for (int64_t h = 0; h < halves; ++h) {
    Tensor part = partial.select(0, h), into = dbias.narrow(0, h == 0 ? (a.gated ? call.gate() : 0) : call.up(), cols);
    x.scalar_type() == at::kDouble ? sum_chunks<double>(call, part, chunks, pitch, into)
                                   : sum_chunks<float>(call, part, chunks, pitch, into);
  }
  return {dx, dbias.to(x.scalar_type()), out};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("fused_forward.cpu", &fused_forward);
  m.impl("fused_backward.cpu", &fused_backward);
}

}  // namespace pk
