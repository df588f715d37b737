#include "pages.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

namespace pk {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = size_t{4} << 20;    // below this the call to the kernel is not worth its time
constexpr size_t kMapped = size_t{32} << 20;  // malloc maps anything from here on, so its pages are fresh and zero

void advise(void* data, size_t bytes) {
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a wish: failure is fine
}

size_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return c10::multiply_integers(sizes) * options.dtype().itemsize();
}

}  // namespace

at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
  if (result.nbytes() >= kLarge) advise(result.mutable_data_ptr(), result.nbytes());
  return result;
}

at::Tensor zeros_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = bytes_of(sizes, options);
  if (bytes >= kMapped) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, data != MAP_FAILED, "pykernels: could not map ", bytes, " bytes");
    advise(data, bytes);
    // What torch's own allocator tells the memory profiler.
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return at::from_blob(
        data, sizes,
        [bytes](void* p) {
          c10::profiledCPUMemoryReporter().Delete(p);
          munmap(p, bytes);
        },
        options);
  }
  at::Tensor result = empty_large(sizes, options);
  return result.zero_();
}

}  // namespace pk
