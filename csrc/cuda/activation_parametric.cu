// prelu and swish with a learnt parameter for each channel.  A tensor is (outer, channels, inner).  Where inner is 1
// the channels are the columns a thread owns, else a block stays on one channel; both walk rows and columns by strides
// of the grid, so no address needs a division.
//
// The weight gradient is summed in a fixed order and without atomics: each block adds its share and stores one number a
// channel, then one kernel adds those.  One channel is spread over as many blocks as a thousand channels are.  A thread
// adds in float, threads and blocks are added in double: a few thousand additions that cost nothing, where float would
// lose the digits that a sum of mixed signs still has.
#include <stdexcept>

#include "activation.h"
#include "math.h"
#include "platform.h"
#include "rows.h"

namespace pk {

namespace {

constexpr int kThreads = kRowsThreads;
constexpr int kBlocks = 1024;  // of a weight gradient, over all channels: fixed, so that the sum is the same anywhere

struct Channels {
  int64_t outer, channels, inner;
  int64_t cols;                   // inner, or channels where inner is 1
  int lane_bits;                  // 2^lane_bits threads of a block along the columns; the others are on other rows
  int64_t channel_tiles;          // blockIdx.x
  unsigned row_parts, col_parts;  // blockIdx.y, blockIdx.z
  bool by_column;
  bool vectors;

