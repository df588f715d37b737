// Losses over classes that all rows share: an online log-sum-exp over tiles of logits, and the gradients of the logits,
// made again from tiles.
#include "sampled_softmax.h"
#include "sampled_softmax_tiles.h"

namespace pk {
namespace {

constexpr int kThreads = 128;

// log(1 + exp(x)), with relative accuracy where exp(x) is small.
template <bool PRECISE>
__device__ __forceinline__ float softplus(float x) {
  const float e = exponential<PRECISE>(-fabsf(x));
  if constexpr (PRECISE) return fmaxf(x, 0.f) + log1pf(e);
  const float series = e * (1.f - e * (0.5f - e * (0.33333334f - e * 0.25f)));
  return fmaxf(x, 0.f) + (e < 0.0625f ? series : __logf(1.f + e));
}

// Over the four lanes that have a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float finite_base(float m) { return m == -kInfinity ? 0.f : m; }  // exp(-inf - 0) is 0

template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads)
    logits_fwd_kernel(const Logits<T> a, float* partial, int64_t part_length, bool smooth) {
  using C = LogitTiles<T>;
  constexpr int M = C::M, N = C::kClasses;
  constexpr bool PRECISE = kWide<T>;
  PK_DYN_SHARED(raw);
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * C::kRows, begin = blockIdx.y * part_length;
  const int64_t end = begin + part_length < a.count ? begin + part_length : a.count;
  const int64_t first_row = i0 + static_cast<int>(threadIdx.x) / kWarp * 16 * M;
  const bool all = !a.ids.data;
  float highest[2 * M], total[2 * M] = {}, own[2 * M] = {}, below[2 * M] = {}, weights = 0.f;  // the lane's shares
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) highest[r] = -kInfinity;
  walk_tiles(a, raw, i0, begin, end, [&](int64_t j0, float (&z)[M][N / 8][4], const float (&factors)[N]) {
    if (a.logistic) {
#pragma unroll
      for (int r = 0; r < 2 * M; ++r)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) total[r] += softplus<PRECISE>(z[r / 2][n][r % 2 * 2 + e]);
      return;
    }
    float seen = 0.f;
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      float most = z[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) most = fmaxf(most, z[r / 2][n][r % 2 * 2 + e]);
      const float higher = fmaxf(highest[r], row_max(most)), base = finite_base(higher);
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) sum += exponential<PRECISE>(z[r / 2][n][r % 2 * 2 + e] - base);
      total[r] = total[r] * exponential<PRECISE>(highest[r] - base) + sum;
      if (all) {
        const int64_t row = first_row + row_of(r), target = row < a.rows ? a.labels[row] - j0 : -1;
        const int place = target < N ? static_cast<int>(target) : -1;
        if (smooth && weights != 0.f) below[r] += weights * (highest[r] - base);
        seen = 0.f;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = column_of(n, e);
            const float logit = z[r / 2][n][r % 2 * 2 + e];
            if (c == place) own[r] += logit;
            if (!smooth) continue;
            const float factor = factors[c];
            if (factor != 0.f) below[r] += factor * (logit - base);
            seen += factor;
          }
      }
      highest[r] = higher;
    }
    weights += seen;
  });
  weights = row_sum(weights);
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int64_t row = first_row + row_of(r);
    total[r] = row_sum(total[r]);
    own[r] = row_sum(own[r]);
    below[r] = row_sum(below[r]);
    if (threadIdx.x % 4 || row >= a.rows) continue;
    float* const to = partial + blockIdx.y * kPlanes * a.rows + row;
    to[0] = highest[r];
    to[a.rows] = total[r];
    to[2 * a.rows] = own[r];
    to[3 * a.rows] = below[r];
    to[4 * a.rows] = weights;
  }
}

struct Slopes {
  const float *dloss, *statistics, *all;
  void *dz, *transposed;
  int64_t statistics_row, dz_row, transposed_row, begin, length, ignored;
  float smoothing, z_loss;
};

