// g++ side of csrc/cuda/platform.h: CUDA's built-ins, element types and launches as ordinary C++.
#pragma once
#include <cmath>
#include <cstdint>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static_assert(false, "use PK_SHARED or PK_DYN_SHARED");

#define threadIdx (::emu::cur->thread)
#define blockIdx (::emu::cur->block)
#define blockDim (::emu::cfg.block)
#define gridDim (::emu::cfg.grid)
#define PK_SHARED(T, name, ...)      \
  using name##_pk_t = T __VA_ARGS__; \
  name##_pk_t& name = ::emu::shared_var<name##_pk_t>([] {}, {__FILE__, __LINE__})
#define PK_DYN_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(::emu::dyn_shared())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads(EMU_SITE) { emu::block_sync(emu::BlockOp::sync, 0, site); }
inline int __syncthreads_count(int p, EMU_SITE) { return emu::block_sync(emu::BlockOp::count, p, site); }
inline int __syncthreads_and(int p, EMU_SITE) { return emu::block_sync(emu::BlockOp::all, p, site); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu::block_sync(emu::BlockOp::any, p, site); }
inline void __syncwarp(uint32_t m = emu::kFull, EMU_SITE) { emu::warp_sync(m, site); }

template <class T>
T __shfl_sync(uint32_t m, T v, int lane, int w = 32, EMU_SITE) {
  return emu::unbits<T>(emu::shfl(emu::Shfl::idx, m, emu::bits(v), lane, w, site));
}
template <class T>
T __shfl_up_sync(uint32_t m, T v, unsigned d, int w = 32, EMU_SITE) {
  return emu::unbits<T>(emu::shfl(emu::Shfl::up, m, emu::bits(v), static_cast<int>(d), w, site));
}
template <class T>
T __shfl_down_sync(uint32_t m, T v, unsigned d, int w = 32, EMU_SITE) {
  return emu::unbits<T>(emu::shfl(emu::Shfl::down, m, emu::bits(v), static_cast<int>(d), w, site));
}
template <class T>
T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32, EMU_SITE) {
  return emu::unbits<T>(emu::shfl(emu::Shfl::bfly, m, emu::bits(v), x, w, site));
}
inline uint32_t __ballot_sync(uint32_t m, int p, EMU_SITE) { return emu::ballot(m, p != 0, site); }
inline int __any_sync(uint32_t m, int p, EMU_SITE) { return emu::ballot(m, p != 0, site) != 0; }
inline int __all_sync(uint32_t m, int p, EMU_SITE) { return emu::ballot(m, p == 0, site) == 0; }
template <class T>
uint32_t __match_any_sync(uint32_t m, T v, EMU_SITE) {
  return emu::match_any(m, emu::bits(v), site);
}

inline void __threadfence() { emu::fence(emu::Scope::gpu); }
inline void __threadfence_system() { emu::fence(emu::Scope::gpu); }
inline void __threadfence_block() { emu::fence(emu::Scope::block); }
inline void __nanosleep(unsigned) { emu::yield(); }

namespace emu {

// Not instrumented: the checker hears of the access as an atomic, which may meet other atomics.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* p, F f, Site site) {
  yield();
  atomic_access(p, sizeof(T), Atomic::read_modify_write, site);
  const T old = *static_cast<volatile T*>(p), next = f(old);
  *static_cast<volatile T*>(p) = next;
  if (bits(old) != bits(next)) made_progress();
  return old;
}

}  // namespace emu

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return static_cast<T>(o + v); }, site);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return o > v ? o : v; }, site);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return o < v ? o : v; }, site);
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return static_cast<T>(o | v); }, site);
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return static_cast<T>(o & v); }, site);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T) { return v; }, site);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, EMU_SITE) {
  return emu::read_modify_write(p, [=](T o) { return o == expected ? v : o; }, site);
}
inline unsigned atomicInc(unsigned* p, unsigned limit, EMU_SITE) {
  return emu::read_modify_write(p, [=](unsigned o) { return o >= limit ? 0u : o + 1; }, site);
}

