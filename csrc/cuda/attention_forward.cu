// Attention forward: a block owns a tile of queries and runs over the tiles of keys they see, with an online softmax.
#include "attention.h"
#include "attention_config.h"
#include "attention_scores.h"
#include "platform.h"

namespace pk {

namespace {

constexpr double kLn2 = 0.6931471805599453;

template <class T, int D, bool GENERAL>
struct ForwardTiles;
template <class T>
struct ForwardTiles<T, 64, false> : AttentionTiles<T, 64, 2, 4, 64, 3, 2> {};
template <class T>
struct ForwardTiles<T, 128, false> : AttentionTiles<T, 128, 2, 4, 32, 3, 2> {};
template <class T>
struct ForwardTiles<T, 64, true> : AttentionTiles<T, 64, 1, 4, 32, 2, 2> {};
template <class T>
struct ForwardTiles<T, 128, true> : AttentionTiles<T, 128, 1, 4, kWide<T> ? 16 : 32, 2, 2> {};
template <class T>
struct ForwardTiles<T, 256, true> : AttentionTiles<T, 256, 1, kWide<T> ? 2 : 4, 16, 2, 1> {};

struct ForwardOutputs {
  void* out;
  float *lse, *lse_low;
  const float* sinks;
  RowStrides out_n, lse_n;
};

// What a thread keeps of its rows of the softmax: the largest logit and its own share of the sum, in powers of two.
template <int M>
struct Softmax {
  float largest[2 * M], sum[2 * M];

  // s: logits times `scale` in, exponentials out; acc follows the change of base.
  template <int N, int O>
  __device__ __forceinline__ void update(float (&s)[M][N][4], float (&acc)[M][O][4], float scale) {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int m = i / 2, e = i % 2 * 2;
      float highest = s[m][0][e];
#pragma unroll
      for (int n = 0; n < N; ++n) highest = fmaxf(highest, fmaxf(s[m][n][e], s[m][n][e + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const float now = fmaxf(largest[i], highest * scale);
      const float base = now == -kInfinity ? 0.f : now;  // no key so far: 2^(-inf - 0) is 0, 2^(-inf + inf) NaN
      const float alpha = ex2(largest[i] - base);
      largest[i] = now;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int k = e; k < e + 2; ++k) total += s[m][n][k] = ex2(fmaf(s[m][n][k], scale, -base));
      sum[i] = sum[i] * alpha + total;
#pragma unroll
      for (int n = 0; n < O; ++n) acc[m][n][e] *= alpha, acc[m][n][e + 1] *= alpha;
    }
  }
};

template <class T, int D, bool GENERAL>
__global__ void __launch_bounds__(ForwardTiles<T, D, GENERAL>::kThreads, ForwardTiles<T, D, GENERAL>::kBlocks)
    attention_fwd_kernel(const __grid_constant__ Attention a, const __grid_constant__ ForwardOutputs o) {
  using C = ForwardTiles<T, D, GENERAL>;
  constexpr int M = C::M, N = C::N;
  PK_DYN_SHARED(raw);
  const Shared queries{smem_addr(raw), raw}, streamed = queries + C::kOwnBytes;
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

  const int lane = static_cast<int>(threadIdx.x) % kWarp, own = static_cast<int>(threadIdx.x) / kWarp * 16 * M;
  const int i0 = x.tile * C::kOwn, row = i0 + own;  // the warp's first
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
  load_tile<T, D, C::kOwn, C::kThreads>(queries, q, a.n.q[2], i0, columns, [lq = x.lq](int i) { return i < lq; });
  using R = Ring<C::kStages>;
  R::begin(count, fetch);

  float acc[M][D / 8][4] = {};
  Softmax<M> softmax;
  const float sink = o.sinks ? o.sinks[x.h] * kLog2e : -kInfinity;
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    softmax.largest[i] = sink;
    softmax.sum[i] = lane % 4 == 0 && sink != -kInfinity ? 1.f : 0.f;  // the lanes' shares are added up at the end
  }
  for (int i = 0; i < count; ++i) {
    R::ready(i, count, fetch);
    const Shared tile = streamed + R::slot(i) * 2 * C::kStepBytes;
    const int j0 = (tiles.begin + i) * N, column = j0 + lane % 4 * 2;
    if (row >= x.lq || !visits<N>(first, last, j0)) continue;  // nothing in it for this warp
    float s[M][N / 8][4] = {};
    product<T, D, GENERAL, M, N>(s, queries, own, tile, columns, exact);
    if constexpr (GENERAL) features.template logits<false, false>(s, s, row + lane / 4, column);
    if (has_hidden<N>(first, last, j0)) {
      Interval allowed[2 * M];
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) allowed[r] = x.keys_of(row + lane / 4 + 8 * r);
      mask_by_position(s, allowed, column);
    }
    uint32_t seen[N / 8] = {};
    if constexpr (GENERAL) seen_columns(seen, s, mask_tensors);
    softmax.update(s, acc, features.factor);
    if constexpr (GENERAL) {
      const uint32_t kept = features.template kept<false, N / 8>(row + lane / 4, column);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][n][e] = kept >> (4 * n + e) & 1 ? s[0][n][e] : 0.f;
    }
    product_of_registers<GENERAL, T, D, GENERAL, M, N>(acc, s, tile + C::kStepBytes, value_columns, exact, seen);
  }
  cp_async_wait<0>();
  __syncthreads();  // without any tile the queries may still be on their way to where the output is put together

  float factor[2 * M];
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    float sum = softmax.sum[i];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const bool alone = sum == 0.f;
    factor[i] = alone ? 0.f : a.x.keep_scale / sum;
    const int r = row + lane / 4 + 8 * i;
    if (lane % 4 != 0 || r >= x.lq) continue;
    const double whole = (static_cast<double>(softmax.largest[i]) + log2f(alone ? 1.f : sum)) * kLn2;
    const float lse = alone ? -kInfinity : static_cast<float>(whole);
    const int64_t at = x.b * o.lse_n.batch + x.h * o.lse_n.head + (x.q_first + r) * o.lse_n.position;
    o.lse[at] = lse;
    o.lse_low[at] = fabsf(lse) < kInfinity ? static_cast<float>(whole - lse) : 0.f;
  }
  T* out = static_cast<T*>(o.out) + x.b * o.out_n.batch + x.h * o.out_n.head + x.q_first * o.out_n.position;
  store_rows<T, D, GENERAL, M>(out, o.out_n.position, row, x.lq, acc, factor, queries, own, value_columns);
}

}  // namespace

void attention_forward(const Attention& a, void* out, float* lse, float* lse_low, const float* sinks, RowStrides out_n,
                       RowStrides lse_n, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const ForwardOutputs o{out, lse, lse_low, sinks, out_n, lse_n};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    choose_instance<T>(a, [&](auto instance) {
      using I = decltype(instance);
      using C = ForwardTiles<T, I::D, I::GENERAL>;
      launch(attention_fwd_kernel<T, I::D, I::GENERAL>, attention_grid(a, a.n.lq, C::kOwn, a.n.heads), C::kThreads,
             C::kOwnBytes + 2 * C::kStages * C::kStepBytes, stream, a, o);
    });
  });
}

}  // namespace pk
