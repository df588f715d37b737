// Attention forward for sm_90a.  A block owns 64 queries for each of its consumer warpgroups and runs over the tiles of
// keys they see; of the last warpgroup one warp keeps tiles of K coming through a ring of slots, and one those of V.
//
// A consumer issues S = Q K^T of the next tile, then O += P V of this one (P from registers, V as it lies), and makes
// the next P while O is still being added up; warpgroups take turns in issuing products, so that one's softmax also
// runs beside the other's products.  Tiles go from the last to the first.
#include "attention.h"
#include "attention_sm90.h"

namespace pk {

namespace {

// GENERAL: with scores that are not the products times a positive scale, masked by position alone.  Those take
// registers and code for each element: fewer elements.
template <int D_, bool GENERAL>
struct ForwardShape {
  static constexpr int D = D_, kGroups = D == 64 && !GENERAL ? 3 : 2, BM = 64 * kGroups;
  static constexpr int BN = D == 256 || GENERAL ? 64 : 128;
  static constexpr int kStages = D == 64 ? 4 : D == 128 ? 3 : 2, kThreads = kWarpgroup * (kGroups + 1);
  // per thread; with what the launch gives they balance
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40, kConsumerRegisters = kGroups == 3 ? 160 : 232;
  static constexpr int kOwnBytes = tile_bytes(64, D), kStepBytes = tile_bytes(BN, D);
  static constexpr size_t kShared = kGroups * kOwnBytes + 2 * kStages * kStepBytes;
  static constexpr int kPart = D < 128 ? D : 128, kParts = D / kPart;  // columns of O that one product makes
  // Products are short: without a sixteenth of the exponentials made elsewhere, the special-function unit would bind.
  static constexpr bool kPolynomial = D == 64 && !GENERAL;
};

struct ForwardMaps {
  TensorMap q, k, v;
};

struct ForwardOutputs {
  void* out;
  float *lse, *lse_low;
  const float* sinks;
  RowStrides out_n, lse_n;
};

struct Bars {
  uint64_t full_q, empty_q, landed, full_k[4], full_v[4], empty_k[4], empty_v[4];
};

// Keys that the rows of the block's tile see.
template <class C>
__device__ __forceinline__ Interval key_tiles(const Head& x) {
  const int i0 = x.tile * C::BM;
  return tiles_of<C::BN>({x.keys_of(i0).begin, x.keys_of(min(i0 + C::BM, x.lq) - 1).end});
}

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(ForwardShape<D, GENERAL>::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ Attention a, const __grid_constant__ ForwardOutputs o,
                              const __grid_constant__ ForwardMaps maps, const __grid_constant__ Schedule order) {
  using C = ForwardShape<D, GENERAL>;
  constexpr int BM = C::BM, BN = C::BN, kGroups = C::kGroups, kStages = C::kStages;
  PK_DYN_SHARED(raw);
  PK_SHARED(Bars, bars, [1]);
  PK_SHARED(Head, heads, [4 * kGroups + 2]);  // of each warp that works
  const auto bar = [&](const uint64_t& x) { return smem_addr(&x); };
  const uint32_t queries = smem_addr(raw), keys = queries + kGroups * C::kOwnBytes,
                 values = keys + kStages * C::kStepBytes;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int wg = __shfl_sync(kAllLanes, tid / kWarpgroup, 0), warp = __shfl_sync(kAllLanes, tid / kWarp, 0);
  if (tid == 0) {
    mbar_init(bar(bars->full_q), 1), mbar_init(bar(bars->empty_q), kGroups * 4), mbar_init(bar(bars->landed), 1);
    for (int i = 0; i < kStages; ++i) {
      mbar_init(bar(bars->full_k[i]), 1), mbar_init(bar(bars->full_v[i]), 1);
      mbar_init(bar(bars->empty_k[i]), kGroups * 4), mbar_init(bar(bars->empty_v[i]), kGroups * 4);
    }
    mbar_fence_init();
  }
  __syncthreads();
  Head& x = heads[min(warp, 4 * kGroups + 1)];
  const int group = static_cast<int>(a.n.group);
  Slot<kStages> slot;  // of keys and of values alike
  int visits = 0;      // tiles of queries so far that see any key

  if (wg == kGroups) {
    setmaxnreg_dec<C::kProducerRegisters>();
    const int helper = __shfl_sync(kAllLanes, tid % kWarpgroup / kWarp, 0);  // not kept while consumers work
    if (helper == 0) {
      for (int turn = static_cast<int>(blockIdx.x); turn < order.total; turn += static_cast<int>(gridDim.x)) {
        if (!take<false>(a, order, turn, x) || lane != 0) continue;
        const Interval tiles = key_tiles<C>(x);
        if (tiles.begin >= tiles.end) continue;
        const int kv_head = x.h / group, b = a.cu_q ? 0 : x.b;
        mbar_wait(bar(bars->empty_q), (visits++ & 1) ^ 1);
        mbar_arrive_expect_tx(bar(bars->full_q), kGroups * C::kOwnBytes);
        for (int w = 0; w < kGroups; ++w)
          load_panels<64, D>(queries + w * C::kOwnBytes, maps.q, x.q_first + x.tile * BM + w * 64, x.h, b,
                             bar(bars->full_q));
        for (int i = tiles.end - 1; i >= tiles.begin; --i, slot.next()) {
          mbar_wait(bar(bars->empty_k[slot.at]), slot.parity ^ 1);
          mbar_arrive_expect_tx(bar(bars->full_k[slot.at]), C::kStepBytes);
          load_panels<BN, D>(keys + slot.at * C::kStepBytes, maps.k, x.k_first + i * BN, kv_head, b,
                             bar(bars->full_k[slot.at]));
        }
      }
    } else if (helper == 1) {
      for (int turn = static_cast<int>(blockIdx.x); turn < order.total; turn += static_cast<int>(gridDim.x)) {
        if (!take<false>(a, order, turn, x)) continue;
        const Interval tiles = key_tiles<C>(x);
        for (int i = tiles.end - 1; i >= tiles.begin; --i, slot.next()) {
          mbar_wait(bar(bars->empty_v[slot.at]), slot.parity ^ 1);
          const int j0 = i * BN;
          const auto hides = [&](int j) {
            if (j0 + j < x.seen.begin || j0 + j >= x.seen.end) return true;
            return a.seen && !a.seen[x.b * a.n.seen[0] + x.h * a.n.seen[1] + (j0 + j) * a.n.seen[2]];
          };
          load_without<BN, D>(raw + kGroups * C::kOwnBytes + (kStages + slot.at) * C::kStepBytes, maps.v,
                              x.k_first + j0, x.h / group, a.cu_q ? 0 : x.b, a.n.lk - x.k_first - j0,
                              bar(bars->full_v[slot.at]), bar(bars->landed), visits, hides);
        }
      }
    }
    return;
  }

  setmaxnreg_inc<C::kConsumerRegisters>();
  const int pair = lane % 4 * 2;  // a thread has rows `row` and row + 8, columns 8 n + pair and the next
  float s[BN / 2], acc[C::kParts][C::kPart / 2], largest[2], sum[2], alpha[2];
  uint32_t p[BN / 16][4];
  const uint64_t q_desc = wgmma_desc(queries + wg * C::kOwnBytes), k_desc = wgmma_desc(keys),
                 v_desc = wgmma_desc_mn(values, tile_bytes(BN, kPanel));
  const auto issue_scores = [&](int slot) {
    const uint64_t k = wgmma_desc_at(k_desc, slot * C::kStepBytes);
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk)
      wgmma_ss<T, BN, false>(s, wgmma_desc_at(q_desc, kk / 4 * tile_bytes(64, kPanel) + kk % 4 * 32),
                             wgmma_desc_at(k, kk / 4 * tile_bytes(BN, kPanel) + kk % 4 * 32), kk > 0);
    wgmma_commit();
  };
  const auto issue_output = [&](int slot) {
    const uint64_t v = wgmma_desc_at(v_desc, slot * C::kStepBytes);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < C::kParts; ++n)
#pragma unroll
      for (int kk = 0; kk < BN / 16; ++kk)
        wgmma_rs<T, C::kPart, true>(
            acc[n], p[kk], wgmma_desc_at(v, n * (C::kPart / kPanel) * tile_bytes(BN, kPanel) + kk * 2048), true);
    wgmma_commit();
  };
  const auto release = [&](const uint64_t& x_bar) {
    if (lane == 0) mbar_arrive(bar(x_bar));
  };
  const auto touch_output = [&] {
#pragma unroll
    for (int n = 0; n < C::kParts; ++n) wgmma_touch(acc[n]);
  };

