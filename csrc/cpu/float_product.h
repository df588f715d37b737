// Products of float32 matrices on the tile registers where they are faster there (float_split.h), else torch's.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace pk {

// Whether no number of a matrix is too large to be split (or NaN), found out when it is first asked.
class Fits {
 public:
  explicit Fits(const at::Tensor& all) : all_(all) {}
  bool operator()();

 private:
  const at::Tensor& all_;
  std::optional<bool> found_;
};

// Whether a product of these sizes is faster on tile registers than torch's.
bool splits(int64_t rows, int64_t columns, int64_t depth);

// c = or += a b of float32 matrices: on tile registers where that is faster and no number is too large, otherwise
// torch's. The bits do not depend on the number of threads. of_a, of_b: of matrices of which a and b may be parts.
void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add, Fits& of_a, Fits& of_b);
void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool add = false);

}  // namespace pk
