// The time loop backward in clusters.  A block has the rows of W_hh that its hidden units' gates are, and multiplies
// their gradients by them: one part of dh of all units.  The parts go through distributed shared memory to the blocks
// whose units they are, which add them up in the order of ranks.
#include "hopper.h"
#include "recurrent_cluster.h"

namespace pk {

namespace {

// Of one element: names as in cell_backward; dh: from dy, and from dh_n where that takes the place of a product.
struct Inputs {
  float kept[4], c, before, dh;
};

template <class T, Kind K>
__device__ __forceinline__ void load_inputs(Inputs& one, Inputs& two, const BackwardLoop& f, const Visit& v,
                                            int64_t row, int unit) {
  const Loop& loop = f.loop;
  const int64_t hidden = loop.hidden, first = loop.first_token(), token = first + v.offset + row;
  const Kept<T, K>* const kept = static_cast<const Kept<T, K>*>(f.kept) + token * (4 * hidden) + unit;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const Pair<Kept<T, K>> p = load_pair(kept + part * hidden);
    one.kept[part] = to_float(p.v[0]), two.kept[part] = to_float(p.v[1]);
  }
  const int64_t initial = (loop.first_state() + row) * hidden + unit;
  const T* const state = static_cast<const T*>(K == Kind::lstm ? f.c0 : f.h0) + initial;
  if constexpr (K == Kind::lstm) {
    const Pair<float> c = load_pair(f.cells + token * hidden + unit);
    one.c = c.v[0], two.c = c.v[1];
  }
  if (row >= v.begun) {  // one by one: the initial state may lie anywhere
    one.before = to_float(state[0]), two.before = to_float(state[1]);
  } else if constexpr (K == Kind::lstm) {
    const Pair<float> c = load_pair(f.cells + (first + v.previous + row) * hidden + unit);
    one.before = c.v[0], two.before = c.v[1];
  } else {
    const T* const output = static_cast<const T*>(f.output);
    const Pair<T> h = load_pair(output + (v.previous + row) * loop.pitch() + loop.first_column() + unit);
    one.before = to_float(h.v[0]), two.before = to_float(h.v[1]);
  }
  const int64_t side = loop.reverse() ? f.dy_side : 0;
  const T* const dy = static_cast<const T*>(f.dy) + (v.offset + row) * f.dy_stride + side + unit;
  one.dh = to_float(dy[0]), two.dh = to_float(dy[1]);
  // A row's last token takes dh_n in place of the product; a GRU's carry begins with it.
  if (K == Kind::lstm && row >= v.staying) one.dh += f.dh_n[initial], two.dh += f.dh_n[initial + 1];
}

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads, 1) recurrent_cluster_backward_kernel(const BackwardLoop f) {
  constexpr int G = kGates<K>, W = kWidth<K>, kSlices = kHeldBackward;
  PK_DYN_SHARED(shared);
  PK_SHARED(uint64_t, bars, [2]);
  const Loop& loop = f.loop;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int units = loop.sizes.units, terms = loop.sizes.terms, slices = loop.sizes.slices(), pitch_d = terms + kPad;
  const int size = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int all = loop.hidden / kUnits, block = rank * units + warp, first_unit = block * kUnits;
  const int64_t hidden = loop.hidden, first_row = loop.first_row();
  const int64_t first_token = loop.first_token(), first_state = loop.first_state();
  T* const dgates = static_cast<T*>(f.dgates);

  T* const d = reinterpret_cast<T*>(shared);  // [2][16][pitch_d]: gates of this block's units
  uint4* const parts = reinterpret_cast<uint4*>(shared + 4 * kTileRows * pitch_d);  // [2][rank][units][lane]: of dh
  uint4* const rest = parts + 2 * size * units * kWarp;
  // this warp's products: with the weights of the same block of units in every rank
  const uint4* const from =
      f.weights + (static_cast<int64_t>(loop.weights()) * size * units + warp) * slices * kWarp + lane;
  uint4* const mine = rest + warp * max(slices - kSlices, 0) * size * kWarp + lane;
  uint4 held[kSlices][kClusterMost];
#pragma unroll
  for (int s = 0; s < kSlices; ++s)
#pragma unroll
    for (int n = 0; n < kClusterMost; ++n)
      if (s < slices && n < size) held[s][n] = from[(n * units * slices + s) * kWarp];
  for (int s = kSlices; s < slices; ++s)
    for (int n = 0; n < size; ++n) mine[((s - kSlices) * size + n) * kWarp] = from[(n * units * slices + s) * kWarp];

  const uint32_t full = smem_addr(bars);
  const int bytes = ceil_div(all, units) * min(units, all - rank * units) * kFragment;  // from each rank that has units
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) mbar_init(full + 8 * i, 1);
    mbar_fence_init();
    if (bytes > 0)
      for (int i = 0; i < 2; ++i) mbar_arrive_expect_tx(full + 8 * i, bytes);
  }
  for (int i = tid; i < 2 * kTileRows * pitch_d; i += static_cast<int>(blockDim.x)) d[i] = from_float<T>(0.f);
  // this thread's elements: two units of two rows
  const int unit = first_unit + lane % 4 * 2;
  const auto row_of = [&](int half) { return first_row + lane / 4 + half * 8; };
  float carry[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool real = row_of(e / 2) < loop.batch && block < all;
    carry[e] = real ? f.carry[(first_state + row_of(e / 2)) * hidden + unit + e % 2] : 0.f;
  }
  cluster_sync();  // every block has started, its mbarriers are ready
  if (rank * units >= all) return;

  const Turns turns = loop.turns();
  int k = 0;
  for (int64_t turn = turns.last - 1; turn >= turns.first; --turn, ++k) {
    const Visit v = visit(loop.offsets, loop.steps, turn, loop.reverse());
    const int buffer = k & 1;
    if (block < all) {
      Inputs in[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half)  // before the wait: this memory is far
        if (row_of(half) < v.rows) load_inputs<T, K>(in[2 * half], in[2 * half + 1], f, v, row_of(half), unit);
      float sum[4] = {};
      if (k > 0) {
        mbar_wait_cluster(full + 8 * buffer, (k - 1) >> 1 & 1);
        if (tid == 0) mbar_arrive_expect_tx(full + 8 * buffer, bytes);  // for the step after the next
        const uint4* part = parts + (buffer * size * units + warp) * kWarp + lane;
        for (int n = 0; n < ceil_div(all, units); ++n) {
          const uint4 p = part[n * units * kWarp];
          sum[0] += __uint_as_float(p.x), sum[1] += __uint_as_float(p.y);
          sum[2] += __uint_as_float(p.z), sum[3] += __uint_as_float(p.w);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t r = row_of(half);
        CellGradient found[2] = {};
        if (r < v.rows) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int e = 2 * half + j;
            float dh = r < v.staying ? sum[e] + in[e].dh : in[e].dh;
            if (K == Kind::gru) dh += carry[e];
            const Peephole peephole = load_peephole(f.peephole, loop.hidden, 3 * loop.first_column() + unit + j);
            found[j] = cell_backward<K, false>(in[e].kept, peephole, dh, carry[e], in[e].c, in[e].before, 0.f, false);
            carry[e] = found[j].carry;
          }
        }
        T* const to = dgates + (first_token + v.offset + r) * (W * hidden) + unit;
        T* const here = d + (buffer * kTileRows + lane / 4 + half * 8) * pitch_d + warp * kUnits + lane % 4 * 2;
#pragma unroll
        for (int part = 0; part < W; ++part) {
          if (r < v.rows) store_pair(to + part * hidden, found[0].d[part], found[1].d[part]);
          if (part >= W - G) store_pair(here + (part - (W - G)) * units * kUnits, found[0].d[part], found[1].d[part]);
        }
      }
    }
    if (turn == turns.first) break;
    __syncthreads();  // the gradients of this block's units are all there; those of the step before have been read
    float sum[kClusterMost][4] = {};
    const uint32_t a =
        smem_addr(d) + static_cast<uint32_t>((buffer * kTileRows + lane % 16) * pitch_d + lane / 16 * 8) * 2;
    const auto multiply = [&](int s, const auto& weights_of) {
      uint32_t left[4], right[4];
      ldmatrix_x4(left, a + static_cast<uint32_t>(s * kTerms * 2));
      ldmatrix_x4(right, a + static_cast<uint32_t>(s * kTerms * 2 + 32));
#pragma unroll
      for (int n = 0; n < kClusterMost; ++n) {
        if (n >= size) break;
        const uint4 w = weights_of(n);
        mma_m16n8k16<T>(sum[n], left, w.x, w.y);
        mma_m16n8k16<T>(sum[n], right, w.z, w.w);
      }
    };
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
      if (s < slices) multiply(s, [&](int n) { return held[s][n]; });
    for (int s = kSlices; s < slices; ++s) multiply(s, [&](int n) { return mine[((s - kSlices) * size + n) * kWarp]; });
    const int other = ~k & 1;
    const uint32_t to = smem_addr(parts + ((other * size + rank) * units + warp) * kWarp + lane);
