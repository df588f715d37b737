// The LSTM in bfloat16 on AMX: the time loop is recurrent_amx.cpp's, with the input's products where its weights fit
// the cache too; otherwise those are torch's. Sums over tokens are recurrent_gradient_amx.cpp's.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "pages.h"
#include "pool.h"
#include "recurrent.h"
#include "scratch.h"

namespace pk {
namespace {

constexpr int64_t kRowsOfTile = 16;  // a tile

const uint16_t* words(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* words_out(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }
Tensor widened(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
Tensor unit_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

// Memory that a loop reads over and over is a block of the pool, however small: of huge pages where there are any.
Tensor packed_words(int64_t count) { return empty_large({std::max<int64_t>(count, kPooled / 2)}, at::kBFloat16); }

// a b by torch. Its product of bfloat16 (oneDNN's) reads whole tiles and multiplies what lies behind a row, which may
// be NaN, with zero: so rows fill their tiles.
void multiply(const Tensor& a, const Tensor& b, Tensor out) {
  constexpr int64_t kDepthOfTile = 32;
  const int64_t missing = (kDepthOfTile - a.size(1) % kDepthOfTile) % kDepthOfTile;
  if (missing == 0) {
    at::mm_out(out, a, b);
  } else {
    at::mm_out(out, at::constant_pad_nd(a, {0, missing}), at::constant_pad_nd(b, {0, 0, 0, missing}));
  }
}

// d^T x, (width, columns), in `out`. torch's product of a transposed bfloat16 matrix reaches half of what it does
// otherwise.
void weight_gradient(const Tensor& d, const Tensor& input, const Tensor& out) {
  const AmxKernels& table = *recurrent_kernels_amx();
  const Tensor x = unit_rows(input);
  const int64_t columns = x.size(1), width = d.size(1), tokens = d.size(0);
  if (tokens == 0) out.zero_();
  if (tokens == 0 || columns == 0) return;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), columns / 64));
  const int64_t share = (columns + threads - 1) / threads, stripe = (share + 31) / 32 * 32;  // columns of a thread
  at::parallel_for(0, (columns + stripe - 1) / stripe, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * stripe, mine = std::min(stripe, columns - first);
      const Tensor held = empty_large({table.gradient_scratch(mine, width, tokens)}, at::kByte);
      table.weight_gradient(words(x) + first, x.stride(0), mine, words(d), d.stride(0), width, tokens,
                            words_out(out) + first, columns, held.mutable_data_ptr());
    }
  });
}

// One direction forward: `out` is its share, with c0 in c_n and h0 in h_n.
class AmxForwardLoop {
 public:
  AmxForwardLoop(const Sequence& sequence, const Tensor& input, const Layer& layer, bool reverse, bool keep,
                 const Forward& out)
      : sequence_(sequence),
        input_(unit_rows(input)),
        w_in_(layer.w_ih.t()),
        h_(layer.h0.contiguous()),
        out_(out),
        chunks_(sequence.chunks(kChunk, reverse)),
        hidden_(layer.w_hh.size(1)),
        reverse_(reverse) {
    const AmxKernels& table = *recurrent_kernels_amx();
    const int64_t inputs = input.size(1);
    const bool fused = inputs > 0 && table.packed_forward(hidden_, inputs) * 2 <= table.stays;
    const Tensor w = layer.w_hh.contiguous(), w_ih = layer.w_ih.contiguous();
    bias_ = biases(Cell::kLstm, hidden_, layer.b_ih, layer.b_hh).first;
    args_.inputs = fused ? inputs : 0;
    packed_ = packed_words(table.packed_forward(hidden_, args_.inputs));
    table.pack_forward(hidden_, args_.inputs, words(w), words(w_ih), words_out(packed_));
    gates_ = keep ? out.gates : empty_large({fused ? 0 : sequence.largest_chunk(kChunk), 4 * hidden_}, at::kHalf);
    args_.x = words(input_);
    args_.x_stride = input_.stride(0);
    args_.steps = sequence.steps(reverse);
    args_.hidden = hidden_;
    args_.weight = words(packed_);
    args_.bias = bias_.const_data_ptr<float>();
    args_.h0 = words(h_);
    args_.state = out.c_n.mutable_data_ptr<float>();
    args_.keep = keep;
    args_.cells = out.cells.mutable_data_ptr<float>();
    args_.output = words_out(out.output);
    args_.output_stride = out.output.stride(0);
  }

  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& chunk(int64_t i) const { return chunks_[i]; }
  const Steps& steps() const { return args_.steps; }
  void before(int64_t i) {
    const Chunk& chunk = chunks_[i];
    const int64_t at = args_.keep ? chunk.token : 0;
    if (!args_.inputs) {
      multiply(input_.narrow(0, chunk.token, chunk.tokens), w_in_,
               gates_.narrow(0, at, chunk.tokens).view(at::kBFloat16));
    }
    args_.gates = words_out(gates_) + (at - chunk.token) * 4 * hidden_;
  }
  void run(int64_t i, int64_t row, int64_t end) const {
    const AmxKernels& table = *recurrent_kernels_amx();
    table.forward(args_, chunks_[i].first, chunks_[i].last, row, end,
                  scratch(table.scratch_bytes(hidden_, args_.inputs, end - row)));
  }
  void after(int64_t i) {
    if (i + 1 < count()) return;
    sequence_.for_ending(reverse_, [&](int64_t row, int64_t rows, int64_t token) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(words_out(out_.h_n) + (row + r) * hidden_, args_.output + (token + r) * args_.output_stride,
                    hidden_ * 2);
    });
  }

 private:
  static constexpr int64_t kChunk = 4096;  // tokens
  const Sequence& sequence_;
  Tensor input_, w_in_, h_;
  Forward out_;
  std::vector<Chunk> chunks_;
  int64_t hidden_;
  bool reverse_;
  Tensor bias_, packed_, gates_;
  AmxForwardArgs args_{};
};

