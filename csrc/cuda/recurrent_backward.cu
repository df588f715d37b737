// The time loop backward, and how either loop is best run.
#include "recurrent_launch.h"

namespace pk {

namespace {

template <class T, Kind K>
__device__ __forceinline__ CellGradient gradient_of(const BackwardLoop& f, const Visit& v, int64_t row, int64_t unit,
                                                    float dh, float carry) {
  const int64_t hidden = f.loop.hidden, pitch = f.loop.pitch(), first = f.loop.first_token();
  const int64_t token = first + v.offset + row;
  const int column = f.loop.first_column();
  const T* output = static_cast<const T*>(f.output);
  float kept[4] = {}, c = 0.f, before = 0.f, y = 0.f;
  if constexpr (K != Kind::rnn) {
#pragma unroll
    for (int part = 0; part < 4; ++part)
      kept[part] = to_float(static_cast<const Kept<T, K>*>(f.kept)[token * (4 * hidden) + part * hidden + unit]);
  }
  const int64_t initial = (f.loop.first_state() + row) * hidden + unit;
  const int64_t earlier = (v.previous + row) * pitch + column + unit;
  if constexpr (K == Kind::lstm) {
    c = f.cells[token * hidden + unit];
    before = row < v.begun ? f.cells[(first + v.previous + row) * hidden + unit]
                           : to_float(static_cast<const T*>(f.c0)[initial]);
  } else if constexpr (K == Kind::gru) {
    before = to_float(row < v.begun ? output[earlier] : static_cast<const T*>(f.h0)[initial]);
  } else {
    y = to_float(output[(v.offset + row) * pitch + column + unit]);
  }
  const Peephole peephole = load_peephole(f.peephole, f.loop.hidden, 3 * column + static_cast<int>(unit));
  return cell_backward<K, std::is_same_v<T, float>>(kept, peephole, dh, carry, c, before, y, f.relu);
}

// What gradient_of() will read that is far: the rest was read by the step before.
template <class T, Kind K>
__device__ __forceinline__ void fetch(const BackwardLoop& f, const Visit& v, int64_t row, int64_t unit) {
  const int64_t hidden = f.loop.hidden, first = f.loop.first_token(), token = first + v.offset + row;
  prefetch(static_cast<const T*>(f.dy) + (v.offset + row) * f.dy_stride + (f.loop.reverse() ? f.dy_side : 0) + unit);
  if constexpr (K == Kind::rnn) {
    prefetch(static_cast<const T*>(f.output) + (v.offset + row) * f.loop.pitch() + f.loop.first_column() + unit);
  } else {
#pragma unroll
    for (int part = 0; part < 4; ++part)
      prefetch(static_cast<const Kept<T, K>*>(f.kept) + token * (4 * hidden) + part * hidden + unit);
    if (row >= v.begun) return;
    if constexpr (K == Kind::lstm)
      prefetch(f.cells + (first + v.previous + row) * hidden + unit);
    else
      prefetch(static_cast<const T*>(f.output) + (v.previous + row) * f.loop.pitch() + f.loop.first_column() + unit);
  }
}

// Two blocks on a multiprocessor; an LSTM's addresses of 16-bit tensors do not fit into half of the registers.
template <class T, Kind K>
constexpr int kBlocks = K == Kind::lstm && !std::is_same_v<T, float> ? 1 : 2;

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T, K>) recurrent_backward_kernel(const BackwardLoop f) {
  constexpr int G = kGates<K>, W = kWidth<K>;
  PK_DYN_SHARED(shared);
  const Loop& loop = f.loop;
  const Tile<T, 1> tile(loop.sizes, shared, f.weights, loop.weights());
  const int64_t hidden = loop.hidden, first_row = loop.first_row();
  const int64_t first_token = loop.first_token(), first_state = loop.first_state();
  const int first_unit = loop.first_unit();
  const int64_t dy_side = loop.reverse() ? f.dy_side : 0;
  T* const dgates = static_cast<T*>(f.dgates);
  const bool vectors = hidden % Vec16<T>::N == 0;
  uint32_t* const arrived = loop.arrived + loop.number();

  tile.for_elements([&](int, int, int row, int unit) {
    const bool real = K != Kind::rnn && first_row + row < loop.batch && first_unit + unit < hidden;
    tile.own(row, unit) = real ? f.carry[(first_state + first_row + row) * hidden + first_unit + unit] : 0.f;
  });
  if (loop.sizes.local) tile.load(0, 0, false, [](int) -> const T* { return nullptr; });
  __syncthreads();
  const Turns turns = loop.turns();
  uint32_t meetings = 0;
  for (int64_t turn = turns.last - 1; turn >= turns.first; --turn) {
    const Visit v = visit(loop.offsets, loop.steps, turn, loop.reverse());
    if (meetings) {
      tile.for_elements([&](int, int, int row, int unit) {
        if (first_row + row < v.rows && first_unit + unit < hidden)
          fetch<T, K>(f, v, first_row + row, first_unit + unit);
      });
      await(arrived, meetings * gridDim.x);
    }
    float sum[kMostUnits][1][4] = {};
    if (first_row < v.staying) {
      for (int first = 0; first < loop.sizes.terms; first += loop.sizes.chunk()) {
        if (!loop.sizes.local) {
          tile.load(first, G * loop.hidden, vectors, [&](int row) -> const T* {
            const int64_t r = first_row + row;
            return r < v.staying ? dgates + (first_token + v.following + r) * (W * hidden) + (W - G) * hidden : nullptr;
          });
          __syncthreads();
        }
        tile.multiply(sum, first);
        if (first + loop.sizes.chunk() < loop.sizes.terms) __syncthreads();
      }
      tile.gather(sum);
    }
    tile.for_elements([&](int n, int e, int row, int unit) {
      const int64_t r = first_row + row, u = first_unit + unit;
      if (r >= v.rows || u >= hidden) return;
      const float carry = tile.own(row, unit);
      // A row's last token takes dh_n in place of the product; a GRU's carry begins with it.
      float dh = r < v.staying ? sum[n][0][e] : K == Kind::gru ? 0.f : f.dh_n[(first_state + r) * hidden + u];
      if (K == Kind::gru) dh += carry;
      dh += to_float(static_cast<const T*>(f.dy)[(v.offset + r) * f.dy_stride + dy_side + u]);
      const CellGradient found = gradient_of<T, K>(f, v, r, u, dh, carry);
      tile.own(row, unit) = found.carry;
#pragma unroll
      for (int part = 0; part < W; ++part) {
        const T d = from_float<T>(found.d[part]);
        dgates[(first_token + v.offset + r) * (W * hidden) + part * hidden + u] = d;
        if (loop.sizes.local && part >= W - G)
          tile.put(row, (part - (W - G)) * loop.hidden + static_cast<int>(u), to_float(d));
      }
    });
    if (loop.sizes.local) {
      __syncthreads();
    } else if (turn > turns.first) {
      arrive(arrived);
      ++meetings;
    }
  }
  if constexpr (K != Kind::rnn) {
    tile.for_elements([&](int, int, int row, int unit) {
      if (first_row + row < loop.batch && first_unit + unit < hidden)
        f.carry[(first_state + first_row + row) * hidden + first_unit + unit] = tile.own(row, unit);
    });
  }
}

int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

}  // namespace

