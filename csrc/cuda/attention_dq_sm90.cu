// dq_i = scale sum_j dscore_ij k_j of attention for sm_90a: a block owns 64 queries for each of its two consumer
// warpgroups and runs over the tiles of keys they see.
//
// One warp of a third warpgroup keeps tiles of K coming, another those of V.  The exponentials are made while
// dp = dout V^T runs, and dq runs into the next tile.
#include "attention.h"
#include "attention_sm90.h"

namespace pk {

namespace {

// GENERAL: as in the forward; what the cap leaves of the gradient is one more register an element.
template <int D_, bool GENERAL>
struct QueryShape {
  static constexpr int D = D_, kGroups = 2, kOwn = 64 * kGroups, N = D == 256 ? 32 : 64, kStages = 3;
  static constexpr int kThreads = kWarpgroup * (kGroups + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kOwnBytes = tile_bytes(kOwn, D), kStepBytes = tile_bytes(N, D);
  static constexpr size_t kShared = 2 * kOwnBytes + 2 * kStages * kStepBytes;
  static constexpr int kPart = D < 128 ? D : 128, kParts = D / kPart;  // columns of dq that one product makes
};

struct QueryMaps {
  TensorMap q, dout, k, v;
};

struct QueryGradients {
  const float *base, *delta;
  void* dq;
  RowStrides dq_n;
};

struct Bars {
  uint64_t full_own, empty_own, landed, full[3], empty_k[3], empty_v[3];
};

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(QueryShape<D, GENERAL>::kThreads, 1)
    attention_bwd_dq_sm90_kernel(const __grid_constant__ Attention a, const __grid_constant__ QueryGradients g,
                                 const __grid_constant__ QueryMaps maps, const __grid_constant__ Schedule order) {
  using C = QueryShape<D, GENERAL>;
  constexpr int N = C::N, kGroups = C::kGroups, kStages = C::kStages;
  PK_DYN_SHARED(raw);
  PK_SHARED(Bars, bars, [1]);
  PK_SHARED(Head, heads, [4 * kGroups + 2]);
  const auto bar = [&](const uint64_t& x) { return smem_addr(&x); };
  const uint32_t queries = smem_addr(raw), douts = queries + C::kOwnBytes, keys = douts + C::kOwnBytes,
                 values = keys + kStages * C::kStepBytes;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int wg = __shfl_sync(kAllLanes, tid / kWarpgroup, 0), warp = __shfl_sync(kAllLanes, tid / kWarp, 0);
  if (tid == 0) {
    mbar_init(bar(bars->full_own), 2), mbar_init(bar(bars->empty_own), kGroups * 4), mbar_init(bar(bars->landed), 1);
    for (int i = 0; i < kStages; ++i) {
      mbar_init(bar(bars->full[i]), 2);  // K, V
      mbar_init(bar(bars->empty_k[i]), kGroups * 4), mbar_init(bar(bars->empty_v[i]), kGroups * 4);
    }
    mbar_fence_init();
  }
  __syncthreads();
  Head& x = heads[min(warp, 4 * kGroups + 1)];
  const auto key_tiles = [&] {
    const int i0 = x.tile * C::kOwn;
    return tiles_of<N>({x.keys_of(i0).begin, x.keys_of(min(i0 + C::kOwn, x.lq) - 1).end});
  };
  const int group = static_cast<int>(a.n.group);
  Slot<kStages> slot;
  int visits = 0;

  if (wg == kGroups) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int helper = __shfl_sync(kAllLanes, tid % kWarpgroup / kWarp, 0);
    if (helper > 1) return;
    const bool of_values = helper == 1;
    int landings = 0;
    for (int turn = static_cast<int>(blockIdx.x); turn < order.total; turn += static_cast<int>(gridDim.x)) {
      if (!take<false>(a, order, turn, x)) continue;
      const Interval tiles = key_tiles();
      if (tiles.begin >= tiles.end) continue;
      const int b = a.cu_q ? 0 : x.b, kv_head = x.h / group;
      if (lane == 0) {
        mbar_wait(bar(bars->empty_own), (visits & 1) ^ 1);
        mbar_arrive_expect_tx(bar(bars->full_own), C::kOwnBytes);
        for (int w = 0; w < kGroups; ++w)
          load_panels<64, D>((of_values ? douts : queries) + w * tile_bytes(64, D), of_values ? maps.dout : maps.q,
                             x.q_first + x.tile * C::kOwn + w * 64, x.h, b, bar(bars->full_own));
      }
      ++visits;
      for (int i = tiles.begin; i < tiles.end; ++i, slot.next()) {
        const int j0 = i * N;
        const uint32_t full = bar(bars->full[slot.at]);
        if (of_values) {  // NaN in a value that is not seen ends in a weight of 0
          if (lane != 0) continue;
          mbar_wait(bar(bars->empty_v[slot.at]), slot.parity ^ 1);
          mbar_arrive_expect_tx(full, C::kStepBytes);
          load_panels<N, D>(values + slot.at * C::kStepBytes, maps.v, x.k_first + j0, kv_head, b, full);
        } else {
          mbar_wait(bar(bars->empty_k[slot.at]), slot.parity ^ 1);
          load_without<N, D>(raw + 2 * C::kOwnBytes + slot.at * C::kStepBytes, maps.k, x.k_first + j0, kv_head, b,
                             a.n.lk - x.k_first - j0, full, bar(bars->landed), landings, [&](int j) {
                               if (j0 + j < x.seen.begin || j0 + j >= x.seen.end) return true;
                               if constexpr (!GENERAL) return false;
                               return a.seen && !a.seen[x.b * a.n.seen[0] + x.h * a.n.seen[1] + (j0 + j) * a.n.seen[2]];
                             });
        }
      }
    }
    return;
  }

