// The recurrent room's `.cpu` operators: one layer in one direction. Schemas are defined in Python
// (pykernels/ops/recurrent/_functions.py); the time loops are in recurrent.inc.
//
// All tokens' products with W_ih, and after the loop backward those of the weights' and the input's gradients, are
// matrix products of torch over chunks of steps: large enough for its products, small enough that gates are still in
// cache when the loop (or the next product) reads them.
#include "recurrent_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "isa.h"
#include "recurrent.h"

namespace pk {
namespace {

constexpr int64_t kFusedBytes = int64_t{5} << 18;  // a second-level cache less what streams through it
constexpr int64_t kRowsForThread = 4;  // fewer rows than this a thread, and blocks of rows are no longer full

const RecurrentKernels& kernels() {
  static const RecurrentKernels* const table = isa() == Isa::kAvx512 ? recurrent_kernels_avx512()
                                               : isa() == Isa::kAvx2 ? recurrent_kernels_avx2()
                                                                     : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

const float* read(const Tensor& t) { return t.const_data_ptr<float>(); }
float* write(const Tensor& t) { return t.mutable_data_ptr<float>(); }
Tensor dense(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

// Rows of unit stride, any distance apart (halves of a two-directional gradient, expanded gradients), without a copy.
Tensor rows_of(const Tensor& t) {
  const Tensor x = t.to(at::kFloat);
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

Forward forward(Cell cell, const Sequence& sequence, const Tensor& input, const Tensor& h0, const Optional& c0,
                const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, bool keep) {
  constexpr int64_t kChunk = 1024;                                                   // tokens
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);  // float32 products stay so
  const RecurrentKernels& table = kernels();
  const int64_t hidden = w_hh.size(1), width = width_of(cell) * hidden, tokens = input.size(0);
  const bool vanilla = width == hidden;
  const Tensor x = rows_of(input), w_in = w_ih.to(at::kFloat).t(), w = dense(w_hh), h = dense(h0);
  const auto [bias, bias_n] = biases(cell, hidden, b_ih, b_hh);
  const auto pack = [&](const Tensor& weight) {
    const int64_t depth = weight.size(1);
    const Tensor packed = at::empty({table.packed_forward(cell, hidden, depth)}, at::kFloat);
    table.pack_forward(cell, hidden, depth, read(weight), write(packed));
    return packed;
  };
  const Tensor packed = pack(w);
  // With both weights in cache, the loop takes the input's product along: gates are then written once and never read.
  const bool fused = cell != Cell::kGru && x.size(1) > 0 && (w_hh.numel() + w_ih.numel()) * 4 <= kFusedBytes;
  const Tensor packed_x = fused ? pack(dense(w_ih)) : Tensor();

  Forward out;
  out.output = at::empty({tokens, hidden}, at::kFloat);
  out.h_n = h.clone();
  if (c0) out.c_n = c0->to(at::kFloat).clone(at::MemoryFormat::Contiguous);
  out.cells = at::empty({keep && c0 ? tokens : 0, hidden}, at::kFloat);
  // Activations overwrite the gates they come from; a vanilla RNN's are its output.
  const int64_t held = keep ? tokens : sequence.largest_chunk(kChunk);
  out.gates = vanilla ? out.output : at::empty({held, width}, at::kFloat);

  ForwardArgs args{};
  args.cell = cell;
  args.steps = sequence.steps();
  args.hidden = hidden;
  args.weight = read(packed);
  args.x = read(x);
  args.x_stride = x.stride(0);
  args.inputs = x.size(1);
  args.x_weight = fused ? read(packed_x) : nullptr;
  args.bias = read(bias);
  args.bias_n = bias_n.defined() ? read(bias_n) : nullptr;
  args.h0 = read(h);
  args.state = c0 ? write(out.c_n) : nullptr;
  args.keep = keep;
  args.cells = keep && c0 ? write(out.cells) : nullptr;
  args.output = write(out.output);
  for (const Chunk& chunk : sequence.chunks(kChunk)) {
    const int64_t at = keep || vanilla ? chunk.token : 0;
    if (!fused) {
      Tensor gates = out.gates.narrow(0, at, chunk.tokens).narrow(1, 0, gates_of(cell) * hidden);
      at::mm_out(gates, x.narrow(0, chunk.token, chunk.tokens), w_in);
    }
    args.gates = write(out.gates) + (at - chunk.token) * width;
    over_rows(args.steps, chunk.first, chunk.last, kRowsForThread,
              [&](int64_t row, int64_t end) { table.forward(args, chunk.first, chunk.last, row, end); });
  }
  sequence.for_ending([&](int64_t row, int64_t rows, int64_t token) {
    std::memcpy(write(out.h_n) + row * hidden, read(out.output) + token * hidden, rows * hidden * sizeof(float));
  });
  if (!keep || vanilla) out.gates = at::empty({0, width}, at::kFloat);
  return out;
}

// sum = or += a^T b, where one row of a and b is a token. Small products are made in partial sums of kPartial tokens:
// torch adds the tokens of one up in a single chain, whose error grows with its length.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b, bool first) {
  constexpr int64_t kPartial = 128, kSmall = int64_t{1} << 16;  // elements
  const int64_t tokens = a.size(0), step = sum.numel() <= kSmall ? kPartial : std::max<int64_t>(tokens, 1);
  for (int64_t t = 0; t < tokens; t += step) {
    const int64_t n = std::min(step, tokens - t);
    const Tensor left = a.narrow(0, t, n).t(), right = b.narrow(0, t, n);
    first&& t == 0 ? at::mm_out(sum, left, right) : sum.addmm_(left, right);
  }
}

Gradients backward(Cell cell, const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
                   const Saved& saved, Wanted wanted) {
  const c10::impl::ExcludeDispatchKeyGuard as_given(c10::autocast_dispatch_keyset);
  const RecurrentKernels& table = kernels();
  const int64_t hidden = saved.w_hh.size(1), width = width_of(cell) * hidden, depth = gates_of(cell) * hidden;
  const int64_t tokens = saved.input.size(0), batch = saved.h0.size(0), kChunk = hidden <= 128 ? 512 : 2048;
  const bool gru = cell == Cell::kGru;
  const Tensor x = rows_of(saved.input), w = dense(saved.w_hh), output = dense(saved.output), h = dense(saved.h0);
  const Tensor gradient = rows_of(dy), last = dhn ? dense(*dhn) : at::zeros(h.sizes(), at::kFloat);
  Tensor w_in = saved.w_ih.to(at::kFloat);
  if (gru) w_in = at::cat({w_in.narrow(0, 2 * hidden, hidden), w_in.narrow(0, 0, 2 * hidden)});  // rows n, r, z
  const Tensor packed = at::empty({table.packed_backward(cell, hidden)}, at::kFloat);
  table.pack_backward(cell, hidden, read(w), write(packed));

  Gradients out;
  if (wanted.input) out.input = at::empty({tokens, x.size(1)}, at::kFloat);
  if (wanted.w_ih) out.w_ih = at::zeros({depth, x.size(1)}, at::kFloat);
  if (wanted.w_hh) out.w_hh = at::zeros({depth, hidden}, at::kFloat);
  Tensor sums = at::zeros({width}, at::kFloat), began = at::zeros({batch, depth}, at::kFloat), carry;
  if (saved.c0) carry = initial_carry(dcn, *saved.c0);
  if (gru) carry = last.clone();

  const int64_t held = sequence.largest_chunk(kChunk);
  const Tensor dgates = at::empty({held, width}, at::kFloat), later = at::empty({batch, width}, at::kFloat);
  const Tensor previous = at::empty({wanted.w_hh ? held : 0, hidden}, at::kFloat);
  const Tensor gates = saved.gates ? dense(*saved.gates) : Tensor(), c0 = saved.c0 ? dense(*saved.c0) : Tensor();

  BackwardArgs args{};
  args.cell = cell;
  args.steps = sequence.steps();
  args.hidden = hidden;
  args.weight = read(packed);
  args.h0 = read(h);
  args.c0 = saved.c0 ? read(c0) : nullptr;
  args.gates = saved.gates ? read(gates) : nullptr;
  args.cells = saved.cells ? read(*saved.cells) : nullptr;
  args.output = read(output);
  args.dy = read(gradient);
  args.dy_stride = gradient.stride(0);
  args.dhn = read(last);
  args.carry = carry.defined() ? write(carry) : nullptr;
  const std::vector<Chunk> chunks = sequence.chunks(kChunk);
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    const bool first = chunk == chunks.rbegin();
    args.dgates = write(dgates) - chunk->token * width;
    args.later = read(later);
    over_rows(args.steps, chunk->first, chunk->last, kRowsForThread,
              [&](int64_t row, int64_t end) { table.backward(args, chunk->first, chunk->last, row, end); });

    const Tensor d = dgates.narrow(0, 0, chunk->tokens), xs = x.narrow(0, chunk->token, chunk->tokens);
    const Tensor d_in = d.narrow(1, 0, depth), d_state = d.narrow(1, width - depth, depth);
    if (wanted.input) {
      Tensor dx = out.input.narrow(0, chunk->token, chunk->tokens);
      at::mm_out(dx, d_in, w_in);
    }
    if (wanted.w_ih) add_product(out.w_ih, d_in, xs, first);
    if (wanted.w_hh) {
      gather_previous(args.steps, *chunk, output, h, previous);
      add_product(out.w_hh, d_state, previous.narrow(0, 0, chunk->tokens), first);
    }
    if (wanted.bias) table.add_column_sums(read(d), chunk->tokens, width, write(sums));
    gather_first(args.steps, *chunk, d_state, began);
    const int64_t t = args.steps.at(chunk->first);  // the next chunk's last step reads this one's gate gradients
    std::memcpy(write(later), read(d) + (args.steps.offsets[t] - chunk->token) * width,
                args.steps.sizes[t] * width * sizeof(float));
  }
  if (wanted.h0) {
    out.h0 = at::mm(began, w);
    if (gru) out.h0.add_(carry);
    const int64_t idle = sequence.rows();  // sequences of no steps hand the gradient through
    if (!gru && idle < batch) out.h0.narrow(0, idle, batch - idle).copy_(last.narrow(0, idle, batch - idle));
  }
  if (wanted.c0) out.c0 = carry;
  if (wanted.bias) {
    out.b_ih = gru ? at::cat({sums.narrow(0, hidden, 2 * hidden), sums.narrow(0, 0, hidden)}) : sums;
    out.b_hh = sums.narrow(0, width - depth, depth);
  }
  if (gru && wanted.w_ih) {
    out.w_ih = at::cat({out.w_ih.narrow(0, hidden, 2 * hidden), out.w_ih.narrow(0, 0, hidden)});
  }
  return out;
}

// What leaves an operator: the input's dtype, memory of its own; zero-size where a gradient was not wanted.
Tensor give(const Tensor& t, at::ScalarType dtype) {
  if (!t.defined()) return at::empty({0}, dtype);
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

Cell vanilla(c10::string_view nonlinearity) {
  TORCH_CHECK(nonlinearity == "tanh" || nonlinearity == "relu", "rnn: unknown nonlinearity '", nonlinearity, "'");
  return nonlinearity == "tanh" ? Cell::kTanh : Cell::kRelu;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(const Tensor& input, const Tensor& h0, const Tensor& c0,
                                                                const Tensor& w_ih, const Tensor& w_hh,
                                                                const Optional& b_ih, const Optional& b_hh,
                                                                const Optional& w_hr, const Optional& peephole,
                                                                const Optional& batch_sizes, bool reverse, bool save) {
  TORCH_CHECK_NOT_IMPLEMENTED(!w_hr && !peephole, "lstm_forward: no projections or peepholes yet");
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("lstm_forward", 4, input, h0, {&c0}, w_ih, w_hh, {b_ih, b_hh});
  const auto dtype = input.scalar_type();
  const Forward out = dtype == at::kBFloat16 && amx_usable()
                          ? forward_bfloat16(sequence, input, h0, c0, w_ih, w_hh, b_ih, b_hh, save)
                          : forward(Cell::kLstm, sequence, input, h0, c0, w_ih, w_hh, b_ih, b_hh, save);
  const auto gates = dtype == at::kFloat ? at::kFloat : at::kHalf;  // bounded by 1, where half is the finer of the two
  return {give(out.output, dtype), give(out.h_n, dtype), give(out.c_n, dtype), give(out.gates, gates), out.cells};
}

std::tuple<Tensor, Tensor> lstm_recompute(const Tensor& input, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                                          const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                          const Optional& w_hr, const Optional& peephole, const Optional& batch_sizes,
                                          const Tensor& output, bool reverse) {
  (void)output;
  auto [y, h, c, gates, cells] =
      lstm_forward(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, batch_sizes, reverse, true);
  return {gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const Tensor& dy, const Optional& dhn, const Optional& dcn, const Tensor& input, const Tensor& h0, const Tensor& c0,
    const Tensor& w_ih, const Tensor& w_hh, const Optional& w_hr, const Optional& peephole, const Optional& batch_sizes,
    const Tensor& output, const Tensor& gates, const Tensor& cells, bool reverse, std::array<bool, 8> mask) {
  TORCH_CHECK_NOT_IMPLEMENTED(!w_hr && !peephole, "lstm_backward: no projections or peepholes yet");
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("lstm_backward", 4, input, h0, {&c0}, w_ih, w_hh, {});
  check_tokens("lstm_backward", input, w_hh, {&dy, &output}, &gates);
  TORCH_CHECK(cells.sizes() == output.sizes() && cells.scalar_type() == at::kFloat && cells.is_contiguous(),
              "lstm_backward: cells must be dense float32 ", output.sizes());
  const Saved saved{input, h0, w_ih, w_hh, output, c0, gates, cells};
  const Wanted wanted{mask[0], mask[1], mask[2], mask[3], mask[4], mask[5]};
  const auto dtype = input.scalar_type();
  const Gradients out = dtype == at::kBFloat16 && amx_usable()
                            ? backward_bfloat16(sequence, dy, dhn, dcn, saved, wanted)
                            : backward(Cell::kLstm, sequence, dy, dhn, dcn, saved, wanted);
  return {give(out.input, dtype), give(out.h0, dtype),   give(out.c0, dtype),   give(out.w_ih, dtype),
          give(out.w_hh, dtype),  give(out.b_ih, dtype), give(Tensor(), dtype), give(Tensor(), dtype)};
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih,
                                               const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                               const Optional& batch_sizes, bool reverse, bool save) {
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("gru_forward", 3, input, h0, {}, w_ih, w_hh, {b_ih, b_hh});
  const Forward out = forward(Cell::kGru, sequence, input, h0, std::nullopt, w_ih, w_hh, b_ih, b_hh, save);
  const auto dtype = input.scalar_type();
  return {give(out.output, dtype), give(out.h_n, dtype), out.gates};
}

Tensor gru_recompute(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                     const Optional& b_ih, const Optional& b_hh, const Optional& batch_sizes, const Tensor& output,
                     bool reverse) {
  (void)output;
  return std::get<2>(gru_forward(input, h0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, true));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(const Tensor& dy, const Optional& dhn,
                                                                        const Tensor& input, const Tensor& h0,
                                                                        const Tensor& w_ih, const Tensor& w_hh,
                                                                        const Optional& batch_sizes,
                                                                        const Tensor& output, const Tensor& gates,
                                                                        bool reverse, std::array<bool, 5> mask) {
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("gru_backward", 3, input, h0, {}, w_ih, w_hh, {});
  check_tokens("gru_backward", input, w_hh, {&dy, &output}, &gates);
  const Gradients out = backward(Cell::kGru, sequence, dy, dhn, std::nullopt,
                                 {input, h0, w_ih, w_hh, output, std::nullopt, gates, std::nullopt},
                                 {mask[0], mask[1], false, mask[2], mask[3], mask[4]});
  const auto dtype = input.scalar_type();
  const Tensor b_hh = mask[4] ? out.b_hh.to(dtype, /*non_blocking=*/false, /*copy=*/true) : Tensor();
  return {give(out.input, dtype), give(out.h0, dtype),   give(out.w_ih, dtype),
          give(out.w_hh, dtype),  give(out.b_ih, dtype), give(b_hh, dtype)};
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& input, const Tensor& h0, const Tensor& w_ih, const Tensor& w_hh,
                                       const Optional& b_ih, const Optional& b_hh, const Optional& batch_sizes,
                                       c10::string_view nonlinearity, bool reverse) {
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("rnn_forward", 1, input, h0, {}, w_ih, w_hh, {b_ih, b_hh});
  const Forward out = forward(vanilla(nonlinearity), sequence, input, h0, std::nullopt, w_ih, w_hh, b_ih, b_hh, false);
  return {give(out.output, input.scalar_type()), give(out.h_n, input.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward(const Tensor& dy, const Optional& dhn,
                                                                const Tensor& input, const Tensor& h0,
                                                                const Tensor& w_ih, const Tensor& w_hh,
                                                                const Optional& batch_sizes, const Tensor& output,
                                                                c10::string_view nonlinearity, bool reverse,
                                                                std::array<bool, 5> mask) {
  const Sequence sequence(input, h0, batch_sizes, reverse);
  check_layer("rnn_backward", 1, input, h0, {}, w_ih, w_hh, {});
  check_tokens("rnn_backward", input, w_hh, {&dy, &output}, nullptr);
  const Gradients out = backward(vanilla(nonlinearity), sequence, dy, dhn, std::nullopt,
                                 {input, h0, w_ih, w_hh, output, std::nullopt, std::nullopt, std::nullopt},
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
