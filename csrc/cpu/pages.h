// Memory for results of a megabyte and more: from the pool (pool.h), or where that is off from torch's allocator with
// huge pages asked for. Smaller ones are torch's.
#pragma once
#include <ATen/core/Tensor.h>

namespace pk {

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);  // as at::empty
at::Tensor empty_large_like(const at::Tensor& like);                              // as at::empty_like
at::Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options);  // as at::zeros

}  // namespace pk
