// The LSTM in bfloat16 on AMX: products of all tokens by torch in bfloat16, the time loop by recurrent_amx.cpp.
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "isa.h"
#include "recurrent.h"

namespace pk {
namespace {

constexpr int64_t kRowsForThread = 16;  // a tile

const uint16_t* words(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* words_out(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }
Tensor widened(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
Tensor rows_of(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

// d^T x, (width, columns). torch's product of a transposed bfloat16 matrix reaches half of what it does otherwise.
Tensor weight_gradient(const Tensor& d, const Tensor& input) {
  const AmxKernels& table = *recurrent_kernels_amx();
  const Tensor x = rows_of(input);
  const int64_t columns = x.size(1), width = d.size(1), tokens = d.size(0);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), columns / 64));
  const int64_t share = (columns + threads - 1) / threads, pitch = (width + 31) / 32 * 32;
  const int64_t stripe = (share + 31) / 32 * 32;  // columns of a thread, each of which has its own rows of the sums
  const int64_t stripes = (columns + stripe - 1) / stripe;
  const Tensor sums = at::zeros({std::max<int64_t>(stripes, 1) * stripe, pitch}, at::kFloat);
  at::parallel_for(0, stripes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * stripe, mine = std::min(stripe, columns - first);
      const Tensor scratch = at::empty({table.gradient_scratch_words(mine)}, at::kBFloat16);
      table.add_weight_gradient(words(x) + first, x.stride(0), mine, words(d), width, tokens,
                                sums.mutable_data_ptr<float>() + first * pitch, words_out(scratch));
    }
  });
  const Tensor out = at::empty({width, columns}, at::kBFloat16);
  table.round_transposed(sums.const_data_ptr<float>(), pitch, columns, width, words_out(out));
  return out;
}

}  // namespace

bool amx_usable() {
  static const bool usable = isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") &&
                             __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                             at::cpu::init_amx();
  return usable;
}

Forward forward_bfloat16(const Sequence& sequence, const Layer& layer, bool keep) {
  constexpr int64_t kChunk = 4096;  // tokens
  const AmxKernels& table = *recurrent_kernels_amx();
  const int64_t hidden = layer.w_hh.size(1), width = 4 * hidden, tokens = layer.input.size(0);
  const Tensor w = layer.w_hh.contiguous(), h = layer.h0.contiguous(), w_in = layer.w_ih.t();
  const Tensor bias = biases(Cell::kLstm, hidden, layer.b_ih, layer.b_hh).first;
  const Tensor packed = at::empty({table.packed_forward(hidden)}, at::kBFloat16);
  table.pack_forward(hidden, words(w), words_out(packed));

  Forward out;
  out.output = at::empty({tokens, hidden}, at::kBFloat16);
  out.h_n = h.clone();
  out.c_n = float_copy(layer.c0, *layer.c0);
  out.cells = at::empty({keep ? tokens : 0, hidden}, at::kFloat);
  out.gates = at::empty({keep ? tokens : sequence.largest_chunk(kChunk), width}, at::kHalf);

  AmxForwardArgs args{};
  args.steps = sequence.steps();
  args.hidden = hidden;
  args.weight = words(packed);
  args.bias = bias.const_data_ptr<float>();
  args.h0 = words(h);
  args.state = out.c_n.mutable_data_ptr<float>();
  args.keep = keep;
  args.cells = out.cells.mutable_data_ptr<float>();
  args.output = words_out(out.output);
  for (const Chunk& chunk : sequence.chunks(kChunk)) {
    const int64_t at = keep ? chunk.token : 0;
    Tensor gates = out.gates.narrow(0, at, chunk.tokens).view(at::kBFloat16);
    at::mm_out(gates, layer.input.narrow(0, chunk.token, chunk.tokens), w_in);
    args.gates = words_out(out.gates) + (at - chunk.token) * width;
    over_rows(args.steps, chunk.first, chunk.last, kRowsForThread, [&](int64_t row, int64_t end) {
      const Tensor scratch = at::empty({table.scratch_bytes(hidden, end - row)}, at::kByte);
      table.forward(args, chunk.first, chunk.last, row, end, scratch.mutable_data_ptr());
    });
  }
  sequence.for_ending([&](int64_t row, int64_t rows, int64_t token) {
    std::memcpy(words_out(out.h_n) + row * hidden, words(out.output) + token * hidden, rows * hidden * 2);
  });
  if (!keep) out.gates = at::empty({0, width}, at::kHalf);
  return out;
}

Gradients backward_bfloat16(const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
                            const Layer& layer, const Saved& saved, Wanted wanted) {
  const AmxKernels& table = *recurrent_kernels_amx();
  const int64_t hidden = layer.w_hh.size(1), width = 4 * hidden, tokens = layer.input.size(0), batch = layer.h0.size(0);
  const Tensor w = layer.w_hh.contiguous(), output = saved.output.contiguous(), h = layer.h0.contiguous();
  const Tensor gradient = rows_of(dy), last = dhn ? widened(*dhn) : at::zeros(h.sizes(), at::kFloat);
  const Tensor gates = saved.gates->contiguous(), c0 = widened(*layer.c0);
  TORCH_CHECK(gates.scalar_type() == at::kHalf, "lstm_backward: gates must be float16, not ", gates.scalar_type());
  const Tensor packed = at::empty({table.packed_backward(hidden)}, at::kBFloat16);
  table.pack_backward(hidden, words(w), words_out(packed));
  const Tensor dgates = at::empty({tokens, width}, at::kBFloat16);

  Gradients out;
  out.c0 = float_copy(dcn, *layer.c0);
  AmxBackwardArgs args{};
  args.steps = sequence.steps();
  args.hidden = hidden;
  args.weight = words(packed);
  args.c0 = c0.const_data_ptr<float>();
  args.gates = words(gates);
  args.cells = saved.cells->const_data_ptr<float>();
  args.dy = words(gradient);
  args.dy_stride = gradient.stride(0);
  args.dhn = last.const_data_ptr<float>();
  args.carry = out.c0.mutable_data_ptr<float>();
  args.dgates = words_out(dgates);
  const Chunk all{0, sequence.count(), 0, tokens};
  if (tokens) {
    over_rows(args.steps, 0, all.last, kRowsForThread, [&](int64_t row, int64_t end) {
      const Tensor scratch = at::empty({table.scratch_bytes(hidden, end - row)}, at::kByte);
      table.backward(args, 0, all.last, row, end, scratch.mutable_data_ptr());
    });
  }
  if (wanted.input) out.input = at::mm(dgates, layer.w_ih);
  if (wanted.w_ih) out.w_ih = weight_gradient(dgates, layer.input);
  if (wanted.w_hh) {
    const Tensor previous = at::empty({tokens, hidden}, at::kBFloat16);
    gather_previous(args.steps, all, output, h, previous);
    out.w_hh = weight_gradient(dgates, previous);
  }
  if (wanted.bias) {
    out.b_ih = at::zeros({width}, at::kFloat);
    table.add_column_sums(words(dgates), tokens, width, out.b_ih.mutable_data_ptr<float>());
  }
  if (wanted.h0) {
    const Tensor began = at::zeros({batch, width}, at::kBFloat16);
    gather_first(args.steps, all, dgates, began);
    out.h0 = at::mm(began, w);
    const int64_t idle = sequence.rows();  // sequences of no steps hand the gradient through
    if (idle < batch) out.h0.narrow(0, idle, batch - idle).copy_(last.narrow(0, idle, batch - idle));
  }
  if (!wanted.c0) out.c0 = Tensor();
  return out;
}

}  // namespace pk
