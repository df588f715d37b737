#include "collectives.h"
#include "hopper.h"

namespace pk {

namespace {

constexpr int BM = 64, BN = 64, BK = 64, kStages = 3, kTileBytes = BM * BK * 2;

// Registers of A's 16 x 16 fragment at column k: rows g and g + 8, columns 2 c, 2 c + 1 and 8 further.
template <class T>
__device__ void load_fragment(uint32_t (&r)[4], const T* a, int row, int k, int M, int K) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, c = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int y = row + g + (i & 1) * 8, x = k + c + (i >> 1) * 8;
    const T* p = a + static_cast<int64_t>(y) * K + x;
    r[i] = pack2<T>(y < M && x < K ? to_float(p[0]) : 0.f, y < M && x + 1 < K ? to_float(p[1]) : 0.f);
  }
}

// One producer warp (its first lane issues TMA), one consumer warpgroup, a ring of stages between them.
template <class T, bool MN_B, bool A_REGISTERS>
__global__ void __launch_bounds__(160)
    wgmma_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const T* a,
                 float* __restrict__ c, int M, int N, int K) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bars, [2 * kStages]);
  const uint32_t sa = smem_addr(smem), sb = sa + kStages * kTileBytes;
  const uint32_t full = smem_addr(bars), empty = full + 8 * kStages;
  const int tid = static_cast<int>(threadIdx.x), steps = ceil_div(K, BK);
  const int m0 = static_cast<int>(blockIdx.y) * BM, n0 = static_cast<int>(blockIdx.x) * BN;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) mbar_init(full + 8 * i, 1), mbar_init(empty + 8 * i, 128);
    mbar_fence_init();
  }
  __syncthreads();
  if (tid >= 128) {
    for (int k = 0; k < steps && tid == 128; ++k) {
      const int st = k % kStages;
      mbar_wait(empty + 8 * st, (k / kStages & 1) ^ 1);
      mbar_arrive_expect_tx(full + 8 * st, A_REGISTERS ? kTileBytes : 2 * kTileBytes);
      if (!A_REGISTERS) tma_load_2d(sa + st * kTileBytes, map_a, k * BK, m0, full + 8 * st);
      if (MN_B)
        tma_load_2d(sb + st * kTileBytes, map_b, n0, k * BK, full + 8 * st);
      else
        tma_load_2d(sb + st * kTileBytes, map_b, k * BK, n0, full + 8 * st);
    }
    return;
  }
  float acc[BN / 2];
  uint32_t fragment[BK / 16][4];
  for (int k = 0; k < steps; ++k) {
    const int st = k % kStages;
    if constexpr (A_REGISTERS) {
#pragma unroll
      for (int kk = 0; kk < BK / 16; ++kk) load_fragment(fragment[kk], a, m0 + tid / 32 * 16, k * BK + kk * 16, M, K);
    }
    mbar_wait(full + 8 * st, k / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk) {
      const uint64_t db =
          MN_B ? wgmma_desc_mn(sb + st * kTileBytes + kk * 2048, BK * 128) : wgmma_desc(sb + st * kTileBytes + kk * 32);
      if constexpr (A_REGISTERS)
        wgmma_rs<T, BN, MN_B>(acc, fragment[kk], db, k + kk > 0);
      else
        wgmma_ss<T, BN, MN_B>(acc, wgmma_desc(sa + st * kTileBytes + kk * 32), db, k + kk > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    mbar_arrive(empty + 8 * st);
  }
  const int row = m0 + tid / 32 * 16 + tid % 32 / 4, col = n0 + tid % 4 * 2;
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) {
    const int r = row + (i >> 1 & 1) * 8, cc = col + i / 4 * 8 + (i & 1);
    if (r < M && cc < N) c[static_cast<int64_t>(r) * N + cc] = acc[i];
  }
}

template <class T, bool MN_B, bool A_REGISTERS>
void run_wgmma(const void* a, const void* b, float* c, int M, int N, int K, void* stream) {
  const T *pa = static_cast<const T*>(a), *pb = static_cast<const T*>(b);
  const auto map_a = make_tensor_map<T, 2>(pa, {K, M}, {K}, {BK, BM});
  const auto map_b =
      MN_B ? make_tensor_map<T, 2>(pb, {N, K}, {N}, {BN, BK}) : make_tensor_map<T, 2>(pb, {K, N}, {K}, {BK, BN});
  const dim3 grid(static_cast<unsigned>(ceil_div(N, BN)), static_cast<unsigned>(ceil_div(M, BM)));
  launch(wgmma_kernel<T, MN_B, A_REGISTERS>, grid, 160, 2 * kStages * kTileBytes, stream, map_a, map_b, pa, c, M, N, K);
}

template <class T>
void run_wgmma(const void* a, const void* b, float* c, int M, int N, int K, bool b_mn, bool a_registers, void* stream) {
  if (a_registers)
    (b_mn ? run_wgmma<T, true, true> : run_wgmma<T, false, true>)(a, b, c, M, N, K, stream);
  else
    (b_mn ? run_wgmma<T, true, false> : run_wgmma<T, false, false>)(a, b, c, M, N, K, stream);
}

constexpr int kRows = 8;

