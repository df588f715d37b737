// One layer backward in float32; see recurrent.cpp.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "float_product.h"
#include "recurrent_float.h"

namespace pk {
namespace {

// The gradient of a weight (width, columns) as a sum over chunks of tokens of d^T x.
class WeightGradient {
 public:
  WeightGradient(bool wanted, int64_t width, int64_t columns, int64_t tokens)
      : wanted_(wanted),
        split_(splits(width, columns, tokens)),
        transposed_(tokens >= kMany && !split_),
        width_(width),
        columns_(columns) {}

  void add(const Tensor& d, Fits& of_d, const Tensor& x) {
    if (!wanted_) return;
    const Tensor &left = transposed_ ? x : d, &right = transposed_ ? d : x;
    const int64_t tokens = d.size(0);
    const int64_t step = width_ * columns_ <= kSmallWeight && !split_ ? kPartialTokens : std::max<int64_t>(tokens, 1);
    for (int64_t t = 0; t < tokens; t += step) {
      const int64_t n = std::min(step, tokens - t);
      const Tensor a = cut(left, 0, t, n).t(), b = cut(right, 0, t, n);
      const bool more = sums_.defined();
      if (!more) sums_ = at::empty({a.size(0), b.size(1)}, at::kFloat);
      Fits of_x(x);
      product(sums_, a, b, more, of_d, of_x);
    }
  }

  // The sum, written to `room` if there is any: a direction's share of both.
  Tensor result(const Tensor& room) const {
    if (!wanted_) return Tensor();
    if (!sums_.defined()) return room.defined() ? room.zero_() : at::zeros({width_, columns_}, at::kFloat);
    const Tensor sum = transposed_ ? sums_.t() : sums_;
    return room.defined() ? room.copy_(sum) : sum.contiguous();
  }

 private:
  // Of many tokens torch's product is faster as x^T d (by a tenth for 256 units, a third for 64).
  static constexpr int64_t kMany = 256;
  bool wanted_, split_, transposed_;
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

// The GRU's gradients come in the order n, r, z.
Tensor in_order(Cell cell, int64_t hidden, const Tensor& t, Tensor room) {
  if (cell != Cell::kGru || !t.defined()) return t;
  const Tensor rz = t.narrow(0, hidden, 2 * hidden), n = t.narrow(0, 0, hidden);
  return room.defined() ? at::cat_out(room, {rz, n}) : at::cat({rz, n});
}

// One direction of a layer backward.
class BackwardLoop {
 public:
  // dx: (tokens, inputs), undefined if not wanted; visited: which chunks of it another direction has written
  BackwardLoop(Cell cell, const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
               const Tensor& input, const Layer& layer, const Saved& saved, Wanted wanted, bool reverse,
               const Tensor& dx, std::vector<bool>& visited)
      : sequence_(sequence),
        wide_(cell, input, layer),
        wanted_(wanted),
        limit_(wide_.hidden <= 128 ? 512 : 2048),
        chunks_(sequence.chunks(limit_, reverse)),
        reverse_(reverse),
        at_once_(sequence.count() == 1 && wide_.tokens == wide_.batch),
        dx_(dx),
        visited_(visited),
        of_w_ih_(wanted.w_ih, wide_.depth, input.size(1), wide_.tokens),
        of_w_hh_(wanted.w_hh, wide_.depth, wide_.state_size, wide_.tokens),
        of_w_hr_(wanted.w_hr, wide_.state_size, wide_.hidden, wide_.tokens),
        output_(rows_of(saved.output)),
        gradient_(rows_of(dy)),
        last_(dhn ? dense(*dhn) : at::zeros({wide_.batch, wide_.state_size}, at::kFloat)),
        gates_(dense_or_none(saved.gates)),
        c0_(dense_or_none(layer.c0)) {
    const int64_t hidden = wide_.hidden, width = wide_.width, size = wide_.state_size, batch = wide_.batch;
    const int64_t held = sequence.largest_chunk(limit_);
    const bool projected = wide_.w_hr.defined();
    if (saved.cells) cells_ = *saved.cells;
    if (sequence.count() != 1 || projected) packed_ = packed_columns(wide_.w);
    if (projected) projection_ = packed_columns(wide_.w_hr);
    sums_ = at::zeros({wanted.bias ? width : 0}, at::kFloat);
    if (wanted.h0 && !at_once_) began_ = at::zeros({batch, wide_.depth}, at::kFloat);
    if (layer.c0) carry_ = float_copy(dcn, *layer.c0);
    if (cell == Cell::kGru) carry_ = last_.clone();
    if (wanted.peephole) dpeephole_ = at::zeros({3 * hidden}, at::kFloat);
    dgates_ = fresh_floats({held, width});
    if (count() > 1) later_ = at::empty({batch, width}, at::kFloat);
    if (wanted.w_hh && !at_once_) previous_ = fresh_floats({held, size});
    if (wanted.peephole) before_ = fresh_floats({held, hidden});
    if (projected) dprojected_ = fresh_floats({held, size});

    args_.cell = cell;
    args_.steps = sequence.steps(reverse);
    args_.hidden = hidden;
    args_.state_size = size;
    args_.weight = read_or_null(packed_);
    args_.h0 = read(wide_.h);
    args_.c0 = read_or_null(c0_);
    args_.gates = read_or_null(gates_);
    args_.cells = read_or_null(cells_);
    args_.output = read(output_);
    args_.output_stride = output_.stride(0);
    args_.dy = read(gradient_);
    args_.dy_stride = gradient_.stride(0);
    args_.dhn = read(last_);
    args_.carry = carry_.defined() ? write(carry_) : nullptr;
    args_.peephole = read_or_null(wide_.peephole);
    args_.projection = read_or_null(projection_);
    args_.later = read_or_null(later_);
  }

