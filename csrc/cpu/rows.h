// Tensors as rows: the common shape [rows, cols] in which kernels walk tensors of equal sizes, without copying any that
// already has unit stride inside rows and one stride between them (dense tensors, halves of a fused tensor, slices,
// expanded leading dimensions). What does not fit is copied into a dense tensor of its own.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace pk {

// Rows shorter than this cost more in partial blocks than a copy does.
constexpr int64_t kShortestRow = 16;

class RowLayout {
 public:
  // Elements are visited in `order` (dimensions from outermost to innermost); dimensions of size 1 are dropped.
  RowLayout(at::IntArrayRef sizes, at::IntArrayRef order) : numel_(c10::multiply_integers(sizes)) {
    for (const int64_t d : order) {
      if (sizes[d] != 1) dims_.push_back({d, sizes[d]});
    }
    cols_ = numel_;
  }

  int64_t cols() const { return cols_; }

  // Narrows cols to what all of `tensors` have contiguous; one that has nothing contiguous will be copied by `fit`.
  template <class... Tensors>
  void take(const Tensors&... tensors) {
    (take_one(tensors), ...);
  }

  // Prescribes cols (a product of trailing sizes).
  void set_cols(int64_t cols) { cols_ = cols; }

  // The stride between rows of `tensor`; a tensor that does not fit is replaced by a dense copy first.
  int64_t fit(at::Tensor& tensor) const {
    const int64_t stride = row_stride(tensor);
    if (stride >= 0) return stride;
    tensor = dense_copy(tensor);
    return cols_;
  }

  // Does it fit as it is?
  bool fits(const at::Tensor& tensor) const { return row_stride(tensor) >= 0; }

  at::Tensor dense_copy(const at::Tensor& tensor) const {
    c10::SmallVector<int64_t, 6> strides(tensor.dim(), 1);
    int64_t running = 1;
    for (auto it = dims_.rbegin(); it != dims_.rend(); ++it) {
      strides[it->index] = running;
      running *= it->size;
    }
    at::Tensor copy = at::empty_strided(tensor.sizes(), strides, tensor.options());
    return copy.copy_(tensor);
  }

 private:
  struct Dim {
    int64_t index, size;
  };

  void take_one(const at::Tensor& tensor) {
    int64_t run = 1;
    for (auto it = dims_.rbegin(); it != dims_.rend() && tensor.stride(it->index) == run; ++it) run *= it->size;
    if (run >= kShortestRow) cols_ = std::min(cols_, run);
  }

  int64_t row_stride(const at::Tensor& tensor) const {  // -1: does not fit
    if (numel_ == 0) return 0;
    int64_t run = 1, stride = -1;
    for (auto it = dims_.rbegin(); it != dims_.rend(); ++it) {
      const int64_t actual = tensor.stride(it->index);
      if (run < cols_) {
        if (actual != run) return -1;
      } else if (stride < 0) {
        stride = actual;
      } else if (actual != stride * (run / cols_)) {
        return -1;
      }
      run *= it->size;
    }
    return stride < 0 ? cols_ : stride;
  }

  int64_t numel_, cols_;
  c10::SmallVector<Dim, 6> dims_;
};

using Order = c10::SmallVector<int64_t, 6>;

inline Order row_major(int64_t dim) {
  Order order(dim);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// The dimensions of a dense tensor from its largest stride to its smallest.
inline Order memory_order(const at::Tensor& dense) {
  Order order = row_major(dense.dim());
  for (size_t i = 1; i < order.size(); ++i) {  // insertion: stable, no allocation, and nearly always sorted already
    for (size_t j = i; j > 0 && dense.stride(order[j - 1]) < dense.stride(order[j]); --j)
      std::swap(order[j - 1], order[j]);
  }
  return order;
}

}  // namespace pk
