// The gradient of attention's additive bias: one block for each of its tiles adds up what was broadcast, in one order.
#include "attention.h"
#include "attention_config.h"
#include "attention_scores.h"
#include "platform.h"

namespace pk {

namespace {

template <class T, int D>
struct BiasTiles;
template <class T>
struct BiasTiles<T, 128> : AttentionTiles<T, 128, 1, 4, 32, 1, 1> {};
template <class T>
struct BiasTiles<T, 256> : AttentionTiles<T, 256, 1, kWide<T> ? 2 : 4, kWide<T> ? 16 : 32, 1, 1> {};

struct BiasGradient {
  const void* dout;
  const float *base, *delta;
  void* dbias;
  RowStrides dout_n;
  int64_t batch, heads, rows, columns;  // of the bias: the full size, or 1 where it was broadcast
};

template <class T, int D>
__global__ void __launch_bounds__(BiasTiles<T, D>::kThreads)
    attention_bwd_dbias_kernel(const __grid_constant__ Attention a, const __grid_constant__ BiasGradient g) {
  using C = BiasTiles<T, D>;
  constexpr int N = C::N;
  constexpr int UNROLL = kWide<T> && D > 128 ? 4 : C::kOwn;  // one row a step there: all their addresses would spill
  PK_DYN_SHARED(raw);
  PK_SHARED(float, sums, [C::kThreads / kWarp][N]);
  const Shared queries{smem_addr(raw), raw}, douts = queries + C::kOwnBytes, keys = douts + C::kOwnBytes,
                                             values = keys + C::kStepBytes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool every_batch = g.batch == 1, every_head = g.heads == 1, every_row = g.rows == 1;
  const int64_t across = ceil_div(g.columns, int64_t{N}), down = ceil_div(g.rows, int64_t{C::kOwn});
  const int64_t block = blockIdx.x;
  const int j0 = static_cast<int>(block % across) * N, tile_i = static_cast<int>(block / across % down);
  const int own_h = static_cast<int>(block / across / down % g.heads);
  const int own_b = static_cast<int>(block / across / down / g.heads);
  const int column = j0 + lane % 4 * 2;
  const TileColumns<T, D, true> columns(a.n.d), value_columns(a.n.dv);
  const bool exact = a.n.exact;
  float acc[N / 8][4] = {};
  Head x;
  x.pairs = 0, x.q_first = x.k_first = 0;
  x.lq = static_cast<int>(a.n.lq), x.lk = static_cast<int>(a.n.lk);
  for (x.b = 0; x.b < (every_batch ? static_cast<int>(a.n.batch) : own_b + 1); ++x.b) {
    if (a.cu_q) {
      const Lengths s = packed_lengths(a, x.b);
      x.lq = s.lq, x.lk = s.lk, x.q_first = s.q_first, x.k_first = s.k_first;
    }
    const int64_t pairs = static_cast<int64_t>(x.lq) * x.lk;
    const int heads_end = every_head ? static_cast<int>(a.n.heads) : own_h + 1;
    const bool mine = (every_batch || x.b == own_b) && j0 < x.lk;
    for (x.h = every_head ? 0 : own_h; mine && x.h < heads_end; ++x.h) {
      place(a, x);
      const Features<T, true> features(a, x);
      const int kv_head = x.h / static_cast<int>(a.n.group);
      const T* q = static_cast<const T*>(a.q) + x.b * a.n.q[0] + x.h * a.n.q[1] + x.q_first * a.n.q[2];
      const T* k = static_cast<const T*>(a.k) + x.b * a.n.k[0] + kv_head * a.n.k[1] + x.k_first * a.n.k[2];
      const T* v = static_cast<const T*>(a.v) + x.b * a.n.v[0] + kv_head * a.n.v[1] + x.k_first * a.n.v[2];
      const T* dout =
          static_cast<const T*>(g.dout) + x.b * g.dout_n.batch + x.h * g.dout_n.head + x.q_first * g.dout_n.position;
      const int tiles = ceil_div(x.lq, C::kOwn), tiles_end = every_row ? tiles : min(tile_i + 1, tiles);
      for (int tile = every_row ? 0 : tile_i; tile < tiles_end; ++tile) {
        const int i0 = tile * C::kOwn, i1 = min(i0 + C::kOwn, x.lq), row = i0 + warp * 16;
        if (!visits<N>(x.keys_of(i0), x.keys_of(i1 - 1), j0)) continue;
        const auto exists = [&](int i) { return i < x.lq; };
        const auto reads = [&](int j) { return features.reads(x.seen, j); };
        __syncthreads();  // the products of the tile before are done with the memory
        load_tile<T, D, C::kOwn, C::kThreads, UNROLL>(queries, q, a.n.q[2], i0, columns, exists);
        load_tile<T, D, C::kOwn, C::kThreads, UNROLL>(douts, dout, g.dout_n.position, i0, value_columns, exists);
        load_tile<T, D, N, C::kThreads, UNROLL>(keys, k, a.n.k[2], j0, columns, reads);
        load_tile<T, D, N, C::kThreads, UNROLL>(values, v, a.n.v[2], j0, value_columns, reads);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (row >= x.lq) continue;
        float s[1][N / 8][4] = {}, dp[1][N / 8][4] = {};
        product<T, D, true, 1, N>(s, queries, warp * 16, keys, columns, exact);
        product<T, D, true, 1, N>(dp, douts, warp * 16, values, value_columns, exact);
        features.template logits<false, false>(s, s, row + lane / 4, column);
        Interval allowed[2];
        float base[2], delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = row + lane / 4 + 8 * i;
          const int64_t at = row_of_head(a, x) + r;
          allowed[i] = x.keys_of(r);
          base[i] = r < x.lq ? g.base[at] : kInfinity;
          delta[i] = r < x.lq ? g.delta[at] : 0.f;
        }
        mask_by_position(s, allowed, column);
        const uint32_t kept = features.template kept<false, N / 8>(row + lane / 4, column);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float d = kept >> (4 * n + e) & 1 ? dp[0][n][e] * a.x.keep_scale : 0.f;
            const float p = ex2(fmaf(s[0][n][e], features.factor, -base[e / 2]));
            if (p != 0.f) acc[n][e] += p * (d - delta[e / 2]);
          }
      }
    }
    x.pairs += pairs;
  }