// dz_j = scale p_j - own [j is the target] - even c_j
struct RowFactors {
  float highest, sum, scale, own, even;
  int64_t target;
};

template <class T>
__device__ __forceinline__ RowFactors row_factors(const Logits<T>& a, const Slopes& s, int64_t row) {
  RowFactors f{0.f, 0.f, 0.f, 0.f, 0.f, -1};
  if (row >= a.rows) return f;
  float g = s.dloss[row];
  f.highest = s.statistics[row * s.statistics_row];
  const float total = s.statistics[row * s.statistics_row + 1];
  f.sum = total;
  f.scale = g;
  if (a.ids.data) return f;
  f.target = a.labels[row];
  const bool kept = f.target != s.ignored;
  if (!kept) g = 0.f;
  const bool inside = kept && f.target >= 0 && f.target < a.classes;
  const float c = !kept ? 0.f : a.factors ? (inside ? a.factors[f.target] : 0.f) : 1.f;
  f.own = (1.f - s.smoothing) * g * c;
  f.scale = f.own;
  if (s.smoothing != 0.f) {
    f.even = s.smoothing / static_cast<float>(a.classes) * g;
    f.scale += f.even * (s.all ? *s.all : static_cast<float>(a.classes));
  }
  if (s.z_loss != 0.f) f.scale += 2.f * s.z_loss * g * c * (f.highest + logf(total));
  return f;
}

template <class T>
__global__ void __launch_bounds__(LogitTiles<T>::kThreads) logits_bwd_kernel(const Logits<T> a, const Slopes s) {
  using C = LogitTiles<T>;
  using D = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;  // float16 has not the range
  constexpr int M = C::M, N = C::kClasses;
  constexpr bool PRECISE = kWide<T>;
  PK_DYN_SHARED(raw);
  PK_SHARED(RowFactors, factors, [C::kRows]);
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * C::kRows;
  const int64_t begin = s.begin + blockIdx.y * int64_t{N}, end = s.begin + s.length;
  const int first = static_cast<int>(threadIdx.x) / kWarp * 16 * M;
  if (threadIdx.x < C::kRows) factors[threadIdx.x] = row_factors(a, s, i0 + threadIdx.x);
  // ready() below has the barrier
  walk_tiles(a, raw, i0, begin, begin + N < end ? begin + N : end,
             [&](int64_t j0, float (&z)[M][N / 8][4], const float (&weights)[N]) {
               const int here = static_cast<int>(end - j0 < N ? end - j0 : N);
               const int odd =
                   static_cast<int>(threadIdx.x) / 4 % 2;  // a lane has one column of its row and the next one
               const int dz_here = static_cast<int>(s.dz_row - (j0 - s.begin) < N ? s.dz_row - (j0 - s.begin) : N);
#pragma unroll
               for (int r = 0; r < 2 * M; ++r) {
                 const RowFactors f = factors[first + row_of(r)];
                 const int64_t row = i0 + first + row_of(r), target = f.target - j0;
                 const int place = target < N ? static_cast<int>(target) : -1;
                 const bool exists = row < a.rows;
                 D* const dz = s.dz && exists ? static_cast<D*>(s.dz) + row * s.dz_row + (j0 - s.begin) : nullptr;
                 D* const transposed = static_cast<D*>(s.transposed) + (j0 - s.begin) * s.transposed_row + (row - odd);
#pragma unroll
                 for (int n = 0; n < N / 8; ++n) {
                   const int c = column_of(n, 0);
                   float x[2];
#pragma unroll
                   for (int e = 0; e < 2; ++e) {
                     const float logit = z[r / 2][n][r % 2 * 2 + e];
                     const float power = exponential<PRECISE>(a.logistic ? -logit : logit - f.highest);
                     x[e] = f.scale * quotient(a.logistic ? 1.f : power, a.logistic ? 1.f + power : f.sum);
                     if (c + e == place) x[e] -= f.own;
                     if (f.even != 0.f) x[e] -= f.even * weights[c + e];
                     if (!exists || c + e >= here) x[e] = 0.f;
                   }
                   if (dz && c < dz_here) store_pair(dz + c, x[0], x[1]);
                   if (!s.transposed) continue;
                   const float other = __shfl_xor_sync(kAllLanes, odd ? x[0] : x[1], 4);
                   if (row - odd < s.transposed_row && c + odd < here)
                     store_pair(transposed + (c + odd) * s.transposed_row, odd ? other : x[0], odd ? x[1] : other);
                 }
               }
             });
}

