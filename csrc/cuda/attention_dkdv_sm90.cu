// dk = sum_i dscore_ij q_i and dv = sum_i p_ij dout_i of attention for sm_90a: a block owns 64 keys of one key head for
// each of its two consumer warpgroups and runs over the tiles of queries of all query heads that share it, in order:
// one owner, one order, no atomics.  Tiles are transposed, keys are rows, so that both sums are accumulated in place.
// At head size 256 both warpgroups own the same 64 keys, and half of the columns of the sums each.
//
// Warps of a third warpgroup keep tiles of Q, of dout, and what is known of their rows coming.  The exponentials are
// made while dp = V dout^T runs, the rest of dscore while dv does, and dk runs into the next tile.  A block has one
// tile of keys: to take one after another, as the other kernels do, costs registers that the products of head size 128
// need.
#include "attention.h"
#include "attention_sm90.h"

namespace pk {

namespace {

// GENERAL: as in the forward; what the cap leaves of the gradient is one more register an element, and with two sums of
// 128 columns there are registers for half the elements.
template <int D_, bool GENERAL>
struct KeyShape {
  // Two sums of 256 columns do not fit in the registers of a warpgroup.
  static constexpr bool kSplit = D_ == 256;
  static constexpr int D = D_, kGroups = 2, kOwn = kSplit ? 64 : 64 * kGroups, kColumns = kSplit ? D / 2 : D;
  static constexpr int N = D >= 128 && GENERAL ? 32 : 64, kStages = 4;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1), kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kOwnBytes = tile_bytes(kOwn, D), kStepBytes = tile_bytes(N, D);
  static constexpr size_t kShared = 2 * kOwnBytes + 2 * kStages * kStepBytes;
  // The first of a warp's 16 keys in the tile.
  __device__ static __forceinline__ int own_row(int warp) { return (kSplit ? warp % 4 : warp) * 16; }
};

struct KeyMaps {
  TensorMap q, dout, k, v;
};

struct KeyGradients {
  const float *base, *delta;
  void *dk, *dv;
  RowStrides dk_n, dv_n;
};

struct Bars {
  uint64_t full_own, landed[2], full[4], empty[4];
};

// What a warp knows of its keys.  In registers it would be there through all products, which leave none.
struct Keys {
  Head head;
  Interval tiles;  // of queries that see any of the block's keys; the same for every head of the group
  Interval whole;  // queries that see all the warp's keys
};

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(KeyShape<D, GENERAL>::kThreads, 1)
    attention_bwd_dkdv_sm90_kernel(const __grid_constant__ Attention a, const __grid_constant__ KeyGradients g,
                                   const __grid_constant__ KeyMaps maps, const __grid_constant__ Schedule order) {
  using C = KeyShape<D, GENERAL>;
  constexpr int N = C::N, kGroups = C::kGroups, kStages = C::kStages;
  PK_DYN_SHARED(raw);
  PK_SHARED(Bars, bars, [1]);
  PK_SHARED(Keys, kept, [C::kThreads / kWarp]);  // of each warp
  PK_SHARED(float, rows, [kStages][2][N]);       // base and delta of the queries in each slot
  const auto bar = [&](const uint64_t& x) { return smem_addr(&x); };
  const uint32_t keys = smem_addr(raw), values = keys + C::kOwnBytes, queries = values + C::kOwnBytes,
                 douts = queries + kStages * C::kStepBytes;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int wg = __shfl_sync(kAllLanes, tid / kWarpgroup, 0), warp = __shfl_sync(kAllLanes, tid / kWarp, 0);
  if (tid == 0) {
    mbar_init(bar(bars->full_own), 2);
    mbar_init(bar(bars->landed[0]), 1), mbar_init(bar(bars->landed[1]), 1);
    for (int i = 0; i < kStages; ++i) {
      mbar_init(bar(bars->full[i]), 3), mbar_init(bar(bars->empty[i]), kGroups * 4);  // Q, dout, rows
    }
    mbar_fence_init();
  }
  Keys& own = kept[warp];
  const Head& x = own.head;
  const int group = static_cast<int>(a.n.group);
  if (!take<true>(a, order, static_cast<int>(blockIdx.x), own.head)) return;
  if (lane == 0) {
    const int j0 = x.tile * C::kOwn, some = max(j0, x.seen.begin), beyond = min(j0 + C::kOwn, x.seen.end);
    own.tiles = {0, 0};
    if (some < beyond) own.tiles = tiles_of<N>({x.queries_of(some).begin, x.queries_of(beyond - 1).end});
    const int first = j0 + C::own_row(warp), last = min(first + 16, x.lk) - 1;
    own.whole = {kUnbounded, 0};
    if (first >= x.seen.begin && last < x.seen.end && first <= last)
      own.whole = {x.queries_of(last).begin, x.queries_of(first).end};
  }
  __syncthreads();
  // Slots in the order of their use; in one number, because registers are short.
  const auto slot = [](int n) { return n % kStages; };
  const auto parity = [](int n) { return n / kStages & 1; };
  int n = 0;

  if (wg == kGroups) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int helper = __shfl_sync(kAllLanes, tid % kWarpgroup / kWarp, 0);
    // f(head, first query) for every tile of the ring, once its slot is free
    const auto produce = [&](auto f) {
      for (int h = x.h * group; h < (x.h + 1) * group; ++h)
        for (int i = own.tiles.begin; i < own.tiles.end; ++i, ++n) {
          mbar_wait(bar(bars->empty[slot(n)]), parity(n) ^ 1);
          f(h, i * N);
        }
    };
    const auto load_own = [&](uint32_t tile, const TensorMap& map) {
      if (lane != 0 || own.tiles.begin >= own.tiles.end) return;
      mbar_arrive_expect_tx(bar(bars->full_own), C::kOwnBytes);
      for (int w = 0; w < C::kOwn / 64; ++w)
        load_panels<64, D>(tile + w * tile_bytes(64, D), map, x.k_first + x.tile * C::kOwn + w * 64, x.h,
                           a.cu_q ? 0 : x.b, bar(bars->full_own));
    };
    const auto load = [&](const TensorMap& map, int offset, int h, int i0, uint32_t landed, int& landings) {
      const int lq = x.lq;  // rows beyond are another sequence's, if there are any
      load_without<N, D>(raw + offset + slot(n) * C::kStepBytes, map, x.q_first + i0, h, a.cu_q ? 0 : x.b,
                         a.n.lq - x.q_first - i0, bar(bars->full[slot(n)]), landed, landings,
                         [=](int r) { return i0 + r >= lq; });
    };
    int landings = 0;
    if (helper == 0) {
      load_own(keys, maps.k);
      produce([&](int h, int i0) { load(maps.q, 2 * C::kOwnBytes, h, i0, bar(bars->landed[0]), landings); });
    } else if (helper == 1) {
      load_own(values, maps.v);
      produce([&](int h, int i0) {
        load(maps.dout, 2 * C::kOwnBytes + kStages * C::kStepBytes, h, i0, bar(bars->landed[1]), landings);
      });
    } else if (helper == 2) {
      produce([&](int h, int i0) {
        const int64_t row = (a.cu_q ? h : static_cast<int64_t>(x.b) * a.n.heads + h) * a.n.lq + x.q_first + i0;
#pragma unroll
        for (int r = lane; r < N; r += kWarp) {  // a query that does not exist has weight 0
          const bool there = i0 + r < x.lq;
          rows[slot(n)][0][r] = there ? g.base[row + r] : kInfinity;
          rows[slot(n)][1][r] = there ? g.delta[row + r] : 0.f;
        }
        __syncwarp();
        if (lane == 0) mbar_arrive(bar(bars->full[slot(n)]));
      });
    }
    return;
  }