  const int64_t plane = (static_cast<int64_t>(own_b) * g.heads + own_h) * g.rows * g.columns;
  const auto store = [&](int64_t index, float value) {
    if (bias_is_float<T>(a))
      static_cast<float*>(g.dbias)[plane + index] = value;
    else
      static_cast<T*>(g.dbias)[plane + index] = from_float<T>(value);
  };
  if (!every_row) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = static_cast<int64_t>(tile_i) * C::kOwn + warp * 16 + lane / 4 + 8 * (e / 2);
        const int64_t j = column + 8 * n + e % 2;
        if (i < g.rows && j < g.columns) store(i * g.columns + j, acc[n][e]);
      }
    return;
  }
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = acc[n][e] + acc[n][2 + e];
#pragma unroll
      for (int o = 4; o < kWarp; o *= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
      if (lane < 4) sums[warp][8 * n + 2 * lane + e] = sum;
    }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < N && j0 + j < g.columns; j += C::kThreads) {
    float sum = 0.f;
    for (int w = 0; w < C::kThreads / kWarp; ++w) sum += sums[w][j];
    store(j0 + j, sum);
  }
}

}  // namespace

void attention_dbias(const Attention& a, const void* dout, const float* base, const float* delta, void* dbias,
                     RowStrides dout_n, int64_t batch, int64_t heads, int64_t rows, int64_t columns, DType dtype,
                     void* stream) {
  const DeviceGuard guard(a.q);
  const BiasGradient g{dout, base, delta, dbias, dout_n, batch, heads, rows, columns};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto size) {
      constexpr int D = decltype(size)::value;
      using C = BiasTiles<T, D>;
      const int64_t tiles = ceil_div(rows, int64_t{C::kOwn}) * ceil_div(columns, int64_t{C::N});
      const int64_t blocks = batch * heads * tiles;
      if (blocks > 0x7fffffff) throw std::invalid_argument("attention: more than 2^31 - 1 tiles of the bias");
      launch(attention_bwd_dbias_kernel<T, D>, dim3(static_cast<unsigned>(blocks)), C::kThreads,
             2 * C::kOwnBytes + 2 * C::kStepBytes, stream, a, g);
    };
    if (a.n.d <= 128 && a.n.dv <= 128)
      run(std::integral_constant<int, 128>{});
    else
      run(std::integral_constant<int, 256>{});
  });
}

}  // namespace pk
