// The activation room's `.cpu` operators: arguments to rows, outputs, threads. Schemas are defined in Python
// (pykernels/ops/activation.py); arithmetic is in functors.h, loops in activation.inc.
#include "activation_arguments.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "pages.h"
#include "rows.h"

namespace pk {
namespace {

constexpr Name kParametric[] = {{"prelu", Activation::kPrelu}, {"swish", Activation::kSwishBeta}};

bool streaming(size_t bytes) { return static_cast<int64_t>(bytes) >= kStreaming; }

bool same_dense_layout(const Tensor& x, const Tensor& other) {
  return x.is_non_overlapping_and_dense() &&
         (other.strides() == x.strides() || (x.is_contiguous() && other.is_contiguous()));
}

// ---- unary

Tensor unary_forward(const Tensor& x, c10::string_view activation, double alpha) {
  UnaryArgs args{parse(activation, kUnary, "unary_forward"), dtype_of(x, "unary_forward"), alpha, x.numel()};
  Tensor y = empty_large_like(x), source = x;
  int64_t stride = 0;
  if (!x.is_non_overlapping_and_dense()) {
    RowLayout layout(x.sizes(), memory_order(y));
    layout.take(x);
    stride = layout.fit(source);
    args.cols = layout.cols();
  }
  args.x = input(source, stride);
  args.out = output(y, args.cols);
  args.stream = streaming(y.nbytes());
  run(kernels().unary_forward, args, x.numel());
  return y;
}

Tensor unary_backward(const Tensor& dy, const Tensor& saved, c10::string_view activation, double alpha) {
  UnaryArgs args{parse(activation, kUnary, "unary_backward"), dtype_of(saved, "unary_backward"), alpha, saved.numel()};
  check_twin(saved, dy, "unary_backward", "dy");
  Tensor dx = empty_large_like(saved), source = saved, gradient = dy;
  int64_t stride = 0, dy_stride = 0;
  if (!same_dense_layout(saved, dy)) {
    RowLayout layout(saved.sizes(), memory_order(dx));
    layout.take(saved, dy);
    stride = layout.fit(source);
    dy_stride = layout.fit(gradient);
    args.cols = layout.cols();
  }
  args.x = input(source, stride);
  args.dy = input(gradient, dy_stride);
  args.out = output(dx, args.cols);
  args.stream = streaming(dx.nbytes());
  run(kernels().unary_backward, args, saved.numel());
  return dx;
}

void unary_inplace(const Tensor& x, c10::string_view activation, double alpha) {
  UnaryArgs args{parse(activation, kUnary, "unary_"), dtype_of(x, "unary_"), alpha, x.numel()};
  at::assert_no_internal_overlap(x);
  Tensor target = x;
  int64_t stride = 0;
  if (!x.is_non_overlapping_and_dense()) {
    RowLayout layout(x.sizes(), memory_order(x));
    layout.take(x);
    stride = layout.fit(target);
    args.cols = layout.cols();
  }
  args.x = input(target, stride);
  args.out = output(target, stride);
  run(kernels().unary_forward, args, x.numel());
  if (!target.is_same(x)) x.copy_(target);
}

// ---- gated

Tensor gated_forward(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  GatedArgs args{parse(activation, kGated, "gated_forward"), dtype_of(gate, "gated_forward"), gate.numel()};
  check_twin(gate, up, "gated_forward", "up");
  Tensor out = empty_large_like(gate), g = gate, u = up;
  int64_t gate_stride = 0, up_stride = 0;
  if (!same_dense_layout(gate, up)) {
    RowLayout layout(gate.sizes(), memory_order(out));
    layout.take(gate, up);
    gate_stride = layout.fit(g);
    up_stride = layout.fit(u);
    args.cols = layout.cols();
  }
  args.gate = input(g, gate_stride);
  args.up = input(u, up_stride);
  args.out = output(out, args.cols);
  args.stream = streaming(out.nbytes());
  run(kernels().gated_forward, args, gate.numel());
  return out;
}

std::tuple<Tensor, Tensor> gated_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                          c10::string_view activation, std::array<bool, 2> mask) {
  GatedArgs args{parse(activation, kGated, "gated_backward"), dtype_of(gate, "gated_backward"), gate.numel()};
  check_twin(gate, up, "gated_backward", "up");
  check_twin(gate, dy, "gated_backward", "dy");
  Tensor dgate = mask[0] ? empty_large_like(gate) : at::empty({0}, gate.options());
  Tensor dup = mask[1] ? empty_large_like(up) : at::empty({0}, up.options());
  Tensor g = gate, u = up, d = dy;
  Tensor da = dgate, db = dup;  // what the kernel writes: a copy where a gradient is dense in another order
  int64_t gate_stride = 0, up_stride = 0, dy_stride = 0, da_stride = 0, db_stride = 0;
  if (!same_dense_layout(gate, up) || !same_dense_layout(gate, dy)) {
    RowLayout layout(gate.sizes(), memory_order(mask[0] ? dgate : mask[1] ? dup : gate));
    layout.take(gate, up, dy);
    gate_stride = layout.fit(g);
    up_stride = layout.fit(u);
    dy_stride = layout.fit(d);
    da_stride = mask[0] ? layout.fit(da) : 0;
    db_stride = mask[1] ? layout.fit(db) : 0;
    args.cols = layout.cols();
  }
  args.gate = input(g, gate_stride);
  args.up = input(u, up_stride);
  args.dy = input(d, dy_stride);
  if (mask[0]) args.dgate = output(da, da_stride);
  if (mask[1]) args.dup = output(db, db_stride);
  args.stream = streaming(da.nbytes() + db.nbytes());
  if (mask[0] || mask[1]) run(kernels().gated_backward, args, gate.numel());
  if (!da.is_same(dgate)) dgate.copy_(da);
  if (!db.is_same(dup)) dup.copy_(db);
  return {dgate, dup};
}

// ---- glu: both halves in one tensor

struct Halves {
  int64_t dim, size, inner, gate, up;  // gate, up: where the halves start along dim
  std::vector<int64_t> shape;
};

Halves split(const Tensor& x, int64_t dim, bool gate_first, const char* op) {
  TORCH_CHECK(x.dim() > 0, op, ": input needs a dimension to split");
  dim = at::maybe_wrap_dim(dim, x.dim());
  TORCH_CHECK(x.size(dim) % 2 == 0, op, ": the size of dimension ", dim, " must be even, got ", x.size(dim));
  const int64_t size = x.size(dim) / 2;
  Halves h{dim,
           size,
           c10::multiply_integers(x.sizes().slice(dim + 1)),
           gate_first ? 0 : size,
           gate_first ? size : 0,
           x.sizes().vec()};
  h.shape[dim] = size;
  return h;
}

Tensor glu_forward(const Tensor& x, int64_t dim, c10::string_view activation, bool gate_first) {
  GatedArgs args{parse(activation, kGated, "glu_forward"), dtype_of(x, "glu_forward"), 0};
  const Halves h = split(x, dim, gate_first, "glu_forward");
  Tensor out = empty_large(h.shape, x.options());
  Tensor gate, up;
  if (x.is_contiguous()) {
    args.cols = h.size * h.inner;
    args.gate = half(input(x, 2 * args.cols), h.gate * h.inner, x.element_size());
    args.up = half(input(x, 2 * args.cols), h.up * h.inner, x.element_size());
  } else {
    gate = x.narrow(h.dim, h.gate, h.size);
    up = x.narrow(h.dim, h.up, h.size);
    RowLayout layout(h.shape, row_major(x.dim()));
    layout.take(gate, up);
    const int64_t gate_stride = layout.fit(gate), up_stride = layout.fit(up);
    args.gate = input(gate, gate_stride);
    args.up = input(up, up_stride);
    args.cols = layout.cols();
  }
  args.out = output(out, args.cols);
  args.stream = streaming(out.nbytes());
  run(kernels().gated_forward, args, out.numel());
  return out;
}

Tensor glu_backward(const Tensor& dy, const Tensor& x, int64_t dim, c10::string_view activation, bool gate_first) {
  GatedArgs args{parse(activation, kGated, "glu_backward"), dtype_of(x, "glu_backward"), 0};
  const Halves h = split(x, dim, gate_first, "glu_backward");
  TORCH_CHECK(dy.sizes() == h.shape && dy.scalar_type() == x.scalar_type() && dy.device() == x.device(),
              "glu_backward: dy is ", dy.scalar_type(), dy.sizes(), ", expected ", x.scalar_type(),
              at::IntArrayRef(h.shape));
  Tensor dx = empty_large(x.sizes(), x.options());
  Tensor gradient = dy, gate, up;
  const int64_t block = h.size * h.inner, size = x.element_size();
  RowLayout layout(h.shape, row_major(x.dim()));
  if (x.is_contiguous()) {
    layout.set_cols(block);
    args.gate = half(input(x, 2 * block), h.gate * h.inner, size);
    args.up = half(input(x, 2 * block), h.up * h.inner, size);
  } else {
    gate = x.narrow(h.dim, h.gate, h.size);
    up = x.narrow(h.dim, h.up, h.size);
    layout.set_cols(block);
    const int64_t gate_stride = layout.fit(gate), up_stride = layout.fit(up);
    args.gate = input(gate, gate_stride);
    args.up = input(up, up_stride);
  }
  args.cols = block;
  const int64_t dy_stride = layout.fit(gradient);
  args.dy = input(gradient, dy_stride);
  args.dgate = half(output(dx, 2 * block), h.gate * h.inner, size);
  args.dup = half(output(dx, 2 * block), h.up * h.inner, size);
  args.stream = streaming(dx.nbytes());
  run(kernels().gated_backward, args, dy.numel());
  return dx;
}

// ---- parametric: a parameter for all elements or one per channel (dimension 1)

// How weights meet elements: one per row (long rows), or one per column, expanded over the dimensions inside a channel.
struct Channels {
  int64_t per_row;  // ParametricArgs::channels
  int64_t cols;     // 0: whatever the strides allow
  int64_t inner;
  Tensor weight;
};

Channels channels_of(const Tensor& x, const Tensor& weight, const char* op) {
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(), op, ": weight is ",
              weight.scalar_type(), " on ", weight.device(), ", expected ", x.scalar_type(), " on ", x.device());
  const int64_t count = weight.numel(), size = x.dim() > 1 ? x.size(1) : 1;
  TORCH_CHECK(count == 1 || count == size, op, ": weight has ", count, " elements, expected 1 or ", size);
  if (count == 1) return {1, 0, 1, weight};
  const int64_t inner = c10::multiply_integers(x.sizes().slice(2));
  if (inner >= 4 * kShortestRow) return {count, inner, inner, weight.contiguous()};
  return {0, count * inner, inner, inner == 1 ? weight.contiguous() : weight.flatten().repeat_interleave(inner)};
}