  dim3 grid() const { return {static_cast<unsigned>(channel_tiles), row_parts, col_parts}; }
};

unsigned parts_of(int64_t tiles, int64_t limit) {
  return static_cast<unsigned>(tiles < limit ? tiles : limit < 1 ? 1 : limit);
}

template <class T>
Channels channels_of(int64_t outer, int64_t channels, int64_t inner, int64_t blocks) {
  constexpr int64_t N = Vec16<T>::N;
  Channels c{};
  c.outer = outer, c.channels = channels, c.inner = inner;
  c.by_column = inner == 1 && channels > 1;
  c.cols = c.by_column ? channels : inner;
  const int64_t vectors = ceil_div(c.cols, N);
  c.lane_bits = bits_for(vectors, kRowsThreadBits);
  const int64_t col_tiles = ceil_div(vectors, int64_t{1} << c.lane_bits);
  const int64_t row_tiles = ceil_div(outer, int64_t{kThreads} >> c.lane_bits);
  c.channel_tiles = c.by_column ? col_tiles : channels;
  if (c.channel_tiles > 0x7fffffff) throw std::invalid_argument("more than 2^31 - 1 channels");
  const int64_t each = blocks / c.channel_tiles;  // blocks a channel tile
  c.row_parts = parts_of(row_tiles, each < 65535 ? each : 65535);
  c.col_parts = c.by_column ? 1 : parts_of(col_tiles, each / c.row_parts < 65535 ? each / c.row_parts : 65535);
  return c;
}

// Where this thread begins and how far it steps; one channel, or N adjacent ones.
template <int N, bool BY_COLUMN>
struct Walk {
  int64_t channel, row, row_step, col, col_step;
  __device__ __forceinline__ explicit Walk(const Channels& c) {
    const unsigned lanes = 1u << c.lane_bits, lane_rows = kThreads >> c.lane_bits;
    row = static_cast<int64_t>(blockIdx.y) * lane_rows + (threadIdx.x >> c.lane_bits);
    row_step = static_cast<int64_t>(gridDim.y) * lane_rows;
    channel = BY_COLUMN ? 0 : static_cast<int64_t>(blockIdx.x);
    col = (static_cast<int64_t>(BY_COLUMN ? blockIdx.x : blockIdx.z) * lanes + (threadIdx.x & (lanes - 1))) * N;
    col_step = BY_COLUMN ? c.cols : static_cast<int64_t>(gridDim.z) * lanes * N;
  }
};

// The weights of this thread's vector: one for all its elements, or one for each.
template <class T, bool BY_COLUMN>
__device__ __forceinline__ void load_weights(float (&w)[Vec16<T>::N], const T* weight, const Channels& c,
                                             int64_t channel, int64_t col) {
  constexpr int N = Vec16<T>::N;
  Vec16<T> raw;
  if constexpr (BY_COLUMN) raw = load_step<false>(weight + col, part_of_vector<T>(c.cols - col));
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = to_float(BY_COLUMN ? raw.v[i] : weight[channel]);
}

template <class T, class A, bool BY_COLUMN>
__global__ void __launch_bounds__(kThreads)
    parametric_fwd_kernel(const T* x, const T* weight, T* y, const Channels c, int64_t x_outer, int64_t x_channel,
                          int64_t y_outer, int64_t y_channel) {
  constexpr int N = Vec16<T>::N;
  const Walk<N, BY_COLUMN> walk(c);
  if (walk.col >= c.cols) return;
  float w[N];
  load_weights<T, BY_COLUMN>(w, weight, c, walk.channel, walk.col);
  for (int64_t row = walk.row; row < c.outer; row += walk.row_step) {
    for (int64_t col = walk.col; col < c.cols; col += walk.col_step) {
      const int part = part_of_vector<T>(c.cols - col);
      auto step = [&](auto whole) {
        constexpr bool WHOLE = decltype(whole)::value;
        const Vec16<T> in = load_step<WHOLE>(x + row * x_outer + walk.channel * x_channel + col, part);
        Vec16<T> out;
#pragma unroll
        for (int i = 0; i < N; ++i)
          out.v[i] = from_float<T>(A::template value<sizeof(T) == 4>(to_float(in.v[i]), w[i]));
        store_step<WHOLE>(y + row * y_outer + walk.channel * y_channel + col, out, part);
      };
      if (c.vectors && part == N)
        step(std::true_type{});
      else
        step(std::false_type{});
    }
  }
}

// Sum over the block's threads, in a fixed tree; thread 0 has it.
__device__ __forceinline__ double block_sum_double(double x) {
  PK_SHARED(double, part, [kThreads / kWarp]);
#pragma unroll
  for (int o = kWarp / 2; o; o >>= 1) x += __shfl_xor_sync(kAllLanes, x, o);
  if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += part[i];
  return sum;
}

template <class T, class A, bool BY_COLUMN>
__global__ void __launch_bounds__(kThreads)
    parametric_bwd_kernel(const T* dy, const T* x, const T* weight, T* dx, double* partial, const Channels c,
                          int64_t dy_outer, int64_t dy_channel, int64_t x_outer, int64_t x_channel, int64_t dx_outer,
                          int64_t dx_channel) {
  constexpr int N = Vec16<T>::N;
  constexpr bool PRECISE = sizeof(T) == 4;
  const Walk<N, BY_COLUMN> walk(c);
  float w[N], sum[N] = {};
  if (walk.col < c.cols) load_weights<T, BY_COLUMN>(w, weight, c, walk.channel, walk.col);
  for (int64_t row = walk.row; row < c.outer; row += walk.row_step) {
    for (int64_t col = walk.col; col < c.cols; col += walk.col_step) {
      const int part = part_of_vector<T>(c.cols - col);
      auto step = [&](auto whole) {
        constexpr bool WHOLE = decltype(whole)::value;
        const Vec16<T> g = load_step<WHOLE>(dy + row * dy_outer + walk.channel * dy_channel + col, part);
        const Vec16<T> in = load_step<WHOLE>(x + row * x_outer + walk.channel * x_channel + col, part);
        Vec16<T> out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = to_float(g.v[i]), v = to_float(in.v[i]);
          out.v[i] = from_float<T>(A::template gradient<PRECISE>(d, v, w[i]));
          const float share = A::template weight_gradient<PRECISE>(d, v, w[i]);
          sum[i] += WHOLE || i < part ? share : 0.f;
        }
        if (dx) store_step<WHOLE>(dx + row * dx_outer + walk.channel * dx_channel + col, out, part);
      };
      if (c.vectors && part == N)
        step(std::true_type{});
      else
        step(std::false_type{});
    }
  }
  if (!partial) return;
  if constexpr (BY_COLUMN) {
    PK_SHARED(float, lane_sum, [kThreads][N]);
#pragma unroll
    for (int i = 0; i < N; ++i) lane_sum[threadIdx.x][i] = sum[i];
    __syncthreads();
    const int lanes = 1 << c.lane_bits;
    for (int k = static_cast<int>(threadIdx.x); k < lanes * N; k += kThreads) {
      const int64_t channel = static_cast<int64_t>(blockIdx.x) * lanes * N + k;
      double total = 0;
      for (int t = k / N; t < kThreads; t += lanes) total += static_cast<double>(lane_sum[t][k % N]);
      if (channel < c.channels) partial[blockIdx.y * c.channels + channel] = total;
    }
  } else {
    double total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) total += static_cast<double>(sum[i]);
    total = block_sum_double(total);
    const int64_t part = static_cast<int64_t>(blockIdx.y) * gridDim.z + blockIdx.z;
    if (threadIdx.x == 0) partial[part * c.channels + walk.channel] = total;
  }
}

