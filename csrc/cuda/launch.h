// nvcc side of launching: errors as exceptions, the tensors' device made current and given back, dynamic shared memory
// beyond 48 KiB opted into.  The emulator's side is in csrc/emulator/platform.h.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pk {

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

// Of a launch: names the kernel (mangled) and the configuration.  An error may also be that of an earlier kernel, which
// had not run by the time of its own launch.
template <class K>
void check_launch(cudaError_t e, K* kernel, dim3 grid, dim3 block, size_t smem) {
  if (e == cudaSuccess) return;
  const std::string why = cudaGetErrorString(e);
  const char* name = nullptr;
  if (cudaFuncGetName(&name, reinterpret_cast<const void*>(kernel)) != cudaSuccess || !name) name = "?";
  (void)cudaGetLastError();  // not to be met again by whoever asks next
  const auto shape = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  throw std::runtime_error("launch of " + std::string(name) + ", grid " + shape(grid) + ", block " + shape(block) +
                           ", " + std::to_string(smem) + " bytes of shared memory: " + why);
}

// Makes the device that owns `p` current for a scope.  Launchers get raw pointers from a process that may have another
// device current, and a launch into another device's stream is an error.
class DeviceGuard {
 public:
  explicit DeviceGuard(const void* p) {
    cudaPointerAttributes a;
    if (!p) return;
    if (cudaPointerGetAttributes(&a, p) != cudaSuccess) {
      (void)cudaGetLastError();
      return;
    }
    if (a.type != cudaMemoryTypeDevice && a.type != cudaMemoryTypeManaged) return;
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (a.device == previous_) return;
    check(cudaSetDevice(a.device), "cudaSetDevice");
    restore_ = true;
  }
  ~DeviceGuard() {
    if (restore_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

namespace detail {

inline const void* first_pointer() { return nullptr; }
template <class A, class... R>
const void* first_pointer(const A& a, const R&... rest) {
  if constexpr (std::is_pointer_v<A>) {
    if (a) return a;
  }
  return first_pointer(rest...);
}

// False where a block of the current device has less, what is static taken off.
template <class K>
bool allows_shared(K kernel, size_t bytes) {
  if (bytes <= 48 * 1024 ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) == cudaSuccess)
    return true;
  (void)cudaGetLastError();
  return false;
}

template <class K>
void allow_shared(K kernel, size_t bytes) {
  if (!allows_shared(kernel, bytes))
    throw std::runtime_error(std::to_string(bytes) + " bytes of dynamic shared memory are more than this GPU has");
}

}  // namespace detail

// The device is that of the first non-null pointer argument.  A kernel whose pointers are inside a struct needs a
// DeviceGuard around its launch.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  const DeviceGuard guard(detail::first_pointer(args...));
  detail::allow_shared(kernel, smem);
  kernel<<<grid, block, smem, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(args)...);
  check_launch(cudaGetLastError(), kernel, grid, block, smem);
}

// All blocks are resident at once, so that grid_sync() may be used; see resident_blocks() for how many can be.
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  const DeviceGuard guard(detail::first_pointer(args...));
  detail::allow_shared(kernel, smem);
  auto go = [&](P... p) {
    void* ptrs[] = {const_cast<void*>(static_cast<const void*>(&p))...};
    const auto error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, ptrs, smem,
                                                   static_cast<cudaStream_t>(stream));
    check_launch(error, kernel, grid, block, smem);
  };
  go(static_cast<P>(args)...);
}

namespace detail {

// Attributes of a launch in clusters of that many blocks along x; keeps what the configuration points to.
struct ClusterConfig {
  cudaLaunchAttribute size{};
  cudaLaunchConfig_t config{};
  ClusterConfig(int cluster, dim3 grid, dim3 block, size_t smem, void* stream) {
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = smem;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &size, config.numAttrs = 1;
  }
  ClusterConfig(const ClusterConfig&) = delete;
  ClusterConfig& operator=(const ClusterConfig&) = delete;
};

}  // namespace detail

// sm_90: blocks in clusters of `cluster` (at most 8) along x, which can reach each other's shared memory.
template <class... P, class... A>
void launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  const DeviceGuard guard(detail::first_pointer(args...));
  detail::allow_shared(kernel, smem);
  const detail::ClusterConfig c(cluster, grid, block, smem, stream);
  check_launch(cudaLaunchKernelEx(&c.config, kernel, static_cast<P>(args)...), kernel, grid, block, smem);
}

// How many clusters of this kernel the current device holds at once; 0 where it has none that large.
template <class... P>
int resident_clusters(void (*kernel)(P...), int cluster, int threads, size_t smem) {
  if (!detail::allows_shared(kernel, smem)) return 0;
  const detail::ClusterConfig c(cluster, static_cast<unsigned>(cluster), static_cast<unsigned>(threads), smem, nullptr);
  int n = 0;
  if (cudaOccupancyMaxActiveClusters(&n, reinterpret_cast<const void*>(kernel), &c.config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return n;
}

inline int sm_count() {
  int device = 0, n = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return n;
}

// Bytes of shared memory that a block may have on the current device.
inline size_t shared_limit() {
  int device = 0, n = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&n, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a block");
  return static_cast<size_t>(n);
}

// How many blocks of this kernel the current device holds at once: the largest cooperative grid.
template <class... P>
int resident_blocks(void (*kernel)(P...), int threads, size_t smem) {
  int per_sm = 0;
  if (!detail::allows_shared(kernel, smem)) return 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, smem), "occupancy");
  return per_sm * sm_count();
}

}  // namespace pk
