// Warp and block reductions in a fixed order (bitwise the same every run), and the grid's last-block handoff.
#pragma once
#include "platform.h"

namespace pk {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, o));
  return x;
}

namespace detail {

// Every thread of a one-dimensional block of THREADS calls this and gets the result.
template <int THREADS, bool MAX>
__device__ __forceinline__ float block_reduce(float x) {
  static_assert(THREADS % kWarp == 0 && THREADS <= 1024);
  PK_SHARED(float, part, [THREADS / kWarp]);
  x = MAX ? warp_max(x) : warp_sum(x);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = part[0];
#pragma unroll
  for (int i = 1; i < THREADS / kWarp; ++i) x = MAX ? fmaxf(x, part[i]) : x + part[i];
  __syncthreads();  // the next reduction of this block overwrites part
  return x;
}

}  // namespace detail

template <int THREADS>
__device__ __forceinline__ float block_sum(float x) {
  return detail::block_reduce<THREADS, false>(x);
}
template <int THREADS>
__device__ __forceinline__ float block_max(float x) {
  return detail::block_reduce<THREADS, true>(x);
}

// True, in all of its threads, for the last of `blocks` blocks to come here; that block then sees all that the others
// wrote before.  `counter` is zero at launch.  Fences on both sides: the first publishes this block's writes (all its
// threads', by the barrier), the second makes the others' visible.
__device__ __forceinline__ bool last_block_done(unsigned* counter, unsigned blocks) {
  PK_SHARED(int, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    last[0] = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0] != 0;
}

}  // namespace pk
