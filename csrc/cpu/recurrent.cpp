// One layer in one direction in float32 (the 16-bit dtypes are converted to it and back): what is around the time loops
// of recurrent.inc.
//
// All tokens' products with W_ih, and after the loop backward those of the weights' and the input's gradients, are
// matrix products over chunks of steps: large enough for a product, small enough that gates are still in cache when the
// loop (or the next product) reads them.
#include "recurrent.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "isa.h"

namespace pk {

const RecurrentKernels& recurrent_kernels() {
  static const RecurrentKernels* const table = isa() == Isa::kAvx512 ? recurrent_kernels_avx512()
                                               : isa() == Isa::kAvx2 ? recurrent_kernels_avx2()
                                                                     : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

namespace {

constexpr int64_t kFusedBytes = int64_t{5} << 18;  // a second-level cache less what streams through it
constexpr int64_t kRowsForThread = 4;     // fewer rows than this a thread, and blocks of rows are no longer full
constexpr int64_t kForwardTokens = 1024;  // of a chunk

const float* read(const Tensor& t) { return t.const_data_ptr<float>(); }
const float* read_or_null(const Tensor& t) { return t.defined() ? read(t) : nullptr; }
float* write(const Tensor& t) { return t.mutable_data_ptr<float>(); }
// Conversions and cuts that change nothing are left out: each costs a microsecond, which a single cell notices.
Tensor as_float(const Tensor& t) { return t.scalar_type() == at::kFloat ? t : t.to(at::kFloat); }
Tensor dense(const Tensor& t) { return as_float(t).contiguous(); }
Tensor cut(const Tensor& t, int64_t dim, int64_t at, int64_t count) {
  return count == t.size(dim) ? t : t.narrow(dim, at, count);
}
Tensor dense_or_none(const Optional& t) { return t ? dense(*t) : Tensor(); }

// Rows of unit stride, any distance apart (halves of a two-directional gradient, expanded gradients), without a copy.
Tensor rows_of(const Tensor& t) {
  const Tensor x = as_float(t);
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

// w (depth, columns) packed for products with it from the right.
Tensor packed_columns(const Tensor& w) {
  const int64_t depth = w.size(0), columns = w.size(1);
  Tensor packed = at::empty({recurrent_kernels().packed_columns(depth, columns)}, at::kFloat);
  recurrent_kernels().pack_columns(depth, columns, read(w), write(packed));
  return packed;
}

// A layer's tensors in float32, and its sizes.
struct Wide {
  int64_t hidden, state_size, width, depth, tokens, batch;
  Tensor x, h, w_ih, w, w_hr, peephole;

  Wide(Cell cell, const Layer& layer)
      : hidden(layer.w_hh.size(0) / gates_of(cell)),
        state_size(layer.w_hh.size(1)),
        width(width_of(cell) * hidden),
        depth(gates_of(cell) * hidden),
        tokens(layer.input.size(0)),
        batch(layer.h0.size(0)),
        x(rows_of(layer.input)),
        h(dense(layer.h0)),
        w_ih(as_float(layer.w_ih)),
        w(dense(layer.w_hh)),
        w_hr(dense_or_none(layer.w_hr)),
        peephole(dense_or_none(layer.peephole)) {}
};

// Adds the products of h before each token to the gates from the input. The GRU's n' goes behind the input's three.
void add_state_products(Cell cell, const Wide& wide, Tensor gates, const Tensor& previous) {
  const int64_t hidden = wide.hidden, shared = cell == Cell::kGru ? 2 * hidden : wide.depth;
  Tensor sums = cut(gates, 1, 0, shared);
  sums.addmm_(previous, cut(wide.w, 0, 0, shared).t());
  if (cell != Cell::kGru) return;
  Tensor rest = gates.narrow(1, 3 * hidden, hidden);
  at::mm_out(rest, previous, wide.w.narrow(0, shared, hidden).t());
}

ForwardArgs forward_args(Cell cell, const Sequence& sequence, const Wide& wide, const Tensor& bias,
                         const Tensor& bias_n) {
  ForwardArgs args{};
  args.cell = cell;
  args.steps = sequence.steps();
  args.hidden = wide.hidden;
  args.state_size = wide.state_size;
  args.x = read(wide.x);
  args.x_stride = wide.x.stride(0);
  args.inputs = wide.x.size(1);
  args.bias = read(bias);
  args.bias_n = read(bias_n);
  args.h0 = read(wide.h);
  args.peephole = read_or_null(wide.peephole);
  return args;
}

}  // namespace

Forward forward_float(Cell cell, const Sequence& sequence, const Layer& layer, bool keep) {
  const RecurrentKernels& table = recurrent_kernels();
  const Wide wide(cell, layer);
  const int64_t hidden = wide.hidden, width = wide.width, tokens = wide.tokens;
  const bool vanilla = width == hidden;
  const Tensor w_in = wide.w_ih.t();
  const auto [bias, bias_n] = biases(cell, hidden, layer.b_ih, layer.b_hh);
  const auto pack = [&](const Tensor& weight) {
    const int64_t depth = weight.size(1);
    const Tensor packed = at::empty({table.packed_forward(cell, hidden, depth)}, at::kFloat);
    table.pack_forward(cell, hidden, depth, read(weight), write(packed));
    return packed;
  };
  // For a single step packing would cost as much as the product.
  const bool ready = sequence.count() == 1 && !wide.w_hr.defined() && tokens == wide.batch;
  const Tensor packed = ready ? Tensor() : pack(wide.w);
  // With both weights in cache, the loop takes the input's product along: gates are then written once and never read.
  const int64_t both = wide.w.numel() + wide.w_ih.numel();
  const bool fused = !ready && cell != Cell::kGru && wide.x.size(1) > 0 && both * 4 <= kFusedBytes;
  const Tensor packed_x = fused ? pack(wide.w_ih.contiguous()) : Tensor();
  const Tensor projection = wide.w_hr.defined() ? packed_columns(wide.w_hr.t().contiguous()) : Tensor();
  const Tensor unprojected = projection.defined() ? at::empty({wide.batch, hidden}, at::kFloat) : Tensor();

  Forward out;
  out.output = at::empty({tokens, wide.state_size}, at::kFloat);
  if (layer.c0) out.c_n = float_copy(layer.c0, *layer.c0);
  out.cells = at::empty({keep && layer.c0 ? tokens : 0, hidden}, at::kFloat);
  // Activations overwrite the gates they come from; a vanilla RNN's are its output.
  const int64_t held = keep ? tokens : sequence.largest_chunk(kForwardTokens);
  out.gates = vanilla ? out.output : at::empty({held, width}, at::kFloat);

  ForwardArgs args = forward_args(cell, sequence, wide, bias, bias_n);
  args.weight = read_or_null(packed);
  args.x_weight = read_or_null(packed_x);
  args.state = layer.c0 ? write(out.c_n) : nullptr;
  args.keep = keep;
  args.cells = keep && layer.c0 ? write(out.cells) : nullptr;
  args.output = write(out.output);
  args.ready = ready;
  args.projection = read_or_null(projection);
  args.unprojected = projection.defined() ? write(unprojected) : nullptr;
  for (const Chunk& chunk : sequence.chunks(kForwardTokens)) {
    const int64_t at = keep || vanilla ? chunk.token : 0;
    if (!fused) {
      const Tensor gates = cut(out.gates, 0, at, chunk.tokens);
      Tensor of_input = cut(gates, 1, 0, wide.depth);
      at::mm_out(of_input, cut(wide.x, 0, chunk.token, chunk.tokens), w_in);
      if (ready) add_state_products(cell, wide, gates, wide.h);
    }
    args.gates = write(out.gates) + (at - chunk.token) * width;
    over_rows(args.steps, chunk.first, chunk.last, kRowsForThread,
              [&](int64_t row, int64_t end) { table.forward(args, chunk.first, chunk.last, row, end); });
  }
  out.h_n = ready ? out.output.clone() : wide.h.clone();
  if (!ready) {
    const int64_t size = wide.state_size;
    sequence.for_ending([&](int64_t row, int64_t rows, int64_t token) {
      std::memcpy(write(out.h_n) + row * size, read(out.output) + token * size, rows * size * sizeof(float));
    });
  }
  if (!keep || vanilla) out.gates = at::empty({0, width}, at::kFloat);
  return out;
}

Forward recompute_float(Cell cell, const Sequence& sequence, const Layer& layer, const Tensor& output) {
  const RecurrentKernels& table = recurrent_kernels();
  const Wide wide(cell, layer);
  const Tensor y = dense(output), w_in = wide.w_ih.t();
  const auto [bias, bias_n] = biases(cell, wide.hidden, layer.b_ih, layer.b_hh);
  Forward out;
  out.gates = at::empty({wide.tokens, wide.width}, at::kFloat);
  if (layer.c0) {
    out.c_n = float_copy(layer.c0, *layer.c0);
    out.cells = at::empty({wide.tokens, wide.hidden}, at::kFloat);
  }
  const Tensor before = at::empty({sequence.largest_chunk(kForwardTokens), wide.state_size}, at::kFloat);
  ForwardArgs args = forward_args(cell, sequence, wide, bias, bias_n);
  args.state = layer.c0 ? write(out.c_n) : nullptr;
  args.cells = layer.c0 ? write(out.cells) : nullptr;
  args.gates = write(out.gates);
  args.keep = args.ready = true;
  for (const Chunk& chunk : sequence.chunks(kForwardTokens)) {
    const Tensor gates = out.gates.narrow(0, chunk.token, chunk.tokens);
    Tensor of_input = gates.narrow(1, 0, wide.depth);
    at::mm_out(of_input, wide.x.narrow(0, chunk.token, chunk.tokens), w_in);
    gather_previous(args.steps, chunk, y, wide.h, before);
    add_state_products(cell, wide, gates, before.narrow(0, 0, chunk.tokens));
    over_rows(args.steps, chunk.first, chunk.last, kRowsForThread,
              [&](int64_t row, int64_t end) { table.forward(args, chunk.first, chunk.last, row, end); });
  }
  return out;
}

namespace {

// The gradient of a weight (width, columns) as a sum over chunks of tokens of d^T x.
class WeightGradient {
 public:
  WeightGradient(bool wanted, int64_t width, int64_t columns, int64_t tokens)
      : wanted_(wanted), transposed_(tokens >= kMany), width_(width), columns_(columns) {}

  void add(const Tensor& d, const Tensor& x) {
    if (!wanted_) return;
    const Tensor &left = transposed_ ? x : d, &right = transposed_ ? d : x;
    const int64_t tokens = d.size(0);
    const int64_t step = width_ * columns_ <= kSmallWeight ? kPartialTokens : std::max<int64_t>(tokens, 1);
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t n = std::min(step, tokens - t);
      const Tensor a = cut(left, 0, t, n).t(), b = cut(right, 0, t, n);
      sums_.defined() ? sums_.addmm_(a, b) : (sums_ = at::mm(a, b), sums_);
    }
  }

  Tensor result() const {
    if (!wanted_) return Tensor();
    if (!sums_.defined()) return at::zeros({width_, columns_}, at::kFloat);
    return transposed_ ? sums_.t().contiguous() : sums_;
  }

 private:
  // Of many tokens torch's product is faster as x^T d (by a tenth for 256 units, a third for 64).
  static constexpr int64_t kMany = 256;
  bool wanted_, transposed_;
  int64_t width_, columns_;
  Tensor sums_;
};

// Sums over tokens of di c, df c (c before the token) and do c' (after it): the peepholes' gradients.
void add_peephole_gradient(const Tensor& d, const Tensor& before, const Tensor& cells, Tensor sums) {
  const int64_t hidden = cells.size(1);
  const auto add = [&](int64_t part, int64_t gate, const Tensor& c) {
    sums.narrow(0, part * hidden, hidden).add_(d.narrow(1, gate * hidden, hidden).mul(c).sum(0));
  };
  add(0, 0, before);
  add(1, 1, before);
  add(2, 3, cells);
}

}  // namespace

Gradients backward_float(Cell cell, const Sequence& sequence, const Tensor& dy, const Optional& dhn,
                         const Optional& dcn, const Layer& layer, const Saved& saved, Wanted wanted) {
  const RecurrentKernels& table = recurrent_kernels();
  const Wide wide(cell, layer);
  const int64_t hidden = wide.hidden, width = wide.width, depth = wide.depth, size = wide.state_size;
  const int64_t tokens = wide.tokens, batch = wide.batch, kChunk = hidden <= 128 ? 512 : 2048;
  const bool gru = cell == Cell::kGru, one_step = sequence.count() == 1, projected = wide.w_hr.defined();
  const bool at_once = one_step && tokens == batch;  // the state before is h0, and every gradient reaches it
  const Tensor output = dense(saved.output), gradient = rows_of(dy);
  const Tensor last = dhn ? dense(*dhn) : at::zeros({batch, size}, at::kFloat);
  const Tensor packed = one_step && !projected ? Tensor() : packed_columns(wide.w);
  const Tensor projection = projected ? packed_columns(wide.w_hr) : Tensor();

  Gradients out;
  if (wanted.input) out.input = at::empty({tokens, wide.x.size(1)}, at::kFloat);
  WeightGradient of_w_ih(wanted.w_ih, depth, wide.x.size(1), tokens), of_w_hh(wanted.w_hh, depth, size, tokens);
  WeightGradient of_w_hr(wanted.w_hr, size, hidden, tokens);
  Tensor sums = at::zeros({wanted.bias ? width : 0}, at::kFloat), carry;
  Tensor began = wanted.h0 && !at_once ? at::zeros({batch, depth}, at::kFloat) : Tensor();
  if (layer.c0) carry = float_copy(dcn, *layer.c0);
  if (gru) carry = last.clone();
  if (wanted.peephole) out.peephole = at::zeros({3 * hidden}, at::kFloat);

  const std::vector<Chunk> chunks = sequence.chunks(kChunk);
  const int64_t held = sequence.largest_chunk(kChunk);
  const Tensor dgates = at::empty({held, width}, at::kFloat);
  const Tensor later = chunks.size() > 1 ? at::empty({batch, width}, at::kFloat) : Tensor();
  const Tensor previous = wanted.w_hh && !at_once ? at::empty({held, size}, at::kFloat) : Tensor();
  const Tensor before = wanted.peephole ? at::empty({held, hidden}, at::kFloat) : Tensor();
  const Tensor dprojected = projected ? at::empty({held, size}, at::kFloat) : Tensor();
  const Tensor gates = dense_or_none(saved.gates), c0 = dense_or_none(layer.c0);

  BackwardArgs args{};
  args.cell = cell;
  args.steps = sequence.steps();
  args.hidden = hidden;
  args.state_size = size;
  args.weight = read_or_null(packed);
  args.h0 = read(wide.h);
  args.c0 = read_or_null(c0);
  args.gates = read_or_null(gates);
  args.cells = saved.cells ? read(*saved.cells) : nullptr;
  args.output = read(output);
  args.dy = read(gradient);
  args.dy_stride = gradient.stride(0);
  args.dhn = read(last);
  args.carry = carry.defined() ? write(carry) : nullptr;
  args.peephole = read_or_null(wide.peephole);
  args.projection = read_or_null(projection);
  for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) {
    args.dgates = write(dgates) - chunk->token * width;
    args.dprojected = projected ? write(dprojected) - chunk->token * size : nullptr;
    args.later = read_or_null(later);
    over_rows(args.steps, chunk->first, chunk->last, kRowsForThread,
              [&](int64_t row, int64_t end) { table.backward(args, chunk->first, chunk->last, row, end); });

    const Tensor d = cut(dgates, 0, 0, chunk->tokens), xs = cut(wide.x, 0, chunk->token, chunk->tokens);
    const Tensor d_in = cut(d, 1, 0, depth), d_state = cut(d, 1, width - depth, depth);
    if (wanted.input) {
      Tensor dx = cut(out.input, 0, chunk->token, chunk->tokens);
      if (gru) {  // the gates' gradients are in the order n, r, z
        at::mm_out(dx, d_in.narrow(1, hidden, 2 * hidden), wide.w_ih.narrow(0, 0, 2 * hidden));
        dx.addmm_(d_in.narrow(1, 0, hidden), wide.w_ih.narrow(0, 2 * hidden, hidden));
      } else {
        at::mm_out(dx, d_in, wide.w_ih);
      }
    }
    of_w_ih.add(d_in, xs);
    if (wanted.w_hh) {
      if (!at_once) gather_previous(args.steps, *chunk, output, wide.h, previous);
      of_w_hh.add(d_state, at_once ? wide.h : cut(previous, 0, 0, chunk->tokens));
    }
    if (wanted.w_hr) {
      const Tensor activations = gates.narrow(0, chunk->token, chunk->tokens);
      const Tensor cells = saved.cells->narrow(0, chunk->token, chunk->tokens);  // h before the projection: o tanh(c)
      const Tensor h = activations.narrow(1, 3 * hidden, hidden).mul(cells.tanh());
      of_w_hr.add(dprojected.narrow(0, 0, chunk->tokens), h);
    }
    if (wanted.peephole) {
      gather_previous(args.steps, *chunk, *saved.cells, c0, before);
      add_peephole_gradient(d, before.narrow(0, 0, chunk->tokens), saved.cells->narrow(0, chunk->token, chunk->tokens),
                            out.peephole);
    }
    if (wanted.bias) table.add_column_sums(read(d), chunk->tokens, width, write(sums));
    if (wanted.h0) {
      if (at_once) {
        began = d_state;
      } else {
        gather_first(args.steps, *chunk, d_state, began);
      }
    }
    if (chunks.size() > 1) {  // the next chunk's last step reads this one's gate gradients
      const int64_t t = args.steps.at(chunk->first);
      std::memcpy(write(later), read(d) + (args.steps.offsets[t] - chunk->token) * width,
                  args.steps.sizes[t] * width * sizeof(float));
    }
  }
  if (wanted.h0) {
    out.h0 = at::mm(began, wide.w);
    if (gru) out.h0.add_(carry);
    const int64_t idle = sequence.rows();  // sequences of no steps hand the gradient through
    if (!gru && idle < batch) out.h0.narrow(0, idle, batch - idle).copy_(last.narrow(0, idle, batch - idle));
  }
  if (wanted.c0) out.c0 = carry;
  if (wanted.bias) {
    out.b_ih = gru ? at::cat({sums.narrow(0, hidden, 2 * hidden), sums.narrow(0, 0, hidden)}) : sums;
    out.b_hh = sums.narrow(0, width - depth, depth);
  }
  out.w_ih = of_w_ih.result();
  if (gru && wanted.w_ih) {
    out.w_ih = at::cat({out.w_ih.narrow(0, hidden, 2 * hidden), out.w_ih.narrow(0, 0, hidden)});
  }
  out.w_hh = of_w_hh.result();
  out.w_hr = of_w_hr.result();
  return out;
}

}  // namespace pk
