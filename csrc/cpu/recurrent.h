// What the recurrent operators share beside their kernels: results, gathers, threads. recurrent.cpp has float32 (and
// the 16-bit dtypes through it), recurrent_bfloat16.cpp the LSTM on AMX.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "sequence.h"

namespace pk {

using at::Tensor;
using Optional = std::optional<Tensor>;

struct Forward {
  Tensor output, h_n, c_n, gates, cells;  // float32 or, where that is how they were computed, what the operator returns
};

struct Saved {
  Tensor input, h0, w_ih, w_hh, output;
  Optional c0, gates, cells;
};
struct Gradients {
  Tensor input, h0, c0, w_ih, w_hh, b_ih, b_hh;  // float32; undefined: not wanted
};
struct Wanted {
  bool input, h0, c0, w_ih, w_hh, bias;
};

// b_ih + b_hh where both are added to the gates; the GRU's b_hn is not (it is multiplied by r), and comes separately.
inline std::pair<Tensor, Tensor> biases(Cell cell, int64_t hidden, const Optional& b_ih, const Optional& b_hh) {
  Tensor bias = at::zeros({gates_of(cell) * hidden}, at::kFloat), bias_n;
  if (b_ih) bias.add_(*b_ih);
  if (cell != Cell::kGru) {
    if (b_hh) bias.add_(*b_hh);
    return {bias, bias_n};
  }
  bias_n = at::zeros({hidden}, at::kFloat);
  if (b_hh) {
    bias.narrow(0, 0, 2 * hidden).add_(b_hh->narrow(0, 0, 2 * hidden));
    bias_n.copy_(b_hh->narrow(0, 2 * hidden, hidden));
  }
  return {bias, bias_n};
}
// The gradient of c before the last step: dcn as float32, or zeros; memory of its own.
inline Tensor initial_carry(const Optional& dcn, const Tensor& c0) {
  if (!dcn) return at::zeros(c0.sizes(), at::kFloat);
  TORCH_CHECK(dcn->sizes() == c0.sizes(), "lstm_backward: the gradient of c_n has shape ", dcn->sizes());
  return dcn->to(at::kFloat).clone(at::MemoryFormat::Contiguous);
}

// body(row, end) for the rows of each thread, at least `least` of them.
template <class Body>
void over_rows(const Steps& steps, int64_t first, int64_t last, int64_t least, Body body) {
  const std::vector<int64_t> bounds = split_rows(steps, first, last, at::get_num_threads(), least);
  at::parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(bounds[i], bounds[i + 1]);
  });
}

// h before each token of the chunk, one after another; all tensors dense.
inline void gather_previous(const Steps& steps, const Chunk& chunk, const Tensor& output, const Tensor& h0,
                            const Tensor& out) {
  const int64_t bytes = output.size(1) * output.element_size();
  const auto *y = static_cast<const char*>(output.const_data_ptr()), *h = static_cast<const char*>(h0.const_data_ptr());
  for (int64_t step = chunk.first; step < chunk.last; ++step) {
    const int64_t t = steps.at(step), continued = steps.continued(step);
    char* to = static_cast<char*>(out.mutable_data_ptr()) + (steps.offsets[t] - chunk.token) * bytes;
    if (continued) std::memcpy(to, y + steps.offsets[steps.at(step - 1)] * bytes, continued * bytes);
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

bool amx_usable();
Forward forward_bfloat16(const Sequence& sequence, const Tensor& input, const Tensor& h0, const Tensor& c0,
                         const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh, bool keep);
Gradients backward_bfloat16(const Sequence& sequence, const Tensor& dy, const Optional& dhn, const Optional& dcn,
                            const Saved& saved, Wanted wanted);

}  // namespace pk
