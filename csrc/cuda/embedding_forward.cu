// Lookup and bags, forward, and the gradient of the per-sample weights.  A group of lanes owns a bag (of a lookup: four
// rows) and a part of its columns; four rows are in flight, nothing is exchanged between threads.
#include "embedding.h"
#include "embedding_bags.h"

namespace pk {
namespace {

constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits;
constexpr int kInFlight = 4;

enum class Mode { kLookup, kSum, kMax };

template <class T>
struct BagForward {
  Ids ids;
  Bags bags;
  Record record;
  const T* weight;
  const T* scale;
  T* out;
  int32_t* maxima;
  int64_t rows, cols, padding, weight_row, weight_col, out_row;
  bool mean;
  Lanes lanes;
  int64_t table;
};

// The rows at the positions from `first` on, up to `end`, as many in flight; which of them take part; the last invalid
// id.
template <class T, int W>
__device__ __forceinline__ void gather(const BagForward<T>& a, int64_t first, int64_t end, int64_t col,
                                       Vec<T, W> (&row)[kInFlight], bool (&counted)[kInFlight], int64_t& invalid) {
  int64_t id[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    id[u] = first + u < end ? a.ids[first + u] : a.padding;
    const bool valid = id[u] >= 0 && id[u] < a.rows;
    counted[u] = valid && id[u] != a.padding;
    invalid = !valid && first + u < end ? first + u : invalid;
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    row[u] = {};
    if (counted[u]) row[u] = load_part<T, W>(a.weight + id[u] * a.weight_row + col * a.weight_col);
  }
}

template <class T>
__device__ __forceinline__ void report_id(const BagForward<T>& a, int64_t position, int64_t col) {
  if (position >= 0 && col == 0) a.record.report(position, a.ids[position], a.rows, a.table);
}

template <class T, int W, Mode MODE>
__device__ __forceinline__ void reduce_bag(const BagForward<T>& a, int64_t bag, int64_t col) {
  float total[W];
  int32_t place[W];
#pragma unroll
  for (int i = 0; i < W; ++i) total[i] = 0.f, place[i] = -1;
  const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag);
  int64_t invalid = -1;
  int size = 0;
  for (int64_t p = begin; p < end; p += kInFlight) {
    Vec<T, W> row[kInFlight];
    bool counted[kInFlight];
    gather<T, W>(a, p, end, col, row, counted, invalid);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      size += counted[u];  // the row of one that takes no part is 0
      const float factor = MODE == Mode::kSum && a.scale && counted[u] ? to_float(a.scale[p + u]) : 1.f;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float x = to_float(row[u].v[i]);
        if constexpr (MODE == Mode::kMax) {  // the first of equal ones; of a bag with NaN the first NaN
          const bool better = counted[u] && (place[i] < 0 || x > total[i] || (x != x && total[i] == total[i]));
          total[i] = better ? x : total[i];
          place[i] = better ? static_cast<int32_t>(p + u - begin) : place[i];
        } else {
          total[i] += x * factor;
        }
      }
    }
  }
  if (MODE == Mode::kMax && a.maxima) {
#pragma unroll
    for (int i = 0; i < W; ++i) a.maxima[bag * a.out_row + col + i] = place[i];
  }
  if (a.mean && size > 1) {
#pragma unroll
    for (int i = 0; i < W; ++i) total[i] /= static_cast<float>(size);
  }
  store_part<T, W>(a.out + bag * a.out_row + col, total);
  report_id(a, invalid, col);
}

template <class T, int W, Mode MODE>
__global__ void __launch_bounds__(kThreads) bag_forward_kernel(const BagForward<T> a) {
  const int64_t group =
      (static_cast<int64_t>(blockIdx.x) << (kThreadBits - a.lanes.bits)) + (threadIdx.x >> a.lanes.bits);
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * a.lanes.count() + (threadIdx.x & (a.lanes.count() - 1))) * W;
  if (col >= a.cols) return;
  if constexpr (MODE == Mode::kLookup) {  // padding is -1: its row is returned like any other
    const int64_t first = group * kInFlight, end = a.bags.n;
    Vec<T, W> row[kInFlight];
    bool counted[kInFlight];
    int64_t invalid = -1;
    gather<T, W>(a, first, end, col, row, counted, invalid);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      T* const to = a.out + (first + u) * a.out_row + col;
      if (first + u >= end) continue;
      if constexpr (W == 1)
        *to = row[u].v[0];
      else
        store_vec(to, row[u]);
    }
    report_id(a, invalid, col);
  } else {
    if (group < a.bags.count) reduce_bag<T, W, MODE>(a, group, col);
  }
}

