// Bags and rows as the kernels of the embedding room see them.
#pragma once
#include "record.h"
#include "vec.h"

namespace pk {

struct Bags {
  const int64_t* offsets;  // null: all bags have `length` ids
  int64_t count, length, n;
  bool last;  // offsets has one element more, the end of the last bag

  // In [0, n] whatever the offsets hold.
  __device__ __forceinline__ int64_t begin(int64_t bag) const {
    if (!offsets) return bag * length;
    const int64_t at = offsets[bag];
    return at < 0 ? 0 : at < n ? at : n;
  }
  __device__ __forceinline__ int64_t end(int64_t bag) const {
    if (!offsets) return (bag + 1) * length;
    return bag + 1 < count || last ? begin(bag + 1) : n;
  }
  // Positions from here on are in no bag.
  __device__ __forceinline__ int64_t limit() const { return offsets && last ? begin(count) : n; }
  // The last bag that begins at or before the position.
  __device__ __forceinline__ int64_t of(int64_t position) const {
    if (!offsets) return position / length;
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (offsets[middle] <= position)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

// W adjacent elements of a row: one 16-byte transaction, or a single element at any alignment and stride.
template <class T, int W>
__device__ __forceinline__ Vec<T, W> load_part(const T* p) {
  if constexpr (W == 1)
    return {{*p}};
  else
    return load_vec(p);
}
template <class T, int W>
__device__ __forceinline__ void store_part(T* p, const float (&x)[W]) {
  Vec<T, W> v;
#pragma unroll
  for (int i = 0; i < W; ++i) v.v[i] = from_float<T>(x[i]);
  if constexpr (W == 1)
    *p = v.v[0];
  else
    store_vec(p, v);
}

// float parts of the width that half-precision rows have: one or two transactions.
template <int W>
__device__ __forceinline__ void load_floats(const float* p, float (&x)[W]) {
  if constexpr (W == 1) {
    x[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const auto v = load_vec(p + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = v.v[j];
    }
  }
}
template <int W>
__device__ __forceinline__ void store_floats(float* p, const float (&x)[W]) {
  if constexpr (W == 1) {
    *p = x[0];
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) store_vec(p + i, Vec16<float>{{x[i], x[i + 1], x[i + 2], x[i + 3]}});
  }
}

// Threads of a block along the columns, a power of two; the others are on other rows.
struct Lanes {
  int bits;
  __host__ __device__ int count() const { return 1 << bits; }
};
inline Lanes lanes_for(int64_t parts, int most_bits) {
  int bits = 0;
  while (bits < most_bits && (int64_t{1} << bits) < parts) ++bits;
  return {bits};
}

// Calls f(std::integral_constant<int, W>{}): whole vectors where every row of every tensor allows it.
template <class T, class F>
void dispatch_width(bool vectors, F&& f) {
  if (vectors)
    f(std::integral_constant<int, Vec16<T>::N>{});
  else
    f(std::integral_constant<int, 1>{});
}

template <class T>
bool whole_vectors(const void* p, int64_t row, int64_t col, int64_t cols) {
  return col == 1 && cols % Vec16<T>::N == 0 && aligned16(static_cast<const T*>(p), row);
}

}  // namespace pk
