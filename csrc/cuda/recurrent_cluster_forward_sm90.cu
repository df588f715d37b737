// The time loop forward in clusters: the blocks of a tile of 16 rows keep W_hh in registers and shared memory, a warp
// the gates of 8 hidden units, and send each other the new state through distributed shared memory.  Nothing of the
// exchange goes through L2, and the warps of a block never meet: each waits for the bytes of the whole state.
#include "hopper.h"
#include "recurrent_cluster.h"

namespace pk {

namespace {

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads, 1) recurrent_cluster_forward_kernel(const ForwardLoop f) {
  constexpr int G = kGates<K>, kSlices = kHeldForward;
  PK_DYN_SHARED(shared);
  PK_SHARED(uint64_t, bars, [2]);
  const Loop& loop = f.loop;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int units = loop.sizes.units, slices = loop.sizes.slices(), terms = loop.sizes.terms, pitch_h = terms + kPad;
  const int rank = static_cast<int>(blockIdx.x), all = ceil_div(loop.hidden, kUnits), used = ceil_div(all, units);
  const int64_t hidden = loop.hidden, first_row = loop.first_row();
  const int64_t first_token = loop.first_token(), first_state = loop.first_state(), pitch = loop.pitch();
  const int column = loop.first_column(), block = rank * units + warp, first_unit = block * kUnits;
  const T* const h0 = static_cast<const T*>(f.h0);

  T* const state = reinterpret_cast<T*>(shared);  // [2][16][pitch_h]
  uint4* const rest = reinterpret_cast<uint4*>(shared + 4 * kTileRows * pitch_h);
  uint4 held[kSlices][G];
  const uint4* const from =
      f.weights + (static_cast<int64_t>(loop.weights()) * units + warp) * slices * G * kWarp + lane;
  uint4* const mine = rest + warp * max(slices - kSlices, 0) * G * kWarp + lane;
#pragma unroll
  for (int s = 0; s < kSlices; ++s)
#pragma unroll
    for (int gate = 0; gate < G; ++gate)
      if (s < slices) held[s][gate] = from[(s * G + gate) * kWarp];
  for (int i = kSlices * G; i < slices * G; ++i) mine[(i - kSlices * G) * kWarp] = from[i * kWarp];

  const uint32_t full = smem_addr(bars), states = smem_addr(state);
  const int bytes = all * kUnits * kTileRows * 2;  // of one state
  if (tid == 0) {
    for (int i = 0; i < 2; ++i) mbar_init(full + 8 * i, 1);
    mbar_fence_init();
    for (int i = 0; i < 2; ++i) mbar_arrive_expect_tx(full + 8 * i, bytes);
  }
  for (int i = tid; i < kTileRows * terms; i += static_cast<int>(blockDim.x)) {
    const int row = i / terms, k = i % terms;
    const bool real = first_row + row < loop.batch && k < loop.hidden;
    state[row * pitch_h + k] = real ? h0[(first_state + first_row + row) * hidden + k] : from_float<T>(0.f);
    if (k >= all * kUnits) state[(kTileRows + row) * pitch_h + k] = from_float<T>(0.f);  // nobody sends these
  }
  float h[4], c[4];  // of this thread's elements, as Tile::for_elements has them
  const auto row_of = [&](int e) { return lane / 4 + e / 2 * 8; };
  const auto unit_of = [&](int e) { return first_unit + lane % 4 * 2 + e % 2; };
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool real = first_row + row_of(e) < loop.batch && unit_of(e) < loop.hidden;
    const int64_t at = (first_state + first_row + row_of(e)) * hidden + unit_of(e);
    h[e] = real ? to_float(h0[at]) : 0.f;
    c[e] = real && K == Kind::lstm ? f.c[at] : 0.f;
  }
  cluster_sync();  // every block has started, its mbarriers are ready
  if (block >= all) return;

  const Turns turns = loop.turns();
  int k = 0;
  for (int64_t turn = turns.first; turn < turns.last; ++turn, ++k) {
    const Visit v = visit(loop.offsets, loop.steps, turn, loop.reverse());
    float x[G][4], inner[4];  // with the bias; inner: a GRU's fourth part.  Before the wait: this memory is far
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t r = first_row + row_of(e);
      const bool real = r < v.rows && unit_of(e) < loop.hidden;
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
        x[gate][e] = real ? f.x[(first_token + v.offset + r) * (G * hidden) + gate * hidden + unit_of(e)] : 0.f;
      float bias[4];
      load_bias<K>(bias, f.bias, loop.hidden, kWidth<K> * column + min(unit_of(e), loop.hidden - 1));
#pragma unroll
      for (int gate = 0; gate < G; ++gate) x[gate][e] += bias[gate];
      inner[e] = K == Kind::gru ? bias[3] : 0.f;
    }
    if (k > 0) {
      mbar_wait_cluster(full + 8 * (k & 1), (k - 1) >> 1 & 1);
      if (tid == 0) mbar_arrive_expect_tx(full + 8 * (k & 1), bytes);  // for the step after the next
    }
    float sum[G][4] = {};
    const uint32_t a = states + static_cast<uint32_t>(((k & 1) * kTileRows + lane % 16) * pitch_h + lane / 16 * 8) * 2;
    const auto multiply = [&](int s, const uint4(&w)[G]) {
      uint32_t left[4], right[4];
      ldmatrix_x4(left, a + static_cast<uint32_t>(s * kTerms * 2));
      ldmatrix_x4(right, a + static_cast<uint32_t>(s * kTerms * 2 + 32));
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        mma_m16n8k16<T>(sum[gate], left, w[gate].x, w[gate].y);
        mma_m16n8k16<T>(sum[gate], right, w[gate].z, w[gate].w);
      }
    };
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
      if (s < slices) multiply(s, held[s]);