// One direction backward: `dgates` (tokens, 4 H) with rows any distance apart is its share, as is `carry`, with dc_n.
class AmxBackwardLoop {
 public:
  AmxBackwardLoop(const Sequence& sequence, const Tensor& dy, const Tensor& last, const Layer& layer,
                  const Saved& saved, bool reverse, const Tensor& dgates, const Tensor& carry, const Tensor& dx)
      : gradient_(unit_rows(dy)),
        last_(last),
        gates_(saved.gates->contiguous()),
        c0_(widened(*layer.c0)),
        dgates_(dgates),
        hidden_(layer.w_hh.size(1)),
        chunk_{0, sequence.count(), 0, sequence.tokens()} {
    const AmxKernels& table = *recurrent_kernels_amx();
    const Tensor w = layer.w_hh.contiguous();
    const auto pack = [&](const Tensor& weight) {
      const int64_t depth = weight.size(0), columns = weight.size(1);
      const Tensor packed = packed_words(table.packed_backward(depth, columns));
      table.pack_backward(depth, columns, words(weight), words_out(packed));
      return packed;
    };
    packed_ = pack(w);
    if (dx.defined()) {
      packed_x_ = pack(layer.w_ih.contiguous());
      args_.x_weight = words(packed_x_);
      args_.inputs = dx.size(1);
      args_.dx = words_out(dx);
    }
    args_.steps = sequence.steps(reverse);
    args_.hidden = hidden_;
    args_.weight = words(packed_);
    args_.c0 = c0_.const_data_ptr<float>();
    args_.gates = words(gates_);
    args_.cells = saved.cells->const_data_ptr<float>();
    args_.dy = words(gradient_);
    args_.dy_stride = gradient_.stride(0);
    args_.dhn = last_.const_data_ptr<float>();
    args_.carry = carry.mutable_data_ptr<float>();
    args_.dgates = words_out(dgates_);
    args_.dgates_stride = dgates_.stride(0);
  }

  int64_t count() const { return chunk_.tokens > 0; }
  const Chunk& chunk(int64_t) const { return chunk_; }
  const Steps& steps() const { return args_.steps; }
  void before(int64_t) {}
  void run(int64_t, int64_t row, int64_t end) const {
    const AmxKernels& table = *recurrent_kernels_amx();
    table.backward(args_, 0, chunk_.last, row, end, scratch(table.scratch_bytes(hidden_, args_.inputs, end - row)));
  }
  void after(int64_t) {}

 private:
  Tensor gradient_, last_, gates_, c0_, dgates_;
  int64_t hidden_;
  Chunk chunk_;
  Tensor packed_, packed_x_;
  AmxBackwardArgs args_{};
};

}  // namespace

Forward forward_bfloat16(const Sequence& sequence, const Layer& layer, bool keep) {
  const Tensor& h0 = layer.h0;
  const int64_t hidden = h0.size(-1), ways = directions(h0), room = layer.input.size(0), tokens = sequence.tokens();
  Forward out;
  out.output = empty_large({room, ways * hidden}, h0.options());
  if (tokens < room) out.output.narrow(0, tokens, room - tokens).zero_();
  out.h_n = h0.clone(at::MemoryFormat::Contiguous);
  out.c_n = float_copy(layer.c0, *layer.c0);
  out.cells = empty_large(sizes_of(h0, {keep ? room : 0, hidden}), at::kFloat);
  out.gates = empty_large(sizes_of(h0, {keep ? room : 0, 4 * hidden}), at::kHalf);
  std::vector<AmxForwardLoop> loops;
  loops.reserve(ways);
  for (int64_t d = 0; d < ways; ++d) {
    const Forward own{out.output.narrow(1, d * hidden, hidden), share(out.h_n, ways, d), share(out.c_n, ways, d),
                      share(out.gates, ways, d), share(out.cells, ways, d)};
    loops.emplace_back(sequence, layer.input, direction_of(layer, d), d == 1, keep, own);
  }
  run_loops(loops, kRowsOfTile);
  return out;
}

