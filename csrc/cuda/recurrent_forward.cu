// The time loop forward.
#include "recurrent_launch.h"

namespace pk {

namespace {

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads, 1) recurrent_forward_kernel(const ForwardLoop f) {
  constexpr int G = kGates<K>;
  constexpr bool PRECISE = std::is_same_v<T, float>;
  PK_DYN_SHARED(shared);
  const Loop& loop = f.loop;
  const Tile<T, G> tile(loop.sizes, shared, f.weights, loop.weights());
  const int64_t hidden = loop.hidden, first_row = loop.first_row();
  const int64_t first_token = loop.first_token(), first_state = loop.first_state(), pitch = loop.pitch();
  const int first_unit = loop.first_unit(), column = loop.first_column();
  const T *h0 = static_cast<const T*>(f.h0), *output = static_cast<const T*>(f.output);
  const bool vectors = hidden % Vec16<T>::N == 0;
  uint32_t* const arrived = loop.arrived + loop.number();

  if constexpr (K == Kind::lstm) {
    tile.for_elements([&](int, int, int row, int unit) {
      const bool real = first_row + row < loop.batch && first_unit + unit < hidden;
      tile.own(row, unit) = real ? f.c[(first_state + first_row + row) * hidden + first_unit + unit] : 0.f;
    });
  }
  const Turns turns = loop.turns();
  uint32_t meetings = 0;
  for (int64_t turn = turns.first; turn < turns.last; ++turn) {
    const Visit v = visit(loop.offsets, loop.steps, turn, loop.reverse());
    const auto state_of = [&](int row, int64_t rows) -> const T* {
      const int64_t r = first_row + row;
      return r >= rows     ? nullptr
             : r < v.begun ? output + (v.previous + r) * pitch + column
                           : h0 + (first_state + r) * hidden;
    };
    float x[kMostUnits][G][4], old[kMostUnits][4];  // before the wait: this memory is far
    tile.for_elements([&](int n, int e, int row, int unit) {
      const int64_t r = first_row + row, u = first_unit + unit;
      const bool real = r < v.rows && u < hidden;
#pragma unroll
      for (int gate = 0; gate < G; ++gate)
        x[n][gate][e] = real ? f.x[(first_token + v.offset + r) * (G * hidden) + gate * hidden + u] : 0.f;
      if constexpr (K == Kind::gru) old[n][e] = real ? to_float(state_of(row, v.rows)[u]) : 0.f;
    });
    if (meetings) await(arrived, meetings * gridDim.x);
    float sum[kMostUnits][G][4] = {};
    for (int first = 0; first < loop.sizes.terms; first += loop.sizes.chunk()) {
      if (!loop.sizes.local || turn == turns.first) {
        // rows that begin later are there already where the state stays in shared memory
        const int64_t rows = loop.sizes.local ? loop.batch : v.rows;
        tile.load(first, static_cast<int>(hidden), vectors, [&](int row) { return state_of(row, rows); });
        __syncthreads();
      }
      tile.multiply(sum, first);
      if (first + loop.sizes.chunk() < loop.sizes.terms) __syncthreads();
    }
    tile.gather(sum);
    tile.for_elements([&](int n, int e, int row, int unit) {
      const int64_t r = first_row + row, u = first_unit + unit;
      if (r >= v.rows || u >= hidden) return;
      float bias[4], gates[G], products[G];
      load_bias<K>(bias, f.bias, loop.hidden, kWidth<K> * column + static_cast<int>(u));
#pragma unroll
      for (int gate = 0; gate < G; ++gate) gates[gate] = x[n][gate][e], products[gate] = sum[n][gate][e];
      float before = 0.f;
      if constexpr (K == Kind::gru) before = old[n][e];
      const float c = K == Kind::lstm ? tile.own(row, unit) : 0.f;
      const Peephole peephole = load_peephole(f.peephole, loop.hidden, 3 * column + static_cast<int>(u));
      const CellResult found = cell_forward<K, PRECISE>(gates, bias, products, peephole, before, c, f.relu);
      const int64_t token = v.offset + r;
      if constexpr (K != Kind::rnn) {
        if (f.kept) {
#pragma unroll
          for (int part = 0; part < 4; ++part)
            static_cast<Kept<T, K>*>(f.kept)[(first_token + token) * (4 * hidden) + part * hidden + u] =
                from_float<Kept<T, K>>(found.kept[part]);
          if (K == Kind::lstm) f.cells[(first_token + token) * hidden + u] = found.c;
        }
      }
      if constexpr (K == Kind::lstm) tile.own(row, unit) = found.c;
      const T h = from_float<T>(found.h);
      static_cast<T*>(f.output)[token * pitch + column + u] = h;
      if (r >= v.staying) static_cast<T*>(f.h_n)[(first_state + r) * hidden + u] = h;
      if (loop.sizes.local) tile.put(row, static_cast<int>(u), to_float(h));
    });
    if (loop.sizes.local) {
      __syncthreads();
    } else if (turn + 1 < turns.last) {
      arrive(arrived);
      ++meetings;
    }
  }
  if constexpr (K == Kind::lstm) {
    tile.for_elements([&](int, int, int row, int unit) {
      if (first_row + row < loop.batch && first_unit + unit < hidden)
        f.c[(first_state + first_row + row) * hidden + first_unit + unit] = tile.own(row, unit);
    });
  }
}

template <class T, Kind K>
__global__ void __launch_bounds__(kTileThreads)
    recurrent_recompute_kernel(const float* x, const float* products, const float* bias_ptr, const float* peephole_ptr,
                               float* state, T* kept, float* cells, const int64_t* offsets, int64_t batch,
                               int64_t steps, int64_t tokens, int hidden) {
  constexpr int G = kGates<K>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= batch * hidden) return;
  const int side = static_cast<int>(blockIdx.y), column = side * hidden;
  const int64_t row = i / hidden, unit = i % hidden;
  float bias[4], c = K == Kind::lstm ? state[side * batch * hidden + i] : 0.f;
  load_bias<K>(bias, bias_ptr, hidden, kWidth<K> * column + static_cast<int>(unit));
  const Peephole peephole = load_peephole(peephole_ptr, hidden, 3 * column + static_cast<int>(unit));
  for (int64_t turn = 0; turn < steps; ++turn) {
    const Visit v = visit(offsets, steps, turn, side == 1);
    if (row >= v.rows) continue;
    const int64_t token = side * tokens + v.offset + row;
    float gates[G], p[G];
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      gates[gate] = x[token * (G * hidden) + gate * hidden + unit];
      p[gate] = products[token * (G * hidden) + gate * hidden + unit];
    }
    const CellResult found = cell_forward<K, true>(gates, bias, p, peephole, 0.f, c, false);
    c = found.c;
#pragma unroll
    for (int part = 0; part < 4; ++part)
      kept[token * (4 * hidden) + part * hidden + unit] = from_float<T>(found.kept[part]);
    if constexpr (K == Kind::lstm) cells[token * hidden + unit] = c;
  }
}