  int64_t count() const { return static_cast<int64_t>(chunks_.size()); }
  const Chunk& chunk(int64_t i) const { return chunks_[count() - 1 - i]; }
  const Steps& steps() const { return args_.steps; }
  void before(int64_t i) {
    args_.dgates = write(dgates_) - chunk(i).token * wide_.width;
    args_.dprojected = dprojected_.defined() ? write(dprojected_) - chunk(i).token * wide_.state_size : nullptr;
  }
  void run(int64_t i, int64_t row, int64_t end) const {
    recurrent_kernels().backward(args_, chunk(i).first, chunk(i).last, row, end);
  }
  // What all tokens of the chunk add to the gradients.
  void after(int64_t i) {
    const Chunk& chunk = this->chunk(i);
    const int64_t hidden = wide_.hidden, width = wide_.width, depth = wide_.depth;
    const Tensor d = cut(dgates_, 0, 0, chunk.tokens), xs = cut(wide_.x, 0, chunk.token, chunk.tokens);
    const Tensor d_in = cut(d, 1, 0, depth), d_state = cut(d, 1, width - depth, depth);
    Fits of_d(d);
    if (wanted_.input) add_to_input(reverse_ ? i : count() - 1 - i, chunk, d_in, of_d);
    of_w_ih_.add(d_in, of_d, xs);
    if (wanted_.w_hh) {
      if (!at_once_) gather_previous(args_.steps, chunk, output_, wide_.h, previous_);
      of_w_hh_.add(d_state, of_d, at_once_ ? wide_.h : cut(previous_, 0, 0, chunk.tokens));
    }
    if (wanted_.w_hr) {
      const Tensor activations = gates_.narrow(0, chunk.token, chunk.tokens);
      const Tensor cells = cells_.narrow(0, chunk.token, chunk.tokens);  // h before the projection: o tanh(c)
      const Tensor h = activations.narrow(1, 3 * hidden, hidden).mul(cells.tanh());
      const Tensor dprojected = dprojected_.narrow(0, 0, chunk.tokens);
      Fits of_dprojected(dprojected);
      of_w_hr_.add(dprojected, of_dprojected, h);
    }
    if (wanted_.peephole) {
      gather_previous(args_.steps, chunk, cells_, c0_, before_);
      add_peephole_gradient(d, before_.narrow(0, 0, chunk.tokens), cells_.narrow(0, chunk.token, chunk.tokens),
                            dpeephole_);
    }
    if (wanted_.bias) recurrent_kernels().add_column_sums(read(d), chunk.tokens, width, write(sums_));
    if (wanted_.h0) {
      if (at_once_) {
        began_ = d_state;
      } else {
        gather_first(args_.steps, chunk, d_state, began_);
      }
    }
    if (count() > 1) {  // the next chunk's last step reads this one's gate gradients
      const int64_t t = args_.steps.at(chunk.first);
      std::memcpy(write(later_), read(d) + (args_.steps.offsets[t] - chunk.token) * width,
                  args_.steps.sizes[t] * width * sizeof(float));
    }
  }

