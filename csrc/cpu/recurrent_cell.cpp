// The cells' `.cpu` operators: one step, without what a sequence needs around it. A small cell's call is nearly all
// overhead, so its products go to the BLAS that torch brings along, without a dispatcher and views in between.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <climits>

#include "isa.h"
#include "recurrent.h"

// In torch's x86-64 builds; weak, because others may keep theirs to themselves.
extern "C" __attribute__((weak)) void sgemm_(const char* a_form, const char* b_form, const int* m, const int* n,
                                             const int* k, const float* alpha, const float* a, const int* a_pitch,
                                             const float* b, const int* b_pitch, const float* beta, float* c,
                                             const int* c_pitch);

namespace pk {
namespace {

// A row-major matrix, rows `pitch` apart, that a product reads as it is or transposed.
struct Matrix {
  const float* data;
  int64_t rows, columns, pitch;
  bool transposed = false;

  Matrix t() const { return {data, columns, rows, pitch, !transposed}; }
  Matrix part(int64_t first, int64_t count) const {  // rows of a matrix that is not transposed
    return {data + first * pitch, count, columns, pitch};
  }
  Tensor view() const {
    return at::from_blob(const_cast<float*>(data), {rows, columns},
                         transposed ? at::IntArrayRef{1, pitch} : at::IntArrayRef{pitch, 1}, at::kFloat);
  }
};

// c (rows of a by columns of b, `pitch` apart) = a b, or += a b.
void product(const Matrix& a, const Matrix& b, float* c, int64_t pitch, bool add) {
  const int64_t rows = a.rows, columns = b.columns, depth = a.columns;
  if (rows == 0 || columns == 0) return;
  const int64_t largest = std::max({rows, columns, depth, a.pitch, b.pitch, pitch});
  if (sgemm_ == nullptr || largest > INT_MAX) {
    Tensor out = at::from_blob(c, {rows, columns}, {pitch, 1}, at::kFloat);
    add ? void(out.addmm_(a.view(), b.view())) : void(at::mm_out(out, a.view(), b.view()));
    return;
  }
  // BLAS counts by columns, so it is given c^T = b^T a^T.
  const int m = static_cast<int>(columns), n = static_cast<int>(rows), k = static_cast<int>(depth);
  const int a_pitch = static_cast<int>(std::max<int64_t>(a.pitch, 1)), c_pitch = static_cast<int>(pitch);
  const int b_pitch = static_cast<int>(std::max<int64_t>(b.pitch, 1));
  const float one = 1.f, beta = add ? 1.f : 0.f;
  sgemm_(b.transposed ? "T" : "N", a.transposed ? "T" : "N", &m, &n, &k, &one, b.data, &b_pitch, a.data, &a_pitch,
         &beta, c, &c_pitch);
}

// Rows of unit stride that do not overlap, as BLAS has them.
Tensor blas_rows(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) >= std::max<int64_t>(t.size(1), 1) ? t : t.contiguous();
}
Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr<float>(), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

// The shapes, dtypes and places of a cell's tensors. Messages are made by the caller (`cell_arguments`).
void check(Cell cell, const Layer& l) {
  TORCH_CHECK(l.input.dim() == 2 && l.h0.dim() == 2 && (cell == Cell::kLstm) == l.c0.has_value(),
              "cell: input and states must be 2-D");
  TORCH_CHECK(l.input.is_cpu() && l.h0.size(0) == l.input.size(0), "cell: batch sizes differ");
  check_layer("cell", cell, l);
}

template <class Body>
void over_batch(int64_t batch, int64_t hidden, Body body) {
  constexpr int64_t kElements = 4096;  // of a thread, at least
  if (batch * hidden <= kElements) return body(0, batch);
  at::parallel_for(0, batch, std::max<int64_t>(1, kElements / hidden), body);
}

// h', of an LSTM c', then what backward reads: of an LSTM the gates and (16-bit dtypes) c' in float32, of a GRU the
// gates, n' behind r, z, n.
std::vector<Tensor> cell_forward(const Tensor& input, const Tensor& h, const Optional& c, const Tensor& w_ih,
                                 const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, c10::string_view kind,
                                 bool save) {
  const AsGiven guard;
  const Cell cell = cell_of(kind);
  const Layer layer{input, h, c, w_ih, w_hh, b_ih, b_hh, std::nullopt, std::nullopt};
  check(cell, layer);
  const int64_t batch = h.size(0), hidden = h.size(1), width = width_of(cell) * hidden;
  const bool lstm = cell == Cell::kLstm, gru = cell == Cell::kGru;
  const auto dtype = input.scalar_type();
  if (dtype != at::kFloat) {
    const Sequence sequence(input, h, std::nullopt);
    const bool amx = lstm && dtype == at::kBFloat16 && has_tile_registers();
    const Forward out = amx ? forward_bfloat16(sequence, layer, save) : forward_float(cell, sequence, layer, save);
    std::vector<Tensor> found{out.output.to(dtype)};
    if (lstm) found.push_back(out.c_n.to(dtype));
    if (save && lstm) found.insert(found.end(), {out.gates.to(at::kHalf), out.cells});
    if (save && gru) found.push_back(out.gates);
    return found;
  }
  const Tensor x = blas_rows(input), before = h.contiguous(), w_x = blas_rows(w_ih), w_h = blas_rows(w_hh);
  const Tensor output = at::empty({batch, hidden}, at::kFloat);
  const Tensor gates = lstm || gru ? at::empty({batch, width}, at::kFloat) : output;
  float* const sums = gates.mutable_data_ptr<float>();
  const Matrix of_input = matrix(x), of_state = matrix(before), weight = matrix(w_h);
  product(of_input, matrix(w_x).t(), sums, width, false);
  if (gru) {
    product(of_state, weight.part(0, 2 * hidden).t(), sums, width, true);
    product(of_state, weight.part(2 * hidden, hidden).t(), sums + 3 * hidden, width, false);
  } else {
    product(of_state, weight.t(), sums, width, true);
  }
  const auto [bias, bias_n] = biases(cell, hidden, b_ih, b_hh);
  Tensor state;
  if (lstm) state = float_copy(c, *c);

  const int64_t zero = 0;
  ForwardArgs args{};
  args.cell = cell;
  args.steps = {1, &batch, &zero, false};
  args.hidden = args.state_size = hidden;
  args.bias = bias.const_data_ptr<float>();
  args.bias_n = bias_n.const_data_ptr<float>();
  args.h0 = of_state.data;
  args.state = args.cells = lstm ? state.mutable_data_ptr<float>() : nullptr;
  args.gates = sums;
  args.output = output.mutable_data_ptr<float>();
  args.output_stride = hidden;
  args.keep = save;
  args.ready = true;
  over_batch(batch, hidden,
             [&](int64_t row, int64_t end) { recurrent_kernels().forward(args, 0, batch ? 1 : 0, row, end); });
  std::vector<Tensor> found{output};
  if (lstm) found.push_back(state);
  if (save && (lstm || gru)) found.push_back(gates);
  return found;
}

// The gradients that the mask wants of (input, h, c, w_ih, w_hh, b_ih, b_hh), in this order. cells: c' in float32.
std::vector<Tensor> cell_backward(const Optional& dh, const Optional& dc, const Tensor& input, const Tensor& h,
                                  const Optional& c, const Tensor& w_ih, const Tensor& w_hh, const Optional& output,
                                  const Optional& gates, const Optional& cells, c10::string_view kind,
                                  std::array<bool, 7> mask) {
  const AsGiven guard;
  const Cell cell = cell_of(kind);
  const Layer layer{input, h, c, w_ih, w_hh, std::nullopt, std::nullopt, std::nullopt, std::nullopt};
  check(cell, layer);
  const bool lstm = cell == Cell::kLstm, gru = cell == Cell::kGru;
  const int64_t batch = h.size(0), hidden = h.size(1), width = width_of(cell) * hidden, gated = gates_of(cell) * hidden;
  const auto dtype = input.scalar_type();
  const auto of_shape = [&](const Optional& t, int64_t columns) {
    return !t || (t->is_cpu() && t->sizes() == at::IntArrayRef{batch, columns});
  };
  TORCH_CHECK(of_shape(dh, hidden) && of_shape(dc, hidden) && of_shape(output, hidden) && of_shape(gates, width) &&
                  of_shape(cells, hidden),
              "cell_backward: a saved tensor or gradient has another shape than its cell");
  TORCH_CHECK((!dh || dh->scalar_type() == dtype) && (!output || output->scalar_type() == dtype),
              "cell_backward: dh and output must be ", dtype, ", as the input is");
  TORCH_CHECK((lstm && cells && gates) || (gru && gates) || (!lstm && !gru && output), "cell_backward: nothing saved");
  std::vector<Tensor> found;
  const auto add = [&](bool wanted, Tensor t) {
    if (wanted) found.push_back(t.scalar_type() == dtype ? std::move(t) : t.to(dtype));
  };
  const bool of_bias = mask[5] || mask[6];
  if (dtype != at::kFloat) {
    const Sequence sequence(input, h, std::nullopt);
    const Wanted wanted{mask[0], mask[1], mask[2], mask[3], mask[4], of_bias};
    const Tensor dy = dh ? *dh : at::zeros(h.sizes(), h.options());
    const Saved saved{output ? *output : h, gates, cells ? Optional(cells->contiguous()) : cells};
    const bool amx = lstm && dtype == at::kBFloat16 && has_tile_registers();
    const Gradients out = amx ? backward_bfloat16(sequence, dy, std::nullopt, dc, layer, saved, wanted)
                              : backward_float(cell, sequence, dy, std::nullopt, dc, layer, saved, wanted);
    add(mask[0], out.input), add(mask[1], out.h0), add(mask[2], out.c0), add(mask[3], out.w_ih), add(mask[4], out.w_hh);
    add(mask[5], out.b_ih);
    if (mask[6]) found.push_back((gru ? out.b_hh : out.b_ih).to(dtype, false, /*copy=*/true));
    return found;
  }
  const Tensor before = h.contiguous(), w_x = blas_rows(w_ih), w_h = blas_rows(w_hh), x = blas_rows(input);
  const Tensor dy =
      dh ? (dh->stride(1) == 1 || hidden == 1 ? *dh : dh->contiguous()) : at::zeros({1, hidden}, at::kFloat);
  const Tensor c_before = lstm ? c->contiguous() : Tensor(), kept = gates ? gates->contiguous() : Tensor();
  const Tensor c_after = cells ? cells->contiguous() : Tensor(), y = output ? output->contiguous() : before;
  Tensor carry;
  if (lstm) carry = float_copy(dc, *c);
  if (gru) carry = at::zeros({batch, hidden}, at::kFloat);
  const Tensor dgates = at::empty({batch, width}, at::kFloat);

  const int64_t zero = 0;
  BackwardArgs args{};
  args.cell = cell;
  args.steps = {1, &batch, &zero, false};
  args.hidden = args.state_size = hidden;
  args.h0 = before.const_data_ptr<float>();
  args.c0 = lstm ? c_before.const_data_ptr<float>() : nullptr;
  args.gates = kept.defined() ? kept.const_data_ptr<float>() : nullptr;
  args.cells = c_after.defined() ? c_after.const_data_ptr<float>() : nullptr;
  args.output = y.const_data_ptr<float>();
  args.output_stride = hidden;
  args.dy = dy.const_data_ptr<float>();
  args.dy_stride = dh ? dy.stride(0) : 0;
  args.carry = carry.defined() ? carry.mutable_data_ptr<float>() : nullptr;
  args.dgates = dgates.mutable_data_ptr<float>();
  over_batch(batch, hidden,
             [&](int64_t row, int64_t end) { recurrent_kernels().backward(args, 0, batch ? 1 : 0, row, end); });

  // Of a GRU's four parts n, r, z, n' the first three are the input's and the last three the state's.
  const float *d = args.dgates, *d_state = d + (width - gated);
  const Matrix of_state{d_state, batch, gated, width}, weight = matrix(w_x);
  const auto input_parts = [&](auto body) {  // body(columns of d, rows of W_ih)
    if (!gru) return body(int64_t{0}, int64_t{0}, gated);
    body(hidden, int64_t{0}, 2 * hidden);
    body(int64_t{0}, 2 * hidden, hidden);
  };
  const auto of_weight = [&](const float* gradient, int64_t rows, const Matrix& left, float* out) {
    // In partial sums, as WeightGradient makes them: torch's product adds up the rows in one chain.
    const int64_t step = gated * left.columns <= kSmallWeight ? kPartialTokens : std::max<int64_t>(batch, 1);
    for (int64_t t = 0; t < batch; t += step) {
      const int64_t n = std::min(step, batch - t);
      product(Matrix{gradient + t * width, n, rows, width}.t(), left.part(t, n), out, left.columns, t > 0);
    }
  };
  const auto fresh = [&](int64_t rows, int64_t columns) {
    found.push_back(batch ? at::empty({rows, columns}, at::kFloat) : at::zeros({rows, columns}, at::kFloat));
    return found.back().mutable_data_ptr<float>();
  };
  if (mask[0]) {
    float* const out = fresh(batch, x.size(1));
    input_parts([&](int64_t column, int64_t row, int64_t n) {
      product(Matrix{d + column, batch, n, width}, weight.part(row, n), out, x.size(1), gru && column == 0);
    });
  }
  if (mask[1]) {
    float* out = fresh(batch, hidden);
    if (gru && batch) std::memcpy(out, args.carry, batch * hidden * sizeof(float));
    product(of_state, matrix(w_h), out, hidden, gru);
  }
  if (mask[2]) found.push_back(carry);
  if (mask[3]) {
    float* const out = fresh(gated, x.size(1));
    input_parts(
        [&](int64_t column, int64_t row, int64_t n) { of_weight(d + column, n, matrix(x), out + row * x.size(1)); });
  }
  if (mask[4]) of_weight(d_state, gated, matrix(before), fresh(gated, hidden));
  if (of_bias) {
    const Tensor sums = at::zeros({width}, at::kFloat);
    float* const p = sums.mutable_data_ptr<float>();
    if (batch) recurrent_kernels().add_column_sums(d, batch, width, p);
    const auto copy = [&](bool of_state_bias) {
      const Tensor out = at::empty({gated}, at::kFloat);
      float* const to = out.mutable_data_ptr<float>();
      if (gru && !of_state_bias) {
        std::memcpy(to, p + hidden, 2 * hidden * sizeof(float));
        std::memcpy(to + 2 * hidden, p, hidden * sizeof(float));
      } else {
        std::memcpy(to, p + (width - gated), gated * sizeof(float));
      }
      found.push_back(out);
    };
    if (gru) {
      if (mask[5]) copy(false);
      if (mask[6]) copy(true);
    } else {
      if (mask[5]) found.push_back(sums);
      if (mask[6]) mask[5] ? copy(true) : found.push_back(sums);
    }
  }
  return found;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("cell_forward.cpu", &cell_forward);
  m.impl("cell_backward.cpu", &cell_backward);
}

}  // namespace pk
