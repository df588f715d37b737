// Sums of rows by id, without atomics: positions sorted by id, each row of the gradient the sum of one run of them.
//
// The sorted entries are cut into chunks of a fixed length, a group of lanes to a chunk, so the work of a group does
// not depend on how often an id occurs.  A run inside a chunk is finished there.  Of one that crosses chunks each chunk
// leaves a partial sum: a tail where the run begins, a head in every chunk that it began before; join_kernel adds them.
// What is done with the sum of a run is Finish: it is stored, or it updates the row of the table.
#pragma once
#include "embedding_bags.h"

namespace pk {

struct Keys {  // ascending; one of the two
  const int32_t* narrow;
  const int64_t* wide;
  __device__ __forceinline__ int64_t operator[](int64_t i) const { return narrow ? narrow[i] : wide[i]; }
};

template <class T>
struct Segment {
  Keys keys;
  const int32_t* ranks;   // how many different keys come before each entry's, or null
  const int64_t* source;  // of each entry: its row of dy,
  const float* factor;    // what that row is multiplied by, or null,
  const int32_t* place;   // and its place within its bag
  const int32_t* maxima;  // null, or a column counts only where this row of maxima holds the place
  const T* dy;
  float* partial;  // (chunks, 2, cols): heads and tails
  int64_t n, rows, cols, dy_row, dy_col, chunk_length;
  bool by_frequency;
  Lanes lanes;

  __host__ __device__ int64_t chunks() const { return ceil_div(n, chunk_length); }
};

constexpr int kSegmentThreadBits = 7, kSegmentThreads = 1 << kSegmentThreadBits;

// The columns of one thread: VECS parts of W, `apart` elements from one to the next.
template <int W, int VECS>
struct Columns {
  int64_t first, apart, cols;
  __device__ __forceinline__ int64_t operator[](int v) const { return first + v * apart; }
  __device__ __forceinline__ bool has(int v) const { return (*this)[v] < cols; }
};

// The sum of a run is done: divides it by its length if asked, and hands it over.
template <class T, int W, int VECS, class Finish>
__device__ __forceinline__ void finish_run(const Segment<T>& s, const Finish& finish, float (&total)[VECS][W],
                                           const Columns<W, VECS>& at, int64_t key, int64_t target, int64_t count) {
  if (s.by_frequency) {
#pragma unroll
    for (int v = 0; v < VECS; ++v)
#pragma unroll
      for (int i = 0; i < W; ++i) total[v][i] /= static_cast<float>(count);
  }
  finish(total, at, key, target);
}

template <int W, int VECS>
__device__ __forceinline__ void store_partial(float* slot, const float (&total)[VECS][W], const Columns<W, VECS>& at) {
#pragma unroll
  for (int v = 0; v < VECS; ++v)
    if (at.has(v)) store_floats(slot + at[v], total[v]);
}

// One sorted entry on its way.  Past the end of the chunk: the last key again, and nothing.
template <class T, int W, int VECS, bool MAX>
struct Entry {
  static constexpr int kPlaces = W == 1 ? 1 : 4;
  int64_t key, source;
  float factor;
  int32_t place;
  bool taken;
  Vec<T, W> row[VECS];
  Vec<int32_t, kPlaces> maxima[MAX ? VECS : 1][W / kPlaces];

  __device__ __forceinline__ void load(const Segment<T>& s, int64_t i, int64_t end, int64_t filler,
                                       const Columns<W, VECS>& at) {
    key = i < end ? s.keys[i] : filler;
    taken = i < end && key < s.rows;
    source = taken ? s.source[i] : 0;
    factor = taken && s.factor ? s.factor[i] : 1.f;
    place = taken && s.maxima ? s.place[i] : 0;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      row[v] = {};
      if (taken && at.has(v)) row[v] = load_part<T, W>(s.dy + source * s.dy_row + at[v] * s.dy_col);
      if constexpr (MAX) {
#pragma unroll
        for (int j = 0; j < W / kPlaces; ++j) {
          maxima[v][j] = {};
          if (taken && at.has(v))
            maxima[v][j] = load_part<int32_t, kPlaces>(s.maxima + source * s.cols + at[v] + kPlaces * j);
        }
      }
    }
  }

  __device__ __forceinline__ void add_to(float (&total)[VECS][W], const Segment<T>& s,
                                         const Columns<W, VECS>& at) const {
    if (!taken) return;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        float x = to_float(row[v].v[j]) * factor;
        if constexpr (MAX)
          x = maxima[v][j / kPlaces].v[j % kPlaces] == place ? x : 0.f;
        else if (s.maxima)
          x = at.has(v) && s.maxima[source * s.cols + at[v] + j] == place ? x : 0.f;
        total[v][j] += x;
      }
    }
  }
};