  for (int turn = static_cast<int>(blockIdx.x); turn < order.total; turn += static_cast<int>(gridDim.x)) {
    if (!take<false>(a, order, turn, x)) continue;
    const Interval tiles = key_tiles<C>(x);
    const int first_row = x.tile * BM + tid / kWarp * 16, row = first_row + lane / 4;
    int whole_begin, whole_end;  // in tiles between these, all the warp's pairs are allowed
    {
      const Interval first = x.keys_of(first_row), last = x.keys_of(min(first_row + 16, x.lq) - 1);
      whole_begin = last.begin, whole_end = first.end;
    }
    const float sink = o.sinks ? o.sinks[x.h] * kLog2e : -kInfinity;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      largest[e] = sink;
      sum[e] = lane % 4 == 0 && sink != -kInfinity ? 1.f : 0.f;  // the lanes' shares are added up at the end
    }
#pragma unroll
    for (int n = 0; n < C::kParts; ++n)
#pragma unroll
      for (int i = 0; i < C::kPart / 2; ++i) acc[n][i] = 0.f;

    // From products to exponentials, in place: masks where there are any, the rows' maxima, what the sums so far are to
    // be multiplied by.
    const auto softmax = [&](int j0) {
      float factor = a.x.scale;
      auto& tile = reinterpret_cast<float (&)[1][BN / 8][4]>(s);
      if constexpr (GENERAL) {
        const Features<T, true> features(a, x);
        factor = features.factor;
        logits_by_parts<false, false>(features, s, s, row, j0 + pair);
      }
      if (j0 < whole_begin || j0 + BN > whole_end) {
        const Interval allowed[2] = {x.keys_of(row), x.keys_of(row + 8)};
        mask_by_position(tile, allowed, j0 + pair);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float highest = s[2 * e];
#pragma unroll
        for (int j = 0; j < BN / 8; ++j) highest = fmaxf(highest, fmaxf(s[4 * j + 2 * e], s[4 * j + 2 * e + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
        const float now = fmaxf(largest[e], highest * factor);
        const float base = now == -kInfinity ? 0.f : now;  // no key so far: 2^(-inf - 0) is 0, 2^(-inf + inf) NaN
        alpha[e] = ex2(largest[e] - base);
        largest[e] = now;
        float total = 0.f;
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
          for (int i = 4 * j + 2 * e; i < 4 * j + 2 * e + 2; ++i) {
            const float t = fmaf(s[i], factor, -base);
            s[i] = C::kPolynomial && i % 32 == 1 + 2 * e ? ex2_polynomial(t) : ex2(t);
            total += s[i];
          }
        sum[e] = sum[e] * alpha[e] + total;
      }
    };
    const auto pack = [&] {
#pragma unroll
      for (int i = 0; i < BN / 4; ++i) p[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
    };

    if (tiles.begin < tiles.end) {
      // each has its turn once a step; the first step needs somebody to begin
      if (wg == kGroups - 1 && tiles.end - tiles.begin > 1) named_barrier_arrive(1, 2 * kWarpgroup);
      mbar_wait(bar(bars->full_q), visits++ & 1);
      mbar_wait(bar(bars->full_k[slot.at]), slot.parity);
      wgmma_fence();
      issue_scores(slot.at);
      wgmma_wait<0>();
      wgmma_touch(s);
      release(bars->empty_k[slot.at]);
      softmax((tiles.end - 1) * BN);
      pack();
      mbar_wait(bar(bars->full_v[slot.at]), slot.parity);
#pragma unroll 1
      for (int i = tiles.end - 2; i >= tiles.begin; --i) {  // S of tile i, O of the one before, i + 1
        const int before = slot.at;
        slot.next();
        mbar_wait(bar(bars->full_k[slot.at]), slot.parity);
        named_barrier_sync(1 + wg, 2 * kWarpgroup);
        touch_output();
        wgmma_fence();
        issue_scores(slot.at);
        issue_output(before);
        if (wg + 1 < kGroups || i > tiles.begin) named_barrier_arrive(wg + 1 < kGroups ? wg + 2 : 1, 2 * kWarpgroup);
        wgmma_wait<1>();
        wgmma_touch(s);
        release(bars->empty_k[slot.at]);
        softmax(i * BN);
        wgmma_touch(s);
        // A branch: without one the compiler moves the softmax below the wait, where nothing runs beside it.
        mbar_wait(bar(bars->full_v[slot.at]), slot.parity);
        wgmma_wait<0>();
        touch_output();
        release(bars->empty_v[before]);
#pragma unroll
        for (int n = 0; n < C::kParts; ++n)
#pragma unroll
          for (int j = 0; j < C::kPart / 2; ++j) acc[n][j] *= alpha[j >> 1 & 1];
        pack();
      }
      release(bars->empty_q);
      touch_output();
      issue_output(slot.at);
      wgmma_wait<0>();
      touch_output();
      release(bars->empty_v[slot.at]);
      slot.next();
    }

    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 1);
      sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 2);
      const bool alone = sum[e] == 0.f;
      factor[e] = alone ? 0.f : 1.f / sum[e];
      const int r = row + 8 * e;
      if (lane % 4 != 0 || r >= x.lq) continue;
      const double exact = (static_cast<double>(largest[e]) + log2f(alone ? 1.f : sum[e])) * kLn2;
      const float lse = alone ? -kInfinity : static_cast<float>(exact);
      const int64_t at = x.b * o.lse_n.batch + x.h * o.lse_n.head + (x.q_first + r) * o.lse_n.position;
      o.lse[at] = lse;
      o.lse_low[at] = fabsf(lse) < kInfinity ? static_cast<float>(exact - lse) : 0.f;
    }
    T* out = static_cast<T*>(o.out) + x.b * o.out_n.batch + x.h * o.out_n.head + x.q_first * o.out_n.position;
#pragma unroll
    for (int n = 0; n < C::kParts; ++n)
      store_accumulator<T, C::kPart>(out, o.out_n.position, row - lane / 4, x.lq, n * C::kPart,
                                     static_cast<int>(a.n.dv), acc[n], factor);
  }
}

