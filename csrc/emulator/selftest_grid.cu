// Self-tests between blocks: races, grid barriers, handoff through fences and atomics; see selftest_block.cu.
#include "../cuda/platform.h"
#include "../cuda/reduce.h"
#include "selftest.h"

namespace pk {

namespace {

constexpr int kBlocks = 4;

__device__ int global_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <bool SYNC>
__device__ void exchange(const float* in, float* out, int n) {
  const int i = global_index();
  out[i] = in[i];
  if constexpr (SYNC)
    grid_sync();
  else
    __syncthreads();
  const float v = ld_cg(out + n - 1 - i);
  if constexpr (SYNC)
    grid_sync();
  else
    __syncthreads();
  out[i] = v + 1;
}
__global__ void correct_grid_sync(const float* in, float* out, int n) { exchange<true>(in, out, n); }
__global__ void block_barrier_taken_for_grid_barrier(const float* in, float* out, int n) {
  exchange<false>(in, out, n);
}
__global__ void grid_sync_in_plain_launch(const float* in, float* out, int n) { exchange<true>(in, out, n); }

__global__ void two_blocks_write_one_element(const float* in, float* out, int n) {
  const int i = global_index();
  out[i] = in[n - 1 - i] + 1;
  if (threadIdx.x == 0 && i + static_cast<int>(blockDim.x) < n)
    out[i + blockDim.x] = in[n - 1 - i - static_cast<int>(blockDim.x)] + 1;
}

// Every block writes its part of the mirrored input; the last one to finish adds 1 to the whole.  The counter is an
// element of the output, put right at the end: 0 as a float is 0 as an integer.
enum class Handoff { helper, no_first_fence, no_second_fence, block_fence, plain_counter };

template <Handoff H>
__device__ bool is_last(unsigned* counter) {
  if constexpr (H == Handoff::helper) {
    return last_block_done(counter, gridDim.x);
  } else {
    PK_SHARED(int, last, [1]);
    __syncthreads();
    if (threadIdx.x == 0) {
      if constexpr (H == Handoff::no_second_fence || H == Handoff::plain_counter) __threadfence();
      if constexpr (H == Handoff::block_fence) __threadfence_block();
      if constexpr (H == Handoff::plain_counter)
        last[0] = (*counter)++ == gridDim.x - 1;
      else
        last[0] = atomicAdd(counter, 1u) == gridDim.x - 1;
      if constexpr (H == Handoff::no_first_fence || H == Handoff::plain_counter) __threadfence();
      if constexpr (H == Handoff::block_fence) __threadfence_block();
    }
    __syncthreads();
    return last[0] != 0;
  }
}

// Element n - 1 of out holds the counter until the last block writes its value.
template <Handoff H>
__device__ void last_block(const float* in, float* out, int n) {
  const int i = global_index();
  unsigned* counter = reinterpret_cast<unsigned*>(out + n - 1);
  if (i < n - 1) out[i] = in[n - 1 - i];
  if (!is_last<H>(counter)) return;
  for (int k = threadIdx.x; k < n - 1; k += static_cast<int>(blockDim.x)) out[k] += 1;
  __syncthreads();
  if (threadIdx.x == 0) out[n - 1] = in[0] + 1;
}
__global__ void correct_last_block(const float* in, float* out, int n) { last_block<Handoff::helper>(in, out, n); }
__global__ void last_block_without_release_fence(const float* in, float* out, int n) {
  last_block<Handoff::no_first_fence>(in, out, n);
}
__global__ void last_block_without_acquire_fence(const float* in, float* out, int n) {
  last_block<Handoff::no_second_fence>(in, out, n);
}
__global__ void last_block_with_block_fences(const float* in, float* out, int n) {
  last_block<Handoff::block_fence>(in, out, n);
}
__global__ void last_block_with_plain_counter(const float* in, float* out, int n) {
  last_block<Handoff::plain_counter>(in, out, n);
}

// A chain: each block waits for the one before it, through a flag in the last element, and continues its work.
template <bool ACQUIRE, bool RELEASE>
__device__ void chain(const float* in, float* out, int n) {
  uint32_t* flag = reinterpret_cast<uint32_t*>(out + n - 1);
  const int i = global_index(), block = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    if constexpr (ACQUIRE) {
      while (ld_acquire(flag) != blockIdx.x) {
      }
    } else {
      while (atomicAdd(flag, 0u) != blockIdx.x) {
      }
    }
  }
  __syncthreads();
  const float carried =
      block ? out[i - static_cast<int>(blockDim.x)] - in[n - 1 - i + static_cast<int>(blockDim.x)] : 1;
  if (i < n - 1) out[i] = in[n - 1 - i] + carried;
  __syncthreads();
  if (threadIdx.x == 0 && block + 1 < kBlocks) {
    if constexpr (RELEASE)
      st_release(flag, blockIdx.x + 1);
    else
      atomicExch(flag, blockIdx.x + 1);
  }
  if (i == n - 1) out[i] = in[0] + carried;
}
__global__ void correct_flag_chain(const float* in, float* out, int n) { chain<true, true>(in, out, n); }
__global__ void flag_chain_without_release(const float* in, float* out, int n) { chain<true, false>(in, out, n); }
__global__ void flag_chain_without_acquire(const float* in, float* out, int n) { chain<false, true>(in, out, n); }

template <void (*KERNEL)(const float*, float*, int)>
void plain(const float* in, float* out, int n) {
  launch(KERNEL, kBlocks, n / kBlocks, 0, nullptr, in, out, n);
}
template <void (*KERNEL)(const float*, float*, int)>
void together(const float* in, float* out, int n) {
  launch_cooperative(KERNEL, kBlocks, n / kBlocks, 0, nullptr, in, out, n);
}

// The pointers inside of a struct: a launcher cannot tell their device.
struct InAndOut {
  const float* in;
  float* out;
  int n;
};
__global__ void of_a_struct(const InAndOut x) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  x.out[i] = x.in[x.n - 1 - i] + 1;
}
void launch_without_a_device(const float* in, float* out, int n) {
  launch(of_a_struct, kBlocks, n / kBlocks, 0, nullptr, InAndOut{in, out, n});
}
void correct_launch_of_a_struct(const float* in, float* out, int n) {
  const DeviceGuard guard(in);
  launch_without_a_device(in, out, n);
}
void empty_grid(const float* in, float* out, int n) {
  launch(correct_grid_sync, dim3(n / kBlocks, 0), 32, 0, nullptr, in, out, n);
}