// MAX: maxima are given, and their loads are in flight with the rows'.
//
// Rows are asked for kRowsInFlight entries ahead and move up through registers.  Unrolling would save the moves, but
// repeat what is done with a finished run; and loads, after that run's stores, would no longer be in flight together.
template <class T, int W, int VECS, bool MAX, class Finish>
__global__ void __launch_bounds__(kSegmentThreads) segment_kernel(const Segment<T> s, const Finish finish) {
  constexpr int kRowsInFlight = VECS > 1 ? 2 : 4;
  const int lanes = s.lanes.count();
  const int64_t chunk =
      (static_cast<int64_t>(blockIdx.x) << (kSegmentThreadBits - s.lanes.bits)) + (threadIdx.x >> s.lanes.bits);
  const Columns<W, VECS> at{(static_cast<int64_t>(blockIdx.y) * lanes * VECS + (threadIdx.x & (lanes - 1))) * W,
                            lanes * W, s.cols};
  if (chunk >= s.chunks() || (!Finish::kWholeRow && !at.has(0))) return;
  const int64_t begin = chunk * s.chunk_length;
  const int64_t end = begin + s.chunk_length < s.n ? begin + s.chunk_length : s.n;
  int64_t current = s.keys[begin];
  if (current >= s.rows) return;  // sorted last: nothing more adds to a row
  const int64_t filler = s.keys[end - 1];
  bool head = begin > 0 && s.keys[begin - 1] == current;
  int64_t target = s.ranks ? s.ranks[begin] : current, first = begin;
  float* const heads = s.partial + chunk * 2 * s.cols;
  float total[VECS][W] = {};
  Entry<T, W, VECS, MAX> entry[kRowsInFlight + 1];
#pragma unroll
  for (int u = 0; u < kRowsInFlight; ++u) entry[u].load(s, begin + u, end, filler, at);
#pragma unroll 1
  for (int64_t i = begin; i < end; ++i) {
    entry[kRowsInFlight].load(s, i + kRowsInFlight, end, filler, at);
    if (entry[0].key != current) {
      if (head)
        store_partial(heads, total, at);
      else
        finish_run(s, finish, total, at, current, target, i - first);
#pragma unroll
      for (int v = 0; v < VECS; ++v)
#pragma unroll
        for (int j = 0; j < W; ++j) total[v][j] = 0.f;
      head = false;
      target = s.ranks ? target + 1 : entry[0].key;
      first = i;
      current = entry[0].key;
    }
    entry[0].add_to(total, s, at);
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) entry[u] = entry[u + 1];
  }
  if (current >= s.rows) return;
  if (head)
    store_partial(heads, total, at);
  else if (end < s.n && s.keys[end] == current)
    store_partial(heads + s.cols, total, at);
  else
    finish_run(s, finish, total, at, current, target, end - first);
}

// The first i of `count` from low on with keys[i * stride] >= key, or low + count.
__device__ __forceinline__ int64_t first_not_below(const Keys& keys, int64_t low, int64_t count, int64_t key,
                                                   int64_t stride) {
  int64_t high = low + count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle * stride] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

constexpr int kJoinWarps = 8;

// The run that crosses the end of a chunk, if it begins in that chunk: its tail and its heads, the warps taking turns.
template <class T, int W, int VECS, class Finish>
__global__ void __launch_bounds__(kJoinWarps* kWarp) join_kernel(const Segment<T> s, const Finish finish) {
  PK_SHARED(float, part, [kJoinWarps][VECS][W][kWarp]);
  const int64_t chunk = blockIdx.x, end = (chunk + 1) * s.chunk_length, key = s.keys[end - 1];
  if (key >= s.rows || s.keys[end] != key) return;
  const int64_t first = first_not_below(s.keys, end - s.chunk_length, s.chunk_length, key, 1);
  if (first > 0 && s.keys[first - 1] == key) return;  // it began in an earlier chunk
  const int64_t past = first_not_below(s.keys, chunk + 1, s.chunks() - chunk - 1, key + 1, s.chunk_length);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Columns<W, VECS> at{(static_cast<int64_t>(blockIdx.y) * kWarp * VECS + lane) * W, kWarp * W, s.cols};
  float total[VECS][W] = {};
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    if (!at.has(v)) continue;
    for (int64_t c = chunk + 1 + warp; c < past; c += kJoinWarps) {
      float x[W];
      load_floats(s.partial + c * 2 * s.cols + at[v], x);
#pragma unroll
      for (int j = 0; j < W; ++j) total[v][j] += x[j];
    }
  }
#pragma unroll
  for (int v = 0; v < VECS; ++v)
#pragma unroll
    for (int j = 0; j < W; ++j) part[warp][v][j][lane] = total[v][j];
  __syncthreads();
  if (warp > 0) return;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    float tail[W] = {};
    if (at.has(v)) load_floats(s.partial + (chunk * 2 + 1) * s.cols + at[v], tail);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float sum = tail[j];
#pragma unroll
      for (int w = 0; w < kJoinWarps; ++w) sum += part[w][v][j][lane];
      total[v][j] = sum;
    }
  }
  if (!Finish::kWholeRow && !at.has(0)) return;
  const int64_t last = (past - 1) * s.chunk_length, rest = s.n - last;
  const int64_t count =
      first_not_below(s.keys, last, rest < s.chunk_length ? rest : s.chunk_length, key + 1, 1) - first;
  finish_run(s, finish, total, at, key, s.ranks ? s.ranks[first] : key, count);
}

// Both kernels.  Finish: operator()(total, columns, key, target), and kWholeRow if it needs all columns in one warp.
template <class T, int W, int VECS, bool MAX, class Finish>
void launch_segments(Segment<T> s, const Finish& finish, void* stream) {
  const int64_t parts = ceil_div(s.cols, static_cast<int64_t>(W));
  s.lanes = Finish::kWholeRow ? Lanes{5} : lanes_for(parts, 5);
  const auto blocks_of = [&](int lanes) {
    return static_cast<unsigned>(ceil_div(parts, static_cast<int64_t>(lanes) * VECS));
  };
  const int64_t chunks = s.chunks();
  launch(segment_kernel<T, W, VECS, MAX, Finish>,
         dim3(static_cast<unsigned>(ceil_div(chunks, kSegmentThreads >> s.lanes.bits)), blocks_of(s.lanes.count())),
         kSegmentThreads, 0, stream, s, finish);
  if (chunks > 1)
    launch(join_kernel<T, W, VECS, Finish>, dim3(static_cast<unsigned>(chunks - 1), blocks_of(kWarp)),
           kJoinWarps * kWarp, 0, stream, s, finish);
}

}  // namespace pk
