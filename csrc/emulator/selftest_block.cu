// Self-tests inside a block: barriers, shared memory, warp collectives.  Each kernel is right but for one planted bug,
// named by the case; correct_* must pass.
#include "../cuda/platform.h"
#include "selftest.h"

namespace pk {

namespace {

constexpr int kThreads = 128;

__global__ void correct_barrier(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = in[i];
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void missing_barrier(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = 0;
  __syncthreads();
  s[i] = in[i];
  out[i] = s[n - 1 - i] + 1;
}

// Write after read: right in every order the fibers run in, wrong on hardware.
__global__ void reuse_without_barrier(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    s[i] = in[i] + static_cast<float>(round - 2);
    __syncthreads();
    out[i] = s[n - 1 - i] + 1;
  }
}

__global__ void last_element_unwritten(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  if (i < n - 1) s[i] = in[i];
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void accumulation_without_atomics(const float* in, float* out, int n) {
  PK_SHARED(float, sum, [1]);
  const int i = threadIdx.x;
  if (i == 0) sum[0] = 0;
  __syncthreads();
  sum[0] += 1;
  __syncthreads();
  out[i] = in[n - 1 - i] + (sum[0] == static_cast<float>(n) ? 1 : 0);
}

__global__ void correct_atomics(const float* in, float* out, int n) {
  PK_SHARED(int, count, [4]);
  const int i = threadIdx.x;
  if (i < 4) count[i] = 0;
  __syncthreads();
  atomicAdd(&count[i & 3], 1);
  __syncthreads();
  out[i] = in[n - 1 - i] + (count[i & 3] == n / 4 ? 1 : 0);
}

__global__ void atomic_meets_plain_read(const float* in, float* out, int n) {
  PK_SHARED(int, count, [1]);
  const int i = threadIdx.x;
  if (i == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count, 1);
  out[i] = in[n - 1 - i] + (count[0] > 0 ? 1 : 0);
}

__global__ void barrier_in_branch(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  if (i < 64) __syncthreads();
  out[i] = in[n - 1 - i] + 1;
}

__global__ void different_barriers_meet(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  if (i < 64)
    __syncthreads();
  else
    __syncthreads();
  out[i] = in[n - 1 - i] + 1;
}

__global__ void exit_before_barrier(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + 1;
  if (i >= 100) return;
  __syncthreads();
}

__global__ void named_barrier_without_its_warp(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  if (i < 64) named_barrier_sync(1, 96);
  out[i] = in[n - 1 - i] + 1;
}

// Two warps hand a buffer to two others and get it back: arrive does not wait, sync does.
__global__ void correct_named_barriers(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x, half = n / 2;
  for (int round = 0; round < 3; ++round) {
    if (i < half) {
      s[i] = in[i], s[i + half] = in[i + half];
      named_barrier_arrive(1, kThreads);
      named_barrier_sync(2, kThreads);
    } else {
      named_barrier_sync(1, kThreads);
      out[i] = s[n - 1 - i] + 1, out[i - half] = s[n - 1 - (i - half)] + 1;
      named_barrier_arrive(2, kThreads);
    }
  }
}

__global__ void named_barrier_not_handed_back(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x, half = n / 2;
  for (int round = 0; round < 3; ++round) {
    if (i < half) {
      s[i] = in[i], s[i + half] = in[i + half];
      named_barrier_arrive(1, kThreads);
    } else {
      named_barrier_sync(1, kThreads);
      out[i] = s[n - 1 - i] + 1, out[i - half] = s[n - 1 - (i - half)] + 1;
    }
  }
}

__global__ void correct_syncwarp(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = in[n - 1 - (i ^ 1)];
  __syncwarp();
  out[i] = s[i ^ 1] + 1;
}

__global__ void missing_syncwarp(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = 0;
  __syncwarp();
  s[i] = in[n - 1 - (i ^ 1)];
  out[i] = s[i ^ 1] + 1;
}

// A shuffle moves registers; it orders no memory.
__global__ void shuffle_taken_for_syncwarp(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = in[n - 1 - (i ^ 1)];
  (void)__shfl_xor_sync(kAllLanes, i, 1);
  out[i] = s[i ^ 1] + 1;
}

__global__ void divergent_shuffle(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  float v = in[n - 1 - (i ^ 1)];
  if (i % 32 < 16)
    v = __shfl_xor_sync(kAllLanes, v, 1);
  else
    v = __shfl_xor_sync(kAllLanes, v, 1);
  out[i] = v + 1;
}

__global__ void shuffle_outside_its_mask(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = __shfl_sync(0x0000ffffu, in[n - 1 - i], i % 32) + 1;
}

// Lane 3 reads lane 20, which is not in the mask: undefined, here a NaN.
__global__ void shuffle_from_absent_lane(const float* in, float* out, int n) {
  const int i = threadIdx.x, lane = i % 32;
  float v = in[n - 1 - i];
  if (lane < 16) v = __shfl_sync(0x0000ffffu, v, lane == 3 ? 20 : lane);
  out[i] = v + 1;
}

// Each lane wrote the row whose address it gives, but gets elements of others' rows.
__global__ void ldmatrix_before_syncwarp(const float* in, float* out, int n) {
  PK_SHARED(float4, rows, [kThreads]);
  const int i = threadIdx.x;
  const float v = in[n - 1 - i] + 1;
  rows[i] = make_float4(v, v, v, v);
  uint32_t r[4];
  ldmatrix_x4(r, smem_addr(&rows[i]));
  out[i] = v;
}

__global__ void mma_by_half_a_warp(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + 1;
  if (i >= 112) return;
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_m16n8k16<bf16>(d, a, 0, 0);
  out[i] += d[0];
}

__global__ void pointer_to_another_threads_local(const float* in, float* out, int n) {
  PK_SHARED(float*, p, [kThreads]);
  const int i = threadIdx.x;
  float mine = in[n - 1 - i] + 1;
  p[i] = &mine;
  __syncthreads();
  out[i] = *p[i ^ 1] * 0 + mine;
  __syncthreads();
}

__global__ void too_much_static_shared(const float* in, float* out, int n) {
  PK_SHARED(float, s, [13 * 1024]);
  const int i = threadIdx.x;
  s[i] = in[i];
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

template <void (*KERNEL)(const float*, float*, int)>
void one_block(const float* in, float* out, int n) {
  launch(KERNEL, 1, kThreads, 0, nullptr, in, out, n);
}

}  // namespace

#define PK_CASE(name) {#name, one_block<name>}

std::vector<Case> block_cases() {
  return {
      PK_CASE(correct_barrier),
      PK_CASE(missing_barrier),
      PK_CASE(reuse_without_barrier),
      PK_CASE(last_element_unwritten),
      PK_CASE(accumulation_without_atomics),
      PK_CASE(correct_atomics),
      PK_CASE(atomic_meets_plain_read),
      PK_CASE(barrier_in_branch),
      PK_CASE(different_barriers_meet),
      PK_CASE(exit_before_barrier),
      PK_CASE(named_barrier_without_its_warp),
      PK_CASE(correct_named_barriers),
      PK_CASE(named_barrier_not_handed_back),
      PK_CASE(correct_syncwarp),
      PK_CASE(missing_syncwarp),
      PK_CASE(shuffle_taken_for_syncwarp),
      PK_CASE(divergent_shuffle),
      PK_CASE(shuffle_outside_its_mask),
      PK_CASE(shuffle_from_absent_lane),
      PK_CASE(ldmatrix_before_syncwarp),
      PK_CASE(mma_by_half_a_warp),
      PK_CASE(pointer_to_another_threads_local),
      PK_CASE(too_much_static_shared),
  };
}

}  // namespace pk
