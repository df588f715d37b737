// Backward fused with the optimizer: the sum of a run steps the row of the table that it belongs to.  The formulas are
// those of pykernels/ops/embedding/update.py, in float; the row is rounded once, stochastically if there is a seed.
#include "embedding.h"
#include "embedding_segment.h"
#include "philox.h"
#include "reduce.h"

namespace pk {
namespace {

enum class Kind { kSgd, kAdagrad, kRowwiseAdagrad, kAdam };

// Differences from 1 are taken by the caller, in double.
struct UpdateNumbers {
  float lr, weight_decay, eps, one_minus_beta1, beta2, one_minus_beta2, scale2;
};

Kind kind_of(const std::string& rule) {
  if (rule == "sgd") return Kind::kSgd;
  if (rule == "adagrad") return Kind::kAdagrad;
  if (rule == "rowwise_adagrad") return Kind::kRowwiseAdagrad;
  if (rule == "adam") return Kind::kAdam;
  throw std::invalid_argument("unknown rule " + rule);
}

// A float whose lower 16 bits are 0: up with the probability of the part that is cut off.
__device__ __forceinline__ float round_stochastically(float x, uint32_t word) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return __uint_as_float((bits + (word >> 16)) & 0xffff0000u);
}

template <class T>
struct Table {
  T* weight;
  int64_t row;  // elements from one row to the next
  float *state, *second_state;
  const int64_t* seed;
  UpdateNumbers numbers;
  Kind kind;

  template <int W>
  __device__ __forceinline__ void write(int64_t key, int64_t col, int64_t cols, float (&w)[W]) const {
    if (seed) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        w[i] = round_stochastically(
            w[i], philox_word(static_cast<uint64_t>(*seed), static_cast<uint64_t>(key * cols + col + i)));
    }
    store_part<T, W>(weight + key * row + col, w);
  }
};

// Rules that look at one element at a time.
template <class T>
struct Step {
  static constexpr bool kWholeRow = false;
  Table<T> table;

  template <int W, int VECS>
  __device__ __forceinline__ void operator()(const float (&total)[VECS][W], const Columns<W, VECS>& at, int64_t key,
                                             int64_t) const {
    const UpdateNumbers& n = table.numbers;
    const auto old = load_part<T, W>(table.weight + key * table.row + at[0]);
    const int64_t place = key * at.cols + at[0];
    float w[W], g[W], s[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      w[i] = to_float(old.v[i]);
      g[i] = total[0][i];
    }
    if (n.weight_decay != 0.f) {  // 0 times an infinite weight is NaN
#pragma unroll
      for (int i = 0; i < W; ++i) g[i] += n.weight_decay * w[i];
    }
    if (table.kind == Kind::kSgd) {
#pragma unroll
      for (int i = 0; i < W; ++i) w[i] -= n.lr * g[i];
    } else if (table.kind == Kind::kAdagrad) {
      load_floats(table.state + place, s);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        s[i] += g[i] * g[i];
        w[i] -= __fdividef(n.lr * g[i], sqrtf(s[i]) + n.eps);
      }
      store_floats(table.state + place, s);
    } else {
      float m[W];
      load_floats(table.state + place, m);
      load_floats(table.second_state + place, s);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        m[i] += n.one_minus_beta1 * (g[i] - m[i]);
        s[i] = n.beta2 * s[i] + n.one_minus_beta2 * g[i] * g[i];
        w[i] -= __fdividef(n.lr * m[i], sqrtf(s[i]) * n.scale2 + n.eps);
      }
      store_floats(table.state + place, m);
      store_floats(table.second_state + place, s);
    }
    table.template write<W>(key, at[0], at.cols, w);
  }
};

// Row-wise Adagrad: a warp has all columns of its row, for their mean square.
template <class T>
struct RowStep {
  static constexpr bool kWholeRow = true;
  Table<T> table;

  template <int W, int VECS>
  __device__ __forceinline__ void operator()(float (&g)[VECS][W], const Columns<W, VECS>& at, int64_t key,
                                             int64_t) const {
    const UpdateNumbers& n = table.numbers;
    T* const row = table.weight + key * table.row;
    Vec<T, W> old[VECS];
    float squares = 0.f;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      old[v] = {};
      if (at.has(v)) old[v] = load_part<T, W>(row + at[v]);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        g[v][i] += n.weight_decay * to_float(old[v].v[i]);  // a select for an infinite weight, as above, would spill
        squares += at.has(v) ? g[v][i] * g[v][i] : 0.f;
      }
    }
    // One lane reads and writes the state: a shuffle orders no memory.
    const bool leads = threadIdx.x % kWarp == 0;
    const float before = __shfl_sync(kAllLanes, leads ? table.state[key] : 0.f, 0);
    const float s = before + warp_sum(squares) / static_cast<float>(at.cols);
    if (leads) table.state[key] = s;
    const float scale = n.lr / (sqrtf(s) + n.eps);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (!at.has(v)) continue;
      float w[W];
#pragma unroll
      for (int i = 0; i < W; ++i) w[i] = to_float(old[v].v[i]) - scale * g[v][i];
      table.template write<W>(key, at[v], at.cols, w);
    }
  }
};

