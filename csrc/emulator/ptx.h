// g++ side of csrc/cuda/ptx.h: the same names, each a call into the emulator.
#pragma once
#include "platform.h"

namespace pk {

template <class T>
uint32_t pack2(float lo, float hi) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  return static_cast<uint32_t>(emu::bits(from_float<T>(lo)) | emu::bits(from_float<T>(hi)) << 16);
}
inline float ex2(float x) {
  const float y = exp2f(x);
  if (!emu::device_arithmetic || x == rintf(x)) return y;
  return y < 0x1p-126f ? 0.f : emu::off_by(y, 0x1.6ap-23f);
}
inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

inline void prefetch(const void*) {}
inline uint32_t smem_addr(const void* p) { return emu::smem_addr(p); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, EMU_SITE) { emu::ldmatrix(r, a, 4, false, site); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, EMU_SITE) { emu::ldmatrix(r, a, 4, true, site); }
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_SITE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  emu::mma16816(d, a, b0, b1, std::is_same_v<T, bf16>, site);
}

inline uint32_t to_tf32(float x) {
  const uint32_t u = static_cast<uint32_t>(emu::bits(x));
  return x != x ? u : (u + 0x1000u) & 0xffffe000u;  // to nearest, ties away from zero
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_SITE) {
  emu::mma1688(d, a, b0, b1, site);
}

inline void cp_async16(uint32_t dst, const void* src, bool pred = true, EMU_SITE) {
  emu::cp_async(dst, src, 16, pred, site);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  emu::cp_async_wait(N);
}

inline void named_barrier_sync(int id, int n, EMU_SITE) { emu::named_barrier(id, n, true, site); }
inline void named_barrier_arrive(int id, int n, EMU_SITE) { emu::named_barrier(id, n, false, site); }
inline void grid_sync(EMU_SITE) { emu::grid_sync(site); }

template <class T>
__forceinline__ T ld_cg(const T* p) {
  return *p;
}
__attribute__((noinline, no_sanitize("thread"))) inline uint32_t ld_acquire(const uint32_t* p, EMU_SITE) {
  emu::yield();
  emu::atomic_access(p, sizeof *p, emu::Atomic::load_acquire, site);
  return *static_cast<const volatile uint32_t*>(p);
}
__attribute__((noinline, no_sanitize("thread"))) inline void st_release(uint32_t* p, uint32_t v, EMU_SITE) {
  emu::yield();
  emu::atomic_access(p, sizeof *p, emu::Atomic::store_release, site);
  if (*static_cast<volatile uint32_t*>(p) != v) emu::made_progress();
  *static_cast<volatile uint32_t*>(p) = v;
}

}  // namespace pk
