// What the recurrent operators share beside their kernels: results, gathers, threads. recurrent.cpp has float32
// (and the 16-bit dtypes through it), recurrent_bfloat16.cpp the LSTM on AMX, recurrent_ops.cpp the operators.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>
#include <initializer_list>

#include "sequence.h"

namespace pk {

using at::Tensor;
using Optional = std::optional<Tensor>;

// A layer's tensors, in the dtype they were given. Where h0 is (2, batch, columns) the layer has two directions, the
// second against time: all but the input then have a dimension of two in front.
struct Layer {
  Tensor input, h0;
  Optional c0;
  Tensor w_ih, w_hh;
  Optional b_ih, b_hh, w_hr, peephole;
};
struct Forward {
  Tensor output, h_n, c_n, gates, cells;  // float32 or, where that is how they were computed, what the operator returns
};
struct Saved {
  Tensor output;
  Optional gates, cells;
};
struct Gradients {
  Tensor input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr,
      peephole;  // float32 (or, by AMX, bfloat16); undefined: not wanted
};
struct Wanted {
  bool input, h0, c0, w_ih, w_hh, bias, w_hr = false, peephole = false;
};

// Tensor functions called in its scope are not differentiated and not cast.
struct AsGiven {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard as_given{c10::autocast_dispatch_keyset};
};

inline Cell cell_of(c10::string_view kind) {
  if (kind == "lstm") return Cell::kLstm;
  if (kind == "gru") return Cell::kGru;
  TORCH_CHECK(kind == "tanh" || kind == "relu", "recurrent: unknown kind '", kind, "'");
  return kind == "tanh" ? Cell::kTanh : Cell::kRelu;
}

inline int64_t directions(const Tensor& h0) { return h0.dim() == 3 ? 2 : 1; }
// One direction's share of a tensor that has one for each.
inline Tensor share(const Tensor& t, int64_t ways, int64_t direction) {
  return ways == 1 || !t.defined() ? t : t.select(0, direction);
}
inline Layer direction_of(const Layer& layer, int64_t direction) {
  const int64_t ways = directions(layer.h0);
  const auto of = [&](const Optional& t) { return t ? Optional(share(*t, ways, direction)) : std::nullopt; };
  return {layer.input,    *of(layer.h0),  of(layer.c0),   *of(layer.w_ih),   *of(layer.w_hh),
          of(layer.b_ih), of(layer.b_hh), of(layer.w_hr), of(layer.peephole)};
}
// Sizes with the directions in front, where there are two.
inline at::DimVector sizes_of(const Tensor& h0, std::initializer_list<int64_t> sizes) {
  at::DimVector found;
  if (directions(h0) == 2) found.push_back(2);
  found.append(sizes.begin(), sizes.end());
  return found;
}

inline void check_layer(const char* op, Cell cell, const Layer& layer) {
  const auto dtype = layer.input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                              ": expected float32, bfloat16 or float16, got ", dtype);
  const Tensor &w_ih = layer.w_ih, &w_hh = layer.w_hh, &h0 = layer.h0;
  const int64_t gates = gates_of(cell), rows = w_hh.dim() == h0.dim() ? w_hh.size(-2) : 0, hidden = rows / gates;
  const int64_t size = layer.w_hr ? w_hh.size(-1) : hidden, batch = h0.size(-2);
  TORCH_CHECK(hidden > 0 && rows == gates * hidden && size > 0, op, ": w_hh has shape ", w_hh.sizes());
  const auto check = [&](const char* name, const Optional& t, std::initializer_list<int64_t> expected) {
    if (!t) return;
    const at::DimVector sizes = sizes_of(h0, expected);
    TORCH_CHECK(t->sizes() == sizes && t->scalar_type() == dtype && t->is_cpu(), op, ": ", name, " must be ", dtype,
                at::IntArrayRef(sizes), ", not ", t->scalar_type(), t->sizes());
  };
  check("h0", h0, {batch, size});
  check("c0", layer.c0, {batch, hidden});
  check("w_ih", w_ih, {rows, layer.input.size(1)});
  check("w_hh", w_hh, {rows, size});
  check("b_ih", layer.b_ih, {rows});
  check("b_hh", layer.b_hh, {rows});
  check("w_hr", layer.w_hr, {size, hidden});
  check("peephole", layer.peephole, {3 * hidden});
}

