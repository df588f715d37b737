// What the loops forward and backward have in common: which steps and rows a block has, and how it is launched.
#pragma once
#include "recurrent_tile.h"

namespace pk {

struct Turns {
  int64_t first, last;  // of the steps in the order of visits
};

struct Loop {
  const int64_t* offsets;
  const int* tile_steps;
  uint32_t* arrived;
  int64_t batch, steps, tokens;  // tokens: those that each direction's tensors have room for
  int hidden, ways;              // ways: directions, 1 or 2
  bool whole;                    // all steps in this launch, not turns first .. last
  TileSizes sizes;
  int tiles;  // of one direction
  int first_tile;
  int64_t first_turn, last_turn;

  // The second direction's tiles come after the first one's.
  __device__ __forceinline__ int number() const { return first_tile + static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ bool reverse() const { return number() >= tiles; }
  __device__ __forceinline__ int tile() const { return reverse() ? number() - tiles : number(); }
  __device__ __forceinline__ int weights() const {
    return static_cast<int>(blockIdx.x) + (reverse() ? static_cast<int>(gridDim.x) : 0);
  }
  // Where the direction's share begins: in tokens of what has a dimension of directions in front, in rows of a state,
  // in columns of the output.  Indices get these added, not pointers: those stay where the kernel's parameters are.
  __device__ __forceinline__ int64_t first_token() const { return reverse() ? tokens : 0; }
  __device__ __forceinline__ int64_t first_state() const { return reverse() ? batch : 0; }
  __device__ __forceinline__ int first_column() const { return reverse() ? hidden : 0; }
  __device__ __forceinline__ int64_t pitch() const { return static_cast<int64_t>(ways) * hidden; }  // of the output
  __device__ __forceinline__ int64_t first_row() const { return static_cast<int64_t>(tile()) * kTileRows; }
  __device__ __forceinline__ int first_unit() const { return static_cast<int>(blockIdx.x) * sizes.units * kUnits; }
  // Steps that have a row of this tile are the first ones in time.
  __device__ __forceinline__ Turns turns() const {
    const int64_t mine = tile_steps[tile()];
    const Turns active = reverse() ? Turns{steps - mine, steps} : Turns{0, mine};
    return whole ? active : Turns{max(active.first, first_turn), min(active.last, last_turn)};
  }
};

// What is kept of a gate.
template <class T, Kind K>
using Kept = std::conditional_t<K == Kind::lstm && !std::is_same_v<T, float>, fp16, float>;

struct ForwardLoop {
  const uint4* weights;
  const float *x, *bias, *peephole;
  const void* h0;
  void *output, *h_n;
  float* c;
  void* kept;
  float* cells;
  Loop loop;
  bool relu;
};

struct BackwardLoop {
  const uint4* weights;
  const void* dy;
  const float *dh_n, *peephole;
  const void *h0, *c0, *output, *kept;
  const float* cells;
  void* dgates;
  float* carry;
  Loop loop;
  int64_t dy_stride, dy_side;
  bool relu;
};

template <class F>
void dispatch_cell(int cell, DType dtype, F&& f) {
  dispatch(dtype, [&](auto t) {
    switch (static_cast<Cell>(cell)) {
      case Cell::lstm:
        return f(t, std::integral_constant<Kind, Kind::lstm>{});
      case Cell::gru:
        return f(t, std::integral_constant<Kind, Kind::gru>{});
      case Cell::tanh:
      case Cell::relu:
        return f(t, std::integral_constant<Kind, Kind::rnn>{});
    }
    throw std::invalid_argument("unknown cell");
  });
}

// gates: in the accumulators; depth: terms of the sum.
inline TileSizes tile_sizes(int gates, int parts, int depth, int units, int way) {
  return {gates, parts, units, ceil_div(depth, kTerms) * kTerms, way != 3, way == 1};
}
template <class T>
TileSizes tile_sizes(int gates, int depth, int units, int way) {
  return tile_sizes(gates, kParts<T>, depth, units, way);
}

template <class A>
void run_loop(void (*kernel)(A), A args, const RecurrentPlan& plan, bool backward, void* stream) {
  const DeviceGuard guard(args.weights);
  Loop& loop = args.loop;
  loop.tiles = static_cast<int>(ceil_div(loop.batch, static_cast<int64_t>(kTileRows)));
  const int64_t tiles = static_cast<int64_t>(loop.tiles) * loop.ways;
  const size_t bytes = loop.sizes.bytes();
  const auto grid = [&](int64_t first) {
    const int64_t left = tiles - first;
    return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(left < plan.tiles ? left : plan.tiles));
  };
  for (int64_t first = 0; first < tiles; first += plan.tiles) {
    loop.first_tile = static_cast<int>(first);
    if (plan.way == 2) {
      launch_cooperative(kernel, grid(first), kTileThreads, bytes, stream, args);
    } else if (plan.way == 1) {
      launch(kernel, grid(first), kTileThreads, bytes, stream, args);
    } else {
      for (int64_t done = 0; done < loop.steps; ++done) {
        loop.first_turn = backward ? loop.steps - 1 - done : done;
        loop.last_turn = loop.first_turn + 1;
        launch(kernel, grid(first), kTileThreads, bytes, stream, args);
      }
    }
  }
}

// Way 4, recurrent_cluster_*_sm90.cu: the blocks of a tile of rows are a cluster.  LSTM and GRU of 16 bits.
RecurrentPlan recurrent_cluster_plan(int cell, bool backward, int hidden, int tiles, DType dtype);
void recurrent_cluster_forward(ForwardLoop f, const RecurrentPlan& plan, int cell, DType dtype, void* stream);
void recurrent_cluster_backward(BackwardLoop f, const RecurrentPlan& plan, int cell, DType dtype, void* stream);

// How many blocks of each kernel the device holds at once.
int64_t recurrent_forward_resident(int cell, DType dtype, const TileSizes& sizes);
int64_t recurrent_backward_resident(int cell, DType dtype, const TileSizes& sizes);

}  // namespace pk