template <class T>
__global__ void __launch_bounds__(32)
    tma_copy_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int d0) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bar, [1]);
  if (threadIdx.x != 0) return;
  const uint32_t s = smem_addr(smem), full = smem_addr(bar);
  const int y = static_cast<int>(blockIdx.x) * kRows, z = static_cast<int>(blockIdx.y),
            w = static_cast<int>(blockIdx.z);
  mbar_init(full, 1);
  mbar_fence_init();
  for (int x = 0, k = 0; x < d0; x += 64, ++k) {
    tma_store_wait_read<0>();  // the last panel's store still reads the buffer
    mbar_arrive_expect_tx(full, 64 * kRows * 2);
    tma_load_4d(s, from, x, y, z, w, full);
    mbar_wait(full, k & 1);
    tma_store_4d(to, s, x, y, z, w);
    tma_store_commit();
  }
  tma_store_wait_read<0>();
}

__global__ void cluster_kernel(const uint32_t* in, uint32_t* out, int* ranks, int how) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bar, [1]);
  uint32_t* const received = reinterpret_cast<uint32_t*>(smem);
  const int threads = static_cast<int>(blockDim.x), tid = static_cast<int>(threadIdx.x);
  const int rank = cluster_rank(), size = cluster_size(), before = (rank + size - 1) % size;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + tid;
  const uint32_t full = smem_addr(bar);
  if (tid == 0) {
    ranks[2 * blockIdx.x] = rank, ranks[2 * blockIdx.x + 1] = size;
    mbar_init(full, how == 4 ? threads : 1);
    mbar_fence_init();
    if (how == 2 || how == 3) mbar_arrive_expect_tx(full, 4 * threads);
  }
  const uint32_t there = smem_addr(received + tid);
  if (how == 0) received[tid] = in[i];
  cluster_sync();
  uint32_t v = 0;
  if (how == 0) v = ld_cluster<uint32_t>(map_cluster(there, (rank + 1) % size));
  if (how == 1 || how == 4) st_cluster(map_cluster(there, before), in[i]);
  if (how == 2) st_async(map_cluster(there, before), in[i], map_cluster(full, before));
  if (how == 3 && tid % 4 == 0)
    st_async(map_cluster(there, before), make_uint4(in[i], in[i + 1], in[i + 2], in[i + 3]), map_cluster(full, before));
  if (how == 4) mbar_arrive_cluster(map_cluster(full, before));
  if (how >= 2) mbar_wait_cluster(full, 0);
  cluster_sync();
  out[i] = how ? received[tid] : v;
}

template <class T>
__global__ void __launch_bounds__(64) multicast_kernel(const __grid_constant__ TensorMap from, T* out) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bar, [1]);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank(), size = cluster_size();
  const uint32_t full = smem_addr(bar);
  if (tid == 0) {
    mbar_init(full, 1);
    mbar_fence_init();
    mbar_arrive_expect_tx(full, size * 128);
  }
  cluster_sync();
  if (tid == 0)
    tma_multicast_2d(smem_addr(smem) + static_cast<uint32_t>(rank) * 1024, from, 0, static_cast<int>(blockIdx.x), full,
                     static_cast<uint16_t>((1 << size) - 1));
  mbar_wait(full, 0);
  for (int r = 0; r < size; ++r)
    out[(static_cast<int64_t>(blockIdx.x) * size + r) * 64 + tid] = reinterpret_cast<const T*>(smem + 1024 * r)[tid];
}

}  // namespace

void check_cluster(const uint32_t* in, uint32_t* out, int* ranks, int blocks, int cluster, int threads, int how,
                   void* stream) {
  launch_cluster(cluster_kernel, cluster, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                 sizeof(uint32_t) * static_cast<size_t>(threads), stream, in, out, ranks, how);
}

void check_multicast(const void* in, void* out, int blocks, int cluster, DType dtype, void* stream) {
  const DeviceGuard guard(in);
  auto run = [&](auto tag) {
    using T = decltype(tag);
    const auto from = make_tensor_map<T, 2>(static_cast<const T*>(in), {64, blocks}, {64}, {64, 1});
    launch_cluster(multicast_kernel<T>, cluster, static_cast<unsigned>(blocks), 64, 1024 * static_cast<size_t>(cluster),
                   stream, from, static_cast<T*>(out));
  };
  if (dtype == DType::bf16)
    run(bf16{});
  else
    run(fp16{});
}

void check_wgmma(const void* a, const void* b, float* c, int M, int N, int K, bool b_mn, bool a_registers, DType dtype,
                 void* stream) {
  const DeviceGuard guard(c);
  if (dtype == DType::bf16)
    run_wgmma<bf16>(a, b, c, M, N, K, b_mn, a_registers, stream);
  else
    run_wgmma<fp16>(a, b, c, M, N, K, b_mn, a_registers, stream);
}

void check_tma_copy(const void* in, void* out, int d0, int d1, int d2, int d3, int64_t s1, int64_t s2, int64_t s3,
                    DType dtype, void* stream) {
  const DeviceGuard guard(in);  // the kernel's own arguments hold no bare pointer
  auto run = [&](auto tag) {
    using T = decltype(tag);
    const auto from =
        make_tensor_map<T, 4>(static_cast<const T*>(in), {d0, d1, d2, d3}, {s1, s2, s3}, {64, kRows, 1, 1});
    const auto to = make_tensor_map<T, 4>(static_cast<T*>(out), {d0, d1, d2, d3}, {s1, s2, s3}, {64, kRows, 1, 1});
    const dim3 grid(static_cast<unsigned>(ceil_div(d1, kRows)), static_cast<unsigned>(d2), static_cast<unsigned>(d3));
    launch(tma_copy_kernel<T>, grid, 32, 64 * kRows * 2, stream, from, to, d0);
  };
  if (dtype == DType::bf16)
    run(bf16{});
  else
    run(fp16{});
}

}  // namespace pk