// Tensors of one row a token: as wide as h of all directions in the input's dtype; and the saved gates.
inline void check_tokens(const char* op, const Layer& layer, std::initializer_list<const Tensor*> tensors,
                         const Tensor* gates) {
  const int64_t tokens = layer.input.size(0), columns = directions(layer.h0) * layer.h0.size(-1);
  for (const Tensor* t : tensors) {
    TORCH_CHECK(t->dim() == 2 && t->size(0) == tokens && t->size(1) == columns && t->is_cpu(), op,
                ": a saved tensor or gradient has shape ", t->sizes());
    TORCH_CHECK(t->scalar_type() == layer.input.scalar_type(), op, ": dtypes differ");
  }
  const int64_t hidden = (layer.c0 ? *layer.c0 : layer.h0).size(-1);
  TORCH_CHECK(!gates || (gates->sizes() == sizes_of(layer.h0, {tokens, 4 * hidden}) && gates->is_cpu()), op,
              ": the saved gates have shape ", gates->sizes());
}

inline void check_final(const char* op, const Optional& gradient, const Tensor& state) {
  TORCH_CHECK(!gradient || (gradient->sizes() == state.sizes() && gradient->is_cpu()), op,
              ": the gradient of a final state of shape ", state.sizes(), " has another");
}

// b_ih + b_hh where both are added to the gates; the GRU's b_hn is not (it is multiplied by r), and comes separately.
inline std::pair<Tensor, Tensor> biases(Cell cell, int64_t hidden, const Optional& b_ih, const Optional& b_hh) {
  const int64_t gates = gates_of(cell) * hidden, shared = cell == Cell::kGru ? 2 * hidden : gates;
  const Tensor bias = at::empty({gates}, at::kFloat), bias_n = at::empty({gates - shared}, at::kFloat);
  const auto widened = [](const Optional& b) {
    return !b ? Tensor() : b->scalar_type() == at::kFloat ? b->contiguous() : b->to(at::kFloat).contiguous();
  };
  const Tensor of_input = widened(b_ih), of_state = widened(b_hh);
  const float* a = b_ih ? of_input.const_data_ptr<float>() : nullptr;
  const float* b = b_hh ? of_state.const_data_ptr<float>() : nullptr;
  float *sum = bias.mutable_data_ptr<float>(), *rest = bias_n.mutable_data_ptr<float>();
  for (int64_t i = 0; i < gates; ++i) sum[i] = (a ? a[i] : 0.f) + (b && i < shared ? b[i] : 0.f);
  for (int64_t i = shared; i < gates; ++i) rest[i - shared] = b ? b[i] : 0.f;
  return {bias, bias_n};
}
// t as float32 in memory of its own, dense; zeros where there is none.
inline Tensor float_copy(const Optional& t, const Tensor& like) {
  if (!t) return at::zeros(like.sizes(), at::kFloat);
  return t->to(at::kFloat, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
}

// body(row, end) for the rows of each thread, at least `least` of them.
template <class Body>
void over_rows(const Steps& steps, int64_t first, int64_t last, int64_t least, Body body) {
  const std::vector<int64_t> bounds = split_rows(steps, first, last, at::get_num_threads(), least);
  at::parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(bounds[i], bounds[i + 1]);
  });
}

