// sm_90a: mbarriers, TMA, wgmma, setmaxnreg, clusters.  For sources named *_sm90.cu, which are compiled for sm_90a
// only; csrc/emulator/hopper.h has the same names.
#pragma once
#include "platform.h"

namespace pk {

// Shared-memory matrix descriptors, 128-byte swizzle, rows of 64 16-bit elements, 8-row groups 1024 bytes apart.
// K-major operand; 16 further along K: + 32 bytes.
__host__ __device__ inline uint64_t wgmma_desc(uint32_t addr) {
  return static_cast<uint64_t>((addr & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// MN-major operand (rows are K), panels of 64 MN elements panel_bytes apart; 16 further along K: + 2048 bytes.
__host__ __device__ inline uint64_t wgmma_desc_mn(uint32_t addr, int panel_bytes) {
  return static_cast<uint64_t>((addr & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 | 64ull << 32 |
         1ull << 62;
}
// The same operand `bytes` further on.  Only the low word changes, so that a loop adds constants instead of rebuilding.
__host__ __device__ inline uint64_t wgmma_desc_at(uint64_t desc, int bytes) {
  const uint32_t low = static_cast<uint32_t>(desc) + static_cast<uint32_t>(bytes >> 4);
  return (desc & 0xffffffff00000000ull) | low;
}

}  // namespace pk

#if !defined(__CUDACC__)
#include "../emulator/hopper.h"
#else

#include <cuda.h>

namespace pk {

using TensorMap = CUtensorMap;

// An R-dimensional tensor of T (16-bit), innermost dimension first and dense; stride: of dimensions 1.. in elements.
// Boxes land in shared memory dense, innermost first, 128-byte swizzled; outside the tensor loads give zeros and stores
// write nothing.
template <class T, int R>
TensorMap make_tensor_map(const T* base, const int (&dim)[R], const int64_t (&stride)[R - 1], const int (&box)[R]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  static const auto encode = [] {  // asked of the driver at run time: the module loads where there is none
    void* fn = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &fn, 12000, cudaEnableDefault, &result),
          "driver entry point");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(fn);
  }();
  TensorMap m;
  cuuint64_t dims[R], strides[R];
  cuuint32_t boxes[R], ones[R];
  for (int i = 0; i < R; ++i) {
    dims[i] = static_cast<cuuint64_t>(dim[i]), boxes[i] = static_cast<cuuint32_t>(box[i]), ones[i] = 1;
    if (i) strides[i - 1] = static_cast<cuuint64_t>(stride[i - 1]) * sizeof(T);
  }
  constexpr auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (encode(&m, type, R, const_cast<T*>(base), dims, strides, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refused the tensor map");
  return m;
}

__device__ __forceinline__ void mbar_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// After mbar_init, before TMA may use the barrier.
__device__ __forceinline__ void mbar_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbar_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbar_arrive_expect_tx(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Returns once the phase of this parity has completed.
__device__ __forceinline__ void mbar_wait(uint32_t bar, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra wait;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Where other blocks of the cluster take part: they arrive (at a mapped address), store asynchronously or multicast,
// and what they wrote before is seen only after a wait of the cluster's scope.
__device__ __forceinline__ void mbar_arrive_cluster(uint32_t bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbar_wait_cluster(uint32_t bar, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nwait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra wait;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Between a thread's own writes to shared memory and their use by TMA or wgmma, in the writing thread.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tma_prefetch(const TensorMap& m) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&m) : "memory");
}
__device__ __forceinline__ void tma_load_2d(uint32_t dst, const TensorMap& m, int c0, int c1, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          dst),
      "l"(&m), "r"(c0), "r"(c1), "r"(bar)
      : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t dst, const TensorMap& m, int c0, int c1, int c2, int c3,
                                            uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(dst),
      "l"(&m), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(bar)
      : "memory");
}
// The box goes to the same address in every block of the cluster whose rank is a bit of `ranks`, and its bytes to the
// mbarrier at the same address there.
__device__ __forceinline__ void tma_multicast_2d(uint32_t dst, const TensorMap& m, int c0, int c1, uint32_t bar,
                                                 uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(&m), "r"(c0), "r"(c1), "r"(bar), "h"(ranks)
      : "memory");
}
__device__ __forceinline__ void tma_multicast_4d(uint32_t dst, const TensorMap& m, int c0, int c1, int c2, int c3,
                                                 uint32_t bar, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(&m), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(bar), "h"(ranks)
      : "memory");
}
__device__ __forceinline__ void tma_store_4d(const TensorMap& m, uint32_t src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&m),
               "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The shared memory of all but the last N groups may be overwritten.
template <int N>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// Registers move between warpgroups; over the block the totals must balance, or inc waits for ever.
template <int N>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Clusters.  Before a block is first reached from another one, and before it ends, a barrier of the cluster is needed.
__device__ __forceinline__ int cluster_rank() {
  int r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ int cluster_size() {
  int r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// All threads of the cluster that have not exited meet; the relaxed one orders no memory.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The address in the block of that rank of what is at `addr` in this one: for the functions below, for
// mbar_arrive_cluster, and for nothing else.
__device__ __forceinline__ uint32_t map_cluster(uint32_t addr, int rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
}
// T: uint32_t or uint4.
template <class T>
__device__ __forceinline__ T ld_cluster(uint32_t addr) {
  T v;
  if constexpr (std::is_same_v<T, uint4>)
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(addr)
                 : "memory");
  else
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
  return v;
}
template <class T>
__device__ __forceinline__ void st_cluster(uint32_t addr, T v) {
  if constexpr (std::is_same_v<T, uint4>)
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  else
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
}
// Stores v and then adds its bytes to the mbarrier in the same block, both at mapped addresses.
__device__ __forceinline__ void st_async(uint32_t dst, uint32_t v, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(dst), "r"(v), "r"(bar)
               : "memory");
}
__device__ __forceinline__ void st_async(uint32_t dst, uint4 v, uint32_t bar) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(dst),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(bar)
               : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Ties registers to this place in the program: the compiler may not move their uses across it, which it otherwise does,
// because wgmma_wait has no register operands.
template <int N>
__device__ __forceinline__ void wgmma_touch(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
__device__ __forceinline__ void wgmma_touch(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// The accumulator's N / 2 registers as one operand list, spelled for N = 32, 64 and 128.
#define PK_D8(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PK_D32(i) PK_D8(i), PK_D8(i + 8), PK_D8(i + 16), PK_D8(i + 24)
#define PK_OUT16 PK_D8(0), PK_D8(8)
#define PK_OUT32 PK_D32(0)
#define PK_OUT64 PK_D32(0), PK_D32(32)
#define PK_S16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PK_S32 PK_S16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PK_S64                                                                                                \
  PK_S32                                                                                                      \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63"
#define PK_SS(n, t, S, D, a, b, p, tb)                                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." t "." t \
               " {" S "}, %" #a ", %" #b ", p, 1, 1, 0, %" #tb ";\n}"                                                  \
               : D                                                                                                     \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(scale_d)), "n"(MN_B ? 1 : 0))
#define PK_RS(n, t, S, D, a0, a1, a2, a3, b, p, tb)                                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." t "." t \
               " {" S "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #tb ";\n}"                    \
               : D                                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(static_cast<int>(scale_d)),              \
                 "n"(MN_B ? 1 : 0))

// D[64 x N] (+)= A B^T over 16 of K, A K-major from shared memory (ss) or registers (rs), B N x K; asynchronous.
template <class T, int N, bool MN_B>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a_desc, uint64_t b_desc, bool scale_d) {
  static_assert(N == 32 || N == 64 || N == 128);
  constexpr bool BF = std::is_same_v<T, bf16>;
  if constexpr (N == 32 && BF)
    PK_SS(32, "bf16", PK_S16, PK_OUT16, 16, 17, 18, 19);
  else if constexpr (N == 32)
    PK_SS(32, "f16", PK_S16, PK_OUT16, 16, 17, 18, 19);
  else if constexpr (N == 64 && BF)
    PK_SS(64, "bf16", PK_S32, PK_OUT32, 32, 33, 34, 35);
  else if constexpr (N == 64)
    PK_SS(64, "f16", PK_S32, PK_OUT32, 32, 33, 34, 35);
  else if constexpr (BF)
    PK_SS(128, "bf16", PK_S64, PK_OUT64, 64, 65, 66, 67);
  else
    PK_SS(128, "f16", PK_S64, PK_OUT64, 64, 65, 66, 67);
}
template <class T, int N, bool MN_B>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_desc, bool scale_d) {
  static_assert(N == 64 || N == 128);
  constexpr bool BF = std::is_same_v<T, bf16>;
  if constexpr (N == 64 && BF)
    PK_RS(64, "bf16", PK_S32, PK_OUT32, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (N == 64)
    PK_RS(64, "f16", PK_S32, PK_OUT32, 32, 33, 34, 35, 36, 37, 38);
  else if constexpr (BF)
    PK_RS(128, "bf16", PK_S64, PK_OUT64, 64, 65, 66, 67, 68, 69, 70);
  else
    PK_RS(128, "f16", PK_S64, PK_OUT64, 64, 65, 66, 67, 68, 69, 70);
}

#undef PK_SS
#undef PK_RS
#undef PK_D8
#undef PK_D32
#undef PK_OUT16
#undef PK_OUT32
#undef PK_OUT64
#undef PK_S16
#undef PK_S32
#undef PK_S64

}  // namespace pk
#endif