RowLayout parametric_layout(const Tensor& x, const Channels& channels) {
  RowLayout layout(x.sizes(), row_major(x.dim()));
  if (channels.cols) layout.set_cols(channels.cols);
  return layout;
}

Tensor parametric_forward(const Tensor& x, const Tensor& weight, c10::string_view activation) {
  const Activation parsed = parse(activation, kParametric, "parametric_forward");
  const Dtype dtype = dtype_of(x, "parametric_forward");
  const Channels channels = channels_of(x, weight, "parametric_forward");
  Tensor y = empty_large(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  RowLayout layout = parametric_layout(x, channels);
  if (!channels.cols) layout.take(x);
  Tensor source = x;
  const int64_t stride = layout.fit(source), cols = layout.cols();
  const ParametricArgs args{
      parsed,           dtype,  cols, input(source, stride), {}, output(y, cols), channels.weight.const_data_ptr(),
      channels.per_row, nullptr};
  run(kernels().parametric_forward, args, x.numel());
  return y;
}

// Second stage of the weight gradient: sums[c] of terms partial[r * pitch + c * inner + i] over r, then i, in this
// order. (Segment sums of channel c are the terms r * pitch + c * segments + i.)
template <class T>
void sum_partials(const Tensor& partial, int64_t terms, int64_t pitch, int64_t inner, Tensor& sums) {
  const T* p = partial.const_data_ptr<T>();
  T* out = sums.mutable_data_ptr<T>();
  for (int64_t c = 0; c < sums.numel(); ++c) {
    double sum = 0;
    for (int64_t r = 0; r < terms; ++r) {
      for (int64_t i = 0; i < inner; ++i) sum += p[r * pitch + c * inner + i];
    }
    out[c] = static_cast<T>(sum);
  }
}

std::tuple<Tensor, Tensor> parametric_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                               c10::string_view activation, std::array<bool, 2> mask) {
  const Activation parsed = parse(activation, kParametric, "parametric_backward");
  const Dtype dtype = dtype_of(x, "parametric_backward");
  check_twin(x, dy, "parametric_backward", "dy");
  const Channels channels = channels_of(x, weight, "parametric_backward");
  Tensor dx = mask[0] ? empty_large(x.sizes(), x.options()) : at::empty({0}, x.options());
  if (x.numel() == 0 || !(mask[0] || mask[1])) {
    return {dx, mask[1] ? at::zeros(weight.sizes(), weight.options()) : at::empty({0}, weight.options())};
  }
  RowLayout layout = parametric_layout(x, channels);
  if (!channels.cols) layout.take(x, dy);
  Tensor source = x, gradient = dy;
  const int64_t stride = layout.fit(source), dy_stride = layout.fit(gradient), cols = layout.cols();
  const int64_t rows = x.numel() / cols, segments = segments_of(cols);
  // Both partitions depend on the shape only, never on the number of threads.
  const int64_t chunk = std::min<int64_t>(256, std::max((rows + 63) / 64, (8192 + cols - 1) / cols));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const auto accumulate = x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Tensor partial;
  if (mask[1]) {
    partial =
        channels.per_row ? at::empty({rows * segments}, accumulate) : at::zeros({chunks, padded_row(cols)}, accumulate);
  }
  ParametricArgs args{parsed,
                      dtype,
                      cols,
                      input(source, stride),
                      input(gradient, dy_stride),
                      mask[0] ? output(dx, cols) : Output{},
                      channels.weight.const_data_ptr(),
                      channels.per_row,
                      mask[1] ? partial.mutable_data_ptr() : nullptr};
  if (channels.per_row) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(cols, kSegment));
    at::parallel_for(0, rows * segments, grain,
                     [&](int64_t begin, int64_t end) { kernels().parametric_backward_by_row(args, begin, end); });
  } else {
    const int64_t bytes = mask[1] ? padded_row(cols) * partial.element_size() : 0;
    at::parallel_for(0, chunks, std::max<int64_t>(1, kGrain / (chunk * cols)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        ParametricArgs mine = args;
        if (mask[1]) mine.partial = static_cast<char*>(args.partial) + i * bytes;
        kernels().parametric_backward_by_column(mine, i * chunk, std::min(rows, (i + 1) * chunk));
      }
    });
  }
  if (!mask[1]) return {dx, at::empty({0}, weight.options())};
  Tensor sums = at::empty({weight.numel()}, accumulate);
  const int64_t terms = channels.per_row ? rows / channels.per_row : chunks;
  const int64_t inner = channels.per_row ? segments : channels.inner;
  const int64_t pitch = channels.per_row ? channels.per_row * segments : padded_row(cols);
  x.scalar_type() == at::kDouble ? sum_partials<double>(partial, terms, pitch, inner, sums)
                                 : sum_partials<float>(partial, terms, pitch, inner, sums);
  return {dx, sums.view(weight.sizes()).to(weight.scalar_type())};
}

