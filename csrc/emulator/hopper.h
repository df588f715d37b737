// g++ side of csrc/cuda/hopper.h: mbarriers, TMA (2-d and 4-d, 128-byte swizzle, load, multicast and store), wgmma,
// setmaxnreg, clusters.
#pragma once
#include "platform.h"
#include "tensor_map.h"

namespace emu {

TensorMap make_tensor_map(const void* base, int element, int rank, const int* dim, const int64_t* stride,
                          const int* box);
void mbar_init(uint32_t bar, int count, Site);
void mbar_fence_init();
void mbar_arrive(uint32_t bar, int tx, Site);
void mbar_wait(uint32_t bar, int parity, bool cluster, Site);
void fence_proxy_async();
void tma_load(uint32_t dst, const TensorMap&, const int (&at)[4], uint32_t bar, int mask, Site);  // mask < 0: own block
void tma_store(const TensorMap&, uint32_t src, const int (&at)[4], Site);
void tma_store_commit();
void tma_store_wait(int n);

struct WgmmaArgs {
  int n;
  const uint32_t* a_regs;  // A from registers, else null
  uint64_t a_desc, b_desc;
  bool scale_d, b_mn, bf16;
};
void wgmma(float* d, const WgmmaArgs&, Site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n, Site);
void setmaxnreg(int n, bool inc, Site);

int cluster_rank();
int cluster_size();
void cluster_arrive(bool relaxed, Site);
void cluster_wait(Site);
uint32_t map_cluster(uint32_t addr, int rank, Site);
void ld_cluster(uint32_t addr, void* to, int bytes, Site);
void st_cluster(uint32_t addr, const void* from, int bytes, Site);
void st_async(uint32_t dst, const uint32_t* value, int bytes, uint32_t bar, Site);

}  // namespace emu

namespace pk {

using TensorMap = emu::TensorMap;

template <class T, int R>
TensorMap make_tensor_map(const T* base, const int (&dim)[R], const int64_t (&stride)[R - 1], const int (&box)[R]) {
  return emu::make_tensor_map(base, sizeof(T), R, dim, stride, box);
}
inline void mbar_init(uint32_t bar, int count, EMU_SITE) { emu::mbar_init(bar, count, site); }
inline void mbar_fence_init() { emu::mbar_fence_init(); }
inline void mbar_arrive(uint32_t bar, EMU_SITE) { emu::mbar_arrive(bar, 0, site); }
inline void mbar_arrive_expect_tx(uint32_t bar, int bytes, EMU_SITE) { emu::mbar_arrive(bar, bytes, site); }
inline void mbar_wait(uint32_t bar, int parity, EMU_SITE) { emu::mbar_wait(bar, parity, false, site); }
inline void mbar_wait_cluster(uint32_t bar, int parity, EMU_SITE) { emu::mbar_wait(bar, parity, true, site); }
inline void mbar_arrive_cluster(uint32_t bar, EMU_SITE) { emu::mbar_arrive(bar, 0, site); }
inline void fence_proxy_async() { emu::fence_proxy_async(); }
inline void tma_prefetch(const TensorMap&) {}
inline void tma_load_2d(uint32_t dst, const TensorMap& m, int c0, int c1, uint32_t bar, EMU_SITE) {
  emu::tma_load(dst, m, {c0, c1, 0, 0}, bar, -1, site);
}
inline void tma_load_4d(uint32_t dst, const TensorMap& m, int c0, int c1, int c2, int c3, uint32_t bar, EMU_SITE) {
  emu::tma_load(dst, m, {c0, c1, c2, c3}, bar, -1, site);
}
inline void tma_multicast_2d(uint32_t dst, const TensorMap& m, int c0, int c1, uint32_t bar, uint16_t ranks, EMU_SITE) {
  emu::tma_load(dst, m, {c0, c1, 0, 0}, bar, ranks, site);
}
inline void tma_multicast_4d(uint32_t dst, const TensorMap& m, int c0, int c1, int c2, int c3, uint32_t bar,
                             uint16_t ranks, EMU_SITE) {
  emu::tma_load(dst, m, {c0, c1, c2, c3}, bar, ranks, site);
}
inline void tma_store_4d(const TensorMap& m, uint32_t src, int c0, int c1, int c2, int c3, EMU_SITE) {
  emu::tma_store(m, src, {c0, c1, c2, c3}, site);
}
inline void tma_store_commit() { emu::tma_store_commit(); }
template <int N>
void tma_store_wait_read() {
  emu::tma_store_wait(N);
}
template <int N>
void setmaxnreg_inc(EMU_SITE) {
  emu::setmaxnreg(N, true, site);
}
template <int N>
void setmaxnreg_dec(EMU_SITE) {
  emu::setmaxnreg(N, false, site);
}

inline int cluster_rank() { return emu::cluster_rank(); }
inline int cluster_size() { return emu::cluster_size(); }
inline void cluster_arrive(EMU_SITE) { emu::cluster_arrive(false, site); }
inline void cluster_arrive_relaxed(EMU_SITE) { emu::cluster_arrive(true, site); }
inline void cluster_wait(EMU_SITE) { emu::cluster_wait(site); }
inline void cluster_sync(EMU_SITE) {
  emu::cluster_arrive(false, site);
  emu::cluster_wait(site);
}
inline uint32_t map_cluster(uint32_t addr, int rank, EMU_SITE) { return emu::map_cluster(addr, rank, site); }
template <class T>
T ld_cluster(uint32_t addr, EMU_SITE) {
  T v;
  emu::ld_cluster(addr, &v, sizeof v, site);
  return v;
}
template <class T>
void st_cluster(uint32_t addr, T v, EMU_SITE) {
  emu::st_cluster(addr, &v, sizeof v, site);
}
inline void st_async(uint32_t dst, uint32_t v, uint32_t bar, EMU_SITE) { emu::st_async(dst, &v, 4, bar, site); }
inline void st_async(uint32_t dst, uint4 v, uint32_t bar, EMU_SITE) {
  const uint32_t words[] = {v.x, v.y, v.z, v.w};
  emu::st_async(dst, words, 16, bar, site);
}

inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int N>
void wgmma_wait(EMU_SITE) {
  emu::wgmma_wait(N, site);
}
template <class R, int N>
inline void wgmma_touch(R (&)[N]) {}
template <class T, int N, bool MN_B>
inline void wgmma_ss(float (&d)[N / 2], uint64_t a_desc, uint64_t b_desc, bool scale_d, EMU_SITE) {
  emu::wgmma(d, {N, nullptr, a_desc, b_desc, scale_d, MN_B, std::is_same_v<T, bf16>}, site);
}
template <class T, int N, bool MN_B>
inline void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_desc, bool scale_d, EMU_SITE) {
  emu::wgmma(d, {N, a, 0, b_desc, scale_d, MN_B, std::is_same_v<T, bf16>}, site);
}

}  // namespace pk