  setmaxnreg_inc<C::kConsumerRegisters>();
  const int pair = lane % 4 * 2;  // a thread has two keys, 8 apart, and queries 8 j + pair and the next
  float s[N / 2], dp[N / 2], dk[C::kColumns / 2], dv[C::kColumns / 2], cap[GENERAL ? N / 2 : 1];
  uint32_t packed[N / 16][4];  // p, then dscore
  const int mine = C::kSplit ? 0 : wg, column = C::kSplit ? wg * C::kColumns : 0;
  const uint64_t k_desc = wgmma_desc(keys + mine * tile_bytes(64, D)),
                 v_desc = wgmma_desc(values + mine * tile_bytes(64, D));
  const uint64_t q_desc = wgmma_desc(queries), dout_desc = wgmma_desc(douts);
  const int panels = column / kPanel * tile_bytes(N, kPanel);
  const uint64_t q_mn = wgmma_desc_mn(queries + panels, tile_bytes(N, kPanel)),
                 dout_mn = wgmma_desc_mn(douts + panels, tile_bytes(N, kPanel));
  const auto issue_transposed = [&](float (&d)[N / 2], uint64_t own_tile, uint64_t streamed) {
    const uint64_t tile = wgmma_desc_at(streamed, slot(n) * C::kStepBytes);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
      wgmma_ss<T, N, false>(d, wgmma_desc_at(own_tile, kk / 4 * tile_bytes(64, kPanel) + kk % 4 * 32),
                            wgmma_desc_at(tile, kk / 4 * tile_bytes(N, kPanel) + kk % 4 * 32), kk > 0);
    wgmma_commit();
  };
  const auto issue_sum = [&](float (&d)[C::kColumns / 2], uint64_t streamed) {
    const uint64_t tile = wgmma_desc_at(streamed, slot(n) * C::kStepBytes);
#pragma unroll
    for (int j = 0; j < N / 4; ++j) packed[j / 4][j % 4] = pack2<T>(s[2 * j], s[2 * j + 1]);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < N / 16; ++kk)
      wgmma_rs<T, C::kColumns, true>(d, packed[kk], wgmma_desc_at(tile, kk * 2048), true);
    wgmma_commit();
  };
  const auto release = [&](const uint64_t& freed) {
    if (lane == 0) mbar_arrive(bar(freed));
  };

