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

}  // namespace

void embedding_update(const int32_t* keys, const int64_t* wide_keys, const int64_t* source, const float* factor,
                      const int32_t* place, const int32_t* maxima, const void* dy, void* weight, float* state,
                      float* second_state, const int64_t* seed, float* partial, int64_t n, int64_t rows, int64_t cols,
                      int64_t dy_row, int64_t dy_col, int64_t weight_row, int64_t chunk_length, bool by_frequency,
                      const std::string& rule, float lr, float weight_decay, float eps, float one_minus_beta1,
                      float beta2, float one_minus_beta2, float scale2, DType dtype, void* stream) {
  if (n <= 0 || cols <= 0) return;
  const DeviceGuard guard(weight);
  const Kind kind = kind_of(rule);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Segment<T> s{{keys, wide_keys}, nullptr, source, factor, place,  maxima, static_cast<const T*>(dy),
                       partial,           n,       rows,   cols,   dy_row, dy_col, chunk_length,
                       by_frequency,      {}};
    const Table<T> table{static_cast<T*>(weight),
                         weight_row,
                         state,
                         second_state,
                         seed,
                         {lr, weight_decay, eps, one_minus_beta1, beta2, one_minus_beta2, scale2},
                         kind};
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
        throw std::invalid_argument(
            "row-wise Adagrad on CUDA takes up to 512 columns, 256 where rows are not whole "
            "multiples of 16 bytes; this table has " +
            std::to_string(cols));
    });
  });
}

}  // namespace pk
