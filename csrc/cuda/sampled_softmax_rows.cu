// Losses of a row's own classes: rows of the table are gathered, multiplied and summed in one pass.
//
// Some lanes of a warp share a row of x, each with up to 16 of its columns in registers, and walk its classes four at a
// time.  A lane copies the parts of those rows that it will read itself, asynchronously and one group ahead: eight rows
// are in flight without a register for them, and no barrier is needed.  Rows wider than a warp's 512 columns go by
// chunks, once for the logits and once more for the sum.
#include "embedding.h"
#include "embedding_segment.h"
#include "math.h"
#include "sampled_softmax.h"

namespace pk {
namespace {

constexpr int kThreads = 128, kOwn = 16, kGroup = 4, kStages = 2;

template <class T>
constexpr int kParts = kOwn / Vec16<T>::N;

template <class T>
struct Gather {
  const T *x, *weight, *bias;
  Ids ids;
  const int8_t* signs;
  const float* log;
  float *loss, *coefficient, *unit, *logits;
  int64_t rows, cols, count, classes, x_row, x_col, weight_row, weight_col, bias_step, logits_row;
  bool x_vectors, weight_vectors, adds;
  int bits, parts;  // 2^bits lanes have a row, in each chunk `parts` vectors of it each

  __host__ __device__ int chunk() const { return parts * Vec16<T>::N << bits; }
  __device__ __forceinline__ int chunks() const { return max(1, static_cast<int>(ceil_div(cols, int64_t{chunk()}))); }
  __device__ __forceinline__ int groups() const { return max(1, static_cast<int>(ceil_div(count, int64_t{kGroup}))); }
};

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

template <class T>
class OwnRow {
 public:
  const Gather<T>& g;
  int64_t row;
  bool live, first_lane;

  __device__ __forceinline__ OwnRow(const Gather<T>& gather, unsigned char* raw) : g(gather), raw_(raw) {
    const int lanes = 1 << g.bits;
    row = static_cast<int64_t>(blockIdx.x) * (kThreads >> g.bits) + (static_cast<int>(threadIdx.x) >> g.bits);
    lane_ = static_cast<int>(threadIdx.x) & (lanes - 1);
    live = row < g.rows;
    first_lane = live && lane_ == 0;
  }

  // Class k of the row, -1 where there is none.
  __device__ __forceinline__ int64_t id(int k) const {
    if (!live || k >= g.count) return -1;
    const int64_t id = g.ids[row * g.count + k];
    return id < g.classes ? id : -1;
  }
  __device__ __forceinline__ int64_t col(int chunk, int part) const {
    return static_cast<int64_t>(chunk) * g.chunk() + ((part << g.bits) + lane_) * Vec16<T>::N;
  }

  // f(group, chunk, stage) for all groups of classes and all chunks of columns, while the next rows are on their way.
  template <bool CHUNKS_FIRST, class F>
  __device__ __forceinline__ void walk(F f) {
    const int inner = CHUNKS_FIRST ? g.chunks() : g.groups(), count = g.chunks() * g.groups();
    fetch(0, 0, 0);
    cp_async_commit();
#pragma unroll 1
    for (int i = 0, a = 0, b = 0; i < count; ++i) {
      const int next_b = b + 1 < inner ? b + 1 : 0, next_a = next_b ? a : a + 1;
      if (i + 1 < count) fetch(CHUNKS_FIRST ? next_a : next_b, CHUNKS_FIRST ? next_b : next_a, (i + 1) % kStages);
      cp_async_commit();
      cp_async_wait<1>();
      f(CHUNKS_FIRST ? a : b, CHUNKS_FIRST ? b : a, i % kStages);
      a = next_a;
      b = next_b;
    }
  }

