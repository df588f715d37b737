// The `.cpu` operators of single cells: what is left of a step when both matrix products are done (by torch, one call
// each).
#include "recurrent_cells.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <initializer_list>
#include <tuple>

#include "isa.h"

namespace pk {
namespace {

using at::Tensor;

const CellKernels& kernels() {
  static const CellKernels* const table = isa() == Isa::kAvx512 ? cell_kernels_avx512()
                                          : isa() == Isa::kAvx2 ? cell_kernels_avx2()
                                                                : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

CellArgs args_of(const char* op, const Tensor& state, std::initializer_list<const Tensor*> gates, int64_t count,
                 std::initializer_list<const Tensor*> twins) {
  const auto dtype = state.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                              ": expected float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK(state.dim() == 2, op, ": the state has shape ", state.sizes());
  for (const Tensor* t : gates) {
    TORCH_CHECK(t->dim() == 2 && t->size(0) == state.size(0) && t->size(1) == count * state.size(1), op,
                ": gates of shape ", t->sizes(), " for a state of shape ", state.sizes());
    TORCH_CHECK(t->scalar_type() == dtype && t->is_cpu(), op, ": dtypes differ");
  }
  for (const Tensor* t : twins) {
    TORCH_CHECK(t->sizes() == state.sizes() && t->scalar_type() == dtype && t->is_cpu(), op, ": expected ", dtype,
                state.sizes(), ", got ", t->scalar_type(), t->sizes());
  }
  CellArgs args{};
  args.dtype = dtype == at::kFloat      ? CellDtype::kFloat
               : dtype == at::kBFloat16 ? CellDtype::kBFloat16
                                        : CellDtype::kHalf;
  args.hidden = state.size(1);
  return args;
}

void run(void (*kernel)(const CellArgs&, int64_t, int64_t), const CellArgs& args, int64_t rows) {
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(args.hidden, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor dense_like(const Tensor& t) { return at::empty(t.sizes(), t.options()); }

std::tuple<Tensor, Tensor> lstm_cell_forward(const Tensor& input_, const Tensor& hidden_, const Tensor& c_) {
  CellArgs args = args_of("lstm_cell_forward", c_, {&input_, &hidden_}, 4, {});
  const Tensor input = input_.contiguous(), hidden = hidden_.contiguous(), c = c_.contiguous();
  const Tensor h_out = dense_like(c), c_out = dense_like(c);
  args.gates = input.const_data_ptr();
  args.state_gates = hidden.const_data_ptr();
  args.state = c.const_data_ptr();
  args.out = h_out.mutable_data_ptr();
  args.out_state = c_out.mutable_data_ptr();
  run(kernels().lstm_forward, args, c.size(0));
  return {h_out, c_out};
}

std::tuple<Tensor, Tensor> lstm_cell_backward(const Tensor& dh_, const Tensor& dc_, const Tensor& input_,
                                              const Tensor& hidden_, const Tensor& c_) {
  CellArgs args = args_of("lstm_cell_backward", c_, {&input_, &hidden_}, 4, {&dh_, &dc_});
  const Tensor input = input_.contiguous(), hidden = hidden_.contiguous(), c = c_.contiguous();
  const Tensor dh = dh_.contiguous(), dc = dc_.contiguous(), dgates = dense_like(input), dbefore = dense_like(c);
  args.gates = input.const_data_ptr();
  args.state_gates = hidden.const_data_ptr();
  args.state = c.const_data_ptr();
  args.dy = dh.const_data_ptr();
  args.dstate = dc.const_data_ptr();
  args.out = dgates.mutable_data_ptr();
  args.out_state = dbefore.mutable_data_ptr();
  run(kernels().lstm_backward, args, c.size(0));
  return {dgates, dbefore};
}

Tensor gru_cell_forward(const Tensor& input_, const Tensor& hidden_, const Tensor& h_) {
  CellArgs args = args_of("gru_cell_forward", h_, {&input_, &hidden_}, 3, {});
  const Tensor input = input_.contiguous(), hidden = hidden_.contiguous(), h = h_.contiguous(), out = dense_like(h);
  args.gates = input.const_data_ptr();
  args.state_gates = hidden.const_data_ptr();
  args.state = h.const_data_ptr();
  args.out = out.mutable_data_ptr();
  run(kernels().gru_forward, args, h.size(0));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& dy_, const Tensor& input_, const Tensor& hidden_,
                                                     const Tensor& h_) {
  CellArgs args = args_of("gru_cell_backward", h_, {&input_, &hidden_}, 3, {&dy_});
  const Tensor input = input_.contiguous(), hidden = hidden_.contiguous(), h = h_.contiguous(), dy = dy_.contiguous();
  const Tensor d_input = dense_like(input), d_hidden = dense_like(hidden), dh = dense_like(h);
  args.gates = input.const_data_ptr();
  args.state_gates = hidden.const_data_ptr();
  args.state = h.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.out = d_input.mutable_data_ptr();
  args.out_gates = d_hidden.mutable_data_ptr();
  args.out_state = dh.mutable_data_ptr();
  run(kernels().gru_backward, args, h.size(0));
  return {d_input, d_hidden, dh};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("lstm_cell_forward.cpu", &lstm_cell_forward);
  m.impl("lstm_cell_backward.cpu", &lstm_cell_backward);
  m.impl("gru_cell_forward.cpu", &gru_cell_forward);
  m.impl("gru_cell_backward.cpu", &gru_cell_backward);
}

}  // namespace pk