  // The other gradients; weights' are written to `room`, if there is any.
  Gradients result(const Gradients& room) const {
    const int64_t hidden = wide_.hidden, batch = wide_.batch;
    const Cell cell = args_.cell;
    const bool gru = cell == Cell::kGru;
    Gradients out;
    if (wanted_.h0) {
      out.h0 = at::mm(began_, wide_.w);
      if (gru) out.h0.add_(carry_);
      const int64_t idle = sequence_.rows();  // sequences of no steps hand the gradient through
      if (!gru && idle < batch) out.h0.narrow(0, idle, batch - idle).copy_(last_.narrow(0, idle, batch - idle));
    }
    if (wanted_.c0) out.c0 = carry_;
    if (wanted_.bias) {
      out.b_ih = in_order(cell, hidden, sums_.narrow(0, 0, wide_.depth), {});
      out.b_hh = sums_.narrow(0, wide_.width - wide_.depth, wide_.depth);
    }
    out.w_ih = in_order(cell, hidden, of_w_ih_.result(gru ? Tensor() : room.w_ih), room.w_ih);
    out.w_hh = of_w_hh_.result(room.w_hh);
    out.w_hr = of_w_hr_.result(room.w_hr);
    out.peephole = dpeephole_;
    return out;
  }

 private:
  void add_to_input(int64_t index, const Chunk& chunk, const Tensor& d, Fits& of_d) {
    const int64_t hidden = wide_.hidden;
    const Tensor dx = cut(dx_, 0, chunk.token, chunk.tokens);
    const auto add = [&](const Tensor& left, const Tensor& weight) {
      Fits of_weight(weight);
      product(dx, left, weight, visited_[index], of_d, of_weight);
      visited_[index] = true;
    };
    if (args_.cell == Cell::kGru) {  // the gates' gradients are in the order n, r, z
      add(d.narrow(1, hidden, 2 * hidden), wide_.w_ih.narrow(0, 0, 2 * hidden));
      add(d.narrow(1, 0, hidden), wide_.w_ih.narrow(0, 2 * hidden, hidden));
    } else {
      add(d, wide_.w_ih);
    }
  }

  const Sequence& sequence_;
  Wide wide_;
  Wanted wanted_;
  int64_t limit_;
  std::vector<Chunk> chunks_;
  bool reverse_, at_once_;  // at_once: the state before is h0, and every gradient reaches it
  Tensor dx_;
  std::vector<bool>& visited_;
  WeightGradient of_w_ih_, of_w_hh_, of_w_hr_;
  Tensor output_, gradient_, last_, gates_, c0_, cells_, packed_, projection_, sums_, carry_, began_, dpeephole_;
  Tensor dgates_, later_, previous_, before_, dprojected_;
  BackwardArgs args_{};
};

}  // namespace

Gradients backward_float(Cell cell, const Sequence& sequence, const Tensor& dy, const Optional& dhn,
                         const Optional& dcn, const Layer& layer, const Saved& saved, Wanted wanted) {
  const Tensor &h0 = layer.h0, input = present(sequence, layer.input);
  const int64_t ways = directions(h0), size = h0.size(-1), room = layer.input.size(0);
  const auto of = [&](const Optional& t, int64_t d) { return t ? Optional(share(*t, ways, d)) : std::nullopt; };
  const Tensor dx = wanted.input ? token_rows(sequence, room, input.size(1)) : Tensor();
  std::vector<bool> visited(sequence.count());
  std::vector<BackwardLoop> loops;
  loops.reserve(ways);
  for (int64_t d = 0; d < ways; ++d) {
    const Saved own{cut(saved.output, 1, d * size, size), of(saved.gates, d), of(saved.cells, d)};
    loops.emplace_back(cell, sequence, cut(dy, 1, d * size, size), of(dhn, d), of(dcn, d), input,
                       ways == 1 ? layer : direction_of(layer, d), own, wanted, d == 1, dx, visited);
  }
  run_loops(loops, kRowsForThread);
  Gradients out;
  if (ways == 1) {
    out = loops[0].result({});
  } else {
    const auto like = [](bool made, const Tensor& t) { return made ? fresh_floats(t.sizes()) : Tensor(); };
    out.w_ih = like(wanted.w_ih, layer.w_ih);
    out.w_hh = like(wanted.w_hh, layer.w_hh);
    if (wanted.w_hr) out.w_hr = like(true, *layer.w_hr);
    Gradients parts[2];
    for (int64_t d = 0; d < 2; ++d) {
      Gradients rooms;
      rooms.w_ih = share(out.w_ih, 2, d);
      rooms.w_hh = share(out.w_hh, 2, d);
      rooms.w_hr = share(out.w_hr, 2, d);
      parts[d] = loops[d].result(rooms);
    }
    out.h0 = joined(parts[0].h0, &parts[1].h0);
    out.c0 = joined(parts[0].c0, &parts[1].c0);
    out.b_ih = joined(parts[0].b_ih, &parts[1].b_ih);
    out.b_hh = joined(parts[0].b_hh, &parts[1].b_hh);
    out.peephole = joined(parts[0].peephole, &parts[1].peephole);
  }
  out.input = dx;
  return out;
}

}  // namespace pk