__global__ void __launch_bounds__(kThreads)
    join_sample_kernel(const float* partial, float* statistics, float* loss, int64_t rows, int64_t parts, int64_t count,
                       bool logistic) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float* const of_row = statistics + row * (2 + count);
  const float* const of_parts = partial + row;
  const int64_t apart = kPlanes * rows;
  const float share = 1.f / static_cast<float>(count);
  if (logistic) {
    float sum = 0.f, own = 0.f;
    for (int64_t t = 0; t < count; ++t) own += softplus<true>(of_row[2 + t]) - of_row[2 + t] * share;
    for (int64_t p = 0; p < parts; ++p) sum += of_parts[p * apart + rows];
    loss[row] = own + sum;
    of_row[0] = of_row[1] = 0.f;
    return;
  }
  float highest = -kInfinity;
  for (int64_t t = 0; t < count; ++t) highest = fmaxf(highest, of_row[2 + t]);
  for (int64_t p = 0; p < parts; ++p) highest = fmaxf(highest, of_parts[p * apart]);
  const float base = finite_base(highest);
  float total = 0.f, mean = 0.f;
  for (int64_t t = 0; t < count; ++t) {
    total += expf(of_row[2 + t] - base);
    mean += (of_row[2 + t] - base) * share;
  }
  for (int64_t p = 0; p < parts; ++p) total += of_parts[p * apart + rows] * expf(of_parts[p * apart] - base);
  of_row[0] = base;
  of_row[1] = total;
  loss[row] = logf(total) - mean;
}

__global__ void __launch_bounds__(kThreads)
    join_all_kernel(const float* partial, const Ids target, const float* factors, const float* all, float* statistics,
                    float* loss, int64_t rows, int64_t parts, int64_t classes, int64_t ignored, float smoothing,
                    float z_loss) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const float* const of_parts = partial + row;
  const int64_t apart = kPlanes * rows, label = target[row];
  float highest = -kInfinity;
  for (int64_t p = 0; p < parts; ++p) highest = fmaxf(highest, of_parts[p * apart]);
  const float base = finite_base(highest);
  float total = 0.f, own = 0.f, below = 0.f;
  for (int64_t p = 0; p < parts; ++p) {
    const float* const at = of_parts + p * apart;
    total += at[rows] * expf(at[0] - base);
    own += at[2 * rows];
    below += at[3 * rows] + (at[4 * rows] == 0.f ? 0.f : at[4 * rows] * (at[0] - base));
  }
  const bool inside = label >= 0 && label < classes;
  const float c = factors ? (inside ? factors[label] : 0.f) : 1.f, log = logf(total);
  float x = (1.f - smoothing) * c * (log - (own - base));
  if (smoothing != 0.f) {
    const float sum = all ? *all : static_cast<float>(classes);
    x += smoothing / static_cast<float>(classes) * (sum * log - below);
  }
  if (z_loss != 0.f) x += z_loss * c * (base + log) * (base + log);
  statistics[2 * row] = base;
  statistics[2 * row + 1] = total;
  loss[row] = label != ignored ? x : 0.f;
}

template <class T>
Logits<T> logits_of(const void* x, const void* weight, const void* bias, const void* ids, const float* log,
                    const void* labels, const float* factors, bool narrow_ids, bool narrow_labels, int64_t rows,
                    int64_t count, int64_t cols, int64_t classes, int64_t x_row, int64_t x_col, int64_t weight_row,
                    int64_t weight_col, int64_t bias_step, int64_t hits, bool logistic, bool exact) {
  return {matrix<T>(x, x_row, x_col, cols),
          matrix<T>(weight, weight_row, weight_col, cols),
          static_cast<const T*>(bias),
          {ids, narrow_ids},
          log,
          {labels, narrow_labels},
          factors,
          rows,
          count,
          classes,
          bias_step,
          ids ? hits : 0,
          logistic,
          exact};
}

