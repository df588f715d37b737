// Self-tests of cp.async, bounds, alignment, arithmetic, spinning and stack; see selftest_block.cu.
#include "../cuda/platform.h"
#include "selftest.h"

namespace pk {

namespace {

constexpr int kThreads = 128;

// Thread i < n / 4 copies in[4 i, 4 i + 4).
__device__ void copy_all(float* s, const float* in, int n) {
  const int i = threadIdx.x;
  if (i < n / 4) cp_async16(smem_addr(s + 4 * i), in + 4 * i);
  cp_async_commit();
}

__global__ void correct_copy(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  copy_all(s, in, n);
  cp_async_wait<0>();
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void copy_not_waited_for(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  copy_all(s, in, n);
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
  cp_async_wait<0>();
}

__global__ void copy_waited_for_one_group_short(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  copy_all(s, in, n);
  cp_async_wait<1>();
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
  cp_async_wait<0>();
}

__global__ void copy_without_barrier(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i] = 0;
  __syncthreads();
  copy_all(s, in, n);
  cp_async_wait<0>();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void copy_never_waited_for(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  copy_all(s, in, n);
  out[i] = in[n - 1 - i] + 1;
}

__global__ void write_into_copy_in_flight(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  if (i < n / 4) {
    cp_async16(smem_addr(s + 4 * i), in + 4 * i);
    s[4 * i] = in[4 * i];
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

// The next copy goes into a stage that other threads may still read.
__global__ void prefetch_into_stage_being_read(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    copy_all(s, in, n);
    cp_async_wait<0>();
    __syncthreads();
    out[i] = s[n - 1 - i] + 1;
  }
}

__global__ void misaligned_copy(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  if (i == 0) cp_async16(smem_addr(s), in + 1);
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = in[n - 1 - i] + 1;
}

__global__ void dynamic_shared_overrun(const float* in, float* out, int n) {
  PK_DYN_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  const int i = threadIdx.x;
  s[i] = in[i];
  if (i == 5) s[n] = 0;
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void static_shared_overrun(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  float* p = s;
  p[i] = in[i];
  if (i == 5) p[n] = 0;
  __syncthreads();
  out[i] = s[n - 1 - i] + 1;
}

__global__ void static_array_index(const float* in, float* out, int n) {
  PK_SHARED(float, s, [kThreads]);
  const int i = threadIdx.x;
  s[i == 5 ? n : i] = in[i];
  __syncthreads();
  out[i] = in[n - 1 - i] + 1;
}

__global__ void global_read_past_the_end(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + 1 + 0 * in[i + 1];
}

__global__ void global_write_before_the_start(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + 1;
  if (i == 0) out[-1] = 0;
}

__global__ void misaligned_vector_load(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(in + 1);
  out[i] = in[n - 1 - i] + 1 + 0 * (v.x + v.y + v.z + v.w);
}

__global__ void register_array_overrun(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  float r[4] = {};
  for (int k = 0; k <= 4; ++k)
    if (k * n > 4 * i) r[k] += 1;
  out[i] = in[n - 1 - i] + 1 + 0 * (r[0] + r[1] + r[2] + r[3]);
}

__global__ void index_overflow(const float* in, float* out, int n) {
  const int i = threadIdx.x, big = n * 20'000'000;
  out[i] = in[n - 1 - i] + static_cast<float>(big == 7 ? 2 : 1);
}

__global__ void shift_too_far(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + static_cast<float>((1 << (n / 4)) == 7 ? 2 : 1);
}

__global__ void division_by_zero(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + static_cast<float>(n / (n - kThreads) == 7 ? 2 : 1);
}

__global__ void spin_on_a_flag_nobody_sets(const float* in, float* out, int n) {
  PK_SHARED(int, flag, [1]);
  const int i = threadIdx.x;
  if (i == 0) flag[0] = 0;
  __syncthreads();
  while (atomicAdd(flag, 0) != 7) {
  }
  out[i] = in[n - 1 - i] + 1;
}

__global__ void spin_on_plain_loads(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  const volatile float* p = in;
  while (*p != 1e9f) {
  }
  out[i] = in[n - 1 - i] + 1;
}

__device__ __attribute__((noinline)) float deep(const float* in, int depth) {
  float block[256];
  for (int k = 0; k < 256; ++k) block[k] = in[k % kThreads];
  if (depth == 0) return block[7];
  return deep(in, depth - 1) * 0 + block[depth];
}

__global__ void stack_overflow(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[n - 1 - i] + 1 + 0 * deep(in, n);
}

template <void (*KERNEL)(const float*, float*, int)>
void one_block(const float* in, float* out, int n) {
  launch(KERNEL, 1, kThreads, static_cast<size_t>(n) * sizeof(float), nullptr, in, out, n);
}

}  // namespace

#define PK_CASE(name) {#name, one_block<name>}

std::vector<Case> async_cases() {
  return {
      PK_CASE(correct_copy),
      PK_CASE(copy_not_waited_for),
      PK_CASE(copy_waited_for_one_group_short),
      PK_CASE(copy_without_barrier),
      PK_CASE(copy_never_waited_for),
      PK_CASE(write_into_copy_in_flight),
      PK_CASE(prefetch_into_stage_being_read),
      PK_CASE(misaligned_copy),
      PK_CASE(dynamic_shared_overrun),
      PK_CASE(static_shared_overrun),
      PK_CASE(static_array_index),
      PK_CASE(global_read_past_the_end),
      PK_CASE(global_write_before_the_start),
      PK_CASE(misaligned_vector_load),
      PK_CASE(register_array_overrun),
      PK_CASE(index_overflow),
      PK_CASE(shift_too_far),
      PK_CASE(division_by_zero),
      PK_CASE(spin_on_a_flag_nobody_sets),
      PK_CASE(spin_on_plain_loads),
      PK_CASE(stack_overflow),
  };
}

}  // namespace pk
