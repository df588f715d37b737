// bias + activation + dropout.  A thread owns one vector of columns and walks rows; the activation is a branch that all
// threads take alike, so that one kernel a dtype serves all of them.  Random words are addressed by the element's
// position in the output: backward makes them again.
//
// The bias gradient is summed in a fixed order and without atomics: each block adds its rows and stores one number a
// column, then sum_parts adds the blocks.  A thread adds in float, threads and blocks are added in double.
#include <iterator>
#include <stdexcept>

#include "activation.h"
#include "math.h"
#include "philox.h"
#include "platform.h"
#include "rows.h"

namespace pk {

namespace {

constexpr int kThreads = kRowsThreads;
constexpr int kBlocks = 1024;  // of a bias gradient: fixed, so that the sum is the same anywhere

struct Plan {
  int64_t rows, cols;
  const int64_t* seed;  // null: no dropout
  uint32_t last;        // words up to this one are dropped
  float scale, alpha;
  int activation, lane_bits;
  unsigned x, y;  // blocks along the columns and along the rows
  bool vectors;
};

template <class T>
Plan plan_of(int64_t rows, int64_t cols, bool sums) {
  Plan c{};
  c.rows = rows, c.cols = cols;
  const int64_t vectors = ceil_div(cols, static_cast<int64_t>(Vec16<T>::N));
  c.lane_bits = bits_for(vectors, kRowsThreadBits);
  const int64_t x = ceil_div(vectors, int64_t{1} << c.lane_bits);
  int64_t y = ceil_div(rows, int64_t{kThreads} >> c.lane_bits);
  if (x > 0x7fffffff) throw std::invalid_argument("too many columns");
  if (sums) {
    const int64_t most = kBlocks / x;
    y = y < most ? y : most < 1 ? 1 : most;
  } else if (x * y >= 8192 && y >= 4) {
    y = ceil_div(y, int64_t{4});
  }
  c.x = static_cast<unsigned>(x), c.y = static_cast<unsigned>(y < 65535 ? y : 65535);
  return c;
}

constexpr const char* kUnaryNames[] = {"sigmoid", "tanh",      "relu", "leaky_relu", "elu",
                                       "gelu",    "gelu_tanh", "silu", "swish"};
constexpr const char* kGateNames[] = {"sigmoid", "relu", "gelu", "gelu_tanh", "silu", "identity"};

int bit_of(const std::string& name, bool gated) {
  const char* const* names = gated ? kGateNames : kUnaryNames;
  const int count = static_cast<int>(gated ? std::size(kGateNames) : std::size(kUnaryNames));
  for (int i = 0; i < count; ++i)
    if (name == names[i]) return 1 << i;
  throw std::invalid_argument("unknown activation " + name);
}

// f(A{}) with the functions of the activation: bit i of `bits` is the i-th of the names above. Tests of bits, as a
// chain of comparisons becomes a jump through a table, behind which the lint cannot follow the path of a full tile.
template <class F>
__device__ __forceinline__ void first_of(int, F&&) {}
template <class A, class... REST, class F>
__device__ __forceinline__ void first_of(int bits, F&& f) {
  if (bits & 1)
    f(A{});
  else
    first_of<REST...>(bits >> 1, f);
}
template <bool GATED, class F>
__device__ __forceinline__ void with_activation(int bits, F&& f) {
  if constexpr (GATED)
    first_of<Sigmoid, Relu, Gelu, GeluTanh, Silu, Identity>(bits, f);
  else
    first_of<Sigmoid, Tanh, Relu, LeakyRelu, Elu, Gelu, GeluTanh, Silu, Swish>(bits, f);
}

// Where this thread begins and how far it steps.
template <class T>
struct Place {
  int64_t row, row_step, col;
  int part;
  bool whole;
  __device__ __forceinline__ explicit Place(const Plan& c) {
    constexpr int N = Vec16<T>::N;
    const unsigned lanes = 1u << c.lane_bits, lane_rows = kThreads >> c.lane_bits;
    row = static_cast<int64_t>(blockIdx.y) * lane_rows + (threadIdx.x >> c.lane_bits);
    row_step = static_cast<int64_t>(gridDim.y) * lane_rows;
    col = (static_cast<int64_t>(blockIdx.x) * lanes + (threadIdx.x & (lanes - 1))) * N;
    part = col < c.cols ? part_of_vector<T>(c.cols - col) : 0;
    whole = c.vectors && part == N;
  }
};

// The two paths meet as floats: arithmetic is compiled once.  What is not there is 0.
template <class T, int N>
__device__ __forceinline__ void load_floats(float (&v)[N], const T* p, const Place<T>& at) {
  if (at.whole) {
    const Vec16<T> raw = load_vec(p);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(raw.v[i]);
  } else {
    const Vec16<T> raw = load_vec_part(p, at.part, from_float<T>(0.f));
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(raw.v[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ void load_with_bias(float (&v)[N], const T* p, const T* bias, const Place<T>& at) {
  load_floats(v, p, at);
  if (!bias) return;
  float b[N];
  load_floats(b, bias + at.col, at);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] += b[i];
}

template <class T, int N>
__device__ __forceinline__ void store_floats(T* p, const float (&v)[N], const Place<T>& at) {
  Vec16<T> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.v[i] = from_float<T>(v[i]);
  if (at.whole)
    store_vec(p, raw);
  else
    store_vec_part(p, raw, at.part);
}

// Bit i: the element at index + i is kept.
template <int N>
__device__ __forceinline__ unsigned kept_bits(const Plan& c, int64_t index) {
  if (!c.seed) return ~0u;
  const uint64_t seed = static_cast<uint64_t>(*c.seed);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    bits |= static_cast<unsigned>(philox_word(seed, static_cast<uint64_t>(index + i)) > c.last) << i;
  return bits;
}

template <int N>
__device__ __forceinline__ void drop(float (&v)[N], unsigned kept, float scale) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = kept >> i & 1 ? v[i] * scale : 0.f;
}

template <class T, bool GATED>
__global__ void __launch_bounds__(kThreads)
    fused_fwd_kernel(const T* x, const T* up, const T* bias, const T* up_bias, T* y, const Plan c, int64_t x_stride) {
  constexpr int N = Vec16<T>::N;
  const Place<T> at(c);
  if (at.part == 0) return;
  for (int64_t row = at.row; row < c.rows; row += at.row_step) {
    float v[N], u[N], out[N];
    load_with_bias(v, x + row * x_stride + at.col, bias, at);
    if constexpr (GATED) load_with_bias(u, up + row * x_stride + at.col, up_bias, at);
    with_activation<GATED>(c.activation, [&](auto a) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out[i] = decltype(a)::template value<sizeof(T) == 4>(v[i], c.alpha);
        if constexpr (GATED) out[i] *= u[i];
      }
    });
    const int64_t index = row * c.cols + at.col;
    drop(out, kept_bits<N>(c, index), c.scale);
    store_floats(y + index, out, at);
  }
}

// partial[column]: the sum of this block's threads for each column of their vectors, in a fixed order.
template <class T, int N>
__device__ __forceinline__ void store_sums(const float (&sum)[N], double* partial, const Plan& c) {
  PK_SHARED(float, lane_sum, [kThreads][N]);
#pragma unroll
  for (int i = 0; i < N; ++i) lane_sum[threadIdx.x][i] = sum[i];
  __syncthreads();
  const int lanes = 1 << c.lane_bits;
  for (int k = static_cast<int>(threadIdx.x); k < lanes * N; k += kThreads) {
    const int64_t col = static_cast<int64_t>(blockIdx.x) * lanes * N + k;
    double total = 0;
    for (int t = k / N; t < kThreads; t += lanes) total += static_cast<double>(lane_sum[t][k % N]);
    if (col < c.cols) partial[col] = total;
  }
}

// Of the backward, a multiprocessor: as many as the registers of each form allow without spills.
template <class T, bool GATED>
constexpr int kResident = sizeof(T) == 4 ? 5 : (GATED ? 3 : 4);

template <class T, bool GATED>
__global__ void __launch_bounds__(kThreads, kResident<T, GATED>)
    fused_bwd_kernel(const T* dy, const T* x, const T* up, const T* bias, const T* up_bias, T* dx, T* dup, T* y,
                     double* partial, int64_t gate_at, int64_t up_at, const Plan c, int64_t dy_stride, int64_t x_stride,
                     int64_t dx_stride) {
  constexpr int N = Vec16<T>::N;
  constexpr bool PRECISE = sizeof(T) == 4;
  const Place<T> at(c);
  float sum[N] = {}, up_sum[N] = {};
  for (int64_t row = at.row; at.part && row < c.rows; row += at.row_step) {
    float g[N], v[N], u[N], out[N];  // in the end dx, -, dup, y
    load_floats(g, dy + row * dy_stride + at.col, at);
    load_with_bias(v, x + row * x_stride + at.col, bias, at);
    if constexpr (GATED) load_with_bias(u, up + row * x_stride + at.col, up_bias, at);
    const int64_t index = row * c.cols + at.col;
    const unsigned kept = kept_bits<N>(c, index);
    drop(g, kept, c.scale);
    with_activation<GATED>(c.activation, [&](auto a) {
      using A = decltype(a);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if constexpr (GATED) {
          const float value = A::template value<PRECISE>(v[i], c.alpha), d = g[i];
          out[i] = value * u[i];
          g[i] = A::template gradient<PRECISE>(d * u[i], v[i], c.alpha);
          u[i] = d * value;
        } else {
          if (y) out[i] = A::template value<PRECISE>(v[i], c.alpha);
          g[i] = A::template gradient<PRECISE>(g[i], v[i], c.alpha);
        }
      }
    });
    if (dx) {
      store_floats(dx + row * dx_stride + at.col, g, at);
      if constexpr (GATED) store_floats(dup + row * dx_stride + at.col, u, at);
    }
    if (y) {
      drop(out, kept, c.scale);
      store_floats(y + index, out, at);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {  // elements past the end have a gradient of 0
      sum[i] += g[i];
      if constexpr (GATED) up_sum[i] += u[i];
    }
  }
  if (!partial) return;
  double* const mine = partial + static_cast<int64_t>(blockIdx.y) * c.cols * (GATED ? 2 : 1);
  store_sums<T>(sum, mine + gate_at, c);
  if constexpr (GATED) {
    __syncthreads();
    store_sums<T>(up_sum, mine + up_at, c);
  }
}

template <class T>
const T* typed(const void* p, int64_t offset = 0) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}
template <class T>
T* typed(void* p, int64_t offset = 0) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}

