// Products of the backward passes: gradients of logits times rows of classes (gathered, where they are a sample) or
// rows of x.  The contraction goes by 128 bytes of `a` at a time, and is cut into parts where the results alone would
// not fill the GPU.
#include "sampled_softmax.h"
#include "sampled_softmax_tiles.h"

namespace pk {
namespace {

// T: of b.  Gradients of logits are bfloat16 for bfloat16 and float32 else; float16 meets them as tf32, which has its
// digits.
template <class T>
struct ProductTiles {
  using A = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  static constexpr int M = kWide<A> ? 1 : 2, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * M * kWarps, kCols = 64, kDepth = 128 / static_cast<int>(sizeof(A)), kStages = 3;
  static constexpr int kABytes = kRows * 128, kStageBytes = kABytes + kDepth * kCols * static_cast<int>(sizeof(T));
};

template <class T>
struct Product {
  using A = typename ProductTiles<T>::A;
  Matrix<A> a;
  Matrix<T> b;
  Ids ids;
  void* out;
  int64_t m, n, depth, b_rows, part_length;
  bool wide, add, exact;
};

template <class T, int D>
__device__ __forceinline__ float element(Shared tile, int row, int col) {
  return to_float(*reinterpret_cast<const T*>(tile.bytes + at<T, D>(row, col / kUnit<T>) +
                                              col % kUnit<T> * static_cast<int>(sizeof(T))));
}

// Rows 16 step + [0, 16) of a tile, as they stand, as two B of columns col + [0, 8) and col + 8 + [0, 8).
template <class T, int D, class Operand>
__device__ __forceinline__ void load_b_rows(Operand (&y)[2], Shared tile, int step, int col, bool exact) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t w[4];
    ldmatrix_x4_trans(
        w, tile.address + static_cast<uint32_t>(at<T, D>(16 * step + (lane & 15), col / kUnit<T> + (lane >> 4))));
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i / 2].v[i % 2] = w[i];
  } else {
    // load_a() gives a lane columns c, c + 4, c + 8 and c + 12 of a step: so must B its rows
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) w[k] = element<T, D>(tile, 16 * step + lane % 4 + 4 * k, col + 8 * i + lane / 4);
      put_row(y[i], 0, 1, w, exact);
    }
  }
}

// As many of two adjacent results as there is place for.
template <class T>
__device__ __forceinline__ void store(T* p, float low, float high, int64_t left, bool pairs, bool add) {
  if (left <= 0) return;
  if (add) {
    low += to_float(p[0]);
    if (left > 1) high += to_float(p[1]);
  }
  if (pairs) return store_pair(p, low, high);
  p[0] = from_float<T>(low);
  if (left > 1) p[1] = from_float<T>(high);
}

template <class T>
__global__ void __launch_bounds__(ProductTiles<T>::kThreads) product_kernel(const Product<T> p) {
  using C = ProductTiles<T>;
  using A = typename C::A;
  constexpr int M = C::M, N = C::kCols;
  PK_DYN_SHARED(raw);
  const Shared slots{smem_addr(raw), raw};
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * C::kRows, n0 = static_cast<int64_t>(blockIdx.y) * N;
  const int64_t begin = blockIdx.z * p.part_length;
  const int64_t end = begin + p.part_length < p.depth ? begin + p.part_length : p.depth;
  const int own = static_cast<int>(threadIdx.x) / kWarp * 16 * M;
  const int steps = static_cast<int>(ceil_div(end - begin, int64_t{C::kDepth}));
  const auto fetch = [&](int i, int slot) {
    const Shared tile = slots + slot * C::kStageBytes;
    const int64_t first = begin + static_cast<int64_t>(i) * C::kDepth;
    gather_tile<A, C::kDepth, C::kRows, C::kThreads>(tile, p.a, first,
                                                     [&](int r) { return i0 + r < p.m ? i0 + r : int64_t{-1}; });
    gather_tile<T, N, C::kDepth, C::kThreads>(tile + C::kABytes, p.b, n0, [&](int r) {
      if (first + r >= end) return int64_t{-1};
      if (!p.ids.data) return first + r;
      const int64_t id = p.ids[first + r];
      return id < p.b_rows ? id : int64_t{-1};
    });
  };
  using R = Ring<C::kStages>;
  R::begin(steps, fetch);
  float acc[M][N / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    R::ready(i, steps, fetch);
    const Shared tile = slots + R::slot(i) * C::kStageBytes;
    [[maybe_unused]] constexpr int UNROLL = kWide<A> ? 1 : C::kDepth / 16;
#pragma unroll UNROLL
    for (int step = 0; step < C::kDepth / 16; ++step) {
      OperandA<A> x[M];
#pragma unroll
      for (int m = 0; m < M; ++m) x[m] = load_a<A, C::kDepth>(tile, own + 16 * m, step, p.exact);
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        OperandB<A> y[2];
        load_b_rows<T, N>(y, tile + C::kABytes, step, 16 * n, p.exact);
#pragma unroll
        for (int m = 0; m < M; ++m)
          multiply(acc[m][2 * n], x[m], y[0], p.exact), multiply(acc[m][2 * n + 1], x[m], y[1], p.exact);
      }
    }
  }
  const bool pairs = p.n % 2 == 0;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int64_t row = i0 + own + row_of(r);
    if (row >= p.m) continue;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const int64_t col = n0 + column_of(n, 0), at = (blockIdx.z * p.m + row) * p.n + col;
      const float low = acc[r / 2][n][r % 2 * 2], high = acc[r / 2][n][r % 2 * 2 + 1];
      if (p.wide)
        store(static_cast<float*>(p.out) + at, low, high, p.n - col, pairs, p.add);
      else
        store(static_cast<T*>(p.out) + at, low, high, p.n - col, pairs, false);
    }
  }
}

}  // namespace

void sampled_softmax_product(const void* a, const void* b, const void* ids, void* out, bool narrow_ids, int64_t m,
                             int64_t n, int64_t depth, int64_t b_rows, int64_t a_row, int64_t b_row, int64_t b_col,
                             int64_t part_length, int64_t parts, bool wide, bool add, bool exact, DType dtype,
                             void* stream) {
  if (m <= 0 || n <= 0) return;
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = ProductTiles<T>;
    using A = typename C::A;
    const Product<T> p{{static_cast<const A*>(a), a_row, 1, depth, true},
                       matrix<T>(b, b_row, b_col, n),
                       {ids, narrow_ids},
                       out,
                       m,
                       n,
                       depth,
                       b_rows,
                       part_length,
                       wide,
                       add,
                       exact && kWide<T>};
    const dim3 grid(static_cast<unsigned>(ceil_div(m, int64_t{C::kRows})),
                    static_cast<unsigned>(ceil_div(n, int64_t{C::kCols})), static_cast<unsigned>(parts));
    launch(product_kernel<T>, grid, C::kThreads, C::kStages * C::kStageBytes, stream, p);
  });
}

}  // namespace pk
