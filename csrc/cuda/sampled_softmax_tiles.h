// Tiles of logits of rows and classes that all rows share, a sample or all.
//
// A block has some rows of x, runs over tiles of 64 classes, and over 128 bytes of columns of both at a time: the rows
// of classes are gathered into shared memory by asynchronous copies, which run two steps ahead of the products, across
// the ends of tiles.
#pragma once
#include "embedding_bags.h"
#include "math.h"
#include "products.h"

namespace pk {

template <class T>
struct LogitTiles {
  static constexpr int M = kWide<T> ? 1 : 2;  // each warp has 16 M rows
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16 * M * kWarps, kClasses = 64;
  static constexpr int kColumns = 128 / static_cast<int>(sizeof(T)), kStages = 3;
  static constexpr int kRowBytes = kRows * 128, kStageBytes = kRowBytes + kClasses * 128;
};

// A matrix whose rows are copied into tiles: 16 bytes at a time where it allows that.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, col, cols;
  bool vectors;
};
template <class T>
Matrix<T> matrix(const void* data, int64_t row, int64_t col, int64_t cols) {
  return {static_cast<const T*>(data), row, col, cols, whole_vectors<T>(data, row, col, cols)};
}

// Columns first + [0, D) of ROWS rows to a tile; row(r): which, or -1 for zeros.  Visible to all after what Ring waits
// for.
template <class T, int D, int ROWS, int THREADS, class Row>
__device__ __forceinline__ void gather_tile(Shared tile, const Matrix<T>& from, int64_t first, Row row) {
  constexpr int UNITS = D / kUnit<T>, STEP = THREADS / UNITS;
  static_assert(THREADS % UNITS == 0 && ROWS % STEP == 0);
  const int r0 = static_cast<int>(threadIdx.x) / UNITS, unit = static_cast<int>(threadIdx.x) % UNITS;
  const int64_t col = first + unit * kUnit<T>;
  if (from.vectors) {
#pragma unroll 2
    for (int i = 0; i < ROWS; i += STEP) {
      const int64_t which = row(r0 + i);
      const bool wanted = which >= 0 && col < from.cols;
      cp_async16(tile.address + static_cast<uint32_t>(at<T, D>(r0 + i, unit)),
                 wanted ? from.data + which * from.row + col : from.data, wanted);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < ROWS; i += STEP) {
    const int64_t which = row(r0 + i);
    T* const to = reinterpret_cast<T*>(tile.bytes + at<T, D>(r0 + i, unit));
#pragma unroll 1
    for (int j = 0; j < kUnit<T>; ++j)
      to[j] =
          which >= 0 && col + j < from.cols ? from.data[which * from.row + (col + j) * from.col] : from_float<T>(0.f);
  }
}

template <class T>
struct Logits {
  Matrix<T> x, weight;
  const T* bias;
  Ids ids;  // of the sample; without data: all classes
  const float* log;
  Ids labels;
  const float* factors;
  int64_t rows, count, classes, bias_step, hits;
  bool logistic, exact;

  // The class at place j of `end`, -1 where there is none.
  __device__ __forceinline__ int64_t id(int64_t j, int64_t end) const {
    if (j >= end) return -1;
    if (!ids.data) return j;
    const int64_t id = ids[j];
    return id < classes ? id : -1;
  }
};

// Which row of its tile element i / 2 of a thread's M x 2 rows is.
__device__ __forceinline__ int row_of(int i) {
  return 16 * (i / 2) + 8 * (i % 2) + (static_cast<int>(threadIdx.x) % kWarp) / 4;
}
// And which class of its tile: pair n of 8, element e of two.
__device__ __forceinline__ int column_of(int n, int e) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + e; }

// Two adjacent elements, the first at an even place of an even row: one transaction.
template <class T>
__device__ __forceinline__ void store_pair(T* p, float low, float high) {
  if constexpr (kWide<T>)
    *reinterpret_cast<float2*>(p) = make_float2(low, high);
  else
    *reinterpret_cast<uint32_t*>(p) = pack2<T>(low, high);
}