unsigned blocks_of(int64_t n, int64_t size) { return static_cast<unsigned>(ceil_div(n, size)); }

}  // namespace

void sampled_softmax_logits(const void* x, const void* weight, const void* bias, const void* ids, const float* log,
                            const void* labels, const float* factors, float* partial, bool narrow_ids,
                            bool narrow_labels, int64_t rows, int64_t count, int64_t cols, int64_t classes,
                            int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col, int64_t bias_step,
                            int64_t hits, int64_t part_length, int64_t parts, bool logistic, bool smooth, bool exact,
                            DType dtype, void* stream) {
  if (rows <= 0) return;
  const DeviceGuard guard(x);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = LogitTiles<T>;
    const auto a = logits_of<T>(x, weight, bias, ids, log, labels, factors, narrow_ids, narrow_labels, rows, count,
                                cols, classes, x_row, x_col, weight_row, weight_col, bias_step, hits, logistic, exact);
    launch(logits_fwd_kernel<T>, dim3(blocks_of(rows, C::kRows), static_cast<unsigned>(parts)), C::kThreads,
           C::kStages * C::kStageBytes, stream, a, partial, part_length, smooth);
  });
}

void sampled_softmax_slopes(const void* x, const void* weight, const void* bias, const void* ids, const float* log,
                            const void* labels, const float* factors, const float* dloss, const float* statistics,
                            const float* all, void* dz, void* transposed, bool narrow_ids, bool narrow_labels,
                            int64_t rows, int64_t count, int64_t cols, int64_t classes, int64_t x_row, int64_t x_col,
                            int64_t weight_row, int64_t weight_col, int64_t bias_step, int64_t hits, int64_t begin,
                            int64_t length, int64_t statistics_row, int64_t dz_row, int64_t transposed_row,
                            int64_t ignored, float smoothing, float z_loss, bool logistic, bool exact, DType dtype,
                            void* stream) {
  if (rows <= 0 || length <= 0) return;
  const DeviceGuard guard(x);
  const Slopes s{dloss,          statistics, all,    dz,      transposed, statistics_row, dz_row,
                 transposed_row, begin,      length, ignored, smoothing,  z_loss};
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = LogitTiles<T>;
    const auto a = logits_of<T>(x, weight, bias, ids, log, labels, factors, narrow_ids, narrow_labels, rows, count,
                                cols, classes, x_row, x_col, weight_row, weight_col, bias_step, hits, logistic, exact);
    launch(logits_bwd_kernel<T>, dim3(blocks_of(rows, C::kRows), blocks_of(length, C::kClasses)), C::kThreads,
           C::kStages * C::kStageBytes, stream, a, s);
  });
}

void sampled_softmax_join_sample(const float* partial, float* statistics, float* loss, int64_t rows, int64_t parts,
                                 int64_t count, bool logistic, void* stream) {
  if (rows <= 0) return;
  launch(join_sample_kernel, blocks_of(rows, kThreads), kThreads, 0, stream, partial, statistics, loss, rows, parts,
         count, logistic);
}

void sampled_softmax_join_all(const float* partial, const void* target, const float* factors, const float* all,
                              float* statistics, float* loss, bool narrow, int64_t rows, int64_t parts, int64_t classes,
                              int64_t ignored, float smoothing, float z_loss, void* stream) {
  if (rows <= 0) return;
  launch(join_all_kernel, blocks_of(rows, kThreads), kThreads, 0, stream, partial, Ids{target, narrow}, factors, all,
         statistics, loss, rows, parts, classes, ignored, smoothing, z_loss);
}

}  // namespace pk
