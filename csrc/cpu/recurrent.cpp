// One layer forward in float32 (the 16-bit dtypes are converted to it and back): what is around the time loops of
// recurrent.inc.
//
// All tokens' products with W_ih, and after the loop backward those of the weights' and the input's gradients, are
// matrix products over chunks of steps: large enough for a product, small enough that gates are still in cache when the
// loop (or the next product) reads them.
#include <ATen/ops/empty.h>

#include "float_product.h"
#include "isa.h"
#include "recurrent_float.h"

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
constexpr int64_t kForwardTokens = 1024;           // of a chunk

// Adds the products of h before each token to the gates from the input. The GRU's n' goes behind the input's three.
void add_state_products(Cell cell, const Wide& wide, Tensor gates, const Tensor& previous) {
  const int64_t hidden = wide.hidden, shared = cell == Cell::kGru ? 2 * hidden : wide.depth;
  Tensor sums = cut(gates, 1, 0, shared);
  product(sums, previous, cut(wide.w, 0, 0, shared).t(), true);
  if (cell != Cell::kGru) return;
  Tensor rest = gates.narrow(1, 3 * hidden, hidden);
  product(rest, previous, wide.w.narrow(0, shared, hidden).t());
}

ForwardArgs forward_args(Cell cell, const Steps& steps, const Wide& wide, const Tensor& bias, const Tensor& bias_n) {
  ForwardArgs args{};
  args.cell = cell;
  args.steps = steps;
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

// One direction of a layer forward. `out` is its share: output (tokens, size) with rows any distance apart, c_n with c0
// in it, cells and, where they are kept, gates of all tokens.
class ForwardLoop {
 public:
  ForwardLoop(Cell cell, const Sequence& sequence, const Tensor& input, const Layer& layer, bool reverse, bool keep,
              const Forward& out)
      : sequence_(sequence),
        wide_(cell, input, layer),
        w_in_(wide_.w_ih.t()),
        out_(out),
        chunks_(sequence.chunks(kForwardTokens, reverse)),
        reverse_(reverse),
        vanilla_(wide_.width == wide_.hidden),
        all_(keep || vanilla_),
        ready_(sequence.count() == 1 && !wide_.w_hr.defined() && wide_.tokens == wide_.batch) {
    const RecurrentKernels& table = recurrent_kernels();
    const int64_t hidden = wide_.hidden;
    const auto pack = [&](const Tensor& weight) {
      const int64_t depth = weight.size(1);
      const Tensor packed = fresh_floats({table.packed_forward(cell, hidden, depth)});
      table.pack_forward(cell, hidden, depth, read(weight), write(packed));
      return packed;
    };
    std::tie(bias_, bias_n_) = biases(cell, hidden, layer.b_ih, layer.b_hh);
    // For a single step packing would cost as much as the product.
    if (!ready_) packed_ = pack(wide_.w);
    // With both weights in cache, the loop takes the input's product along: gates are then written once and never read.
    const int64_t both = wide_.w.numel() + wide_.w_ih.numel();
    fused_ = !ready_ && cell != Cell::kGru && wide_.x.size(1) > 0 && both * 4 <= kFusedBytes;
    if (fused_) packed_x_ = pack(wide_.w_ih.contiguous());
    if (wide_.w_hr.defined()) {
      projection_ = packed_columns(wide_.w_hr.t().contiguous());
      unprojected_ = at::empty({wide_.batch, hidden}, at::kFloat);
    }
    // Activations overwrite the gates they come from; a vanilla RNN's are its output.
    gates_ = vanilla_ ? out.output
             : keep   ? out.gates
                      : fresh_floats({sequence.largest_chunk(kForwardTokens), wide_.width});
    args_ = forward_args(cell, sequence.steps(reverse), wide_, bias_, bias_n_);
    args_.weight = read_or_null(packed_);
    args_.x_weight = read_or_null(packed_x_);
    args_.state = layer.c0 ? write(out.c_n) : nullptr;
    args_.keep = keep;
    args_.cells = keep && layer.c0 ? write(out.cells) : nullptr;
    args_.output = write(out.output);
    args_.output_stride = out.output.stride(0);
    args_.ready = ready_;
    args_.projection = read_or_null(projection_);
    args_.unprojected = projection_.defined() ? write(unprojected_) : nullptr;
  }

  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& chunk(int64_t i) const { return chunks_[i]; }
  const Steps& steps() const { return args_.steps; }
  void before(int64_t i) {
    const Chunk& chunk = chunks_[i];
    const int64_t at = all_ ? chunk.token : 0;
    if (!fused_) {
      const Tensor gates = cut(gates_, 0, at, chunk.tokens);
      Tensor of_input = cut(gates, 1, 0, wide_.depth);
      product(of_input, cut(wide_.x, 0, chunk.token, chunk.tokens), w_in_);
      if (ready_) add_state_products(args_.cell, wide_, gates, wide_.h);
    }
    args_.gates = write(gates_) + (at - chunk.token) * gates_.stride(0);
  }
  void run(int64_t i, int64_t row, int64_t end) const {
    recurrent_kernels().forward(args_, chunks_[i].first, chunks_[i].last, row, end);
  }
  void after(int64_t) {}

  Tensor h_n() const {
    if (ready_) return cut(out_.output, 0, 0, wide_.tokens).clone(at::MemoryFormat::Contiguous);
    const Tensor found = wide_.h.clone();
    const int64_t size = wide_.state_size, pitch = out_.output.stride(0);
    sequence_.for_ending(reverse_, [&](int64_t row, int64_t rows, int64_t token) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(write(found) + (row + r) * size, read(out_.output) + (token + r) * pitch, size * sizeof(float));
    });
    return found;
  }

 private:
  const Sequence& sequence_;
  Wide wide_;
  Tensor w_in_;
  Forward out_;
  std::vector<Chunk> chunks_;
  bool reverse_, vanilla_, all_, ready_, fused_ = false;
  Tensor bias_, bias_n_, packed_, packed_x_, projection_, unprojected_, gates_;
  ForwardArgs args_{};
};

}  // namespace

