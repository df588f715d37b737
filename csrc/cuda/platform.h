// The one header every kernel source includes.  The same .cu file is compiled by nvcc for the GPU and by g++ (`-x c++`)
// for the CPU, where csrc/emulator runs each CUDA thread as a fiber and checks every access.  Kernels use the CUDA
// built-ins both sides have, PK_SHARED / PK_DYN_SHARED instead of __shared__, and pk:: functions for all that is PTX.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "dtype.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// PK_SHARED(float, tile, [4][33]) declares a static shared array, PK_DYN_SHARED(raw) the launch's dynamic bytes.
#define PK_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define PK_DYN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace pk {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even, once: every kernel computes in fp32 and converts at the store.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, fp16>)
    return __float2half_rn(x);
  else
    return x;
}

}  // namespace pk

#include "launch.h"

#else

#include "../emulator/platform.h"

#endif

#include "ptx.h"

namespace pk {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

template <class A, class B>
__host__ __device__ constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Calls f(std::type_identity<T>{}) with the element type of `dtype`:
//   dispatch(dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <class F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(std::type_identity<float>{});
    case DType::bf16:
      return f(std::type_identity<bf16>{});
    case DType::f16:
      return f(std::type_identity<fp16>{});
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace pk