#pragma unroll
  for (int i = 0; i < C::kColumns / 2; ++i) dk[i] = dv[i] = 0.f;
  if (own.tiles.begin < own.tiles.end) {
    int left = (own.tiles.end - own.tiles.begin) * group, i0 = own.tiles.begin * N, h = x.h * group;
    mbar_wait(bar(bars->full_own), 0);
    mbar_wait(bar(bars->full[slot(n)]), parity(n));
#pragma unroll 1
    for (bool first = true;; first = false, ++n) {
      wgmma_fence();
      issue_transposed(s, k_desc, q_desc);
      issue_transposed(dp, v_desc, dout_desc);
      wgmma_wait<1>();
      wgmma_touch(s);
      __syncwarp();  // base and delta of the tile before have been read by every lane, and dk is done with it
      if (!first) release(bars->empty[slot(n - 1)]);
      float factor = a.x.scale;
      auto& tile = reinterpret_cast<float (&)[1][N / 8][4]>(s);
      if constexpr (GENERAL) {
        const Features<T, true> features(a, x, h);
        factor = features.factor;
        logits_by_parts<true, true>(features, s, cap, x.tile * C::kOwn + C::own_row(tid / kWarp) + lane / 4, i0 + pair);
      }
      if (i0 < own.whole.begin || i0 + N > own.whole.end) {
        Interval allowed[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int j = x.tile * C::kOwn + C::own_row(tid / kWarp) + lane / 4 + 8 * r;
          allowed[r] = x.queries_of(j);
          if (j < x.seen.begin || j >= x.seen.end) allowed[r].end = 0;
        }
        mask_by_position(tile, allowed, i0 + pair);
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 base = *reinterpret_cast<const float2*>(&rows[slot(n)][0][8 * j + pair]);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[4 * j + e] = ex2(fmaf(s[4 * j + e], factor, -(e & 1 ? base.y : base.x)));
      }
      issue_sum(dv, dout_mn);
      wgmma_wait<1>();
      wgmma_touch(dp);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 delta = *reinterpret_cast<const float2*>(&rows[slot(n)][1][8 * j + pair]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float y = dp[4 * j + e] - (e & 1 ? delta.y : delta.x), weight = s[4 * j + e];
          // a key that nobody sees may be NaN
          s[4 * j + e] = weight == 0.f ? 0.f : weight * (GENERAL ? y * cap[4 * j + e] : y);
        }
      }
      wgmma_touch(s);
      // A branch: without one the compiler moves dscore below the wait, where nothing runs beside it.
      if (--left > 0) mbar_wait(bar(bars->full[slot(n + 1)]), parity(n + 1));
      wgmma_wait<0>();
      wgmma_touch(dv);
      issue_sum(dk, q_mn);
      if (left == 0) break;
      i0 += N;
      if (i0 >= own.tiles.end * N) i0 = own.tiles.begin * N, ++h;  // the group's next head
    }
    wgmma_wait<0>();
    wgmma_touch(dk);
  }
  const int first_row = x.tile * C::kOwn + C::own_row(tid / kWarp);
  const float scale[2] = {a.x.gradient_scale, a.x.gradient_scale}, one[2] = {1.f, 1.f};
  T* to_dk = static_cast<T*>(g.dk) + x.b * g.dk_n.batch + x.h * g.dk_n.head + x.k_first * g.dk_n.position;
  T* to_dv = static_cast<T*>(g.dv) + x.b * g.dv_n.batch + x.h * g.dv_n.head + x.k_first * g.dv_n.position;
  const int size = static_cast<int>(a.n.d), value_size = static_cast<int>(a.n.dv);
  if (g.dk) store_accumulator<T, C::kColumns>(to_dk, g.dk_n.position, first_row, x.lk, column, size, dk, scale);
  if (g.dv) store_accumulator<T, C::kColumns>(to_dv, g.dv_n.position, first_row, x.lk, column, value_size, dv, one);
}