#pragma unroll 2
    for (int s = kSlices; s < slices; ++s) {
      uint4 w[G];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) w[gate] = mine[((s - kSlices) * G + gate) * kWarp];
      multiply(s, w);
    }
    CellResult found[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int u = min(unit_of(e), loop.hidden - 1);
      const float bias[4] = {0.f, 0.f, 0.f, inner[e]};
      float gates[G], products[G];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) gates[gate] = x[gate][e], products[gate] = sum[gate][e];
      const Peephole peephole = load_peephole(f.peephole, loop.hidden, 3 * column + u);
      found[e] = cell_forward<K, false>(gates, bias, products, peephole, h[e], c[e], false);
      if (first_row + row_of(e) < v.rows && unit_of(e) < loop.hidden) {  // otherwise the state stays as it was
        h[e] = to_float(from_float<T>(found[e].h));
        c[e] = found[e].c;
      }
    }
    if (turn + 1 < turns.last) {  // the four lanes of a row put 8 units together and share out the blocks
      const uint32_t low = pack2<T>(h[0], h[1]), high = pack2<T>(h[2], h[3]);
      uint4 rows[2];
      rows[0].x = __shfl_sync(kAllLanes, low, 0, 4), rows[0].y = __shfl_sync(kAllLanes, low, 1, 4);
      rows[0].z = __shfl_sync(kAllLanes, low, 2, 4), rows[0].w = __shfl_sync(kAllLanes, low, 3, 4);
      rows[1].x = __shfl_sync(kAllLanes, high, 0, 4), rows[1].y = __shfl_sync(kAllLanes, high, 1, 4);
      rows[1].z = __shfl_sync(kAllLanes, high, 2, 4), rows[1].w = __shfl_sync(kAllLanes, high, 3, 4);
      __syncwarp();  // a lane's bytes tell that the whole warp has read the old state: its buffer may be filled again
      const int other = ~k & 1;
      const uint32_t to = states + static_cast<uint32_t>((other * kTileRows + lane / 4) * pitch_h + first_unit) * 2;
      for (int there = lane % 4; there < used; there += 4) {
        const uint32_t bar = map_cluster(full + 8 * other, there);
        st_async(map_cluster(to, there), rows[0], bar);
        st_async(map_cluster(to + static_cast<uint32_t>(16 * pitch_h), there), rows[1], bar);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t r = first_row + row_of(e), u = unit_of(e), token = v.offset + r;
      if (r >= v.rows || u >= hidden) continue;
      if (f.kept) {
#pragma unroll
        for (int part = 0; part < 4; ++part)
          static_cast<Kept<T, K>*>(f.kept)[(first_token + token) * (4 * hidden) + part * hidden + u] =
              from_float<Kept<T, K>>(found[e].kept[part]);
        if (K == Kind::lstm) f.cells[(first_token + token) * hidden + u] = c[e];
      }
      const T now = from_float<T>(h[e]);
      static_cast<T*>(f.output)[token * pitch + column + u] = now;
      if (r >= v.staying) static_cast<T*>(f.h_n)[(first_state + r) * hidden + u] = now;
    }
  }
  if constexpr (K == Kind::lstm) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first_row + row_of(e) < loop.batch && unit_of(e) < loop.hidden)
        f.c[(first_state + first_row + row_of(e)) * hidden + unit_of(e)] = c[e];
  }
}

}  // namespace

void recurrent_cluster_forward(ForwardLoop f, const RecurrentPlan& plan, int cell, DType dtype, void* stream) {
  dispatch_cluster(cell, dtype, [&](auto t, auto k) {
    constexpr Kind K = decltype(k)::value;
    run_cluster(recurrent_cluster_forward_kernel<typename decltype(t)::type, K>, f, plan,
                cluster_forward_bytes(kGates<K>, f.loop.hidden, plan.units), stream);
  });
}

int recurrent_cluster_forward_resident(int cell, DType dtype, int cluster, int units, size_t bytes) {
  int found = 0;
  dispatch_cluster(cell, dtype, [&](auto t, auto k) {
    found = resident_clusters(recurrent_cluster_forward_kernel<typename decltype(t)::type, decltype(k)::value>, cluster,
                              units * kWarp, bytes);
  });
  return found;
}

}  // namespace pk
