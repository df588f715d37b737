// The packed sequences of the recurrent operators: their steps, cut into chunks and among threads. (Public functions
// have checked the same as here; kernels read raw memory, so it is checked where it guards it.)
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
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
  // h0: (batch, columns), or two of these. batch_sizes: int64 (T) on the CPU, not increasing; absent: every step has
  // all rows of h0. Tokens that no step has, all behind the others, are padding.
  Sequence(const at::Tensor& input, const at::Tensor& h0, const std::optional<at::Tensor>& batch_sizes) {
    TORCH_CHECK(input.dim() == 2 && (h0.dim() == 2 || (h0.dim() == 3 && h0.size(0) == 2)),
                "recurrent: input must be 2-D and h0 (batch, hidden size), or two of these");
    const int64_t tokens = input.size(0), batch = h0.size(-2);
    if (batch_sizes) {
      TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu(),
                  "recurrent: batch_sizes must be a 1-D int64 tensor on the CPU");
      const at::Tensor sizes = batch_sizes->contiguous();
      const int64_t* p = sizes.const_data_ptr<int64_t>();
      sizes_.assign(p, p + sizes.numel());
      while (!sizes_.empty() && sizes_.back() == 0) sizes_.pop_back();
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
    TORCH_CHECK(batch_sizes ? total <= tokens : total == tokens, "recurrent: input has ", tokens,
                " rows, batch_sizes sum to ", total);
  }

  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t rows() const { return sizes_.empty() ? 0 : sizes_[0]; }
  int64_t tokens() const { return offsets_.back(); }
  Steps steps(bool reverse) const { return {count(), sizes_.data(), offsets_.data(), reverse}; }

  // As many steps as have at most `limit` tokens together, at least one; as the direction visits them. Both directions
  // have the same chunks.
  std::vector<Chunk> chunks(int64_t limit, bool reverse) const {
    std::vector<Chunk> found;
    for (int64_t first = 0; first < count();) {
      int64_t last = first, tokens = 0;
      do {
        tokens += sizes_[last++];
      } while (last < count() && tokens + sizes_[last] <= limit);
      found.push_back({reverse ? count() - last : first, reverse ? count() - first : last, offsets_[first], tokens});
      first = last;
    }
    if (reverse) std::reverse(found.begin(), found.end());
    return found;
  }

  int64_t largest_chunk(int64_t limit) const {
    int64_t most = 0;
    for (const Chunk& chunk : chunks(limit, false)) most = std::max(most, chunk.tokens);
    return most;
  }

  // body(row, rows, token): these rows' sequences end with the tokens from `token` on.
  template <class Body>
  void for_ending(bool reverse, Body body) const {
    const Steps all = steps(reverse);
    for (int64_t step = 0; step < count(); ++step) {
      const int64_t t = all.at(step), row = all.going_on(step);
      if (row < sizes_[t]) body(row, sizes_[t] - row, offsets_[t] + row);
    }
  }

 private:
  std::vector<int64_t> sizes_, offsets_;
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

}  // namespace pk
