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
  PK_SHARED(float, biases, [4 * kTileWarps * kUnits]);  // here each wait empties the first-level cache
  const Loop& loop = f.loop;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int units = loop.sizes.units, slices = loop.sizes.slices(), terms = loop.sizes.terms, pitch_h = terms + kPad;
  const int rank = static_cast<int>(blockIdx.x), all = loop.hidden / kUnits, used = ceil_div(all, units);
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
    if (k >= loop.hidden) state[(kTileRows + row) * pitch_h + k] = from_float<T>(0.f);  // nobody sends these
  }
  for (int i = tid; i < 4 * units * kUnits; i += static_cast<int>(blockDim.x)) {
    const int part = i / (units * kUnits), unit = rank * units * kUnits + i % (units * kUnits);
    const bool real = f.bias && part < kWidth<K> && unit < loop.hidden;
    biases[i] = real ? f.bias[kWidth<K> * column + part * loop.hidden + unit] : 0.f;
  }
  // this thread's elements, as Tile::for_elements has them: two units of two rows
  const int unit = first_unit + lane % 4 * 2;
  const auto row_of = [&](int half) { return first_row + lane / 4 + half * 8; };
  float h[4], c[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool real = row_of(e / 2) < loop.batch && block < all;
    const int64_t at = (first_state + row_of(e / 2)) * hidden + unit + e % 2;
    h[e] = real ? to_float(h0[at]) : 0.f;
    c[e] = real && K == Kind::lstm ? f.c[at] : 0.f;
  }
  cluster_sync();  // every block has started, its mbarriers are ready
  if (block >= all) return;

  const Turns turns = loop.turns();
  Visit v{}, next{};
  float x[G][4], x_next[G][4];
  const auto fetch = [&](int64_t turn) {  // a step ahead: this memory is far
    if (turn >= turns.last) return;
    next = visit(loop.offsets, loop.steps, turn, loop.reverse());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool real = row_of(half) < next.rows;
      const float* const from_x = f.x + (first_token + next.offset + row_of(half)) * (G * hidden) + unit;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        const Pair<float> p = real ? load_pair(from_x + gate * hidden) : Pair<float>{};
        x_next[gate][2 * half] = p.v[0], x_next[gate][2 * half + 1] = p.v[1];
      }
    }
  };
  fetch(turns.first);
  int k = 0;
  for (int64_t turn = turns.first; turn < turns.last; ++turn, ++k) {
    v = next;
#pragma unroll
    for (int gate = 0; gate < G; ++gate)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[gate][e] = x_next[gate][e];
    fetch(turn + 1);
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
      float bias[4], gates[G], products[G];
#pragma unroll
      for (int part = 0; part < 4; ++part)
        bias[part] = biases[part * units * kUnits + warp * kUnits + lane % 4 * 2 + e % 2];
#pragma unroll
      for (int gate = 0; gate < G; ++gate) gates[gate] = x[gate][e], products[gate] = sum[gate][e];
      const Peephole peephole = load_peephole(f.peephole, loop.hidden, 3 * column + unit + e % 2);
      found[e] = cell_forward<K, false>(gates, bias, products, peephole, h[e], c[e], false);
      if (row_of(e / 2) < v.rows) {  // otherwise the state stays as it was
        h[e] = to_float(from_float<T>(found[e].h));
        c[e] = found[e].c;
      }
    }
    const uint32_t words[2] = {pack2<T>(h[0], h[1]), pack2<T>(h[2], h[3])};
    if (turn + 1 < turns.last) {  // the four lanes of a row put 8 units together and share out the blocks
      uint4 rows[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[half].x = __shfl_sync(kAllLanes, words[half], 0, 4),
        rows[half].y = __shfl_sync(kAllLanes, words[half], 1, 4);
        rows[half].z = __shfl_sync(kAllLanes, words[half], 2, 4),
        rows[half].w = __shfl_sync(kAllLanes, words[half], 3, 4);
      }
      __syncwarp();  // a lane's bytes tell that the whole warp has read the old state: its buffer may be filled again
      const int other = ~k & 1;
      const uint32_t to = states + static_cast<uint32_t>((other * kTileRows + lane / 4) * pitch_h + first_unit) * 2;
#pragma unroll
      for (int n = 0; n < kClusterMost / 4; ++n) {
        const int there = lane % 4 + 4 * n;
        if (there >= used) break;
        const uint32_t bar = map_cluster(full + 8 * other, there);
        st_async(map_cluster(to, there), rows[0], bar);
        st_async(map_cluster(to + static_cast<uint32_t>(16 * pitch_h), there), rows[1], bar);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = row_of(half), token = v.offset + r;
      if (r >= v.rows) continue;
      if (f.kept) {
        Kept<T, K>* const kept = static_cast<Kept<T, K>*>(f.kept) + (first_token + token) * (4 * hidden) + unit;
#pragma unroll
        for (int part = 0; part < 4; ++part)
          store_pair(kept + part * hidden, found[2 * half].kept[part], found[2 * half + 1].kept[part]);
        if (K == Kind::lstm) store_pair(f.cells + (first_token + token) * hidden + unit, c[2 * half], c[2 * half + 1]);
      }
      *reinterpret_cast<uint32_t*>(static_cast<T*>(f.output) + token * pitch + column + unit) = words[half];
      if (r >= v.staying)
        *reinterpret_cast<uint32_t*>(static_cast<T*>(f.h_n) + (first_state + r) * hidden + unit) = words[half];
    }
  }
  if constexpr (K == Kind::lstm) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (row_of(e / 2) < loop.batch) f.c[(first_state + row_of(e / 2)) * hidden + unit + e % 2] = c[e];
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