Forward forward_float(Cell cell, const Sequence& sequence, const Layer& layer, bool keep) {
  const Tensor &h0 = layer.h0, input = present(sequence, layer.input);
  const int64_t ways = directions(h0), room = layer.input.size(0), hidden = layer.w_hh.size(-2) / gates_of(cell);
  const int64_t size = h0.size(-1), width = width_of(cell) * hidden;
  const bool vanilla = width == hidden;
  Forward out;
  out.output = token_rows(sequence, room, ways * size);
  if (layer.c0) out.c_n = float_copy(layer.c0, *layer.c0);
  out.cells = fresh_floats(sizes_of(h0, {keep && layer.c0 ? room : 0, hidden}));
  out.gates = fresh_floats(sizes_of(h0, {keep && !vanilla ? room : 0, width}));
  std::vector<ForwardLoop> loops;
  loops.reserve(ways);
  for (int64_t d = 0; d < ways; ++d) {
    const Forward own{cut(out.output, 1, d * size, size),
                      {},
                      share(out.c_n, ways, d),
                      share(out.gates, ways, d),
                      share(out.cells, ways, d)};
    loops.emplace_back(cell, sequence, input, ways == 1 ? layer : direction_of(layer, d), d == 1, keep, own);
  }
  run_loops(loops, kRowsForThread);
  const Tensor last = ways == 2 ? loops[1].h_n() : Tensor();
  out.h_n = joined(loops[0].h_n(), ways == 2 ? &last : nullptr);
  return out;
}

Forward recompute_float(Cell cell, const Sequence& sequence, const Layer& layer, const Tensor& output) {
  const RecurrentKernels& table = recurrent_kernels();
  const Tensor &h0 = layer.h0, input = present(sequence, layer.input);
  const int64_t ways = directions(h0), room = layer.input.size(0), hidden = layer.w_hh.size(-2) / gates_of(cell);
  const int64_t size = h0.size(-1);
  Forward out;
  out.gates = fresh_floats(sizes_of(h0, {room, width_of(cell) * hidden}));
  if (layer.c0) {
    out.c_n = float_copy(layer.c0, *layer.c0);
    out.cells = fresh_floats(sizes_of(h0, {room, hidden}));
  }
  for (int64_t d = 0; d < ways; ++d) {
    const Layer own = direction_of(layer, d);
    const Wide wide(cell, input, own);
    const Tensor y = rows_of(cut(output, 1, d * size, size)), w_in = wide.w_ih.t(), all = share(out.gates, ways, d);
    const auto [bias, bias_n] = biases(cell, hidden, own.b_ih, own.b_hh);
    const Tensor before = fresh_floats({sequence.largest_chunk(kForwardTokens), size});
    ForwardArgs args = forward_args(cell, sequence.steps(d == 1), wide, bias, bias_n);
    args.state = layer.c0 ? write(share(out.c_n, ways, d)) : nullptr;
    args.cells = layer.c0 ? write(share(out.cells, ways, d)) : nullptr;
    args.gates = write(all);
    args.keep = args.ready = true;
    for (const Chunk& chunk : sequence.chunks(kForwardTokens, d == 1)) {
      const Tensor gates = all.narrow(0, chunk.token, chunk.tokens);
      Tensor of_input = gates.narrow(1, 0, wide.depth);
      product(of_input, wide.x.narrow(0, chunk.token, chunk.tokens), w_in);
      gather_previous(args.steps, chunk, y, wide.h, before);
      add_state_products(cell, wide, gates, before.narrow(0, 0, chunk.tokens));
      over_rows(args.steps, chunk.first, chunk.last, kRowsForThread,
                [&](int64_t row, int64_t end) { table.forward(args, chunk.first, chunk.last, row, end); });
    }
  }
  return out;
}

}  // namespace pk
