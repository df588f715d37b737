// Memory for results of tens of megabytes. The first touch of a fresh 4 KiB page costs more than the work on it, and
// malloc maps such blocks anew for every call; with 2 MiB pages the kernel is entered 512 times less often.
#pragma once
#include <ATen/core/Tensor.h>

namespace pk {

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);  // as at::empty
at::Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options);  // as at::zeros

}  // namespace pk
