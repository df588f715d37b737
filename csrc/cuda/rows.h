// Element-wise kernels over strided rows: any number of tensors of one shape, seen as `rows` runs of `cols` adjacent
// elements, each with its own row stride.  A dense tensor is one row.
#pragma once
#include "platform.h"
#include "vec.h"

namespace pk {

template <class T, int IN, int OUT>
struct Rows {
  const T* in[IN];
  T* out[OUT];  // one of several may be null: not wanted
  int64_t in_stride[IN], out_stride[OUT];
  int64_t rows, cols;
  int lane_bits;  // 2^lane_bits threads of a block along a row; the others are on other rows
  bool vectors;   // every row of every tensor starts on a 16-byte boundary
};

constexpr int kRowsThreadBits = 8, kRowsThreads = 1 << kRowsThreadBits;

// `left` elements at p and after, at most a vector.
template <class T>
__device__ __forceinline__ int part_of_vector(int64_t left) {
  return left < Vec16<T>::N ? static_cast<int>(left) : Vec16<T>::N;
}

// A vector at p, or, where it is not WHOLE, `part` elements of one, at any alignment.
template <bool WHOLE, class T>
__device__ __forceinline__ Vec16<T> load_step(const T* p, int part) {
  if constexpr (WHOLE)
    return load_vec(p);
  else
    return load_vec_part(p, part, from_float<T>(0.f));
}
template <bool WHOLE, class T>
__device__ __forceinline__ void store_step(T* p, const Vec16<T>& x, int part) {
  if constexpr (WHOLE)
    store_vec(p, x);
  else
    store_vec_part(p, x, part);
}

// One vector of one row.  WHOLE, all in 16-byte transactions, is compiled apart: were it to meet the other path before
// the arithmetic, its registers would be split into elements first.
template <bool WHOLE, class T, int IN, int OUT, class F>
__device__ __forceinline__ void step(const Rows<T, IN, OUT>& r, const F& f, int64_t row, int64_t col) {
  const int part = WHOLE ? 0 : part_of_vector<T>(r.cols - col);
  Vec16<T> x[IN], y[OUT];
#pragma unroll
  for (int k = 0; k < IN; ++k) x[k] = load_step<WHOLE>(r.in[k] + row * r.in_stride[k] + col, part);
#pragma unroll
  for (int i = 0; i < Vec16<T>::N; ++i) {
    float in[IN], out[OUT];
#pragma unroll
    for (int k = 0; k < IN; ++k) in[k] = to_float(x[k].v[i]);
    f(in, out, row * r.cols + col + i);
#pragma unroll
    for (int k = 0; k < OUT; ++k) y[k].v[i] = from_float<T>(out[k]);
  }
#pragma unroll
  for (int k = 0; k < OUT; ++k) {
    if (OUT > 1 && !r.out[k]) continue;
    store_step<WHOLE>(r.out[k] + row * r.out_stride[k] + col, y[k], part);
  }
}

// f(in, out, index): floats of one element, and its row-major index.  Each thread owns a vector of a row at a time;
// both grid dimensions stride, so any size fits any grid and no address needs a division.
//
// The path for odd ends must not cost the other its occupancy: 48 registers, or 64 where three loads of 16 bytes a
// thread keep as much in flight with fewer threads.
template <class T, int IN, int OUT, class F>
__global__ void __launch_bounds__(kRowsThreads, OUT == 1 ? 5 : 4) rows_kernel(const Rows<T, IN, OUT> r, const F f) {
  constexpr int N = Vec16<T>::N;
  const unsigned lanes = 1u << r.lane_bits, lane_rows = kRowsThreads >> r.lane_bits;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * lane_rows + (threadIdx.x >> r.lane_bits);
  const int64_t first_col = (static_cast<int64_t>(blockIdx.x) * lanes + (threadIdx.x & (lanes - 1))) * N;
  for (int64_t row = first_row; row < r.rows; row += static_cast<int64_t>(gridDim.y) * lane_rows) {
    for (int64_t col = first_col; col < r.cols; col += static_cast<int64_t>(gridDim.x) * lanes * N) {
      if (r.vectors && r.cols - col >= N)
        step<true>(r, f, row, col);
      else
        step<false>(r, f, row, col);
    }
  }
}

// Smallest b with 2^b >= n, at most `limit`.
inline int bits_for(int64_t n, int limit) {
  int b = 0;
  while (b < limit && (int64_t{1} << b) < n) ++b;
  return b;
}

template <class T, int IN, int OUT, class F>
void launch_rows(Rows<T, IN, OUT> r, const F& f, void* stream) {
  if (r.rows <= 0 || r.cols <= 0) return;
  r.vectors = true;
  for (int k = 0; k < IN; ++k) r.vectors = r.vectors && aligned16(r.in[k], r.rows > 1 ? r.in_stride[k] : 0);
  for (int k = 0; k < OUT; ++k)
    r.vectors = r.vectors && (!r.out[k] || aligned16(r.out[k], r.rows > 1 ? r.out_stride[k] : 0));
  const int64_t vectors = ceil_div(r.cols, static_cast<int64_t>(Vec16<T>::N));
  r.lane_bits = bits_for(vectors, kRowsThreadBits);
  int64_t x = ceil_div(vectors, int64_t{1} << r.lane_bits);
  int64_t y = ceil_div(r.rows, int64_t{kRowsThreads} >> r.lane_bits);
  // Where there are blocks enough for any GPU, a thread takes four vectors: its setup is a third of one's instructions.
  if (x * y >= 8192) (x >= 4 ? x : y) = ceil_div(x >= 4 ? x : y, int64_t{4});
  const dim3 grid(static_cast<unsigned>(x < 0x7fffffff ? x : 0x7fffffff), static_cast<unsigned>(y < 65535 ? y : 65535));
  const DeviceGuard guard(r.in[0]);
  launch(rows_kernel<T, IN, OUT, F>, grid, kRowsThreads, 0, stream, r, f);
}

}  // namespace pk