  // What this lane has of class u of the group that arrived in `stage`.
  __device__ __forceinline__ void read(int stage, int u, float (&w)[kOwn]) const {
    constexpr int N = Vec16<T>::N;
#pragma unroll
    for (int p = 0; p < kParts<T>; ++p) {
#pragma unroll
      for (int i = 0; i < N; ++i) w[p * N + i] = 0.f;
      if (p >= g.parts) continue;
      const auto v = load_vec(reinterpret_cast<const T*>(raw_ + slot(stage, u, p)));
#pragma unroll
      for (int i = 0; i < N; ++i) w[p * N + i] = to_float(v.v[i]);
    }
  }
  __device__ __forceinline__ void read_x(int chunk, float (&x)[kOwn]) const {
    constexpr int N = Vec16<T>::N;
#pragma unroll
    for (int p = 0; p < kParts<T>; ++p) {
      const int64_t c = col(chunk, p);
#pragma unroll
      for (int i = 0; i < N; ++i) x[p * N + i] = 0.f;
      if (!live || p >= g.parts) continue;
      if (!g.x_vectors) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (c + i < g.cols) x[p * N + i] = to_float(g.x[row * g.x_row + (c + i) * g.x_col]);
      } else if (c < g.cols) {
        const auto v = load_vec(g.x + row * g.x_row + c);
#pragma unroll
        for (int i = 0; i < N; ++i) x[p * N + i] = to_float(v.v[i]);
      }
    }
  }

  // f(place in memory, element of the lane) for what the lane has of this row of `unit`.
  template <class F>
  __device__ __forceinline__ void each_of_unit(int chunk, F f) const {
    constexpr int N = Vec16<T>::N;
    if (!live) return;
#pragma unroll
    for (int p = 0; p < kParts<T>; ++p)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int64_t c = col(chunk, p) + i;
        if (p < g.parts && c < g.cols) f(g.unit + row * g.cols + c, p * N + i);
      }
  }

  // Summed over the row's lanes.
  __device__ __forceinline__ float sum(float z) const {
    for (int o = 1 << g.bits >> 1; o; o >>= 1) z += __shfl_xor_sync(kAllLanes, z, o);
    return z;
  }

 private:
  __device__ __forceinline__ int slot(int stage, int u, int part) const {
    return (((stage * kGroup + u) * g.parts + part) * kThreads + static_cast<int>(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ void fetch(int group, int chunk, int stage) const {
#pragma unroll 1
    for (int u = 0; u < kGroup; ++u) {
      const int64_t c = id(group * kGroup + u);
      for (int p = 0; p < g.parts; ++p) {
        const int64_t at = col(chunk, p);
        const bool wanted = c >= 0 && at < g.cols;
        const T* const from = wanted ? g.weight + c * g.weight_row + at * g.weight_col : g.weight;
        unsigned char* const to = raw_ + slot(stage, u, p);
        if (g.weight_vectors) {
          cp_async16(smem_addr(to), from, wanted);
          continue;
        }
#pragma unroll 1
        for (int i = 0; i < Vec16<T>::N; ++i)
          reinterpret_cast<T*>(to)[i] = wanted && at + i < g.cols ? from[i * g.weight_col] : from_float<T>(0.f);
      }
    }
  }

  unsigned char* raw_;
  int lane_;
};

template <class T>
__global__ void __launch_bounds__(kThreads) own_classes_kernel(const Gather<T> g) {
  PK_DYN_SHARED(raw);
  OwnRow<T> own(g, raw);
  const int chunks = g.chunks(), groups = g.groups();
  const int64_t first = own.row * g.count;
  const bool at_once = !g.adds && g.unit && chunks == 1;
  float unit[kOwn] = {};
  if (!g.adds) {
    float x[kOwn] = {}, z[kGroup] = {}, loss = 0.f;
    own.template walk<true>([&](int group, int chunk, int stage) {
      if (chunks > 1 || group == 0) own.read_x(chunk, x);
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        float w[kOwn], dot = 0.f;
        own.read(stage, u, w);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) dot = fmaf(x[i], w[i], dot);
        z[u] = chunk == 0 ? dot : z[u] + dot;
      }
      if (chunk + 1 < chunks) return;
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        const int k = group * kGroup + u;
        const int64_t id = own.id(k);
        z[u] = own.sum(z[u]);
        if (g.logits) {
          if (!own.first_lane || k >= g.count) continue;
          if (g.bias && id >= 0) z[u] += to_float(g.bias[id * g.bias_step]);
          if (g.log) z[u] -= g.log[first + k];
          g.logits[own.row * g.logits_row + k] = z[u];
          continue;
        }
        float sign = k == 0 ? 1.f : -1.f;
        if (g.signs && id >= 0) sign = static_cast<float>(g.signs[first + k]);
        const float against = -sign * z[u];
        if (id >= 0) loss += softplus(against);
        z[u] = id >= 0 ? -sign * sigmoid<true>(against) : 0.f;
        if (g.coefficient && own.first_lane && k < g.count) g.coefficient[first + k] = z[u];
      }
      if (!at_once) return;
#pragma unroll
      for (int u = 0; u < kGroup; ++u) {
        float w[kOwn];
        own.read(stage, u, w);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) unit[i] = fmaf(z[u], w[i], unit[i]);
      }
    });
    if (g.loss && own.first_lane) g.loss[own.row] = loss;
    if (at_once) own.each_of_unit(0, [&](float* p, int i) { *p = unit[i]; });
    if (at_once || !g.unit) return;
    __syncwarp();  // slopes are from a row's first lane
  }
  own.template walk<false>([&](int group, int chunk, int stage) {
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) unit[i] = 0.f;
      if (g.adds) own.each_of_unit(chunk, [&](const float* p, int i) { unit[i] = *p; });
    }
