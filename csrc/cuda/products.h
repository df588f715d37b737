// Tiles in shared memory and the products of one warp.  A tile has D columns; 16-byte unit u of row r lies at unit
// u ^ (r % 8) of the row, so that neither ldmatrix nor the copies meet bank conflicts.
//
// A step of a product is 16 along the contraction.  float16 and bfloat16: one mma.  float32 to float32 accuracy: each
// operand is the sum of three bfloat16, six of the nine products of the parts are made (the others are below float32's
// rounding), at the price of three tf32 products of two parts, whose own rounding shows in gradients of small heads.
// Where tf32 is enough: two mma of depth 8.  ldmatrix moves float32 too: a lane gets one word where it would get a
// pair. The words of a step are then paired as they come; which column is which does not matter to a sum over all of
// them, as long as both operands agree.
#pragma once
#include "platform.h"

namespace pk {

template <class T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));  // elements
template <class T>
constexpr int kStepUnits = 16 / kUnit<T>;  // of 16 elements
template <class T>
constexpr bool kWide = std::is_same_v<T, float>;

// A place in shared memory, as the instructions and as C++ address it.
struct Shared {
  uint32_t address;
  unsigned char* bytes;
  __device__ __forceinline__ Shared operator+(int offset) const {
    return {address + static_cast<uint32_t>(offset), bytes + offset};
  }
};

template <class T, int D>
__device__ __forceinline__ int at(int r, int unit) {
  // the bits apart: what a loop adds to `unit` beyond the swizzle becomes an immediate offset
  return r * (D * static_cast<int>(sizeof(T))) + ((unit & ~7) << 4) + (((unit ^ r) & 7) << 4);
}

// How much of a tile's columns there is: 16-byte units in memory, and steps of 16 columns.  PART: fewer than D.
template <class T, int D, bool PART>
struct TileColumns {
  int units_, steps_;
  __device__ __forceinline__ explicit TileColumns(int64_t size)
      : units_(static_cast<int>(size) / kUnit<T>), steps_(ceil_div(static_cast<int>(size), 16)) {}
  __device__ __forceinline__ int units() const { return PART ? units_ : D / kUnit<T>; }
  __device__ __forceinline__ bool has(int step) const { return !PART || step < steps_; }
};

// Rows row0 + [0, ROWS) of src; zeros for rows that are not wanted and for columns beyond those in memory.
template <class T, int D, int ROWS, int THREADS, int UNROLL = ROWS, bool PART, class Wanted>
__device__ __forceinline__ void load_tile(Shared tile, const T* src, int64_t stride, int row0,
                                          TileColumns<T, D, PART> columns, Wanted wanted) {
  constexpr int UNITS = D / kUnit<T>, STEP = THREADS / UNITS;
  static_assert(THREADS % UNITS == 0 && ROWS % STEP == 0);
  const int r0 = static_cast<int>(threadIdx.x) / UNITS, unit = static_cast<int>(threadIdx.x) % UNITS;
  if (!columns.has(unit / kStepUnits<T>)) return;
  const T* from = src + (row0 + r0) * stride + unit * kUnit<T>;
#pragma unroll UNROLL
  for (int i = 0; i < ROWS; i += STEP)
    cp_async16(tile.address + static_cast<uint32_t>(at<T, D>(r0 + i, unit)), from + i * stride,
               unit < columns.units() && wanted(row0 + r0 + i));
}

// Two floats as three packed pairs of bfloat16 whose sum they are.
__device__ __forceinline__ void split(float low, float high, uint32_t (&part)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    part[i] = pack2<bf16>(low, high);
    low -= __uint_as_float(part[i] << 16);
    high -= __uint_as_float(part[i] & 0xffff0000u);
  }
}

// The operands of one step: A is 16 x 16, B 16 x 8.
template <class T>
struct OperandA {
  uint32_t v[4];
};
template <class T>
struct OperandB {
  uint32_t v[2];
};
template <>
struct OperandA<float> {
  uint32_t v[3][4];
};
template <>
struct OperandB<float> {
  uint32_t v[3][2];
};

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const OperandA<T>& a, const OperandB<T>& b, bool) {
  mma_m16n8k16<T>(d, a.v, b.v[0], b.v[1]);
}
// tf32: v[0] and v[1] are the steps of 8.  Otherwise a step is summed apart and then added: tensor cores cut their sums
// off instead of rounding them, always towards 0, and six times a step that would show.
__device__ __forceinline__ void multiply(float (&d)[4], const OperandA<float>& a, const OperandB<float>& b,
                                         bool exact) {
  if (!exact) {
    mma_m16n8k8_tf32(d, a.v[0], b.v[0][0], b.v[0][1]);
    mma_m16n8k8_tf32(d, a.v[1], b.v[1][0], b.v[1][1]);
    return;
  }
  float sum[4] = {};
#pragma unroll
  for (int order = 2; order >= 0; --order)  // the smallest first
#pragma unroll
    for (int i = 0; i <= order; ++i) mma_m16n8k16<bf16>(sum, a.v[i], b.v[order - i][0], b.v[order - i][1]);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += sum[e];
}

