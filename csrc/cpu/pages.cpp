#include "pages.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <sys/mman.h>

#include "pool.h"
#include "scratch.h"

namespace pk {
namespace {

constexpr size_t kLarge = size_t{4} << 20;  // below this the call to the kernel is not worth its time
// From here on zeros are a fresh mapping, even with the pool: a gradient of a table is written in few places, and where
// it is written everywhere (65,536 ids, 51 MB) clearing a kept block took as long as the page faults.
constexpr size_t kZeroed = size_t{32} << 20;
constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

size_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return c10::multiply_integers(sizes) * options.dtype().itemsize();
}

bool pooled(size_t bytes) {
  if (bytes < kPooled || !pool_enabled()) return false;
  const at::Context& context = at::globalContext();  // torch.utils.deterministic.fill_uninitialized_memory: torch's job
  return !(context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory());
}

at::Tensor advised(at::Tensor result) {
  if (result.nbytes() < kLarge) return result;
  const uintptr_t data = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t start = (data + kHugePage - 1) & ~(kHugePage - 1), end = (data + result.nbytes()) & ~(kHugePage - 1);
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish: failure is fine
  return result;
}

at::Tensor empty_in(c10::Allocator* allocator, at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  return at::Tensor(at::detail::empty_generic(sizes, allocator, kCpu, type, std::nullopt));
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!pooled(bytes_of(sizes, options))) return advised(at::empty(sizes, options));
  return empty_in(pool_allocator(), sizes, options);
}

at::Tensor empty_large_like(const at::Tensor& like) {
  if (!pooled(like.numel() * like.element_size())) return advised(at::empty_like(like));
  // Strides as empty_like gives them: those of a dense tensor, else dense ones in the same order.
  const auto strides = like.is_non_overlapping_and_dense() ? like.strides().vec()
                                                           : at::infer_dense_strides(like.sizes(), like.strides());
  return at::Tensor(
      at::detail::empty_strided_generic(like.sizes(), strides, pool_allocator(), kCpu, like.scalar_type()));
}

at::Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (bytes_of(sizes, options) < kZeroed) return empty_large(sizes, options).zero_();
  return empty_in(zeroed_allocator(), sizes, options);
}

}  // namespace pk