void recurrent_backward(const void* weights, const void* dy, const float* dh_n, const float* peephole, const void* h0,
                        const void* c0, const void* output, const void* kept, const float* cells, void* dgates,
                        float* carry, const int64_t* offsets, const int* tile_steps, uint32_t* arrived,
                        int64_t dy_stride, int64_t dy_side, int64_t batch, int64_t steps, int64_t tokens, int hidden,
                        int ways, int way, int blocks, int units, int tiles, int cell, DType dtype, void* stream) {
  dispatch_cell(cell, dtype, [&](auto t, auto k) {
    using T = typename decltype(t)::type;
    constexpr Kind K = decltype(k)::value;
    const BackwardLoop f{static_cast<const uint4*>(weights),
                         dy,
                         dh_n,
                         peephole,
                         h0,
                         c0,
                         output,
                         kept,
                         cells,
                         dgates,
                         carry,
                         {offsets, tile_steps, arrived, batch, steps, tokens, hidden, ways, way != 3,
                          tile_sizes<T>(1, kGates<K> * hidden, units, way), 0, 0, 0, 0},
                         dy_stride,
                         dy_side,
                         static_cast<Cell>(cell) == Cell::relu};
    if (way == 4) return recurrent_cluster_backward(f, {way, blocks, units, tiles}, cell, dtype, stream);
    run_loop(recurrent_backward_kernel<T, K>, f, {way, blocks, units, tiles}, true, stream);
  });
}

int64_t recurrent_backward_resident(int cell, DType dtype, const TileSizes& sizes) {
  int64_t found = 0;
  dispatch_cell(cell, dtype, [&](auto t, auto k) {
    found = resident_blocks(recurrent_backward_kernel<typename decltype(t)::type, decltype(k)::value>, kTileThreads,
                            sizes.bytes());
  });
  return found;
}

RecurrentPlan recurrent_plan(const void* where, int cell, bool backward, int hidden, int64_t batch, int ways, int wish,
                             DType dtype) {
  const DeviceGuard guard(where);
  const int gates = gates_of(static_cast<Cell>(cell)), parts = dtype == DType::f32 ? 3 : 1;
  const int all = ceil_div(hidden, kUnits);
  const int tiles = static_cast<int>(ways * ceil_div(batch, int64_t{kTileRows}));
  const size_t limit = shared_limit();
  const int most_units = kMostUnits * kTileWarps, most_tiles = 65535;  // the second axis of a grid is that short
  const auto sizes = [&](int units, int way) {
    return tile_sizes(backward ? 1 : gates, parts, backward ? gates * hidden : hidden, units, way);
  };
  const bool any = wish == 0;
  if (wish == 4) return recurrent_cluster_plan(cell, backward, hidden, tiles, dtype);
  if ((any || wish == 1) && all <= most_units && sizes(all, 1).bytes() <= limit)
    return {1, 1, all, tiles < most_tiles ? tiles : most_tiles};
  if (any || wish == 2) {
    RecurrentPlan found{};
    for (int units = 1; units <= most_units; units *= 2) {
      const TileSizes s = sizes(units, 2);
      if (s.bytes() > limit) break;
      const int blocks = ceil_div(all, units);
      const int64_t held =
          backward ? recurrent_backward_resident(cell, dtype, s) : recurrent_forward_resident(cell, dtype, s);
      if (blocks > held) continue;
      const int64_t at_once = held / blocks < most_tiles ? held / blocks : most_tiles;
      found = {2, blocks, units, static_cast<int>(at_once < tiles ? at_once : tiles)};
      if (at_once >= tiles) break;  // more units a block would leave multiprocessors idle
    }
    if (found.way || !any) return found;
  }
  if (!any && wish != 3) return {};
  constexpr int kStepUnits = 4;
  return {3, ceil_div(all, kStepUnits), kStepUnits, tiles < most_tiles ? tiles : most_tiles};
}

}  // namespace pk