// Words of a float32 operand: w[0], w[1] of one row in the first step of 8 and w[2], w[3] in the second.
template <class Operand>
__device__ __forceinline__ void put_row(Operand& x, int first, int second, const float (&w)[4], bool exact) {
  if (exact) {
    uint32_t part[3];
    split(w[0], w[1], part);
#pragma unroll
    for (int i = 0; i < 3; ++i) x.v[i][first] = part[i];
    split(w[2], w[3], part);
#pragma unroll
    for (int i = 0; i < 3; ++i) x.v[i][second] = part[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) x.v[i][first] = to_tf32(w[2 * i]), x.v[i][second] = to_tf32(w[2 * i + 1]);
  }
}

// Rows row + [0, 16) of a tile as A, columns of one step.
template <class T, int D>
__device__ __forceinline__ OperandA<T> load_a(Shared tile, int row, int step, bool exact) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, r = row + (lane & 15);
  OperandA<T> x;
  if constexpr (!kWide<T>) {
    ldmatrix_x4(x.v, tile.address + static_cast<uint32_t>(at<T, D>(r, 2 * step + (lane >> 4))));
  } else {
    uint32_t w[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(w[i], tile.address + static_cast<uint32_t>(at<T, D>(r, 4 * step + 2 * i + (lane >> 4))));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      put_row(x, i, 2 + i,
              {__uint_as_float(w[0][i]), __uint_as_float(w[0][2 + i]), __uint_as_float(w[1][i]),
               __uint_as_float(w[1][2 + i])},
              exact);
  }
  return x;
}

// Rows row + [0, 16) of a tile, transposed, as two B of 8 columns each.
template <class T, int D>
__device__ __forceinline__ void load_b(OperandB<T> (&x)[2], Shared tile, int row, int step, bool exact) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, r = row + (lane & 7) + ((lane >> 4) << 3);
  const int half = (lane >> 3) & 1;
  if constexpr (!kWide<T>) {
    uint32_t w[4];
    ldmatrix_x4(w, tile.address + static_cast<uint32_t>(at<T, D>(r, 2 * step + half)));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i / 2].v[i % 2] = w[i];
  } else {
    uint32_t w[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(w[i], tile.address + static_cast<uint32_t>(at<T, D>(r, 4 * step + 2 * i + half)));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      put_row(x[i], 0, 1,
              {__uint_as_float(w[0][2 * i]), __uint_as_float(w[0][2 * i + 1]), __uint_as_float(w[1][2 * i]),
               __uint_as_float(w[1][2 * i + 1])},
              exact);
  }
}

// acc[16 M x N] += A B^T over the columns; A: rows a_row + [0, 16 M) of its tile, B: the N rows of its tile.
template <class T, int D, bool PART, int M, int N>
__device__ __forceinline__ void product(float (&acc)[M][N / 8][4], Shared a, int a_row, Shared b,
                                        TileColumns<T, D, PART> columns, bool exact) {
  // float32 steps are 12 mma for each that half precision has: unrolled they would not fit in the instruction cache
  [[maybe_unused]] constexpr int UNROLL = kWide<T> ? 1 : D / 16;
#pragma unroll UNROLL
  for (int step = 0; step < D / 16; ++step) {
    if (!columns.has(step)) break;
    OperandA<T> x[M];
#pragma unroll
    for (int m = 0; m < M; ++m) x[m] = load_a<T, D>(a, a_row + 16 * m, step, exact);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      OperandB<T> y[2];
      load_b<T, D>(y, b, 16 * n, step, exact);
#pragma unroll
      for (int m = 0; m < M; ++m)
        multiply(acc[m][2 * n], x[m], y[0], exact), multiply(acc[m][2 * n + 1], x[m], y[1], exact);
    }
  }
}