// Static and dynamic memory are together below a block's limit, but the dynamic part begins at a multiple of 1024.
__global__ void with_both(const float* in, float* out, int n) {
  PK_DYN_SHARED(raw);
  PK_SHARED(float, s, [4]);
  s[0] = 1, raw[0] = 1;
  out[0] = in[n - 1] + s[0];
}
void no_room_before_dynamic_shared(const float* in, float* out, int n) {
  launch(with_both, 1, 1, 227 * 1024 - 512, nullptr, in, out, n);
}

void cooperative_grid_too_large(const float* in, float* out, int n) {
  launch_cooperative(correct_grid_sync, 100'000, 32, 0, nullptr, in, out, n);
}

}  // namespace

#define PK_PLAIN(name) {#name, plain<name>}
#define PK_TOGETHER(name) {#name, together<name>}

std::vector<Case> grid_cases() {
  return {
      PK_TOGETHER(correct_grid_sync),
      PK_TOGETHER(block_barrier_taken_for_grid_barrier),
      PK_PLAIN(grid_sync_in_plain_launch),
      {"cooperative_grid_too_large", cooperative_grid_too_large},
      {"launch_without_a_device", launch_without_a_device},
      {"correct_launch_of_a_struct", correct_launch_of_a_struct},
      {"empty_grid", empty_grid},
      {"no_room_before_dynamic_shared", no_room_before_dynamic_shared},
      PK_PLAIN(two_blocks_write_one_element),
      PK_PLAIN(correct_last_block),
      PK_PLAIN(last_block_without_release_fence),
      PK_PLAIN(last_block_without_acquire_fence),
      PK_PLAIN(last_block_with_block_fences),
      PK_PLAIN(last_block_with_plain_counter),
      PK_TOGETHER(correct_flag_chain),
      PK_TOGETHER(flag_chain_without_release),
      PK_TOGETHER(flag_chain_without_acquire),
  };
}

}  // namespace pk
