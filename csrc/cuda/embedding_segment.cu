// Gradients of tables: sort keys, what belongs to each sorted position, and the sums of rows.
#include "embedding_segment.h"

#include "embedding.h"

namespace pk {
namespace {

constexpr int kThreads = 256;

__global__ void keys_kernel(const Ids ids, const Bags bags, int32_t* narrow, int64_t* wide, const Record record,
                            int64_t rows, int64_t padding) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= bags.n) return;
  const bool inside = p < bags.limit();
  const int64_t id = ids[p];
  const bool valid = id >= 0 && id < rows;
  if (inside && !valid) record.report(p, id, rows, 0);
  const int64_t key = inside && valid && id != padding ? id : rows;
  if (narrow)
    narrow[p] = static_cast<int32_t>(key);
  else
    wide[p] = key;
}

template <class T>
__global__ void entries_kernel(const int64_t* order, const Bags bags, const float* sizes, const T* scale,
                               int64_t* source, float* factor, int32_t* place) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= bags.n) return;
  const int64_t position = order[e], bag = bags.of(position);
  source[e] = bag;
  if (factor) factor[e] = (scale ? to_float(scale[position]) : 1.f) / (sizes ? sizes[bag] : 1.f);
  if (place) place[e] = static_cast<int32_t>(position - bags.begin(bag));
}

template <class T>
struct Store {
  static constexpr bool kWholeRow = false;
  T* out;
  template <int W, int VECS>
  __device__ __forceinline__ void operator()(const float (&total)[VECS][W], const Columns<W, VECS>& at, int64_t,
                                             int64_t target) const {
    store_part<T, W>(out + target * at.cols + at[0], total[0]);
  }
};

}  // namespace

void embedding_keys(const void* ids, const int64_t* offsets, int32_t* keys, int64_t* wide_keys, int64_t* record,
                    int64_t what, bool narrow, int64_t bags, int64_t n, bool last, int64_t rows, int64_t padding,
                    void* stream) {
  if (n <= 0) return;
  const DeviceGuard guard(ids);
  launch(keys_kernel, static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream, Ids{ids, narrow},
         Bags{offsets, bags, 0, n, last}, keys, wide_keys, Record{record, what}, rows, padding);
}

void embedding_entries(const int64_t* order, const int64_t* offsets, const float* sizes, const void* scale,
                       int64_t* source, float* factor, int32_t* place, int64_t bags, int64_t length, int64_t n,
                       DType dtype, void* stream) {
  if (n <= 0) return;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(entries_kernel<T>, static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream, order,
           Bags{offsets, bags, length, n, false}, sizes, static_cast<const T*>(scale), source, factor, place);
  });
}

void embedding_sum_rows(const int32_t* keys, const int64_t* wide_keys, const int32_t* ranks, const int64_t* source,
                        const float* factor, const int32_t* place, const int32_t* maxima, const void* dy, void* out,
                        float* partial, int64_t n, int64_t rows, int64_t cols, int64_t dy_row, int64_t dy_col,
                        int64_t chunk_length, bool by_frequency, DType dtype, void* stream) {
  if (n <= 0 || cols <= 0) return;
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Segment<T> s{{keys, wide_keys}, ranks, source, factor, place,  maxima, static_cast<const T*>(dy),
                       partial,           n,     rows,   cols,   dy_row, dy_col, chunk_length,
                       by_frequency,      {}};
    const bool vectors = whole_vectors<T>(dy, dy_row, dy_col, cols) && aligned16(out) &&
                         (!maxima || aligned16(static_cast<const void*>(maxima)));
    dispatch_width<T>(vectors, [&](auto width) {
      constexpr int W = decltype(width)::value;
      const Store<T> store{static_cast<T*>(out)};
      if (maxima)
        launch_segments<T, W, 1, true>(s, store, stream);
      else
        launch_segments<T, W, 1, false>(s, store, stream);
    });
  });
}

}  // namespace pk