constexpr int kFields = 10;

// The table is the block's third coordinate.
template <class T, int W, Mode MODE>
__global__ void __launch_bounds__(kThreads)
    bag_multi_kernel(const int64_t* tables, T* out, int32_t* maxima, const Record record, int64_t bags, int64_t width,
                     bool narrow, bool last, bool mean, const Lanes lanes) {
  const int64_t* const f = tables + static_cast<int64_t>(blockIdx.z) * kFields;
  const int64_t bag = (static_cast<int64_t>(blockIdx.x) << (kThreadBits - lanes.bits)) + (threadIdx.x >> lanes.bits);
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * lanes.count() + (threadIdx.x & (lanes.count() - 1))) * W;
  if (bag >= bags || col >= f[7]) return;
  const BagForward<T> a{{reinterpret_cast<const void*>(f[0]), narrow},
                        {reinterpret_cast<const int64_t*>(f[2]), bags, f[4], f[5], last},
                        record,
                        reinterpret_cast<const T*>(f[1]),
                        reinterpret_cast<const T*>(f[3]),
                        out + f[9],
                        maxima ? maxima + f[9] : nullptr,
                        f[6],
                        f[7],
                        -1,
                        f[8],
                        1,
                        width,
                        mean,
                        lanes,
                        static_cast<int64_t>(blockIdx.z)};
  reduce_bag<T, W, MODE>(a, bag, col);
}

// A warp for each bag.
__global__ void bag_sizes_kernel(const Ids ids, const Bags bags, float* sizes, int64_t rows, int64_t padding) {
  const int64_t bag = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (bag >= bags.count) return;
  const int64_t end = bags.end(bag);
  int size = 0;
  for (int64_t p = bags.begin(bag) + threadIdx.x % kWarp; p < end; p += kWarp) {
    const int64_t id = ids[p];
    size += id >= 0 && id < rows && id != padding;
  }
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1) size += __shfl_xor_sync(kAllLanes, size, o);
  if (threadIdx.x % kWarp == 0) sizes[bag] = static_cast<float>(size > 1 ? size : 1);
}

template <class T>
struct BagWeights {
  Ids ids;
  Bags bags;
  const T *dy, *weight;
  const float* sizes;
  T* out;
  int64_t rows, cols, padding, dy_row, dy_col, weight_row, weight_col;
};

// A warp for each position.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) bag_weights_kernel(const BagWeights<T> a) {
  const int64_t position = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (position >= a.bags.n) return;
  const int64_t id = a.ids[position];
  float total = 0.f;
  if (position < a.bags.limit() && id >= 0 && id < a.rows && id != a.padding) {
    const int64_t bag = a.bags.of(position);
    const T *dy = a.dy + bag * a.dy_row, *row = a.weight + id * a.weight_row;
    for (int64_t col = threadIdx.x % kWarp * W; col < a.cols; col += kWarp * W) {
      const auto x = load_part<T, W>(dy + col * a.dy_col), y = load_part<T, W>(row + col * a.weight_col);
#pragma unroll
      for (int i = 0; i < W; ++i) total += to_float(x.v[i]) * to_float(y.v[i]);
    }
    if (a.sizes) total /= a.sizes[bag];
  }
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1) total += __shfl_xor_sync(kAllLanes, total, o);
  if (threadIdx.x % kWarp == 0) a.out[position] = from_float<T>(total);
}

}  // namespace