// Row-wise Adagrad on rows wider than a warp holds goes twice over the gradients.  A kernel of its own, an element a
// lane: within Step it would cost the other rules a sixth of their warps.
template <class T>
struct WideStep {
  static constexpr bool kWholeRow = false;
  Table<T> table;
  float* squares;  // of each row that is touched, in the order of their keys: a share for every 32 columns
  int64_t tiles;
  bool scaled;  // the second pass: the row's first share is what scales its step

  __device__ __forceinline__ void operator()(const float (&total)[1][1], const Columns<1, 1>& at, int64_t key,
                                             int64_t target) const {
    const int64_t col = at[0];
    T* const to = table.weight + key * table.row + col;
    const float old = to_float(*to), decay = table.numbers.weight_decay;
    const float g = total[0][0] + (decay != 0.f ? decay * old : 0.f);
    if (scaled) {
      float w[1] = {old - squares[target * tiles] * g};
      table.template write<1>(key, col, at.cols, w);
      return;
    }
    const int lane = threadIdx.x % kWarp;  // lanes beyond the columns are gone
    const int64_t left = at.cols - col + lane;
    const int lanes = left < kWarp ? static_cast<int>(left) : kWarp;
    const uint32_t here = lanes < kWarp ? (1u << lanes) - 1 : kAllLanes;
    float sum = g * g;
#pragma unroll
    for (int o = kWarp / 2; o; o >>= 1) {
      const float other = __shfl_sync(here, sum, lane + o < lanes ? lane + o : lane);
      sum += lane + o < lanes ? other : 0.f;
    }
    if (lane == 0) squares[target * tiles + col / kWarp] = sum;
  }
};

// Between the passes: at the first entry of each run its row's state, and what scales its step.
__global__ void rowwise_state_kernel(const Keys keys, const int32_t* ranks, float* state, float* squares,
                                     const UpdateNumbers n, int64_t entries, int64_t rows, int64_t cols,
                                     int64_t tiles) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= entries || keys[i] >= rows || (i > 0 && keys[i - 1] == keys[i])) return;
  float* const shares = squares + ranks[i] * tiles;
  float sum = 0.f;
  for (int64_t t = 0; t < tiles; ++t) sum += shares[t];
  const float s = state[keys[i]] + sum / static_cast<float>(cols);
  state[keys[i]] = s;
  shares[0] = n.lr / (sqrtf(s) + n.eps);
}

}  // namespace

void embedding_update(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks, const int64_t* source,
                      const float* factor, const int32_t* place, const int32_t* maxima, const void* dy, void* weight,
                      float* state, float* second_state, const int64_t* seed, float* partial, int64_t n, int64_t rows,
                      int64_t cols, int64_t dy_row, int64_t dy_col, int64_t weight_row, int64_t chunk_length,
                      bool by_frequency, const std::string& rule, float lr, float weight_decay, float eps,
                      float one_minus_beta1, float beta2, float one_minus_beta2, float scale2, DType dtype,
                      void* stream) {
  if (n <= 0 || cols <= 0) return;
  const DeviceGuard guard(weight);
  const Kind kind = kind_of(rule);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Segment<T> s{{keys, wide_keys}, ranks, source, factor, place,  maxima, static_cast<const T*>(dy),
                       partial,           n,     rows,   cols,   dy_row, dy_col, chunk_length,
                       by_frequency,      {}};
    const Table<T> table{static_cast<T*>(weight),
                         weight_row,
                         state,
                         second_state,
                         seed,
                         {lr, weight_decay, eps, one_minus_beta1, beta2, one_minus_beta2, scale2},
                         kind};
    if (ranks) {
      const int64_t tiles = ceil_div(cols, int64_t{kWarp});
      launch_segments<T, 1, 1, false>(s, WideStep<T>{table, second_state, tiles, false}, stream);
      launch(rowwise_state_kernel, static_cast<unsigned>(ceil_div(n, int64_t{256})), 256, 0, stream, s.keys, ranks,
             state, second_state, table.numbers, n, rows, cols, tiles);
      launch_segments<T, 1, 1, false>(s, WideStep<T>{table, second_state, tiles, true}, stream);
      return;
    }
    const bool vectors = whole_vectors<T>(dy, dy_row, dy_col, cols) && whole_vectors<T>(weight, weight_row, 1, cols) &&
                         (kind == Kind::kRowwiseAdagrad || (aligned16(state) && aligned16(second_state)));
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int W = decltype(width)::value;
      constexpr int kMost = W == 1 ? 8 : 16 / W;  // each is a kernel that takes seconds to compile
      if (kind != Kind::kRowwiseAdagrad)
        launch_segments<T, W, 1, false>(s, Step<T>{table}, stream);
      else if (W > 1 && cols <= kWarp * W)
        launch_segments<T, W, W == 1 ? kMost : 1, false>(s, RowStep<T>{table}, stream);
      else if (cols <= kWarp * W * kMost)
        launch_segments<T, W, kMost, false>(s, RowStep<T>{table}, stream);
      else
        throw std::invalid_argument("row-wise Adagrad takes ranks for " + std::to_string(cols) + " columns");
    });
  });
}

}  // namespace pk
