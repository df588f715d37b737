// dq = sum_j dscore_ij k_j of attention: a block owns a tile of queries and runs over the tiles of keys they see.
#include "attention.h"
#include "attention_config.h"
#include "attention_scores.h"
#include "platform.h"

namespace pk {

namespace {

template <class T, int D, bool GENERAL>
struct QueryTiles;
template <class T>
struct QueryTiles<T, 64, false> : AttentionTiles<T, 64, 2, 4, 32, 2, 2> {};
template <class T>
struct QueryTiles<T, 128, false> : AttentionTiles<T, 128, 1, 8, 32, 2, 1> {};
template <class T>
struct QueryTiles<T, 64, true> : AttentionTiles<T, 64, 1, 4, kWide<T> ? 16 : 32, 2, 2> {};
template <class T>
struct QueryTiles<T, 128, true> : AttentionTiles<T, 128, 1, 4, 16, 2, 2> {};
template <class T>
struct QueryTiles<T, 256, true> : AttentionTiles<T, 256, 1, kWide<T> ? 2 : 4, 16, kWide<T> ? 1 : 2, 1> {};

struct QueryGradient {
  const void* dout;
  const float *base, *delta;
  void* dq;
  RowStrides dout_n, dq_n;
};

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(QueryTiles<T, D, GENERAL>::kThreads, QueryTiles<T, D, GENERAL>::kBlocks)
    attention_bwd_dq_kernel(const __grid_constant__ Attention a, const __grid_constant__ QueryGradient g) {
  using C = QueryTiles<T, D, GENERAL>;
  constexpr int M = C::M, N = C::N;
  PK_DYN_SHARED(raw);
  const Shared queries{smem_addr(raw), raw}, douts = queries + C::kOwnBytes, streamed = douts + C::kOwnBytes;
  PK_SHARED(Head, head, [1]);
  {
    Head found;
    if (!locate<false>(a, C::kOwn, static_cast<int>(a.n.heads), a.n.right < a.n.lq + a.n.lk, found)) return;
    place(a, found);
    share(head[0], found);
  }
  const Head& x = head[0];
  const Features<T, GENERAL> features(a, x);
  const TileColumns<T, D, GENERAL> columns(a.n.d), value_columns(a.n.dv);
  const bool exact = a.n.exact, mask_tensors = a.mask || a.bias;
  const int kv_head = x.h / static_cast<int>(a.n.group);
  const T* q = static_cast<const T*>(a.q) + x.b * a.n.q[0] + x.h * a.n.q[1] + x.q_first * a.n.q[2];
  const T* k = static_cast<const T*>(a.k) + x.b * a.n.k[0] + kv_head * a.n.k[1] + x.k_first * a.n.k[2];
  const T* v = static_cast<const T*>(a.v) + x.b * a.n.v[0] + kv_head * a.n.v[1] + x.k_first * a.n.v[2];
  const T* dout =
      static_cast<const T*>(g.dout) + x.b * g.dout_n.batch + x.h * g.dout_n.head + x.q_first * g.dout_n.position;

  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = static_cast<int>(threadIdx.x) / kWarp * 16 * M;
  const int i0 = x.tile * C::kOwn, row = i0 + own;
  const Interval tiles = tiles_of<N>({x.keys_of(i0).begin, x.keys_of(min(i0 + C::kOwn, x.lq) - 1).end});
  const int count = max(tiles.end - tiles.begin, 0);
  const Interval first = x.keys_of(row), last = x.keys_of(min(row + 16 * M, x.lq) - 1);

  const auto fetch = [&](int i, int slot) {
    const Shared tile = streamed + slot * 2 * C::kStepBytes;
    const int j0 = (tiles.begin + i) * N;
    const Interval seen = x.seen;
    const auto reads = [&](int j) { return features.reads(seen, j); };
    load_tile<T, D, N, C::kThreads>(tile, k, a.n.k[2], j0, columns, reads);
    load_tile<T, D, N, C::kThreads>(tile + C::kStepBytes, v, a.n.v[2], j0, value_columns, reads);
  };
  const auto exists = [lq = x.lq](int i) { return i < lq; };
  load_tile<T, D, C::kOwn, C::kThreads>(queries, q, a.n.q[2], i0, columns, exists);
  load_tile<T, D, C::kOwn, C::kThreads>(douts, dout, g.dout_n.position, i0, value_columns, exists);
  using R = Ring<C::kStages>;
  R::begin(count, fetch);

  float acc[M][D / 8][4] = {}, base[2 * M], delta[2 * M];
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    const int r = row + lane / 4 + 8 * i;
    const int64_t at = row_of_head(a, x) + r;
    base[i] = r < x.lq ? g.base[at] : kInfinity;
    delta[i] = r < x.lq ? g.delta[at] : 0.f;
  }
  for (int i = 0; i < count; ++i) {
    R::ready(i, count, fetch);
    const Shared tile = streamed + R::slot(i) * 2 * C::kStepBytes;
    const int j0 = (tiles.begin + i) * N, column = j0 + lane % 4 * 2;
    if (row >= x.lq || !visits<N>(first, last, j0)) continue;
    float s[M][N / 8][4] = {}, cap[M][N / 8][4];
    product<T, D, GENERAL, M, N>(s, queries, own, tile, columns, exact);
    if constexpr (GENERAL) features.template logits<false, true>(s, cap, row + lane / 4, column);
    if (has_hidden<N>(first, last, j0)) {
      Interval allowed[2 * M];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) allowed[r] = x.keys_of(row + lane / 4 + 8 * r);
      mask_by_position(s, allowed, column);
    }
    uint32_t seen[N / 8] = {};
    if constexpr (GENERAL) seen_columns(seen, s, mask_tensors);
    float dp[M][N / 8][4] = {};
    product<T, D, GENERAL, M, N>(dp, douts, own, tile + C::kStepBytes, value_columns, exact);
    const uint32_t kept = features.template kept<false, N / 8>(row + lane / 4, column);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 2 * m + e / 2;
          const float p = ex2(fmaf(s[m][n][e], features.factor, -base[r]));
          float d = dp[m][n][e];
          if constexpr (GENERAL) d = kept >> (4 * n + e) & 1 ? d * a.x.keep_scale : 0.f;
          d -= delta[r];
          if constexpr (GENERAL) d *= cap[m][n][e];
          s[m][n][e] = GENERAL && p == 0.f ? 0.f : p * d;  // d may be NaN where nobody looks
        }
    product_of_registers<GENERAL, T, D, GENERAL, M, N>(acc, s, tile, columns, exact, seen);
  }
  cp_async_wait<0>();
  __syncthreads();
  float factor[2 * M];
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) factor[i] = a.x.gradient_scale;
  T* dq = static_cast<T*>(g.dq) + x.b * g.dq_n.batch + x.h * g.dq_n.head + x.q_first * g.dq_n.position;
  store_rows<T, D, GENERAL, M>(dq, g.dq_n.position, row, x.lq, acc, factor, queries, own, columns);
}

}  // namespace

void attention_dq(const Attention& a, const void* dout, const float* base, const float* delta, void* dq,
                  RowStrides dout_n, RowStrides dq_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const QueryGradient g{dout, base, delta, dq, dout_n, dq_n};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    choose_instance<T>(a, [&](auto instance) {
      using I = decltype(instance);
      using C = QueryTiles<T, I::D, I::GENERAL>;
      launch(attention_bwd_dq_kernel<T, I::D, I::GENERAL>, attention_grid(a, a.n.lq, C::kOwn, a.n.heads), C::kThreads,
             2 * C::kOwnBytes + 2 * C::kStages * C::kStepBytes, stream, a, g);
    });
  });
}

}  // namespace pk