#pragma unroll
    for (int u = 0; u < kGroup; ++u) {
      const int k = group * kGroup + u;
      const float factor = own.id(k) >= 0 ? g.coefficient[first + k] : 0.f;
      float w[kOwn];
      own.read(stage, u, w);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) unit[i] = fmaf(factor, w[i], unit[i]);
    }
    if (group + 1 == groups) own.each_of_unit(chunk, [&](float* p, int i) { *p = unit[i]; });
  });
}

template <class T>
void launch_rows_of(Gather<T> g, void* stream) {
  if (g.rows <= 0) return;
  const DeviceGuard guard(g.weight);
  g.x_vectors = g.x && whole_vectors<T>(g.x, g.x_row, g.x_col, g.cols);
  g.weight_vectors = whole_vectors<T>(g.weight, g.weight_row, g.weight_col, g.cols);
  const int64_t vectors = ceil_div(g.cols, int64_t{Vec16<T>::N});
  g.bits = lanes_for(vectors, 5).bits;
  const int64_t parts = ceil_div(vectors, int64_t{1} << g.bits);
  g.parts = parts < kParts<T> ? (parts > 1 ? static_cast<int>(parts) : 1) : kParts<T>;
  const size_t shared = size_t{16} * kThreads * kStages * kGroup * static_cast<size_t>(g.parts);
  launch(own_classes_kernel<T>, static_cast<unsigned>(ceil_div(g.rows, int64_t{kThreads >> g.bits})), kThreads, shared,
         stream, g);
}

__global__ void __launch_bounds__(kThreads)
    own_kernel(const float* dloss, const float* statistics, float* own, int64_t rows, int64_t count, bool logistic) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * count) return;
  const int64_t row = at / count;
  const float* const of_row = statistics + row * (2 + count);
  const float z = of_row[2 + at % count];
  const float share = logistic ? sigmoid<true>(z) : quotient(expf(z - of_row[0]), of_row[1]);
  own[at] = dloss[row] * (share - 1.f / static_cast<float>(count));
}

template <class T>
struct StoreRounded {
  static constexpr bool kWholeRow = false;
  T* out;
  template <int W, int VECS>
  __device__ __forceinline__ void operator()(const float (&total)[VECS][W], const Columns<W, VECS>& at, int64_t,
                                             int64_t target) const {
    T* const to = out + target * at.cols + at[0];
    if constexpr (W == 1)
      *to = from_float<T>(total[0][0]);
    else
      *reinterpret_cast<uint2*>(to) =
          make_uint2(pack2<T>(total[0][0], total[0][1]), pack2<T>(total[0][2], total[0][3]));
  }
};

}  // namespace

