// A self-test, not the library's attention: 64 x 64 tiles, 4 warps of 16 query rows, cp.async double buffering,
// ldmatrix and mma.sync with the online softmax between the two products.
#include "../cuda/platform.h"
#include "selftest_kernels.h"

namespace pk {

namespace {

constexpr int D = 64, BM = 64, BN = 64, kThreads = 128, kTile = BN * D, kTileBytes = kTile * 2;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

// Byte offset of 8-element chunk `chunk` of row r, 128-byte rows, XOR swizzled: ldmatrix has no bank conflicts.
__device__ __forceinline__ uint32_t at(int r, int chunk) {
  return static_cast<uint32_t>(r * 128 + ((chunk ^ (r & 7)) << 4));
}

template <class T>
__device__ __forceinline__ void load_tile(uint32_t dst, const T* src, int row0, int length) {
#pragma unroll
  for (int i = 0; i < kTile / 8 / kThreads; ++i) {
    const int c = static_cast<int>(threadIdx.x) + i * kThreads, r = c >> 3, chunk = c & 7;
    const bool ok = row0 + r < length;
    cp_async16(dst + at(r, chunk), src + static_cast<int64_t>(ok ? row0 + r : 0) * D + chunk * 8, ok);
  }
}

// One thread's share of the tile of scores: rows g and g + 8 of its warp's 16, two columns of every eight.
struct Rows {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float acc[D / 8][4] = {};

  __device__ __forceinline__ void softmax(float (&s)[BN / 8][4], float scale_log2) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = largest[h];
#pragma unroll
      for (int n = 0; n < BN / 8; ++n) m = fmaxf(m, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
      m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
      const float shift = m == -INFINITY ? 0.f : m * scale_log2, rescale = ex2(largest[h] * scale_log2 - shift);
      largest[h] = m;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < BN / 8; ++n)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) total += s[n][e] = ex2(s[n][e] * scale_log2 - shift);
      sum[h] = sum[h] * rescale + total;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) acc[n][2 * h] *= rescale, acc[n][2 * h + 1] *= rescale;
    }
  }
};

template <class T, bool CAUSAL>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ o,
                     float* __restrict__ lse, int length, float scale_log2) {
  PK_DYN_SHARED(smem);
  const uint32_t sq = smem_addr(smem), sk = sq + BM * D * 2, sv = sk + 2 * kTileBytes;
  const int lane = static_cast<int>(threadIdx.x) & 31, warp = static_cast<int>(threadIdx.x) >> 5;
  const int m0 = static_cast<int>(blockIdx.x) * BM, row = m0 + warp * 16 + (lane >> 2);
  const int64_t base = static_cast<int64_t>(blockIdx.y) * length * D;
  q += base, k += base, v += base, o += base;
  const int tiles = ceil_div(CAUSAL ? min(m0 + BM, length) : length, BN);
  load_tile(sq, q, m0, length);
  load_tile(sk, k, 0, length);
  load_tile(sv, v, 0, length);
  cp_async_commit();

  uint32_t qf[D / 16][4];
  Rows rows;
  for (int j = 0; j < tiles; ++j) {
    const int st = j & 1;
    if (j + 1 < tiles) {
      load_tile(sk + (st ^ 1) * kTileBytes, k, (j + 1) * BN, length);
      load_tile(sv + (st ^ 1) * kTileBytes, v, (j + 1) * BN, length);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (j == 0) {
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) ldmatrix_x4(qf[kk], sq + at(warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
    }
    float s[BN / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
      for (int n = 0; n < BN / 16; ++n) {
        uint32_t b[4];
        const int r = n * 16 + (lane & 7) + ((lane >> 4) << 3);
        ldmatrix_x4(b, sk + st * kTileBytes + at(r, kk * 2 + ((lane >> 3) & 1)));
        mma_m16n8k16<T>(s[2 * n], qf[kk], b[0], b[1]);
        mma_m16n8k16<T>(s[2 * n + 1], qf[kk], b[2], b[3]);
      }
    if ((j + 1) * BN > length || (CAUSAL && (j + 1) * BN > m0)) {
#pragma unroll
      for (int n = 0; n < BN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = j * BN + n * 8 + (lane & 3) * 2 + (e & 1), r = row + (e >> 1) * 8;
          if (c >= length || (CAUSAL && c > r)) s[n][e] = -INFINITY;
        }
    }
    rows.softmax(s, scale_log2);
#pragma unroll
    for (int kk = 0; kk < BN / 16; ++kk) {
      const uint32_t p[4] = {pack2<T>(s[2 * kk][0], s[2 * kk][1]), pack2<T>(s[2 * kk][2], s[2 * kk][3]),
                             pack2<T>(s[2 * kk + 1][0], s[2 * kk + 1][1]),
                             pack2<T>(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, sv + st * kTileBytes + at(kk * 16 + (lane & 15), n * 2 + (lane >> 4)));
        mma_m16n8k16<T>(rows.acc[2 * n], p, b[0], b[1]);
        mma_m16n8k16<T>(rows.acc[2 * n + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();  // the next round's prefetch overwrites stage st
  }
  cp_async_wait<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + h * 8;
    float sum = rows.sum[h];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (r >= length) continue;
    const float inverse = 1.f / sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<uint32_t*>(o + static_cast<int64_t>(r) * D + n * 8 + (lane & 3) * 2) =
          pack2<T>(rows.acc[n][2 * h] * inverse, rows.acc[n][2 * h + 1] * inverse);
    if ((lane & 3) == 0)
      lse[static_cast<int64_t>(blockIdx.y) * length + r] = (rows.largest[h] * scale_log2 + __log2f(sum)) * kLn2;
  }
}

}  // namespace

void selftest_attention(const void* q, const void* k, const void* v, void* o, float* lse, int heads, int length,
                        float scale, bool causal, DType dtype, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(length, BM)), static_cast<unsigned>(heads));
  auto run = [&](auto tag) {
    using T = decltype(tag);
    launch(causal ? attention_kernel<T, true> : attention_kernel<T, false>, grid, kThreads, BM * D * 2 + 4 * kTileBytes,
           stream, static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(o),
           lse, length, scale * kLog2e);
  };
  if (dtype == DType::bf16)
    run(bf16{});
  else
    run(fp16{});
}

}  // namespace pk
