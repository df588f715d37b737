// Lookups in tables of 8- and 4-bit codes, and their packing.  A row is cols * BITS / 8 bytes of codes, then scale and
// bias, as float (8 bits) or half (4).  A group of lanes owns a bag and unpacks in registers; four rows are in flight.
#include "embedding.h"
#include "embedding_bags.h"
#include "reduce.h"

namespace pk {
namespace {

constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits;
constexpr int kInFlight = 4;

template <class T>
struct QuantizedBag {
  Ids ids;
  Bags bags;  // a lookup: bags of one id
  Record record;
  const uint8_t* table;
  const float* scale;
  T* out;
  int64_t rows, cols, padding, table_row;  // table_row: bytes
  bool mean;
  Lanes lanes;
};

// What follows the codes, at any alignment or, where rows are read in vectors, in one transaction.
template <int BITS, bool ALIGNED>
__device__ __forceinline__ float2 numbers(const uint8_t* p) {
  uint32_t words[BITS / 4] = {};
  if constexpr (ALIGNED && BITS == 8) {
    return *reinterpret_cast<const float2*>(p);
  } else if constexpr (ALIGNED) {
    words[0] = *reinterpret_cast<const uint32_t*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i / 4] |= static_cast<uint32_t>(p[i]) << (i % 4 * 8);
  }
  if constexpr (BITS == 8) {
    return {__uint_as_float(words[0]), __uint_as_float(words[1])};
  } else {
    return {to_float(__builtin_bit_cast(fp16, static_cast<uint16_t>(words[0]))),
            to_float(__builtin_bit_cast(fp16, static_cast<uint16_t>(words[0] >> 16)))};
  }
}

// The codes of W columns of a row on their way: 8 or 1.
template <int W, int BITS>
struct Codes {
  uint32_t words[BITS / 4];
  float2 numbers;  // scale, bias

  __device__ __forceinline__ void load(const uint8_t* row, int64_t cols, int64_t col) {
    const uint8_t* const p = row + col * BITS / 8;
    if constexpr (W == 1) {
      words[0] = BITS == 4 ? *p >> (col % 2 * 4) : *p;
    } else if constexpr (BITS == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      const uint2 both = *reinterpret_cast<const uint2*>(p);
      words[0] = both.x, words[1] = both.y;
    }
    numbers = pk::numbers<BITS, (W > 1)>(row + cols * BITS / 8);
  }

  // A conversion of an integer takes four times as long as these: 2^23 + code is the code in the lowest bits of a
  // float.
  __device__ __forceinline__ float operator[](int i) const {
    constexpr int kPerWord = 32 / BITS;
    const uint32_t code = words[i / kPerWord] >> (i % kPerWord * BITS) & ((1u << BITS) - 1);
    return __uint_as_float(0x4b000000u | code) - 8388608.f;
  }
};

template <class T, int W, int BITS>
__global__ void __launch_bounds__(kThreads) quantized_bag_kernel(const QuantizedBag<T> a) {
  const int64_t bag =
      (static_cast<int64_t>(blockIdx.x) << (kThreadBits - a.lanes.bits)) + (threadIdx.x >> a.lanes.bits);
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * a.lanes.count() + (threadIdx.x & (a.lanes.count() - 1))) * W;
  if (bag >= a.bags.count || col >= a.cols) return;
  const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag);
  int64_t invalid = -1;
  int size = 0;
  float total[W] = {};
  for (int64_t p = begin; p < end; p += kInFlight) {
    Codes<W, BITS> codes[kInFlight];
    bool counted[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t id = p + u < end ? a.ids[p + u] : a.padding;
      const bool valid = id >= 0 && id < a.rows;
      counted[u] = valid && id != a.padding;
      invalid = !valid && p + u < end ? p + u : invalid;
      codes[u] = {};
      if (counted[u]) codes[u].load(a.table + id * a.table_row, a.cols, col);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      size += counted[u];  // the numbers of a row that takes no part are 0
      const float weight = a.scale && counted[u] ? a.scale[p + u] : 1.f;
      const float factor = weight * codes[u].numbers.x, shift = weight * codes[u].numbers.y;
#pragma unroll
      for (int i = 0; i < W; ++i) total[i] += fmaf(codes[u][i], factor, shift);
    }
  }
  if (a.mean && size > 1) {
#pragma unroll
    for (int i = 0; i < W; ++i) total[i] /= static_cast<float>(size);
  }
  T* const out = a.out + bag * a.cols + col;
  if constexpr (std::is_same_v<T, float>)
    store_floats<W>(out, total);
  else
    store_part<T, W>(out, total);
  if (invalid >= 0 && col == 0) a.record.report(invalid, a.ids[invalid], a.rows, 0);
}

template <class T>
struct Quantize {
  const T* weight;
  uint8_t* out;
  int64_t rows, cols, weight_row, weight_col;
  int bits;

  __device__ __forceinline__ float at(int64_t row, int64_t col) const {
    return to_float(weight[row * weight_row + col * weight_col]);
  }
};