// Runs the loops of a layer's directions, of which all have as many chunks of steps: for each chunk what comes before
// the steps, the steps, what comes after them. Threads share out directions and rows, at least `least` of these each;
// one thread alone goes on with what it has in cache, a direction after the other.
template <class Loops>
void run_loops(Loops& loops, int64_t least) {
  struct Share {
    int64_t loop, row, end;
  };
  const int64_t ways = static_cast<int64_t>(loops.size()), all = at::get_num_threads();
  const int64_t together = all > 1 ? ways : 1, threads = std::max<int64_t>(1, all / together);
  for (int64_t i = 0; i < loops.front().count(); ++i) {
    for (int64_t begin = 0; begin < ways; begin += together) {
      std::vector<Share> shares;
      for (int64_t d = begin; d < begin + together; ++d) {
        loops[d].before(i);
        const Chunk& chunk = loops[d].chunk(i);
        const std::vector<int64_t> bounds = split_rows(loops[d].steps(), chunk.first, chunk.last, threads, least);
        for (size_t k = 0; k + 1 < bounds.size(); ++k) shares.push_back({d, bounds[k], bounds[k + 1]});
      }
      at::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) loops[shares[k].loop].run(i, shares[k].row, shares[k].end);
      });
      for (int64_t d = begin; d < begin + together; ++d) loops[d].after(i);
    }
  }
}

// h before each token of the chunk, one after another; rows of the output may lie apart.
inline void gather_previous(const Steps& steps, const Chunk& chunk, const Tensor& output, const Tensor& h0,
                            const Tensor& out) {
  const int64_t bytes = output.size(1) * output.element_size(), pitch = output.stride(0) * output.element_size();
  const auto *y = static_cast<const char*>(output.const_data_ptr()), *h = static_cast<const char*>(h0.const_data_ptr());
  for (int64_t step = chunk.first; step < chunk.last; ++step) {
    const int64_t t = steps.at(step), continued = steps.continued(step);
    char* to = static_cast<char*>(out.mutable_data_ptr()) + (steps.offsets[t] - chunk.token) * bytes;
    if (continued) {
      const char* from = y + steps.offsets[steps.at(step - 1)] * pitch;
      if (pitch == bytes) std::memcpy(to, from, continued * bytes);
      for (int64_t row = 0; pitch != bytes && row < continued; ++row)
        std::memcpy(to + row * bytes, from + row * pitch, bytes);
    }
    std::memcpy(to + continued * bytes, h + continued * bytes, (steps.sizes[t] - continued) * bytes);
  }
}

// out[row] = d of the token with which the row's sequence begins, for those that begin in the chunk; d is the chunk's.
inline void gather_first(const Steps& steps, const Chunk& chunk, const Tensor& d, const Tensor& out) {
  const int64_t bytes = out.size(1) * out.element_size(), pitch = d.stride(0) * d.element_size();
  for (int64_t step = chunk.first; step < chunk.last; ++step) {
    const int64_t t = steps.at(step), token = steps.offsets[t] - chunk.token;
    for (int64_t row = steps.continued(step); row < steps.sizes[t]; ++row) {
      std::memcpy(static_cast<char*>(out.mutable_data_ptr()) + row * bytes,
                  static_cast<const char*>(d.const_data_ptr()) + (token + row) * pitch, bytes);
    }
  }
}

// What this processor's instruction set has; an error where it has none.
const RecurrentKernels& recurrent_kernels();
// Gradients of small weights (elements) are made in partial sums of so many tokens: torch adds the tokens of a product
// up in a single chain, whose error grows with its length.
constexpr int64_t kPartialTokens = 128, kSmallWeight = int64_t{1} << 16;

// float32 and, through it, the 16-bit dtypes.
Forward forward_float(Cell cell, const Sequence& sequence, const Layer& layer, bool keep);
// The gates and cells that forward_float keeps, from its output.
Forward recompute_float(Cell cell, const Sequence& sequence, const Layer& layer, const Tensor& output);
Gradients backward_float(Cell cell, const Sequence& sequence, const Tensor& dy, const Optional& dhn,
                         const Optional& dcn, const Layer& layer, const Saved& saved, Wanted wanted);

// The LSTM without projections and peepholes in bfloat16, on tile registers.
Forward forward_bfloat16(const Sequence& sequence, const Layer& layer, bool keep);
Gradients backward_bfloat16(const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
                            const Layer& layer, const Saved& saved, Wanted wanted);

}  // namespace pk