// out[channel] = sum over parts: a block has `lanes` channels, its threads share the parts and are added in a tree.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const double* partial, T* out, int64_t parts, int64_t channels, int lane_bits) {
  PK_SHARED(double, sum, [kThreads]);
  const int t = static_cast<int>(threadIdx.x), lanes = 1 << lane_bits, groups = kThreads >> lane_bits;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * lanes + t % lanes;
  double total = 0;
  if (channel < channels)
    for (int64_t part = t / lanes; part < parts; part += groups) total += partial[part * channels + channel];
  sum[t] = total;
  __syncthreads();
  for (int half = groups / 2; half; half /= 2) {
    if (t < half * lanes) sum[t] += sum[t + half * lanes];
    __syncthreads();
  }
  if (t < lanes && channel < channels) out[channel] = from_float<T>(static_cast<float>(sum[t]));
}

template <class T>
int64_t parts(int64_t outer, int64_t channels, int64_t inner) {
  const Channels c = channels_of<T>(outer, channels, inner, kBlocks);
  return static_cast<int64_t>(c.row_parts) * c.col_parts;
}

template <class F>
void dispatch_parametric(const std::string& name, F&& f) {
  if (name == "prelu") return f(std::type_identity<LeakyRelu>{});
  if (name == "swish") return f(std::type_identity<Swish>{});
  throw std::invalid_argument("unknown parametric activation " + name);
}

template <class T>
bool rows_aligned(const void* p, int64_t outer_stride, int64_t channel_stride, const Channels& c) {
  return aligned16(static_cast<const T*>(p), c.outer > 1 ? outer_stride : 0) &&
         (c.by_column || c.channels == 1 || aligned16(static_cast<const T*>(p), channel_stride));
}

}  // namespace

void sum_parts(const double* partial, void* out, int64_t parts, int64_t channels, DType dtype, void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int lane_bits = bits_for(channels, 5);
    const auto blocks = static_cast<unsigned>(ceil_div(channels, int64_t{1} << lane_bits));
    launch(sum_parts_kernel<T>, blocks, kThreads, 0, stream, partial, static_cast<T*>(out), parts, channels, lane_bits);
  });
}

int64_t parametric_parts(int64_t outer, int64_t channels, int64_t inner, DType dtype) {
  return dtype == DType::f32 ? parts<float>(outer, channels, inner) : parts<fp16>(outer, channels, inner);
}

void parametric_forward(const void* x, const void* weight, void* y, int64_t outer, int64_t channels, int64_t inner,
                        int64_t x_outer, int64_t x_channel, int64_t y_outer, int64_t y_channel,
                        const std::string& activation, DType dtype, void* stream) {
  if (outer <= 0 || channels <= 0 || inner <= 0) return;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Channels c = channels_of<T>(outer, channels, inner, int64_t{1} << 30);
    c.vectors = rows_aligned<T>(x, x_outer, x_channel, c) && rows_aligned<T>(y, y_outer, y_channel, c);
    dispatch_parametric(activation, [&](auto a) {
      using A = typename decltype(a)::type;
      launch(c.by_column ? parametric_fwd_kernel<T, A, true> : parametric_fwd_kernel<T, A, false>, c.grid(), kThreads,
             0, stream, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), c, x_outer,
             x_channel, y_outer, y_channel);
    });
  });
}

void parametric_backward(const void* dy, const void* x, const void* weight, void* dx, void* dweight, double* partial,
                         int64_t outer, int64_t channels, int64_t inner, int64_t dy_outer, int64_t dy_channel,
                         int64_t x_outer, int64_t x_channel, int64_t dx_outer, int64_t dx_channel,
                         const std::string& activation, DType dtype, void* stream) {
  if (outer <= 0 || channels <= 0 || inner <= 0) return;
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    Channels c = channels_of<T>(outer, channels, inner, kBlocks);
    c.vectors = rows_aligned<T>(dy, dy_outer, dy_channel, c) && rows_aligned<T>(x, x_outer, x_channel, c) &&
                (!dx || rows_aligned<T>(dx, dx_outer, dx_channel, c));
    dispatch_parametric(activation, [&](auto a) {
      using A = typename decltype(a)::type;
      launch(c.by_column ? parametric_bwd_kernel<T, A, true> : parametric_bwd_kernel<T, A, false>, c.grid(), kThreads,
             0, stream, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight),
             static_cast<T*>(dx), dweight ? partial : nullptr, c, dy_outer, dy_channel, x_outer, x_channel, dx_outer,
             dx_channel);
    });
    if (dweight) sum_parts(partial, dweight, static_cast<int64_t>(c.row_parts) * c.col_parts, channels, dtype, stream);
  });
}

}  // namespace pk