__device__ __forceinline__ bool finite(float x) { return x - x == 0.f; }
__device__ __forceinline__ float from_bits(uint32_t half) {
  return to_float(__builtin_bit_cast(fp16, static_cast<uint16_t>(half)));
}
__device__ __forceinline__ uint32_t half_bits(float x) {
  return x != x ? 0x7e00u : __builtin_bit_cast(uint16_t, from_float<fp16>(x));
}
__device__ __forceinline__ uint32_t float_bits(float x) { return x != x ? 0x7fc00000u : __float_as_uint(x); }

// A warp for each row; the formulas are those of pykernels/reference/embedding/quantized.py, to the last bit.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Quantize<T> a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= a.rows) return;
  float low = kInfinity, high = -kInfinity, missing = 0.f;
  for (int64_t col = lane; col < a.cols; col += kWarp) {
    const float x = a.at(row, col);
    low = fminf(low, x);
    high = fmaxf(high, x);
    missing = x != x ? 1.f : missing;
  }
  low = -warp_max(-low) + 0.f;  // of zeros of both signs +0
  high = warp_max(high) + 0.f;
  if (warp_max(missing) > 0.f) low = high = __uint_as_float(0x7fc00000u);
  if (a.cols == 0) low = high = 0.f;
  const int64_t bytes = a.cols * a.bits / 8;
  uint8_t* const out = a.out + row * (bytes + a.bits);
  float shift = low, inverse;
  bool packs;
  if (a.bits == 8) {
    const float span = high - low, scale = span / 255.f;
    if (lane < 8) out[bytes + lane] = static_cast<uint8_t>(float_bits(lane < 4 ? scale : low) >> (lane % 4 * 8));
    inverse = 255.f / (span + 1e-8f);
    packs = finite(scale);
  } else {
    const uint32_t bias = half_bits(low);
    shift = from_bits(bias);
    const float span = high - shift;
    uint32_t scale = half_bits(span == 0.f ? 1.f : span / 15.f);
    if (from_bits(scale) == 0.f || 1.f / fabsf(from_bits(scale)) == kInfinity) scale = 0x3c00u;  // 1
    if (lane < 4) out[bytes + lane] = static_cast<uint8_t>((lane < 2 ? scale : bias) >> (lane % 2 * 8));
    inverse = 1.f / from_bits(scale);
    packs = finite(shift) && finite(from_bits(scale));
  }
  const auto code = [&](int64_t col) {
    const float x = rintf((a.at(row, col) - shift) * inverse);
    return packs ? static_cast<uint32_t>(fminf(fmaxf(x, 0.f), a.bits == 8 ? 255.f : 15.f)) : 0u;
  };
  for (int64_t i = lane; i < bytes; i += kWarp)
    out[i] = static_cast<uint8_t>(a.bits == 8 ? code(i) : code(2 * i) | code(2 * i + 1) << 4);
}

}  // namespace

void embedding_bag_quantized(const void* packed, const void* ids, const int64_t* offsets, const float* scale, void* out,
                             int64_t* record, int64_t what, bool narrow, int64_t bags, int64_t length, int64_t n,
                             bool last, int64_t rows, int64_t cols, int64_t padding, int64_t packed_row, int64_t bits,
                             bool mean, DType dtype, void* stream) {
  if (bags <= 0 || cols <= 0) return;
  const DeviceGuard guard(out);
  const int64_t part = bits;  // bytes of eight columns, and of what follows them
  const bool vectors =
      cols % 8 == 0 && reinterpret_cast<uintptr_t>(packed) % part == 0 && packed_row % part == 0 && aligned16(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    QuantizedBag<T> a{{ids, narrow},  {offsets, bags, length, n, last},
                      {record, what}, static_cast<const uint8_t*>(packed),
                      scale,          static_cast<T*>(out),
                      rows,           cols,
                      padding,        packed_row,
                      mean,           {}};
    const int64_t parts = vectors ? cols / 8 : cols;
    a.lanes = lanes_for(parts, kThreadBits);
    const dim3 grid(static_cast<unsigned>(ceil_div(bags, kThreads >> a.lanes.bits)),
                    static_cast<unsigned>(ceil_div(parts, a.lanes.count())));
    const auto kernel = vectors     ? bits == 8 ? quantized_bag_kernel<T, 8, 8> : quantized_bag_kernel<T, 8, 4>
                        : bits == 8 ? quantized_bag_kernel<T, 1, 8>
                                    : quantized_bag_kernel<T, 1, 4>;
    launch(kernel, grid, kThreads, 0, stream, a);
  });
}

void quantize_rows(const void* weight, void* out, int64_t rows, int64_t cols, int64_t weight_row, int64_t weight_col,
                   int64_t bits, DType dtype, void* stream) {
  if (rows <= 0) return;
  const DeviceGuard guard(out);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Quantize<T> a{static_cast<const T*>(weight), static_cast<uint8_t*>(out), rows, cols, weight_row, weight_col,
                        static_cast<int>(bits)};
    launch(quantize_kernel<T>, static_cast<unsigned>(ceil_div(rows, kThreads / kWarp)), kThreads, 0, stream, a);
  });
}

}  // namespace pk