// Null is aligned: it is not there.
template <class T>
bool rows_aligned(const T* p, int64_t stride, const Plan& c) {
  return aligned16(p, c.rows > 1 ? stride : 0);
}

void set_options(Plan& c, const std::string& activation, bool gated, float alpha, float scale, int64_t threshold,
                 const int64_t* seed) {
  c.activation = bit_of(activation, gated);
  c.alpha = alpha;
  c.scale = threshold > 0 ? scale : 1.f;
  c.seed = threshold > 0 ? seed : nullptr;
  c.last = static_cast<uint32_t>(threshold - 1);
}

}  // namespace

void fused_forward(const void* x, const void* bias, const int64_t* seed, void* y, int64_t rows, int64_t cols,
                   int64_t x_stride, bool gated, int64_t gate_at, int64_t up_at, const std::string& activation,
                   float alpha, float scale, int64_t threshold, DType dtype, void* stream) {
  if (rows <= 0 || cols <= 0) return;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Plan c = plan_of<T>(rows, cols, false);
    set_options(c, activation, gated, alpha, scale, threshold, seed);
    const T *gate = typed<T>(x, gate_at), *up = typed<T>(x, up_at);
    const T *gate_bias = typed<T>(bias, gate_at), *up_bias = typed<T>(bias, up_at);
    c.vectors = rows_aligned(gate, x_stride, c) && rows_aligned(up, x_stride, c) && aligned16(gate_bias) &&
                aligned16(up_bias) && rows_aligned(typed<T>(y), cols, c);
    launch(gated ? fused_fwd_kernel<T, true> : fused_fwd_kernel<T, false>, dim3(c.x, c.y), kThreads, 0, stream, gate,
           up, gate_bias, up_bias, typed<T>(y), c, x_stride);
  });
}