namespace emu {

inline float approximate(float exact, float error) { return device_arithmetic ? off_by(exact, error) : exact; }

}  // namespace emu

inline float __expf(float x) { return x == 0.f ? 1.f : emu::approximate(expf(x), 0x1p-22f); }
inline float __log2f(float x) { return emu::approximate(log2f(x), 0x1p-22f); }
inline float __logf(float x) {
  const float y = logf(x);
  if (!emu::device_arithmetic || x < 0.5f || x > 2.f) return emu::approximate(y, 0x1.8p-22f);
  return y + (emu::bits(x) & 1 ? 0x1.83p-22f : -0x1.83p-22f);
}
inline float __fdividef(float a, float b) {
  if (b > 0x1p126f || b < -0x1p126f) return a * 0.f / b;  // NaN where a is infinite
  const bool power_of_2 = (emu::bits(b) & 0x7fffff) == 0;
  return power_of_2 ? a / b : emu::approximate(a / b, 0x1p-23f);
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline float __int_as_float(int x) { return emu::unbits<float>(emu::bits(x)); }
inline int __float_as_int(float x) { return emu::unbits<int>(emu::bits(x)); }
inline float __uint_as_float(unsigned x) { return emu::unbits<float>(emu::bits(x)); }
inline unsigned __float_as_uint(float x) { return emu::unbits<unsigned>(emu::bits(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
__forceinline__ void __stwb(T* p, T v) {
  *p = v;
}
template <class A, class B>
constexpr auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}

namespace pk {

// In place of the host's.
inline float expf(float x) { return x == 0.f ? 1.f : emu::approximate(::expf(x), 0x1p-23f); }
inline float tanhf(float x) { return emu::approximate(::tanhf(x), 0x1p-23f); }
inline float expm1f(float x) { return emu::approximate(::expm1f(x), 0x1p-24f); }
inline float log1pf(float x) { return emu::approximate(::log1pf(x), 0x1p-24f); }
inline float logf(float x) { return emu::approximate(::logf(x), 0x1p-24f); }
inline float log2f(float x) { return emu::approximate(::log2f(x), 0x1p-24f); }

#if defined(__aarch64__)
using half_t = __fp16;
#else
using half_t = _Float16;
#endif
struct bf16 {
  uint16_t u;
};
struct fp16 {
  half_t h;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emu::unbits<float>(static_cast<uint64_t>(x.u) << 16); }
inline float to_float(fp16 x) { return static_cast<float>(x.h); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t u = static_cast<uint32_t>(emu::bits(x));
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // round to nearest even
  } else if constexpr (std::is_same_v<T, fp16>) {
    return {static_cast<half_t>(x)};
  } else {
    return x;
  }
}

// CPU tensors: there is no device to make current, but a launch that would need it is an error here too.
struct DeviceGuard {
  explicit DeviceGuard(const void*) { ++emu::guards; }
  ~DeviceGuard() { --emu::guards; }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void*, A... args) {
  emu::launch(kernel, {grid, block, smem, false}, args...);
}
template <class... P, class... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void*, A... args) {
  emu::launch(kernel, {grid, block, smem, true}, args...);
}
template <class... P, class... A>
void launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block, size_t smem, void*, A... args) {
  emu::launch(kernel, {grid, block, smem, false, cluster}, args...);
}
inline int sm_count() { return emu::max_resident_blocks(); }
inline size_t shared_limit() { return 227 * 1024; }  // sm_90's
template <class... P>
int resident_blocks(void (*)(P...), int, size_t) {
  return emu::max_resident_blocks();
}
template <class... P>
int resident_clusters(void (*)(P...), int cluster, int, size_t) {
  return emu::max_resident_blocks() / cluster;
}

}  // namespace pk