Gradients backward_bfloat16(const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
                            const Layer& layer, const Saved& saved, Wanted wanted) {
  const AmxKernels& table = *recurrent_kernels_amx();
  const Tensor& h0 = layer.h0;
  const int64_t hidden = h0.size(-1), width = 4 * hidden, ways = directions(h0), batch = h0.size(-2);
  const int64_t room = layer.input.size(0), tokens = sequence.tokens();
  const Tensor input = layer.input.narrow(0, 0, tokens);
  const Tensor last = dhn ? widened(*dhn) : at::zeros(h0.sizes(), at::kFloat);
  TORCH_CHECK(saved.gates->scalar_type() == at::kHalf, "lstm_backward: gates must be float16, not ",
              saved.gates->scalar_type());
  // Directions side by side: the products with the input are then those of one wide layer.
  const Tensor dgates = empty_large({tokens, ways * width}, h0.options());
  const auto made = [&](bool is_wanted, at::IntArrayRef sizes) {
    return is_wanted ? empty_large(sizes, h0.options()) : Tensor();
  };
  Gradients out;
  out.c0 = float_copy(dcn, *layer.c0);
  out.input = made(wanted.input, layer.input.sizes());
  const Tensor dx = wanted.input ? out.input.narrow(0, 0, tokens) : Tensor();
  // Of one direction the input's gradient is made in the loop, if there is room for both weights.
  const int64_t both = table.packed_backward(width, hidden) + table.packed_backward(width, layer.input.size(1));
  const bool fused = wanted.input && ways == 1 && both * 2 <= table.stays;
  std::vector<AmxBackwardLoop> loops;
  loops.reserve(ways);
  for (int64_t d = 0; d < ways; ++d) {
    const Saved own{saved.output, share(*saved.gates, ways, d), share(*saved.cells, ways, d)};
    loops.emplace_back(sequence, dy.narrow(1, d * hidden, hidden), share(last, ways, d), direction_of(layer, d), own,
                       d == 1, dgates.narrow(1, d * width, width), share(out.c0, ways, d), fused ? dx : Tensor());
  }
  run_loops(loops, kRowsOfTile);
  if (wanted.input) {
    if (!fused) multiply(dgates, layer.w_ih.reshape({ways * width, layer.input.size(1)}), dx);
    if (tokens < room) out.input.narrow(0, tokens, room - tokens).zero_();
  }
  out.w_ih = made(wanted.w_ih, layer.w_ih.sizes());
  if (wanted.w_ih) weight_gradient(dgates, input, out.w_ih.view({ways * width, input.size(1)}));
  if (wanted.bias) {
    out.b_ih = at::zeros(sizes_of(h0, {width}), at::kFloat);
    table.add_column_sums(words(dgates), tokens, ways * width, out.b_ih.mutable_data_ptr<float>());
  }
  out.w_hh = made(wanted.w_hh, layer.w_hh.sizes());
  out.h0 = made(wanted.h0, h0.sizes());
  for (int64_t d = 0; d < ways; ++d) {
    const Chunk all{0, sequence.count(), 0, tokens};
    const Steps steps = sequence.steps(d == 1);
    const Tensor own = dgates.narrow(1, d * width, width);
    if (wanted.w_hh) {
      const Tensor previous = empty_large({tokens, hidden}, h0.options());
      gather_previous(steps, all, saved.output.narrow(1, d * hidden, hidden), share(h0, ways, d).contiguous(),
                      previous);
      weight_gradient(own, previous, share(out.w_hh, ways, d));
    }
    if (wanted.h0) {
      const Tensor began = at::zeros({batch, width}, at::kBFloat16);
      gather_first(steps, all, own, began);
      Tensor dh0 = share(out.h0, ways, d);
      multiply(began, share(layer.w_hh, ways, d), dh0);
      const int64_t idle = sequence.rows();  // sequences of no steps hand the gradient through
      if (idle < batch) dh0.narrow(0, idle, batch - idle).copy_(share(last, ways, d).narrow(0, idle, batch - idle));
    }
  }
  if (!wanted.c0) out.c0 = Tensor();
  return out;
}

}  // namespace pk
