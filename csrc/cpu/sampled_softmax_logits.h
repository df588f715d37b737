// Logits of a batch against the rows of a table, tile by tile, and what a loss makes of them. The tiles exist one at a
// time (or, forward, in a tensor that the caller keeps); the backward pass computes them again.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

#include "sampled_softmax_tables.h"

namespace pk {

class Logits {
 public:
  Logits(const at::Tensor& x, const at::Tensor& table, const char* function);

  int64_t classes() const { return table_.size(0); }

  // Runs `reduce` over all tiles. `loss` has what a tile needs beside its place and memory. kept: float32,
  // batch * classes of them in an order of its own, to be filled, or not defined.
  void reduce(const TileArgs& loss, const at::Tensor& kept) const;

  // dx (batch, cols) float32, or not defined. store(column, columns, rows, stride, sums) takes the gradient of so many
  // rows of the table (float32), and the sums over the batch of their dz (or null); null: not wanted. Each row is given
  // once, by one thread. kept: as `reduce` filled it, or not defined.
  using Store = std::function<void(int64_t, int64_t, const float*, int64_t, const float*)>;
  at::Tensor gradient(const TileArgs& loss, const at::Tensor& kept, bool want_dx, const Store& store,
                      bool want_sums) const;

 private:
  friend class Wide;
  friend class Low;
  friend class Split;
  void place(TileArgs& tile, const at::Tensor& kept, const at::Tensor& z) const;
  template <class Products>
  void reduce_with(const TileArgs& loss, const at::Tensor& kept) const;
  template <class Products>
  at::Tensor gradient_with(const TileArgs& loss, const at::Tensor& kept, bool want_dx, const Store& store,
                           bool want_sums) const;

  bool low_;              // products of bfloat16 on tile registers; else of float32
  bool split_ = false;    // these too on tile registers, where they can be
  at::Tensor x_, table_;  // float32, or padded with zeros to tiles; the table in its own type
  at::Tensor pairs_;      // low: x in pairs of rows, block by block; split: x in its parts
  int64_t batch_, cols_;  // of x before it was padded
  TableDtype dtype_;
};

}  // namespace pk