#pragma unroll
    for (int n = 0; n < kClusterMost; ++n) {
      if (n * units + warp >= all || n >= size) break;
      const uint4 p = make_uint4(__float_as_uint(sum[n][0]), __float_as_uint(sum[n][1]), __float_as_uint(sum[n][2]),
                                 __float_as_uint(sum[n][3]));
      st_async(map_cluster(to, n), p, map_cluster(full + 8 * other, n));
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (row_of(e / 2) < loop.batch && block < all)
      f.carry[(first_state + row_of(e / 2)) * hidden + unit + e % 2] = carry[e];
}

}  // namespace

void recurrent_cluster_backward(BackwardLoop f, const RecurrentPlan& plan, int cell, DType dtype, void* stream) {
  dispatch_cluster(cell, dtype, [&](auto t, auto k) {
    constexpr Kind K = decltype(k)::value;
    f.loop.sizes.terms = ceil_div(kGates<K> * plan.units * kUnits, kTerms) * kTerms;
    run_cluster(recurrent_cluster_backward_kernel<typename decltype(t)::type, K>, f, plan,
                cluster_backward_bytes(kGates<K>, plan.blocks, plan.units), stream);
  });
}

int recurrent_cluster_backward_resident(int cell, DType dtype, int cluster, int units, size_t bytes) {
  int found = 0;
  dispatch_cluster(cell, dtype, [&](auto t, auto k) {
    found = resident_clusters(recurrent_cluster_backward_kernel<typename decltype(t)::type, decltype(k)::value>,
                              cluster, units * kWarp, bytes);
  });
  return found;
}

