// The recurrent room's `.cpu` operators: one layer. Schemas are defined in Python
// (pykernels/ops/recurrent/_functions.py).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "isa.h"
#include "recurrent.h"

namespace pk {
namespace {

// What leaves an operator: the input's dtype, memory of its own; zero-size where a gradient was not wanted.
Tensor give(const Tensor& t, at::ScalarType dtype) {
  if (!t.defined()) return at::empty({0}, dtype);
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

Cell vanilla(c10::string_view nonlinearity) {
  TORCH_CHECK(nonlinearity == "tanh" || nonlinearity == "relu", "rnn: unknown nonlinearity '", nonlinearity, "'");
  return nonlinearity == "tanh" ? Cell::kTanh : Cell::kRelu;
}

bool by_amx(const Layer& layer) {
  return layer.input.scalar_type() == at::kBFloat16 && !layer.w_hr && !layer.peephole && has_tile_registers();
}

// Bounded by 1, where half is the finer of the 16-bit dtypes.
at::ScalarType saved_dtype(at::ScalarType dtype) { return dtype == at::kFloat ? at::kFloat : at::kHalf; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& input, const Tensor& h0, const Tensor& c0,
                                                                const Tensor& w_ih, const Tensor& w_hh,
                                                                const Optional& b_ih, const Optional& b_hh,
                                                                const Optional& w_hr, const Optional& peephole,
                                                                const Optional& batch_sizes, bool save) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole};
  check_layer("lstm_forward", Cell::kLstm, layer);
  const Forward out =
      by_amx(layer) ? forward_bfloat16(sequence, layer, save) : forward_float(Cell::kLstm, sequence, layer, save);
  const auto dtype = input.scalar_type();
  return {give(out.output, dtype), give(out.h_n, dtype), give(out.c_n, dtype), give(out.gates, saved_dtype(dtype)),
          out.cells};
}

std::tuple<Tensor, Tensor> lstm_recompute(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                          const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                          const Optional& w_hr, const Optional& peephole, const Optional& batch_sizes,
                                          const Tensor& output) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole};
  check_layer("lstm_recompute", Cell::kLstm, layer);
  check_tokens("lstm_recompute", layer, {&output}, nullptr);
  // On AMX the loop runs again: the same bits, where torch's bfloat16 product would round the gates.
  const Forward out =
      by_amx(layer) ? forward_bfloat16(sequence, layer, true) : recompute_float(Cell::kLstm, sequence, layer, output);
  return {give(out.gates, saved_dtype(input.scalar_type())), out.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const Tensor& dy, const Optional& dhn, const Optional& dcn, const Tensor& input, const Tensor& h0, const Tensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const Optional& w_hr, const Optional& peephole, const Optional& batch_sizes,
    const Tensor& output, const Tensor& gates, const Tensor& cells, std::array<bool, 8> mask) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, c0, w_ih, w_hh, std::nullopt, std::nullopt, w_hr, peephole};
  check_layer("lstm_backward", Cell::kLstm, layer);
  check_tokens("lstm_backward", layer, {&dy, &output}, &gates);
  check_final("lstm_backward", dhn, h0);
  check_final("lstm_backward", dcn, c0);
  TORCH_CHECK(cells.sizes() == sizes_of(h0, {input.size(0), c0.size(-1)}) && cells.scalar_type() == at::kFloat &&
                  cells.is_contiguous(),
              "lstm_backward: cells must be dense float32 (tokens, H), not ", cells.sizes());
  const Wanted wanted{mask[0],
                      mask[1],
                      mask[2],
                      mask[3],
                      mask[4],
                      mask[5],
                      mask[6] && w_hr.has_value(),
                      mask[7] && peephole.has_value()};
  const Saved saved{output, gates, cells};
  const Gradients out = by_amx(layer) ? backward_bfloat16(sequence, dy, dhn, dcn, layer, saved, wanted)
                                      : backward_float(Cell::kLstm, sequence, dy, dhn, dcn, layer, saved, wanted);
  const auto dtype = input.scalar_type();
  return {give(out.input, dtype), give(out.h0, dtype),   give(out.c0, dtype),   give(out.w_ih, dtype),
          give(out.w_hh, dtype),  give(out.b_ih, dtype), give(out.w_hr, dtype), give(out.peephole, dtype)};
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                               const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                               const Optional& batch_sizes, bool save) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, {}, w_ih, w_hh, b_ih, b_hh, {}, {}};
  check_layer("gru_forward", Cell::kGru, layer);
  const Forward out = forward_float(Cell::kGru, sequence, layer, save);
  const auto dtype = input.scalar_type();
  return {give(out.output, dtype), give(out.h_n, dtype), out.gates};
}