  setmaxnreg_inc<C::kConsumerRegisters>();
  const int pair = lane % 4 * 2;  // a thread has queries `row` and row + 8, keys 8 n + pair and the next
  float s[N / 2], dp[N / 2], dq[C::kParts][C::kPart / 2], cap[GENERAL ? N / 2 : 1];
  uint32_t ds[N / 16][4];
  const uint64_t q_desc = wgmma_desc(queries + wg * tile_bytes(64, D)),
                 dout_desc = wgmma_desc(douts + wg * tile_bytes(64, D));
  const uint64_t k_desc = wgmma_desc(keys), v_desc = wgmma_desc(values),
                 k_mn = wgmma_desc_mn(keys, tile_bytes(N, kPanel));
  const auto issue_product = [&](float (&d)[N / 2], uint64_t own, uint64_t streamed, int at) {
    const uint64_t tile = wgmma_desc_at(streamed, at * C::kStepBytes);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
      wgmma_ss<T, N, false>(d, wgmma_desc_at(own, kk / 4 * tile_bytes(64, kPanel) + kk % 4 * 32),
                            wgmma_desc_at(tile, kk / 4 * tile_bytes(N, kPanel) + kk % 4 * 32), kk > 0);
    wgmma_commit();
  };
  const auto touch_sum = [&] {
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) wgmma_touch(dq[n]);
  };
  const auto release = [&](const uint64_t& freed) {
    if (lane == 0) mbar_arrive(bar(freed));
  };

