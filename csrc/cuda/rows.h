// Element-wise kernels over strided rows: any number of tensors of one shape, seen as `rows` runs of `cols` adjacent
// elements, each with its own row stride.  A dense tensor is one row.
#pragma once
#include "platform.h"
#include "vec.h"

namespace pk {

template <class T, int IN, int OUT> struct Rows {
  const T* in[IN];
  T* out[OUT];  // null: not wanted
  int64_t in_stride[IN], out_stride[OUT];
  int64_t rows, cols;
  int lanes;     // threads of a block along a row, a power of two; the others are on other rows
  bool vectors;  // every row of every tensor starts on a 16-byte boundary
};

constexpr int kRowsThreads = 256;

// Elements at p and after, `left` of them: a vector where alignment and length allow, else one at a time.
template <class T> __device__ __forceinline__ Vec16<T> load_some(const T* p, int64_t left, bool vectors) {
  if (vectors && left >= Vec16<T>::N) return load_vec(p);
  return load_vec_part(p, left < Vec16<T>::N ? static_cast<int>(left) : Vec16<T>::N, from_float<T>(0.f));
}
template <class T> __device__ __forceinline__ void store_some(T* p, const Vec16<T>& x, int64_t left, bool vectors) {
  if (vectors && left >= Vec16<T>::N) store_vec(p, x);
  else store_vec_part(p, x, left < Vec16<T>::N ? static_cast<int>(left) : Vec16<T>::N);
}

// f(in, out, index): floats of one element, and its row-major index.  Each thread owns a vector of a row at a time; both
// grid dimensions stride, so any size fits any grid and no address needs a division.
template <class T, int IN, int OUT, class F>
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const Rows<T, IN, OUT> r, const F f) {
  constexpr int N = Vec16<T>::N;
  const int lane = static_cast<int>(threadIdx.x) & (r.lanes - 1), lane_rows = kRowsThreads / r.lanes;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * lane_rows + static_cast<int>(threadIdx.x) / r.lanes;
  const int64_t first_col = (static_cast<int64_t>(blockIdx.x) * r.lanes + lane) * N;
  for (int64_t row = first_row; row < r.rows; row += static_cast<int64_t>(gridDim.y) * lane_rows) {
    for (int64_t col = first_col; col < r.cols; col += static_cast<int64_t>(gridDim.x) * r.lanes * N) {
      const int64_t left = r.cols - col;
      Vec16<T> x[IN], y[OUT];
      if (r.vectors && left >= N) {  // one test for all the loads, so that they are in flight together
#pragma unroll
        for (int k = 0; k < IN; ++k) x[k] = load_vec(r.in[k] + row * r.in_stride[k] + col);
      } else {
#pragma unroll
        for (int k = 0; k < IN; ++k) x[k] = load_some(r.in[k] + row * r.in_stride[k] + col, left, false);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float in[IN], out[OUT];
#pragma unroll
        for (int k = 0; k < IN; ++k) in[k] = to_float(x[k].v[i]);
        f(in, out, row * r.cols + col + i);
#pragma unroll
        for (int k = 0; k < OUT; ++k) y[k].v[i] = from_float<T>(out[k]);
      }
#pragma unroll
      for (int k = 0; k < OUT; ++k)
        if (r.out[k]) store_some(r.out[k] + row * r.out_stride[k] + col, y[k], left, r.vectors);
    }
  }
}

// Smallest power of two that is at least n, at most `limit`.
inline int power_of_two(int64_t n, int limit) {
  int p = 1;
  while (p < n && p < limit) p *= 2;
  return p;
}

template <class T, int IN, int OUT, class F> void launch_rows(Rows<T, IN, OUT> r, const F& f, void* stream) {
  if (r.rows <= 0 || r.cols <= 0) return;
  r.vectors = true;
  for (int k = 0; k < IN; ++k) r.vectors = r.vectors && aligned16(r.in[k], r.rows > 1 ? r.in_stride[k] : 0);
  for (int k = 0; k < OUT; ++k)
    r.vectors = r.vectors && (!r.out[k] || aligned16(r.out[k], r.rows > 1 ? r.out_stride[k] : 0));
  const int64_t vectors = ceil_div(r.cols, static_cast<int64_t>(Vec16<T>::N));
  r.lanes = power_of_two(vectors, kRowsThreads);
  const int64_t x = ceil_div(vectors, static_cast<int64_t>(r.lanes)), y = ceil_div(r.rows, static_cast<int64_t>(kRowsThreads / r.lanes));
  const dim3 grid(static_cast<unsigned>(x < 0x7fffffff ? x : 0x7fffffff), static_cast<unsigned>(y < 65535 ? y : 65535));
  const DeviceGuard guard(r.in[0]);
  launch(rows_kernel<T, IN, OUT, F>, grid, kRowsThreads, 0, stream, r, f);
}

}  // namespace pk
