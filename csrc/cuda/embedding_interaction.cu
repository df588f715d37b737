// DLRM's pairwise interaction, one kernel each way.  A block has a sample: its features are read once, into shared
// memory, where every pair of them meets; neither the concatenation nor a square of products is ever stored.
#include "embedding.h"
#include "platform.h"

namespace pk {
namespace {

constexpr int kThreads = 128;
constexpr size_t kMostShared = 160 * 1024;  // what every GPU from sm_80 on has for a block, less what is static

template <class T>
struct Features {  // of all samples: the dense ones are row 0, the sparse ones the others
  const T *dense, *sparse;
  int64_t dense_b, dense_d, sparse_b, sparse_f, sparse_d;
  int rows, cols;

  __host__ __device__ int pitch() const { return cols | 1; }  // rows of a column lie in different banks
  __device__ __forceinline__ float at(int64_t sample, int i, int d) const {
    return to_float(i ? sparse[sample * sparse_b + (i - 1) * sparse_f + d * sparse_d]
                      : dense[sample * dense_b + d * dense_d]);
  }
  __device__ __forceinline__ void load(float* x, int64_t sample) const {
    for (int e = threadIdx.x; e < rows * cols; e += kThreads)
      x[e / cols * pitch() + e % cols] = at(sample, e / cols, e % cols);
  }
};

__host__ __device__ inline int first_of_row(int i, bool self) { return self ? i * (i + 1) / 2 : i * (i - 1) / 2; }

template <class T>
__global__ void __launch_bounds__(kThreads)
    interaction_forward_kernel(const Features<T> f, T* out, int pairs, bool self) {
  PK_DYN_SHARED(raw);
  float* const x = reinterpret_cast<float*>(raw);
  const int64_t sample = blockIdx.x;
  f.load(x, sample);
  __syncthreads();
  T* const to = out + sample * (f.cols + pairs);
  for (int d = threadIdx.x; d < f.cols; d += kThreads) to[d] = from_float<T>(x[d]);
  int i = self ? 0 : 1;
  for (int p = threadIdx.x; p < pairs; p += kThreads) {
    while (first_of_row(i + 1, self) <= p) ++i;
    const float *a = x + i * f.pitch(), *b = x + (p - first_of_row(i, self)) * f.pitch();
    float sum = 0.f;
    for (int d = 0; d < f.cols; ++d) sum += a[d] * b[d];
    to[f.cols + p] = from_float<T>(sum);
  }
}

// dx = (G + G^T) x, G the lower triangle of dy's products; the dense features add dy's first columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    interaction_backward_kernel(const Features<T> f, const T* dy, int64_t dy_b, int64_t dy_c, T* ddense, T* dsparse,
                                int pairs, bool self) {
  PK_DYN_SHARED(raw);
  float* const x = reinterpret_cast<float*>(raw);
  float* const g = x + f.rows * f.pitch();
  const int64_t sample = blockIdx.x;
  f.load(x, sample);
  const T* const from = dy + sample * dy_b;
  for (int p = threadIdx.x; p < pairs; p += kThreads) g[p] = to_float(from[(f.cols + p) * dy_c]);
  __syncthreads();
  for (int e = threadIdx.x; e < f.rows * f.cols; e += kThreads) {
    const int i = e / f.cols, d = e % f.cols;
    T* const to = i ? dsparse : ddense;
    if (!to) continue;
    float sum = i ? 0.f : to_float(from[d * dy_c]);
    for (int j = 0; j < f.rows; ++j) {
      if (j == i && !self) continue;
      const float both = j == i ? 2.f : 1.f;
      sum += both * g[first_of_row(i > j ? i : j, self) + (i > j ? j : i)] * x[j * f.pitch() + d];
    }
    to[(i ? sample * (f.rows - 1) + i - 1 : sample) * f.cols + d] = from_float<T>(sum);
  }
}

size_t shared_bytes(int64_t rows, int64_t cols, int64_t pairs) {
  const size_t bytes = static_cast<size_t>(rows * (cols | 1) + pairs) * sizeof(float);
  if (bytes > kMostShared)
    throw std::invalid_argument("dot_interaction on CUDA keeps a sample in shared memory: " + std::to_string(rows) +
                                " features of " + std::to_string(cols) + " are too many");
  return bytes;
}

}  // namespace

void dot_interaction_forward(const void* dense, const void* sparse, void* out, int64_t batch, int64_t rows,
                             int64_t cols, int64_t pairs, int64_t dense_b, int64_t dense_d, int64_t sparse_b,
                             int64_t sparse_f, int64_t sparse_d, bool self, DType dtype, void* stream) {
  if (batch <= 0 || cols + pairs <= 0) return;
  const size_t bytes = shared_bytes(rows, cols, 0);
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Features<T> f{
        static_cast<const T*>(dense), static_cast<const T*>(sparse), dense_b, dense_d, sparse_b, sparse_f, sparse_d,
        static_cast<int>(rows),       static_cast<int>(cols)};
    launch(interaction_forward_kernel<T>, static_cast<unsigned>(batch), kThreads, bytes, stream, f,
           static_cast<T*>(out), static_cast<int>(pairs), self);
  });
}

void dot_interaction_backward(const void* dy, const void* dense, const void* sparse, void* ddense, void* dsparse,
                              int64_t batch, int64_t rows, int64_t cols, int64_t pairs, int64_t dy_b, int64_t dy_c,
                              int64_t dense_b, int64_t dense_d, int64_t sparse_b, int64_t sparse_f, int64_t sparse_d,
                              bool self, DType dtype, void* stream) {
  if (batch <= 0 || cols <= 0) return;
  const size_t bytes = shared_bytes(rows, cols, pairs);
  const DeviceGuard guard(dense);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Features<T> f{
        static_cast<const T*>(dense), static_cast<const T*>(sparse), dense_b, dense_d, sparse_b, sparse_f, sparse_d,
        static_cast<int>(rows),       static_cast<int>(cols)};
    launch(interaction_backward_kernel<T>, static_cast<unsigned>(batch), kThreads, bytes, stream, f,
           static_cast<const T*>(dy), dy_b, dy_c, static_cast<T*>(ddense), static_cast<T*>(dsparse),
           static_cast<int>(pairs), self);
  });
}

}  // namespace pk