// The largest cluster with which all tiles run at once, else the smallest one that can hold the weights.
RecurrentPlan recurrent_cluster_plan(int cell, bool backward, int hidden, int tiles, DType dtype) {
  const bool lstm = static_cast<Cell>(cell) == Cell::lstm;
  if (hidden % kUnits || dtype == DType::f32 || (!lstm && static_cast<Cell>(cell) != Cell::gru)) return {};
  const int all = hidden / kUnits, gates = lstm ? 4 : 3, most_tiles = 65535;
  const size_t limit = shared_limit();
  RecurrentPlan found{};
  for (int cluster = 2; cluster <= kClusterMost; cluster *= 2) {
    const int units = ceil_div(all, cluster);
    const size_t bytes =
        backward ? cluster_backward_bytes(gates, cluster, units) : cluster_forward_bytes(gates, hidden, units);
    if (units > kTileWarps || bytes > limit) continue;
    const int held = backward ? recurrent_cluster_backward_resident(cell, dtype, cluster, units, bytes)
                              : recurrent_cluster_forward_resident(cell, dtype, cluster, units, bytes);
    if (held == 0 || (found.way && held < tiles)) continue;
    found = {4, cluster, units, tiles < most_tiles ? tiles : most_tiles};
  }
  return found;
}

}  // namespace pk