int64_t fused_parts(int64_t rows, int64_t cols, DType dtype) {
  return dtype == DType::f32 ? plan_of<float>(rows, cols, true).y : plan_of<fp16>(rows, cols, true).y;
}

void fused_backward(const void* dy, const void* x, const void* bias, const int64_t* seed, void* dx, void* dbias,
                    void* y, double* partial, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                    int64_t dx_stride, bool gated, int64_t gate_at, int64_t up_at, const std::string& activation,
                    float alpha, float scale, int64_t threshold, DType dtype, void* stream) {
  if (rows <= 0 || cols <= 0) return;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Plan c = plan_of<T>(rows, cols, dbias != nullptr);
    set_options(c, activation, gated, alpha, scale, threshold, seed);
    const T *gate = typed<T>(x, gate_at), *up = typed<T>(x, up_at);
    const T *gate_bias = typed<T>(bias, gate_at), *up_bias = typed<T>(bias, up_at);
    T *dgate = typed<T>(dx, gate_at), *dup = typed<T>(dx, up_at);
    c.vectors = rows_aligned(typed<T>(dy), dy_stride, c) && rows_aligned(gate, x_stride, c) &&
                rows_aligned(up, x_stride, c) && aligned16(gate_bias) && aligned16(up_bias) &&
                rows_aligned<T>(dgate, dx_stride, c) && rows_aligned<T>(dup, dx_stride, c) &&
                rows_aligned<T>(typed<T>(y), cols, c);
    launch(gated ? fused_bwd_kernel<T, true> : fused_bwd_kernel<T, false>, dim3(c.x, c.y), kThreads, 0, stream,
           typed<T>(dy), gate, up, gate_bias, up_bias, dgate, dup, typed<T>(y), dbias ? partial : nullptr, gate_at,
           up_at, c, dy_stride, x_stride, dx_stride);
    if (dbias) sum_parts(partial, dbias, c.y, gated ? 2 * cols : cols, dtype, stream);
  });
}

}  // namespace pk