template <class T, Kind K>
void recompute(const float* x, const float* products, const float* bias, const float* peephole, float* c, void* kept,
               float* cells, const int64_t* offsets, int64_t batch, int64_t steps, int64_t tokens, int hidden, int ways,
               void* stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(batch * hidden, kTileThreads)), static_cast<unsigned>(ways));
  launch(recurrent_recompute_kernel<T, K>, blocks, kTileThreads, 0, stream, x, products, bias, peephole, c,
         static_cast<T*>(kept), cells, offsets, batch, steps, tokens, hidden);
}

}  // namespace

void recurrent_forward(const void* weights, const float* x, const float* bias, const float* peephole, const void* h0,
                       void* output, void* h_n, float* c, void* kept, float* cells, const int64_t* offsets,
                       const int* tile_steps, uint32_t* arrived, int64_t batch, int64_t steps, int64_t tokens,
                       int hidden, int ways, int way, int blocks, int units, int tiles, int cell, DType dtype,
                       void* stream) {
  dispatch_cell(cell, dtype, [&](auto t, auto k) {
    using T = typename decltype(t)::type;
    constexpr Kind K = decltype(k)::value;
    const ForwardLoop f{static_cast<const uint4*>(weights),
                        x,
                        bias,
                        peephole,
                        h0,
                        output,
                        h_n,
                        c,
                        kept,
                        cells,
                        {offsets, tile_steps, arrived, batch, steps, tokens, hidden, ways, way != 3,
                         tile_sizes<T>(kGates<K>, hidden, units, way), 0, 0, 0, 0},
                        static_cast<Cell>(cell) == Cell::relu};
    if (way == 4) return recurrent_cluster_forward(f, {way, blocks, units, tiles}, cell, dtype, stream);
    run_loop(recurrent_forward_kernel<T, K>, f, {way, blocks, units, tiles}, false, stream);
  });
}

void recurrent_recompute(const float* x, const float* products, const float* bias, const float* peephole, float* c,
                         void* kept, float* cells, const int64_t* offsets, int64_t batch, int64_t steps, int64_t tokens,
                         int hidden, int ways, int cell, DType dtype, void* stream) {
  const auto go = [&](auto run) {
    run(x, products, bias, peephole, c, kept, cells, offsets, batch, steps, tokens, hidden, ways, stream);
  };
  if (static_cast<Cell>(cell) == Cell::gru) return go(&recompute<float, Kind::gru>);
  dtype == DType::f32 ? go(&recompute<float, Kind::lstm>) : go(&recompute<fp16, Kind::lstm>);
}

int64_t recurrent_forward_resident(int cell, DType dtype, const TileSizes& sizes) {
  int64_t found = 0;
  dispatch_cell(cell, dtype, [&](auto t, auto k) {
    found = resident_blocks(recurrent_forward_kernel<typename decltype(t)::type, decltype(k)::value>, kTileThreads,
                            sizes.bytes());
  });
  return found;
}

}  // namespace pk