template <class T, int D, bool GENERAL>
void run(const Attention& a, const ForwardOutputs& o, void* stream) {
  using C = ForwardShape<D, GENERAL>;
  const int64_t batch = a.cu_q ? 1 : a.n.batch, kv_heads = a.n.heads / a.n.group;
  const auto map = [&](const void* base, int64_t size, int64_t length, int64_t heads, const int64_t (&n)[3], int rows) {
    return rows_map<T>(base, size, length, heads, batch, n[2], n[1], n[0], rows);
  };
  const ForwardMaps maps{map(a.q, a.n.d, a.n.lq, a.n.heads, a.n.q, 64), map(a.k, a.n.d, a.n.lk, kv_heads, a.n.k, C::BN),
                         map(a.v, a.n.dv, a.n.lk, kv_heads, a.n.v, C::BN)};
  const int64_t streamed = a.n.lk * (a.n.d + a.n.dv) * 2 / a.n.group;
  const Schedule order = schedule(a, a.n.lq, C::BM, a.n.heads, streamed);
  const int blocks = min(order.total, sm_count());
  launch(attention_fwd_sm90_kernel<T, D, GENERAL>, static_cast<unsigned>(blocks), C::kThreads, C::kShared, stream, a, o,
         maps, order);
}

}  // namespace

void attention_forward_sm90(const Attention& a, void* out, float* lse, float* lse_low, const float* sinks,
                            RowStrides out_n, RowStrides lse_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const ForwardOutputs o{out, lse, lse_low, sinks, out_n, lse_n};
  const int64_t widest = max(a.n.d, a.n.dv);
  const bool general = !plain(a);
  if (a.seed || widest > 256 || a.n.lk < 1) throw std::invalid_argument("attention: not for the kernels of sm_90a");
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, float>)
      throw std::invalid_argument("attention: float32 is not for the kernels of sm_90a");
    else if (widest > 128)
      general ? run<T, 256, true>(a, o, stream) : run<T, 256, false>(a, o, stream);
    else if (general)
      widest <= 64 ? run<T, 64, true>(a, o, stream) : run<T, 128, true>(a, o, stream);
    else
      widest <= 64 ? run<T, 64, false>(a, o, stream) : run<T, 128, false>(a, o, stream);
  });
}

}  // namespace pk