template <class T, int D, bool GENERAL>
void run(const Attention& a, const void* dout, RowStrides dout_n, const KeyGradients& g, void* stream) {
  using C = KeyShape<D, GENERAL>;
  const int64_t batch = a.cu_q ? 1 : a.n.batch, kv_heads = a.n.heads / a.n.group;
  const KeyMaps maps{
      rows_map<T>(a.q, a.n.d, a.n.lq, a.n.heads, batch, a.n.q[2], a.n.q[1], a.n.q[0], C::N),
      rows_map<T>(dout, a.n.dv, a.n.lq, a.n.heads, batch, dout_n.position, dout_n.head, dout_n.batch, C::N),
      rows_map<T>(a.k, a.n.d, a.n.lk, kv_heads, batch, a.n.k[2], a.n.k[1], a.n.k[0], 64),
      rows_map<T>(a.v, a.n.dv, a.n.lk, kv_heads, batch, a.n.v[2], a.n.v[1], a.n.v[0], 64)};
  Schedule order = schedule(a, a.n.lk, C::kOwn, kv_heads, a.n.lq * (a.n.d + a.n.dv) * 2 * a.n.group);
  order.reversed = 0;  // the first keys have the most queries under a causal mask
  launch(attention_bwd_dkdv_sm90_kernel<T, D, GENERAL>, static_cast<unsigned>(order.total), C::kThreads, C::kShared,
         stream, a, g, maps, order);
}

}  // namespace

void attention_dkdv_sm90(const Attention& a, const void* dout, const float* base, const float* delta, void* dk,
                         void* dv, RowStrides dout_n, RowStrides dk_n, RowStrides dv_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const KeyGradients g{base, delta, dk, dv, dk_n, dv_n};
  const int64_t widest = max(a.n.d, a.n.dv);
  if (a.seed || widest > 256 || a.n.lk < 1) throw std::invalid_argument("attention: not for the kernels of sm_90a");
  // A block's tiles are the same for all heads of its group, so ends that differ between heads do not count; the masks
  // that they were found from do.
  Attention shared = a;
  if (a.n.group > 1 && a.n.span[1] != 0) shared.span = nullptr;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>)
      throw std::invalid_argument("attention: float32 is not for the kernels of sm_90a");
    else if (widest > 128)  // one for all calls: half as much to build
      run<T, 256, true>(shared, dout, dout_n, g, stream);
    else if (plain(a))
      widest <= 64 ? run<T, 64, false>(a, dout, dout_n, g, stream) : run<T, 128, false>(a, dout, dout_n, g, stream);
    else
      widest <= 64 ? run<T, 64, true>(shared, dout, dout_n, g, stream)
                   : run<T, 128, true>(shared, dout, dout_n, g, stream);
  });
}

}  // namespace pk