// f(first class, acc, weights) for each tile of the classes [begin, end), with the logits in acc, -inf where there is
// none, and the tile's class weights, 0 there.
template <class T, class F>
__device__ __forceinline__ void walk_tiles(const Logits<T>& a, unsigned char* raw, int64_t i0, int64_t begin,
                                           int64_t end, F f) {
  using C = LogitTiles<T>;
  constexpr int M = C::M, N = C::kClasses;
  PK_SHARED(int64_t, tile_ids, [N]);
  PK_SHARED(float, tile_offsets, [N]);
  PK_SHARED(float, tile_weights, [N]);
  const Shared slots{smem_addr(raw), raw};
  const int warp = static_cast<int>(threadIdx.x) / kWarp, own = 16 * M * warp;
  const int chunks = max(1, static_cast<int>(ceil_div(a.x.cols, int64_t{C::kColumns})));
  const int steps = static_cast<int>(ceil_div(end - begin, int64_t{N})) * chunks;
  int64_t fetch_class = begin;
  int fetch_chunk = 0;  // tiles are asked for in order
  const auto fetch = [&](int, int slot) {
    const Shared tile = slots + slot * C::kStageBytes;
    const int64_t first = static_cast<int64_t>(fetch_chunk) * C::kColumns, j0 = fetch_class;
    gather_tile<T, C::kColumns, C::kRows, C::kThreads>(tile, a.x, first,
                                                       [&](int r) { return i0 + r < a.rows ? i0 + r : int64_t{-1}; });
    gather_tile<T, C::kColumns, N, C::kThreads>(tile + C::kRowBytes, a.weight, first,
                                                [&](int r) { return a.id(j0 + r, end); });
    if (++fetch_chunk == chunks) {
      fetch_chunk = 0;
      fetch_class += N;
    }
  };
  using R = Ring<C::kStages>;
  R::begin(steps, fetch);
  float acc[M][N / 8][4];
  int64_t j0 = begin;
  int chunk = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    if (chunk == 0) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.f;
    }
    R::ready(i, steps, fetch);
    const Shared tile = slots + R::slot(i) * C::kStageBytes;
    const TileColumns<T, C::kColumns, false> columns(C::kColumns);
    product<T, C::kColumns, false, M, N>(acc, tile, own, tile + C::kRowBytes, columns, a.exact);
    if (++chunk < chunks) continue;
    chunk = 0;
    if (threadIdx.x < N) {  // everyone left the tile before at ready()
      const int64_t id = a.id(j0 + threadIdx.x, end);
      float offset = id >= 0 && a.bias ? to_float(a.bias[id * a.bias_step]) : 0.f;
      if (id >= 0 && a.log) offset -= a.log[j0 + threadIdx.x];
      tile_ids[threadIdx.x] = id;
      tile_offsets[threadIdx.x] = offset;
      tile_weights[threadIdx.x] = id < 0 ? 0.f : a.factors ? a.factors[id] : 1.f;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = column_of(n, e);
        const bool exists = tile_ids[c] >= 0;
        const float offset = tile_offsets[c];
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
          float& z = acc[r / 2][n][r % 2 * 2 + e];
          z = exists ? z + offset : -kInfinity;
        }
      }
    if (a.hits > 0) {  // every copy of a class that is a label of the row
#pragma unroll
      for (int r = 0; r < 2 * M; ++r) {
        const int64_t row = i0 + own + row_of(r);
        for (int64_t t = 0; t < a.hits && row < a.rows; ++t) {
          const int64_t label = a.labels[row * a.hits + t];
#pragma unroll
          for (int n = 0; n < N / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (tile_ids[column_of(n, e)] == label) acc[r / 2][n][r % 2 * 2 + e] = -kInfinity;
        }
      }
    }
    f(j0, acc, tile_weights);
    j0 += N;
  }
}

}  // namespace pk
