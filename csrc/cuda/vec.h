// Vectors of up to 16 bytes that move as one memory transaction, and loads and stores for rows of any alignment.
#pragma once
#include "platform.h"

namespace pk {

template <class T, int N_>
struct alignas(sizeof(T) * N_) Vec {
  static_assert(sizeof(T) * N_ <= 16 && (N_ & (N_ - 1)) == 0, "one transaction: at most 16 bytes, a power of two");
  static constexpr int N = N_;
  T v[N_];
  __device__ __forceinline__ T& operator[](int i) { return v[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

template <class T>
using Vec16 = Vec<T, 16 / static_cast<int>(sizeof(T))>;

// Whether p, and rows `stride` elements apart from it, can be moved in whole Vec16.
__host__ __device__ inline bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }
template <class T>
__host__ __device__ bool aligned16(const T* p, int64_t stride) {
  return aligned16(static_cast<const void*>(p)) && stride % (16 / static_cast<int64_t>(sizeof(T))) == 0;
}

// p is 16-byte aligned.  The store is an intrinsic: the compiler took apart an assignment, of uint4 too, in some loops.
template <class T>
__device__ __forceinline__ Vec16<T> load_vec(const T* p) {
  return __builtin_bit_cast(Vec16<T>, *reinterpret_cast<const uint4*>(p));
}
template <class T>
__device__ __forceinline__ void store_vec(T* p, const Vec16<T>& x) {
  __stwb(reinterpret_cast<uint4*>(p), __builtin_bit_cast(uint4, x));
}

// p has T's alignment only: one transaction where it happens to be aligned, else an element at a time.  The branch is
// the same for every lane of a row, so it costs one test.
template <class T>
__device__ __forceinline__ Vec16<T> load_vec_any(const T* p) {
  if (aligned16(p)) return load_vec(p);
  Vec16<T> x;
#pragma unroll
  for (int i = 0; i < Vec16<T>::N; ++i) x.v[i] = p[i];
  return x;
}
template <class T>
__device__ __forceinline__ void store_vec_any(T* p, const Vec16<T>& x) {
  if (aligned16(p)) {
    store_vec(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < Vec16<T>::N; ++i) p[i] = x.v[i];
}

// The first n elements only; the others are `fill`, and neither read nor written.
template <class T>
__device__ __forceinline__ Vec16<T> load_vec_part(const T* p, int n, T fill) {
  if (n >= Vec16<T>::N) return load_vec_any(p);
  Vec16<T> x;
#pragma unroll
  for (int i = 0; i < Vec16<T>::N; ++i) x.v[i] = i < n ? p[i] : fill;
  return x;
}
template <class T>
__device__ __forceinline__ void store_vec_part(T* p, const Vec16<T>& x, int n) {
  if (n >= Vec16<T>::N) {
    store_vec_any(p, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < Vec16<T>::N; ++i)
    if (i < n) p[i] = x.v[i];
}

}  // namespace pk
