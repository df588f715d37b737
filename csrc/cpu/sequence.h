// The packed sequences of the recurrent operators: their steps, cut into chunks and among threads, and the checks of
// what belongs to a layer. (Public functions have checked the same; kernels read raw memory, so it is checked where it
// guards it.)
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "recurrent_kernels.h"

namespace pk {

// Steps processed first-th to last-th (exclusive); their tokens are contiguous in either direction.
struct Chunk {
  int64_t first, last, token, tokens;
};

class Sequence {
 public:
  // batch_sizes: int64 (T) on the CPU, positive and not increasing; absent: every step has all rows of h0.
  Sequence(const at::Tensor& input, const at::Tensor& h0, const std::optional<at::Tensor>& batch_sizes, bool reverse)
      : reverse_(reverse) {
    TORCH_CHECK(input.dim() == 2 && h0.dim() == 2, "recurrent: input and h0 must be 2-D");
    const int64_t tokens = input.size(0), batch = h0.size(0);
    if (batch_sizes) {
      TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(),
                  "recurrent: batch_sizes must be a 1-D int64 tensor on the CPU");
      const at::Tensor sizes = batch_sizes->contiguous();
      const int64_t* p = sizes.const_data_ptr<int64_t>();
      sizes_.assign(p, p + sizes.numel());
    } else if (batch > 0) {
      sizes_.assign(tokens / batch, batch);
    }
    offsets_.reserve(sizes_.size() + 1);
    int64_t total = 0, most = batch;
    for (const int64_t n : sizes_) {
      TORCH_CHECK(0 < n && n <= most, "recurrent: batch_sizes must be positive, not increase, and start at most at ",
                  batch);
      offsets_.push_back(total);
      total += n;
      most = n;
    }
    offsets_.push_back(total);
    TORCH_CHECK(total == tokens, "recurrent: input has ", tokens, " rows, batch_sizes sum to ", total);
  }

  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t rows() const { return sizes_.empty() ? 0 : sizes_[0]; }
  Steps steps() const { return {count(), sizes_.data(), offsets_.data(), reverse_}; }

  // As many steps as have at most `limit` tokens together, at least one.
  std::vector<Chunk> chunks(int64_t limit) const {
    std::vector<Chunk> found;
    const Steps all = steps();
    for (int64_t first = 0; first < count();) {
      int64_t last = first, tokens = 0;
      do {
        tokens += sizes_[all.at(last++)];
      } while (last < count() && tokens + sizes_[all.at(last)] <= limit);
      found.push_back({first, last, offsets_[reverse_ ? all.at(last - 1) : first], tokens});
      first = last;
    }
    return found;
  }

  int64_t largest_chunk(int64_t limit) const {
    int64_t most = 0;
    for (const Chunk& chunk : chunks(limit)) most = std::max(most, chunk.tokens);
    return most;
  }

  // body(row, rows, token): these rows' sequences end with the tokens from `token` on.
  template <class Body>
  void for_ending(Body body) const {
    const Steps all = steps();
    for (int64_t step = 0; step < count(); ++step) {
      const int64_t t = all.at(step), row = all.going_on(step);
      if (row < sizes_[t]) body(row, sizes_[t] - row, offsets_[t] + row);
    }
  }

 private:
  std::vector<int64_t> sizes_, offsets_;
  bool reverse_;
};

// Boundaries between the rows of up to `threads` threads, each with about as many tokens of these steps.
inline std::vector<int64_t> split_rows(const Steps& steps, int64_t first, int64_t last, int64_t threads,
                                       int64_t least) {
  const int64_t rows = steps.sizes[steps.reverse ? steps.at(last - 1) : steps.at(first)];
  const int64_t parts = std::max<int64_t>(1, std::min(threads, rows / least));
  if (parts == 1) return {0, rows};
  std::vector<int64_t> tokens(rows + 1);  // of each row
  int64_t total = 0;
  for (int64_t step = first; step < last; ++step) {
    const int64_t n = steps.sizes[steps.at(step)];
    ++tokens[n];
    total += n;
  }
  for (int64_t row = rows - 1; row >= 0; --row) tokens[row] += tokens[row + 1];
  std::vector<int64_t> bounds{0};
  int64_t seen = 0;
  for (int64_t row = 0; row < rows; ++row) {  // row r has tokens[r + 1] of them
    if (seen * parts >= total * static_cast<int64_t>(bounds.size())) bounds.push_back(row);
    seen += tokens[row + 1];
  }
  bounds.push_back(rows);
  return bounds;
}

inline void check_layer(const char* op, int64_t gates, const at::Tensor& input, const at::Tensor& h0,
                        std::initializer_list<const at::Tensor*> states, const at::Tensor& w_ih, const at::Tensor& w_hh,
                        std::initializer_list<std::optional<at::Tensor>> biases) {
  const auto dtype = input.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, op,
                              ": expected float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(1) > 0 && w_hh.size(0) == gates * w_hh.size(1), op, ": w_hh has shape ",
              w_hh.sizes());
  const int64_t hidden = w_hh.size(1);
  TORCH_CHECK(w_ih.dim() == 2 && w_ih.size(0) == gates * hidden && w_ih.size(1) == input.size(1), op,
              ": w_ih has shape ", w_ih.sizes());
  TORCH_CHECK(h0.size(1) == hidden, op, ": h0 has shape ", h0.sizes());
  const auto check = [&](const at::Tensor& t, at::IntArrayRef sizes) {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == dtype && t.is_cpu(), op, ": expected ", dtype, sizes, ", got ",
                t.scalar_type(), t.sizes());
  };
  for (const at::Tensor* state : states) check(*state, h0.sizes());
  for (const auto& bias : biases) {
    if (bias) check(*bias, {gates * hidden});
  }
  TORCH_CHECK(h0.scalar_type() == dtype && w_ih.scalar_type() == dtype && w_hh.scalar_type() == dtype, op,
              ": dtypes differ");
}

// Tensors of one row a token: of H columns in the input's dtype, and the saved gates.
inline void check_tokens(const char* op, const at::Tensor& input, const at::Tensor& w_hh,
                         std::initializer_list<const at::Tensor*> tensors, const at::Tensor* gates) {
  const auto check = [&](const at::Tensor& t, int64_t columns) {
    TORCH_CHECK(t.dim() == 2 && t.size(0) == input.size(0) && t.size(1) == columns && t.is_cpu(), op,
                ": a saved tensor or gradient has shape ", t.sizes());
  };
  for (const at::Tensor* t : tensors) {
    check(*t, w_hh.size(1));
    TORCH_CHECK(t->scalar_type() == input.scalar_type(), op, ": dtypes differ");
  }
  if (gates) check(*gates, 4 * w_hh.size(1));
}

}  // namespace pk