// ---- rrelu

Tensor rrelu(const Tensor* dy, const Tensor& x, double lower, double upper, const Tensor& seed, const char* op) {
  RreluArgs args{dtype_of(x, op), lower, upper, seed_of(seed, op), x.numel()};
  if (dy) check_twin(x, *dy, op, "dy");
  Tensor out = empty_large(x.sizes(), x.options());
  RowLayout layout(x.sizes(), row_major(x.dim()));
  layout.take(x);
  if (dy) layout.take(*dy);
  Tensor source = x, gradient = dy ? *dy : Tensor();
  const int64_t stride = layout.fit(source), dy_stride = dy ? layout.fit(gradient) : 0;
  args.cols = layout.cols();
  args.x = input(source, stride);
  if (dy) args.dy = input(gradient, dy_stride);
  args.out = output(out, args.cols);
  run(kernels().rrelu, args, x.numel());
  return out;
}

Tensor rrelu_forward(const Tensor& x, double lower, double upper, const Tensor& seed) {
  return rrelu(nullptr, x, lower, upper, seed, "rrelu_forward");
}

Tensor rrelu_backward(const Tensor& dy, const Tensor& x, double lower, double upper, const Tensor& seed) {
  return rrelu(&dy, x, lower, upper, seed, "rrelu_backward");
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("unary_forward.cpu", &unary_forward);
  m.impl("unary_backward.cpu", &unary_backward);
  m.impl("unary_.cpu", &unary_inplace);
  m.impl("gated_forward.cpu", &gated_forward);
  m.impl("gated_backward.cpu", &gated_backward);
  m.impl("glu_forward.cpu", &glu_forward);
  m.impl("glu_backward.cpu", &glu_backward);
  m.impl("parametric_forward.cpu", &parametric_forward);
  m.impl("parametric_backward.cpu", &parametric_backward);
  m.impl("rrelu_forward.cpu", &rrelu_forward);
  m.impl("rrelu_backward.cpu", &rrelu_backward);
}

}  // namespace pk
