// What attention's backward needs of each query: no products, one pass over dout and out.
#include "attention.h"
#include "attention_head.h"
#include "math.h"
#include "platform.h"
#include "vec.h"

namespace pk {

namespace {

constexpr int kThreads = 128, kLanes = 8;  // threads of a block, and of a query
constexpr double kLog2eExact = 1.4426950408889634;

struct RowSums {
  const void *dout, *out;
  const float *lse, *lse_low, *dlse;
  float *base, *delta;
  RowStrides dout_n, out_n, dlse_n, lse_n;
  int64_t rows;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_rows_kernel(const __grid_constant__ Attention a, const __grid_constant__ RowSums g) {
  const int64_t own = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = min(own, g.rows - 1);
  const int64_t i = row % a.n.lq, h = row / a.n.lq % a.n.heads, b = row / a.n.lq / a.n.heads;
  const auto at = [&](const RowStrides& n) { return b * n.batch + h * n.head + i * n.position; };
  const T *dout = static_cast<const T*>(g.dout) + at(g.dout_n), *out = static_cast<const T*>(g.out) + at(g.out_n);
  // float32: the products' gradients are differences to delta, which must not add a rounding of its own to theirs
  std::conditional_t<std::is_same_v<T, float>, double, float> sum = 0;
  for (int64_t c = lane * Vec16<T>::N; c < a.n.dv; c += kLanes * Vec16<T>::N) {
    const Vec16<T> x = load_vec(dout + c), y = load_vec(out + c);
#pragma unroll
    for (int n = 0; n < Vec16<T>::N; ++n) sum += decltype(sum){to_float(x.v[n])} * to_float(y.v[n]);
  }
#pragma unroll
  for (int o = kLanes / 2; o; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
  if (lane != 0 || own >= g.rows) return;
  const float lse = g.lse[at(g.lse_n)];
  const double whole = static_cast<double>(lse) + static_cast<double>(g.lse_low[at(g.lse_n)]);
  // +inf where no key is seen: 2^(logit - base) is 0 there, and not NaN
  g.base[row] = lse == -kInfinity ? kInfinity : static_cast<float>(whole * kLog2eExact);
  g.delta[row] = static_cast<float>(sum - g.dlse[at(g.dlse_n)]);
}

struct BiasRows {
  const float* sums;
  void* dbias;
  int64_t batch, heads, rows;
};

// One thread an element: a bias that is the same for all keys moves a query's lse alone, so its gradient is made of
// sums that are known without the products, and exactly; adding up dscore would leave the rounding of out in them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_dbias_rows_kernel(const __grid_constant__ Attention a, const __grid_constant__ BiasRows g) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= g.batch * g.heads * g.rows) return;
  const int64_t own_i = element % g.rows, own_h = element / g.rows % g.heads, own_b = element / g.rows / g.heads;
  const bool every_batch = g.batch == 1, every_head = g.heads == 1, every_row = g.rows == 1;
  float sum = 0.f;
  for (int64_t b = every_batch ? 0 : own_b; b < (every_batch ? a.n.batch : own_b + 1); ++b) {
    Lengths s{0, 0, static_cast<int>(a.n.lq), static_cast<int>(a.n.lk)};
    if (a.cu_q) s = packed_lengths(a, static_cast<int>(b));
    for (int64_t h = every_head ? 0 : own_h; h < (every_head ? a.n.heads : own_h + 1); ++h) {
      const float* sums = g.sums + (a.cu_q ? h * a.n.lq + s.q_first : (b * a.n.heads + h) * a.n.lq);
      const int64_t end = every_row ? s.lq : min(own_i + 1, static_cast<int64_t>(s.lq));
      for (int64_t i = every_row ? 0 : own_i; i < end; ++i) sum += sums[i];
    }
  }
  static_cast<T*>(g.dbias)[element] = from_float<T>(sum);
}

}  // namespace

void attention_rows(const Attention& a, const void* dout, const void* out, const float* lse, const float* lse_low,
                    const float* dlse, float* base, float* delta, RowStrides dout_n, RowStrides out_n,
                    RowStrides dlse_n, RowStrides lse_n, DType dtype, void* stream) {
  const DeviceGuard guard(dout);
  const int64_t rows = (a.cu_q ? 1 : a.n.batch) * a.n.heads * a.n.lq;
  const RowSums g{dout, out, lse, lse_low, dlse, base, delta, dout_n, out_n, dlse_n, lse_n, rows};
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, int64_t{kThreads / kLanes})));
  dispatch(dtype, [&](auto tag) {
    launch(attention_rows_kernel<typename decltype(tag)::type>, grid, kThreads, 0, stream, a, g);
  });
}

void attention_dbias_rows(const Attention& a, const float* sums, void* dbias, int64_t batch, int64_t heads,
                          int64_t rows, DType dtype, void* stream) {
  const DeviceGuard guard(sums);
  const BiasRows g{sums, dbias, batch, heads, rows};
  const dim3 grid(static_cast<unsigned>(ceil_div(batch * heads * rows, int64_t{kThreads})));
  dispatch(dtype, [&](auto tag) {
    launch(attention_bwd_dbias_rows_kernel<typename decltype(tag)::type>, grid, kThreads, 0, stream, a, g);
  });
}

}  // namespace pk