Tensor gru_recompute(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                     const Optional& b_ih, const Optional& b_hh, const Optional& batch_sizes, const Tensor& output) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, {}, w_ih, w_hh, b_ih, b_hh, {}, {}};
  check_layer("gru_recompute", Cell::kGru, layer);
  check_tokens("gru_recompute", layer, {&output}, nullptr);
  return recompute_float(Cell::kGru, sequence, layer, output).gates;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(const Tensor& dy, const Optional& dhn,
                                                                        const Tensor& input, const Tensor& h0,
                                                                        const Tensor& w_ih, const Tensor& w_hh,
                                                                        const Optional& batch_sizes,
                                                                        const Tensor& output, const Tensor& gates,
                                                                        std::array<bool, 5> mask) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, {}, w_ih, w_hh, {}, {}, {}, {}};
  check_layer("gru_backward", Cell::kGru, layer);
  check_tokens("gru_backward", layer, {&dy, &output}, &gates);
  check_final("gru_backward", dhn, h0);
  const Gradients out = backward_float(Cell::kGru, sequence, dy, dhn, {}, layer, {output, gates, {}},
                                       {mask[0], mask[1], false, mask[2], mask[3], mask[4]});
  const auto dtype = input.scalar_type();
  const Tensor b_hh = mask[4] ? out.b_hh.to(dtype, /*non_blocking=*/false, /*copy=*/true) : Tensor();
  return {give(out.input, dtype), give(out.h0, dtype),   give(out.w_ih, dtype),
          give(out.w_hh, dtype),  give(out.b_ih, dtype), give(b_hh, dtype)};
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                                       const Optional& b_ih, const Optional& b_hh, const Optional& batch_sizes,
                                       c10::string_view nonlinearity) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, {}, w_ih, w_hh, b_ih, b_hh, {}, {}};
  check_layer("rnn_forward", Cell::kTanh, layer);
  const Forward out = forward_float(vanilla(nonlinearity), sequence, layer, false);
  return {give(out.output, input.scalar_type()), give(out.h_n, input.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(const Tensor& dy, const Optional& dhn,
                                                                const Tensor& input, const Tensor& h0,
                                                                const Tensor& w_ih, const Tensor& w_hh,
                                                                const Optional& batch_sizes, const Tensor& output,
                                                                c10::string_view nonlinearity,
                                                                std::array<bool, 5> mask) {
  const AsGiven guard;
  const Sequence sequence(input, h0, batch_sizes);
  const Layer layer{input, h0, {}, w_ih, w_hh, {}, {}, {}, {}};
  check_layer("rnn_backward", Cell::kTanh, layer);
  check_tokens("rnn_backward", layer, {&dy, &output}, nullptr);
  check_final("rnn_backward", dhn, h0);
  const Gradients out = backward_float(vanilla(nonlinearity), sequence, dy, dhn, {}, layer, {output, {}, {}},
                                       {mask[0], mask[1], false, mask[2], mask[3], mask[4]});
  const auto dtype = input.scalar_type();
  return {give(out.input, dtype), give(out.h0, dtype), give(out.w_ih, dtype), give(out.w_hh, dtype),
          give(out.b_ih, dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("lstm_forward.cpu", &lstm_forward);
  m.impl("lstm_recompute.cpu", &lstm_recompute);
  m.impl("lstm_backward.cpu", &lstm_backward);
  m.impl("gru_forward.cpu", &gru_forward);
  m.impl("gru_recompute.cpu", &gru_recompute);
  m.impl("gru_backward.cpu", &gru_backward);
  m.impl("rnn_forward.cpu", &rnn_forward);
  m.impl("rnn_backward.cpu", &rnn_backward);
}

}  // namespace pk