void embedding_bag_forward(const void* ids, const void* weight, const int64_t* offsets, const void* scale, void* out,
                           int32_t* maxima, int64_t* record, int64_t what, bool narrow, int64_t bags, int64_t length,
                           int64_t n, bool last, int64_t rows, int64_t cols, int64_t padding, int64_t weight_row,
                           int64_t weight_col, const std::string& mode, DType dtype, void* stream) {
  if (bags <= 0 || cols <= 0) return;
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    BagForward<T> a{{ids, narrow},
                    {offsets, bags, length, n, last},
                    {record, what},
                    static_cast<const T*>(weight),
                    static_cast<const T*>(scale),
                    static_cast<T*>(out),
                    maxima,
                    rows,
                    cols,
                    padding,
                    weight_row,
                    weight_col,
                    cols,
                    mode == "mean",
                    {},
                    0};
    const bool vectors = whole_vectors<T>(weight, weight_row, weight_col, cols) && aligned16(out);
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int W = decltype(width)::value;
      a.lanes = lanes_for(ceil_div(cols, W), kThreadBits);
      const int64_t groups = mode == "lookup" ? ceil_div(bags, kInFlight) : bags;
      const dim3 grid(static_cast<unsigned>(ceil_div(groups, kThreads >> a.lanes.bits)),
                      static_cast<unsigned>(ceil_div(cols, static_cast<int64_t>(a.lanes.count()) * W)));
      const auto kernel = mode == "lookup" ? bag_forward_kernel<T, W, Mode::kLookup>
                          : mode == "max"  ? bag_forward_kernel<T, W, Mode::kMax>
                                           : bag_forward_kernel<T, W, Mode::kSum>;
      launch(kernel, grid, kThreads, 0, stream, a);
    });
  });
}

void embedding_bag_multi_forward(const int64_t* tables, void* out, int32_t* maxima, int64_t* record, int64_t what,
                                 int64_t count, int64_t bags, int64_t width, int64_t most_cols, bool narrow, bool last,
                                 bool vectors, const std::string& mode, DType dtype, void* stream) {
  if (bags <= 0 || most_cols <= 0) return;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_width<T>(vectors && aligned16(out), [&](auto vector) {
      constexpr int W = decltype(vector)::value;
      const Lanes lanes = lanes_for(ceil_div(most_cols, W), kThreadBits);
      const dim3 grid(static_cast<unsigned>(ceil_div(bags, kThreads >> lanes.bits)),
                      static_cast<unsigned>(ceil_div(most_cols, static_cast<int64_t>(lanes.count()) * W)),
                      static_cast<unsigned>(count));
      const auto kernel = mode == "max" ? bag_multi_kernel<T, W, Mode::kMax> : bag_multi_kernel<T, W, Mode::kSum>;
      launch(kernel, grid, kThreads, 0, stream, tables, static_cast<T*>(out), maxima, Record{record, what}, bags, width,
             narrow, last, mode == "mean", lanes);
    });
  });
}

void embedding_bag_sizes(const void* ids, const int64_t* offsets, float* sizes, bool narrow, int64_t bags,
                         int64_t length, int64_t n, bool last, int64_t rows, int64_t padding, void* stream) {
  if (bags <= 0) return;
  const DeviceGuard guard(sizes);
  launch(bag_sizes_kernel, static_cast<unsigned>(ceil_div(bags, kThreads / kWarp)), kThreads, 0, stream,
         Ids{ids, narrow}, Bags{offsets, bags, length, n, last}, sizes, rows, padding);
}

void embedding_bag_backward_weights(const void* dy, const void* ids, const void* weight, const int64_t* offsets,
                                    const float* sizes, void* out, bool narrow, int64_t bags, int64_t length, int64_t n,
                                    bool last, int64_t rows, int64_t cols, int64_t padding, int64_t dy_row,
                                    int64_t dy_col, int64_t weight_row, int64_t weight_col, DType dtype, void* stream) {
  if (n <= 0) return;
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BagWeights<T> a{{ids, narrow},
                          {offsets, bags, length, n, last},
                          static_cast<const T*>(dy),
                          static_cast<const T*>(weight),
                          sizes,
                          static_cast<T*>(out),
                          rows,
                          cols,
                          padding,
                          dy_row,
                          dy_col,
                          weight_row,
                          weight_col};
    const bool vectors =
        whole_vectors<T>(weight, weight_row, weight_col, cols) && whole_vectors<T>(dy, dy_row, dy_col, cols);
    dispatch_width<T>(vectors, [&](auto width) {
      launch(bag_weights_kernel<T, decltype(width)::value>, static_cast<unsigned>(ceil_div(n, kThreads / kWarp)),
             kThreads, 0, stream, a);
    });
  });
}

}  // namespace pk