void sampled_softmax_logistic(const void* x, const void* weight, const void* ids, const int8_t* signs, float* loss,
                              float* coefficient, float* unit, bool narrow, int64_t rows, int64_t cols, int64_t count,
                              int64_t classes, int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col,
                              DType dtype, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Gather<T> g{};
    g.x = static_cast<const T*>(x), g.weight = static_cast<const T*>(weight), g.ids = {ids, narrow}, g.signs = signs;
    g.loss = loss, g.coefficient = coefficient, g.unit = unit;
    g.rows = rows, g.cols = cols, g.count = count, g.classes = classes;
    g.x_row = x_row, g.x_col = x_col, g.weight_row = weight_row, g.weight_col = weight_col;
    launch_rows_of(g, stream);
  });
}

void sampled_softmax_true_logits(const void* x, const void* weight, const void* bias, const void* labels,
                                 const float* log, float* out, bool narrow, int64_t rows, int64_t cols, int64_t count,
                                 int64_t classes, int64_t x_row, int64_t x_col, int64_t weight_row, int64_t weight_col,
                                 int64_t bias_step, int64_t out_row, DType dtype, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Gather<T> g{};
    g.x = static_cast<const T*>(x), g.weight = static_cast<const T*>(weight), g.bias = static_cast<const T*>(bias);
    g.ids = {labels, narrow}, g.log = log, g.logits = out, g.logits_row = out_row, g.bias_step = bias_step;
    g.rows = rows, g.cols = cols, g.count = count, g.classes = classes;
    g.x_row = x_row, g.x_col = x_col, g.weight_row = weight_row, g.weight_col = weight_col;
    launch_rows_of(g, stream);
  });
}

void sampled_softmax_add_rows(const void* weight, const void* ids, const float* factor, float* out, bool narrow,
                              int64_t rows, int64_t cols, int64_t count, int64_t classes, int64_t weight_row,
                              int64_t weight_col, DType dtype, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Gather<T> g{};
    g.weight = static_cast<const T*>(weight), g.ids = {ids, narrow}, g.unit = out, g.adds = true;
    g.coefficient = const_cast<float*>(factor);
    g.rows = rows, g.cols = cols, g.count = count, g.classes = classes;
    g.weight_row = weight_row, g.weight_col = weight_col;
    launch_rows_of(g, stream);
  });
}

void sampled_softmax_own(const float* dloss, const float* statistics, float* own, int64_t rows, int64_t count,
                         bool logistic, void* stream) {
  if (rows * count <= 0) return;
  launch(own_kernel, static_cast<unsigned>(ceil_div(rows * count, int64_t{kThreads})), kThreads, 0, stream, dloss,
         statistics, own, rows, count, logistic);
}

void sampled_softmax_sum_rows(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks,
                              const int64_t* source, const float* factor, const float* values, void* out,
                              float* partial, int64_t n, int64_t rows, int64_t cols, int64_t chunk_length, DType dtype,
                              void* stream) {
  if (n <= 0 || cols <= 0) return;
  if (dtype == DType::f32)
    return embedding_sum_rows(keys, wide_keys, ranks, source, factor, nullptr, nullptr, values, out, partial, n, rows,
                              cols, cols, 1, chunk_length, false, dtype, stream);
  const DeviceGuard guard(out);
  const Segment<float> s{
      {keys, wide_keys}, ranks, source, factor, nullptr, nullptr, values, partial, n, rows, cols, cols, 1,
      chunk_length,      false, {}};
  dispatch_width<float>(cols % 4 == 0 && aligned16(out) && aligned16(static_cast<const void*>(values)),
                        [&](auto width) {
                          constexpr int W = decltype(width)::value;
                          if (dtype == DType::bf16)
                            launch_segments<float, W, 1, false>(s, StoreRounded<bf16>{static_cast<bf16*>(out)}, stream);
                          else
                            launch_segments<float, W, 1, false>(s, StoreRounded<fp16>{static_cast<fp16*>(out)}, stream);
                        });
}

}  // namespace pk