// acc[16 M x D] += X B, X: 16 M x N in registers as a product leaves it, B: the N rows of its tile.  CLEARS: rows of B
// whose half of a word is 0 count as 0, whatever they hold; see seen_columns().
template <bool CLEARS, class T, int D, bool PART, int M, int N>
__device__ __forceinline__ void product_of_registers(float (&acc)[M][D / 8][4], const float (&x)[M][N / 8][4], Shared b,
                                                     TileColumns<T, D, PART> columns, bool exact,
                                                     const uint32_t (&seen)[N / 8]) {
  constexpr int ROW = D * static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // float32: no instruction transposes words.  Where a lane's word lies but for constants; the rows 2 c of the lanes
  // fall on different banks.
  int word[2][2][2];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    word[i / 4][i / 2 % 2][i % 2] =
        at<T, D>(2 * (lane & 3) + i % 2, 4 * (i / 4) + 2 * (i / 2 % 2) + (lane >> 4)) + (lane >> 2) % 4 * 4;
#pragma unroll
  for (int step = 0; step < N / 16; ++step) {
    OperandA<T> a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const auto& first = x[m][2 * step];
      const auto& second = x[m][2 * step + 1];
      if constexpr (!kWide<T>) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[m].v[i] = pack2<T>(first[2 * i], first[2 * i + 1]);
          a[m].v[2 + i] = pack2<T>(second[2 * i], second[2 * i + 1]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          put_row(a[m], i, 2 + i, {first[2 * i], first[2 * i + 1], second[2 * i], second[2 * i + 1]}, exact);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      if (!columns.has(n)) break;
      OperandB<T> y[2];
      if constexpr (!kWide<T>) {
        uint32_t w[4];
        ldmatrix_x4_trans(w, b.address + static_cast<uint32_t>(at<T, D>(16 * step + (lane & 15), 2 * n + (lane >> 4))));
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i / 2].v[i % 2] = CLEARS ? w[i] & seen[2 * step + i % 2] : w[i];
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float w[4];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            w[k] = *reinterpret_cast<const float*>(b.bytes + word[n & 1][i][k & 1] + (16 * step + 8 * (k >> 1)) * ROW +
                                                   (n >> 1) * 128);
          if constexpr (CLEARS) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
              if (!(seen[2 * step + k / 2] >> 16 * (k & 1) & 1)) w[k] = 0.f;
          }
          put_row(y[i], 0, 1, w, exact);
        }
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
        multiply(acc[m][2 * n], a[m], y[0], exact), multiply(acc[m][2 * n + 1], a[m], y[1], exact);
    }
  }
}

// The warp's 16 M rows of results, times one factor a row, to rows row0 + [0, 16 M) below `length`, through rows
// own + [0, 16 M) of a tile that no other warp reads: whole 16-byte stores.
template <class T, int D, bool PART, int M>
__device__ __forceinline__ void store_rows(T* dst, int64_t stride, int row0, int length,
                                           const float (&acc)[M][D / 8][4], const float (&factor)[2 * M], Shared tile,
                                           int own, TileColumns<T, D, PART> columns) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, pair = lane & 3;
#pragma unroll
  for (int i = 0; i < 2 * M; ++i)
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      if (!columns.has(n / 2)) break;
      const int r = own + (lane >> 2) + 8 * i;
      const float low = acc[i / 2][n][i % 2 * 2] * factor[i], high = acc[i / 2][n][i % 2 * 2 + 1] * factor[i];
      if constexpr (kWide<T>)
        *reinterpret_cast<float2*>(tile.bytes + at<T, D>(r, 2 * n + pair / 2) + pair % 2 * 8) = make_float2(low, high);
      else
        *reinterpret_cast<uint32_t*>(tile.bytes + at<T, D>(r, n) + pair * 4) = pack2<T>(low, high);
    }
  __syncwarp();
  constexpr int UNITS = D / kUnit<T>;
#pragma unroll
  for (int i = 0; i < 16 * M * UNITS / kWarp; ++i) {
    const int c = lane + kWarp * i, r = c / UNITS, unit = c % UNITS;
    if (row0 + r < length && unit < columns.units())
      *reinterpret_cast<uint4*>(dst + static_cast<int64_t>(row0 + r) * stride + unit * kUnit<T>) =
          *reinterpret_cast<const uint4*>(tile.bytes + at<T, D>(own + r, unit));
  }
}

// Tiles first, first + 1, ... of a loop through STAGES slots, copies running ahead of the products: begin() once, then
// ready(i, count, fetch) before tile number i is read, by all threads; fetch(i, slot) issues the copies of a tile. What
// was copied before begin() arrives with tile 0.
template <int STAGES>
struct Ring {
  static __device__ __forceinline__ int slot(int i) { return STAGES == 1 ? 0 : i % STAGES; }

  template <class Fetch>
  static __device__ __forceinline__ void begin(int count, Fetch fetch) {
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
      if (i < count) fetch(i, i);
      cp_async_commit();
    }
  }
  template <class Fetch>
  static __device__ __forceinline__ void ready(int i, int count, Fetch fetch) {
    if constexpr (STAGES == 1) {
      if (i > 0) __syncthreads();  // the products of the tile before are done with the slot
      fetch(i, 0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
    } else {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // everyone's copies of tile i are here, and everyone is done with the slot of tile i - 1
      if (i + STAGES - 1 < count) fetch(i + STAGES - 1, slot(i + STAGES - 1));
      cp_async_commit();
    }
  }
};

}  // namespace pk
