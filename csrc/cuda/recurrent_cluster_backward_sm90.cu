// The time loop backward in clusters.  A block has the rows of W_hh that its hidden units' gates are, and multiplies
// their gradients by them: one part of dh of all units.  The parts go through distributed shared memory to the blocks
// whose units they are, which add them up in the order of ranks.
#include "hopper.h"
#include "recurrent_cluster.h"

namespace pk {

namespace {

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads, 1) recurrent_cluster_backward_kernel(const BackwardLoop f) {
  constexpr int G = kGates<K>, W = kWidth<K>, kSlices = kHeldBackward;
  PK_DYN_SHARED(shared);
  PK_SHARED(uint64_t, bars, [2]);
  const Loop& loop = f.loop;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int units = loop.sizes.units, terms = loop.sizes.terms, slices = loop.sizes.slices(), pitch_d = terms + kPad;
  const int size = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const int all = ceil_div(loop.hidden, kUnits), block = rank * units + warp, first_unit = block * kUnits;
  const int64_t hidden = loop.hidden, first_row = loop.first_row();
  const int64_t first_token = loop.first_token(), first_state = loop.first_state();
  const int64_t dy_side = loop.reverse() ? f.dy_side : 0;
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
  const auto row_of = [&](int e) { return lane / 4 + e / 2 * 8; };
  const auto unit_of = [&](int e) { return first_unit + lane % 4 * 2 + e % 2; };
  float carry[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool real = first_row + row_of(e) < loop.batch && unit_of(e) < loop.hidden;
    carry[e] = real ? f.carry[(first_state + first_row + row_of(e)) * hidden + unit_of(e)] : 0.f;
  }
  cluster_sync();  // every block has started, its mbarriers are ready
  if (rank * units >= all) return;

  const Turns turns = loop.turns();
  int k = 0;
  for (int64_t turn = turns.last - 1; turn >= turns.first; --turn, ++k) {
    const Visit v = visit(loop.offsets, loop.steps, turn, loop.reverse());
    const int buffer = k & 1;
    if (block < all) {
      CellInputs in[4];
      float dh[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // before the wait: this memory is far
        const int64_t r = first_row + row_of(e), u = unit_of(e);
        in[e] = {}, dh[e] = 0.f;
        if (r >= v.rows || u >= hidden) continue;
        in[e] = load_inputs<T, K>(f, v, r, u);
        dh[e] = to_float(static_cast<const T*>(f.dy)[(v.offset + r) * f.dy_stride + dy_side + u]);
        // A row's last token takes dh_n in place of the product; a GRU's carry begins with it.
        if (K == Kind::lstm && r >= v.staying) dh[e] += f.dh_n[(first_state + r) * hidden + u];
      }
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
      for (int e = 0; e < 4; ++e) {
        const int64_t r = first_row + row_of(e), u = unit_of(e);
        CellGradient found{};
        if (r < v.rows && u < hidden) {
          if (r < v.staying) dh[e] = sum[e] + dh[e];
          if (K == Kind::gru) dh[e] += carry[e];
          const Peephole peephole =
              load_peephole(f.peephole, loop.hidden, 3 * loop.first_column() + static_cast<int>(u));
          found = cell_backward<K, false>(in[e].kept, peephole, dh[e], carry[e], in[e].c, in[e].before, in[e].y, false);
          carry[e] = found.carry;
        }
#pragma unroll
        for (int part = 0; part < W; ++part) {
          const T x = from_float<T>(found.d[part]);
          if (r < v.rows && u < hidden) dgates[(first_token + v.offset + r) * (W * hidden) + part * hidden + u] = x;
          if (part >= W - G)
            d[(buffer * kTileRows + row_of(e)) * pitch_d + (part - (W - G)) * units * kUnits + warp * kUnits +
              lane % 4 * 2 + e % 2] = x;
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
    if (first_row + row_of(e) < loop.batch && unit_of(e) < loop.hidden)
      f.carry[(first_state + first_row + row_of(e)) * hidden + unit_of(e)] = carry[e];
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
  if (dtype == DType::f32 || (!lstm && static_cast<Cell>(cell) != Cell::gru)) return {};
  const int all = ceil_div(hidden, kUnits), gates = lstm ? 4 : 3, most_tiles = 65535;
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
