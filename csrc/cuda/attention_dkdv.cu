// dk = sum_i dscore_ij q_i and dv = sum_i dropout(p_ij) dout_i of attention: a block owns a tile of keys of one key
// head and runs over the tiles of queries of all query heads that share it, in order: one owner, one order, no atomics.
// Tiles are transposed, keys are rows, so that both sums are accumulated in place.
#include "attention.h"
#include "attention_config.h"
#include "attention_scores.h"
#include "platform.h"

namespace pk {

namespace {

template <class T, int D, bool GENERAL>
struct KeyTiles;
template <class T>
struct KeyTiles<T, 64, false> : AttentionTiles<T, 64, 2, 4, 16, 2, 2> {};
template <class T>
struct KeyTiles<T, 128, false> : AttentionTiles<T, 128, 1, 8, 16, 2, 1> {};
template <class T>
struct KeyTiles<T, 64, true> : AttentionTiles<T, 64, 1, 4, kWide<T> ? 16 : 32, 2, 2> {};
template <class T>
struct KeyTiles<T, 128, true> : AttentionTiles<T, 128, 1, 4, 16, 2, 1> {};
template <class T>
struct KeyTiles<T, 256, true> : AttentionTiles<T, 256, 1, kWide<T> ? 2 : 4, 16, kWide<T> ? 1 : 2, 1> {};

// Which of the sums a launch makes.  Above 128 the two do not fit in registers together.
enum class Sums { both, dk, dv };

struct KeyGradients {
  const void* dout;
  const float *base, *delta;
  void *dk, *dv;
  RowStrides dout_n, dk_n, dv_n;
};

template <class T, int D, bool GENERAL, Sums SUMS>
__global__ void __launch_bounds__(KeyTiles<T, D, GENERAL>::kThreads, KeyTiles<T, D, GENERAL>::kBlocks)
    attention_bwd_dkdv_kernel(const __grid_constant__ Attention a, const __grid_constant__ KeyGradients g) {
  using C = KeyTiles<T, D, GENERAL>;
  constexpr int M = C::M, N = C::N;
  constexpr bool DK = SUMS != Sums::dv, DV = SUMS != Sums::dk;
  PK_DYN_SHARED(raw);
  PK_SHARED(float, rows, [2][2][N]);  // base and delta of the queries of this tile and of the next
  const Shared keys{smem_addr(raw), raw}, values = keys + C::kOwnBytes, streamed = values + C::kOwnBytes;
  const int group = static_cast<int>(a.n.group), kv_heads = static_cast<int>(a.n.heads) / group;
  PK_SHARED(Head, head, [1]);
  {
    Head found;
    if (!locate<true>(a, C::kOwn, kv_heads, false, found)) return;
    share(head[0], found);
  }
  const Head& x = head[0];
  const int kv_head = x.h;
  const TileColumns<T, D, GENERAL> columns(a.n.d), value_columns(a.n.dv);
  const bool exact = a.n.exact;
  const T* k = static_cast<const T*>(a.k) + x.b * a.n.k[0] + kv_head * a.n.k[1] + x.k_first * a.n.k[2];
  const T* v = static_cast<const T*>(a.v) + x.b * a.n.v[0] + kv_head * a.n.v[1] + x.k_first * a.n.v[2];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, own = tid / kWarp * 16 * M;
  const int j0 = x.tile * C::kOwn, row = j0 + own;
  const auto exists = [lk = x.lk](int j) { return j < lk; };
  load_tile<T, D, C::kOwn, C::kThreads>(keys, k, a.n.k[2], j0, columns, exists);
  load_tile<T, D, C::kOwn, C::kThreads>(values, v, a.n.v[2], j0, value_columns, exists);
  cp_async_commit();  // there may be no tile to arrive with

  float adk[DK ? M : 1][DK ? D / 8 : 1][4] = {}, adv[DV ? M : 1][DV ? D / 8 : 1][4] = {};
  using R = Ring<C::kStages>;
  for (int member = 0; member < group; ++member) {
    Head found = x;
    found.h = kv_head * group + member;
    place(a, found);
    __syncthreads();  // the products of the head before are done with the slots, and everyone has read x
    share(head[0], found);
    const Features<T, GENERAL> features(a, x);
    // Rows that no query sees are left out of the ends, and every tile they are in counts as one with hidden pairs.
    const int some = max(j0, x.seen.begin), beyond = min(j0 + C::kOwn, x.seen.end);
    if (some >= beyond) continue;
    const Interval tiles = tiles_of<N>({x.queries_of(some).begin, x.queries_of(beyond - 1).end});
    const int count = max(tiles.end - tiles.begin, 0);
    const int mine = max(row, x.seen.begin), not_mine = min(row + 16 * M, x.seen.end);
    const bool idle = mine >= not_mine, ragged = row < x.seen.begin || min(row + 16 * M, x.lk) > x.seen.end;
    const Interval first = x.queries_of(mine), last = x.queries_of(not_mine - 1);
    const T* q = static_cast<const T*>(a.q) + x.b * a.n.q[0] + x.h * a.n.q[1] + x.q_first * a.n.q[2];
    const T* dout =
        static_cast<const T*>(g.dout) + x.b * g.dout_n.batch + x.h * g.dout_n.head + x.q_first * g.dout_n.position;
    const int64_t first_row = row_of_head(a, x);
    const auto fetch = [&](int i, int slot) {
      const Shared tile = streamed + slot * 2 * C::kStepBytes;
      const int i0 = (tiles.begin + i) * N;
      const auto wanted = [lq = x.lq](int r) { return r < lq; };
      load_tile<T, D, N, C::kThreads>(tile, q, a.n.q[2], i0, columns, wanted);
      load_tile<T, D, N, C::kThreads>(tile + C::kStepBytes, dout, g.dout_n.position, i0, value_columns, wanted);
    };
    float base = kInfinity, delta = 0.f;
    const auto take_rows = [&](int i) {  // a query that does not exist has weight 0
      const int r = (tiles.begin + i) * N + tid;
      const bool there = tid < N && r < x.lq;
      base = there ? g.base[first_row + r] : kInfinity;
      delta = there ? g.delta[first_row + r] : 0.f;
    };
    const auto put_rows = [&](int slot) {
      if (tid < N) rows[slot][0][tid] = base, rows[slot][1][tid] = delta;
    };
    R::begin(count, fetch);
    take_rows(0);
    put_rows(0);
    for (int i = 0; i < count; ++i) {
      R::ready(i, count, fetch);
      take_rows(i + 1);
      const Shared tile = streamed + R::slot(i) * 2 * C::kStepBytes;
      const int i0 = (tiles.begin + i) * N, column = i0 + lane % 4 * 2;
      if (!idle && visits<N>(first, last, i0)) {
        float s[M][N / 8][4] = {}, cap[M][N / 8][4];
        product<T, D, GENERAL, M, N>(s, keys, own, tile, columns, exact);
        if constexpr (GENERAL) features.template logits<true, true>(s, cap, row + lane / 4, column);
        if (ragged || has_hidden<N>(first, last, i0)) {
          Interval allowed[2 * M];
#pragma unroll
          for (int r = 0; r < 2 * M; ++r) {
            const int j = row + lane / 4 + 8 * r;
            allowed[r] = x.queries_of(j);
            if (j < x.seen.begin || j >= x.seen.end) allowed[r].end = 0;
          }
          mask_by_position(s, allowed, column);
        }
        const uint32_t kept = features.template kept<true, N / 8>(row + lane / 4, column);
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          const float2 b = *reinterpret_cast<const float2*>(&rows[i & 1][0][8 * n + lane % 4 * 2]);
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[m][n][e] = ex2(fmaf(s[m][n][e], features.factor, -(e & 1 ? b.y : b.x)));
        }
        if constexpr (DV) {
          if (g.dv) {
            float p[M][N / 8][4];
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                  p[m][n][e] = !GENERAL ? s[m][n][e] : kept >> (4 * n + e) & 1 ? s[m][n][e] * a.x.keep_scale : 0.f;
            product_of_registers<false, T, D, GENERAL, M, N>(adv, p, tile + C::kStepBytes, value_columns, exact, {});
          }
        }
        if constexpr (DK) {
          if (g.dk) {
            float dp[M][N / 8][4] = {};
            product<T, D, GENERAL, M, N>(dp, values, own, tile + C::kStepBytes, value_columns, exact);
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
              const float2 d = *reinterpret_cast<const float2*>(&rows[i & 1][1][8 * n + lane % 4 * 2]);
#pragma unroll
              for (int m = 0; m < M; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                  float y = dp[m][n][e];
                  if constexpr (GENERAL) y = kept >> (4 * n + e) & 1 ? y * a.x.keep_scale : 0.f;
                  y -= e & 1 ? d.y : d.x;
                  if constexpr (GENERAL) y *= cap[m][n][e];
                  // a key that nobody sees may be NaN, and the product with a weight of 0 too
                  s[m][n][e] = s[m][n][e] == 0.f ? 0.f : s[m][n][e] * y;
                }
            }
            product_of_registers<false, T, D, GENERAL, M, N>(adk, s, tile, columns, exact, {});
          }
        }
      }
      put_rows((i + 1) & 1);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  float factor[2 * M];
  if constexpr (DK) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) factor[i] = a.x.gradient_scale;
    T* dk = static_cast<T*>(g.dk) + x.b * g.dk_n.batch + kv_head * g.dk_n.head + x.k_first * g.dk_n.position;
    if (g.dk) store_rows<T, D, GENERAL, M>(dk, g.dk_n.position, row, x.lk, adk, factor, keys, own, columns);
  }
  if constexpr (DV) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) factor[i] = 1.f;
    T* dv = static_cast<T*>(g.dv) + x.b * g.dv_n.batch + kv_head * g.dv_n.head + x.k_first * g.dv_n.position;
    if (g.dv) store_rows<T, D, GENERAL, M>(dv, g.dv_n.position, row, x.lk, adv, factor, values, own, value_columns);
  }
}

template <class T, int D, bool GENERAL, Sums SUMS>
void run(const Attention& a, const KeyGradients& g, void* stream) {
  using C = KeyTiles<T, D, GENERAL>;
  launch(attention_bwd_dkdv_kernel<T, D, GENERAL, SUMS>, attention_grid(a, a.n.lk, C::kOwn, a.n.heads / a.n.group),
         C::kThreads, 2 * C::kOwnBytes + 2 * C::kStages * C::kStepBytes, stream, a, g);
}

}  // namespace

void attention_dkdv(const Attention& a, const void* dout, const float* base, const float* delta, void* dk, void* dv,
                    RowStrides dout_n, RowStrides dk_n, RowStrides dv_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const KeyGradients g{dout, base, delta, dk, dv, dout_n, dk_n, dv_n};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    choose_instance<T>(a, [&](auto instance) {
      using I = decltype(instance);
      if constexpr (I::D > 128) {
        if (dk) run<T, I::D, I::GENERAL, Sums::dk>(a, g, stream);
        if (dv) run<T, I::D, I::GENERAL, Sums::dv>(a, g, stream);
      } else {
        run<T, I::D, I::GENERAL, Sums::both>(a, g, stream);
      }
    });
  });
}

}  // namespace pk