  for (int turn = static_cast<int>(blockIdx.x); turn < order.total; turn += static_cast<int>(gridDim.x)) {
    if (!take<false>(a, order, turn, x)) continue;
    const Interval tiles = key_tiles();
    const int first_row = x.tile * C::kOwn + tid / kWarp * 16, row = first_row + lane / 4;
    int whole_begin, whole_end;
    {
      const Interval first = x.keys_of(first_row), last = x.keys_of(min(first_row + 16, x.lq) - 1);
      whole_begin = last.begin, whole_end = first.end;
    }
    float base[2], delta[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool there = row + 8 * e < x.lq;
      const int64_t at = row_of_head(a, x) + row + 8 * e;
      base[e] = there ? g.base[at] : kInfinity, delta[e] = there ? g.delta[at] : 0.f;
    }
#pragma unroll
    for (int n = 0; n < C::kParts; ++n)
#pragma unroll
      for (int i = 0; i < C::kPart / 2; ++i) dq[n][i] = 0.f;
    if (tiles.begin < tiles.end) {
      mbar_wait(bar(bars->full_own), visits++ & 1);
      mbar_wait(bar(bars->full[slot.at]), slot.parity);
      int before = -1;
#pragma unroll 1
      for (int i = tiles.begin; i < tiles.end; ++i) {
        const int at = slot.at;
        slot.next();
        wgmma_fence();
        issue_product(s, q_desc, k_desc, at);
        issue_product(dp, dout_desc, v_desc, at);
        wgmma_wait<1>();
        wgmma_touch(s);
        if (before >= 0) release(bars->empty_k[before]);  // dq of the tile before is done with it
        const int j0 = i * N;
        float factor = a.x.scale;
        auto& tile = reinterpret_cast<float (&)[1][N / 8][4]>(s);
        if constexpr (GENERAL) {
          const Features<T, true> features(a, x);
          factor = features.factor;
          logits_by_parts<false, true>(features, s, cap, row, j0 + pair);
        }
        if (j0 < whole_begin || j0 + N > whole_end) {
          const Interval allowed[2] = {x.keys_of(row), x.keys_of(row + 8)};
          mask_by_position(tile, allowed, j0 + pair);
        }
#pragma unroll
        for (int j = 0; j < N / 2; ++j) s[j] = ex2(fmaf(s[j], factor, -base[j >> 1 & 1]));
        wgmma_touch(s);
        // A branch: without one the compiler moves the exponentials below the wait, where nothing runs beside them.
        if (i + 1 < tiles.end) mbar_wait(bar(bars->full[slot.at]), slot.parity);
        wgmma_wait<0>();
        wgmma_touch(dp);
        release(bars->empty_v[at]);
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
          const float y = dp[j] - delta[j >> 1 & 1];
          s[j] = s[j] == 0.f ? 0.f : s[j] * (GENERAL ? y * cap[j] : y);
        }
#pragma unroll
        for (int j = 0; j < N / 4; ++j) ds[j / 4][j % 4] = pack2<T>(s[2 * j], s[2 * j + 1]);
        touch_sum();
        wgmma_fence();
        const uint64_t streamed = wgmma_desc_at(k_mn, at * C::kStepBytes);
#pragma unroll
        for (int n = 0; n < C::kParts; ++n)
#pragma unroll
          for (int kk = 0; kk < N / 16; ++kk)
            wgmma_rs<T, C::kPart, true>(
                dq[n], ds[kk], wgmma_desc_at(streamed, n * (C::kPart / kPanel) * tile_bytes(N, kPanel) + kk * 2048),
                true);
        wgmma_commit();
        before = at;
      }
      wgmma_wait<0>();
      touch_sum();
      release(bars->empty_k[before]);
      release(bars->empty_own);
    }
    const float scale[2] = {a.x.gradient_scale, a.x.gradient_scale};
    T* to = static_cast<T*>(g.dq) + x.b * g.dq_n.batch + x.h * g.dq_n.head + x.q_first * g.dq_n.position;
#pragma unroll
    for (int n = 0; n < C::kParts; ++n)
      store_accumulator<T, C::kPart>(to, g.dq_n.position, first_row, x.lq, n * C::kPart, static_cast<int>(a.n.d), dq[n],
                                     scale);
  }
}

template <class T, int D, bool GENERAL>
void run(const Attention& a, const void* dout, RowStrides dout_n, const QueryGradients& g, void* stream) {
  using C = QueryShape<D, GENERAL>;
  const int64_t batch = a.cu_q ? 1 : a.n.batch, kv_heads = a.n.heads / a.n.group;
  const QueryMaps maps{
      rows_map<T>(a.q, a.n.d, a.n.lq, a.n.heads, batch, a.n.q[2], a.n.q[1], a.n.q[0], 64),
      rows_map<T>(dout, a.n.dv, a.n.lq, a.n.heads, batch, dout_n.position, dout_n.head, dout_n.batch, 64),
      rows_map<T>(a.k, a.n.d, a.n.lk, kv_heads, batch, a.n.k[2], a.n.k[1], a.n.k[0], C::N),
      rows_map<T>(a.v, a.n.dv, a.n.lk, kv_heads, batch, a.n.v[2], a.n.v[1], a.n.v[0], C::N)};
  const Schedule order = schedule(a, a.n.lq, C::kOwn, a.n.heads, a.n.lk * (a.n.d + a.n.dv) * 2 / a.n.group);
  const int blocks = min(order.total, sm_count());
  launch(attention_bwd_dq_sm90_kernel<T, D, GENERAL>, static_cast<unsigned>(blocks), C::kThreads, C::kShared, stream, a,
         g, maps, order);
}

}  // namespace

void attention_dq_sm90(const Attention& a, const void* dout, const float* base, const float* delta, void* dq,
                       RowStrides dout_n, RowStrides dq_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const QueryGradients g{base, delta, dq, dq_n};
  const int64_t widest = max(a.n.d, a.n.dv);
  if (a.seed || widest > 256 || a.n.lk < 1) throw std::invalid_argument("attention: not for the kernels of sm_90a");
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>)
      throw std::invalid_argument("attention: float32 is not for the kernels of sm_90a");
    else if (widest > 128)  // one for all calls: half as much to build
      run<T, 256, true>(a, dout, dout_n, g, stream);
    else if (plain(a))
      widest <= 64 ? run<T, 64, false>(a, dout, dout_n, g, stream) : run<T, 128, false>(a, dout, dout_n, g, stream);
    else
      widest <= 64 ? run<T, 64, true>(a, dout, dout_n, g, stream) : run<T, 128, true>(a, dout, dout_n, g, stream);
  });
}

}  // namespace pk
