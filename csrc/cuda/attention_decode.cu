// Decoding: a block owns the query rows that share a key head (the queries of all its query heads, 16 at a time) and
// one part of the keys, so a cache is read once.  Its four warps take 16 keys each of a tile of 64, with an online
// softmax of their own; their sums are added up in the order of the warps.
#include "attention_decode.h"

#include "math.h"
#include "platform.h"
#include "products.h"
#include "record.h"

namespace pk {

namespace {

constexpr double kLn2 = 0.6931471805599453;
constexpr int kRows = 16, kWarps = 4, kKeys = 16 * kWarps, kDecodeThreads = kWarp * kWarps;

// As many stages as 64 KiB hold.
template <class T, int D>
struct DecodeTiles {
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(T));
  static constexpr int kStep = kRowBytes > 256 ? 32 : kKeys;  // keys in a tile
  static constexpr int kBlocks = D > 128 ? 2 : 3;             // on one multiprocessor
  static constexpr int kStages = kRowBytes > 512 ? 1 : kRowBytes > 128 ? 2 : 3;
  static constexpr int kActive = kStep / 16;  // warps that have some
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kStepBytes = kStep * kRowBytes;
  static constexpr int kSums = kActive * kRows * (D + 2) * 4;  // over the ring, when it is done
  static constexpr int kRing = 2 * kStages * kStepBytes;
  static constexpr int kBytes = kQueryBytes + (kRing > kSums ? kRing : kSums);
};

struct Part {
  int length, first, last;  // keys of the sequence; those of this part
};

__device__ __forceinline__ int64_t given_length(const Decode& a, int64_t b) {
  return a.lengths ? Ids{a.lengths, !a.n.long_lengths}[b] : a.n.limit;
}
__device__ __forceinline__ bool is_wrong(int64_t x, int64_t bound) { return x < 0 || x >= bound; }

// A length out of range counts as 0: nothing of the cache is read.
__device__ __forceinline__ Part part_of(const Decode& a, int64_t b, int split, int step) {
  const int64_t given = given_length(a, b);
  const int length = is_wrong(given, a.n.limit + 1) ? 0 : static_cast<int>(given);
  const int begin = max(length - static_cast<int>(a.n.lq) - static_cast<int>(a.n.left), 0);
  const int keys = max(length - begin, 0), splits = static_cast<int>(a.n.splits);
  const int each = ceil_div(ceil_div(keys, splits), step) * step;
  const int64_t first = begin + static_cast<int64_t>(split) * each;
  return {length, static_cast<int>(min(first, static_cast<int64_t>(length))),
          static_cast<int>(min(first + each, static_cast<int64_t>(length)))};
}

// Tells of a length that is out of range, and of such blocks among those of this part.
__device__ __forceinline__ void report_wrong(const Decode& a, int64_t b, int split, const Part& part) {
  const int64_t given = given_length(a, b);
  if (threadIdx.x == 0 && split == 0 && is_wrong(given, a.n.limit + 1))
    Record{a.record, a.n.what}.report(b, given, a.n.limit + 1, 0);
  if (!a.table || part.first >= part.last) return;
  const int64_t blocks = a.n.limit / a.n.block_size;
  for (int64_t i = part.first / a.n.block_size + threadIdx.x; i * a.n.block_size < part.last; i += kDecodeThreads)
    if (const int block = a.table[b * a.n.table + i]; is_wrong(block, a.n.blocks))
      Record{a.record, a.n.what + 1}.report(b * blocks + i, block, a.n.blocks, 0);
}

// What a thread copies of a tile: one 16-byte unit of rows r0, r0 + STEP, ...; `row(r)` is where row r begins, null for
// one that is not wanted (zeros).
template <class T, int D, int ROWS, class Row>
__device__ __forceinline__ void copy_rows(Shared tile, TileColumns<T, D, true> columns, Row row) {
  constexpr int UNITS = D / kUnit<T>, STEP = kDecodeThreads / UNITS;
  static_assert(kDecodeThreads % UNITS == 0 && ROWS % STEP == 0);
  const int r0 = static_cast<int>(threadIdx.x) / UNITS, unit = static_cast<int>(threadIdx.x) % UNITS;
  if (!columns.has(unit / kStepUnits<T>)) return;
#pragma unroll 4
  for (int i = 0; i < ROWS; i += STEP) {
    const T* const from = row(r0 + i);
    const bool wanted = from != nullptr && unit < columns.units();
    cp_async16(tile.address + static_cast<uint32_t>(at<T, D>(r0 + i, unit)), wanted ? from + unit * kUnit<T> : nullptr,
               wanted);
  }
}

struct Line {  // one of the 16 rows: query i of head h
  int i, h;
  bool exists;
};

__device__ __forceinline__ Line line_of(const Decode& a, int64_t kv, int row) {
  const int lq = static_cast<int>(a.n.lq), group = static_cast<int>(a.n.group);
  return {row % lq, static_cast<int>(kv) * group + row / lq, row < group * lq};
}

__device__ __forceinline__ float lse_of(float largest, float sum) {
  if (sum == 0.f) return -kInfinity;
  return static_cast<float>((static_cast<double>(largest) + log2f(sum)) * kLn2);
}

template <class T, int D>
__global__ void __launch_bounds__(kDecodeThreads, DecodeTiles<T, D>::kBlocks)
    attention_decode_kernel(const __grid_constant__ Decode a) {
  using C = DecodeTiles<T, D>;
  PK_DYN_SHARED(raw);
  const Shared queries{smem_addr(raw), raw}, streamed = queries + C::kQueryBytes;
  const int kv_heads = static_cast<int>(a.n.heads / a.n.group), rows = static_cast<int>(a.n.group * a.n.lq);
  const int row_tiles = ceil_div(rows, kRows), owner = static_cast<int>(blockIdx.x) / row_tiles;
  const int64_t b = owner / kv_heads, kv = owner % kv_heads;
  const int row0 = static_cast<int>(blockIdx.x) % row_tiles * kRows, split = static_cast<int>(blockIdx.y);
  const Part part = part_of(a, b, split, C::kStep);
  const int count = ceil_div(max(part.last - part.first, 0), C::kStep);
  const TileColumns<T, D, true> columns(a.n.d), value_columns(a.n.dv);
  const bool exact = a.n.exact;
  const int block_size = static_cast<int>(a.n.block_size);

  if (a.record && kv == 0 && row0 == 0) report_wrong(a, b, split, part);  // one key head of each sequence

  // Which block holds key j, or -1: one out of range is not seen.
  const auto block_of = [&](int j) -> int {
    const int block = a.table[b * a.n.table + j / block_size];
    return block < a.n.blocks ? block : -1;
  };
  const auto key_row = [&](const void* x, const int64_t (&strides)[3], int j) -> const T* {
    if (j >= part.last) return nullptr;
    const int64_t block = a.table ? block_of(j) : b;
    const int at = a.table ? j % block_size : j;
    if (block < 0) return nullptr;
    return static_cast<const T*>(x) + block * strides[0] + kv * strides[1] + at * strides[2];
  };
  const auto fetch = [&](int n, int slot) {
    const Shared tile = streamed + slot * 2 * C::kStepBytes;
    const int j0 = part.first + n * C::kStep;
    copy_rows<T, D, C::kStep>(tile, columns, [&](int r) { return key_row(a.k, a.n.k, j0 + r); });
    copy_rows<T, D, C::kStep>(tile + C::kStepBytes, value_columns, [&](int r) { return key_row(a.v, a.n.v, j0 + r); });
  };
  copy_rows<T, D, kRows>(queries, columns, [&](int r) -> const T* {
    const Line line = line_of(a, kv, row0 + r);
    if (!line.exists) return nullptr;
    return static_cast<const T*>(a.q) + b * a.n.q[0] + line.h * a.n.q[1] + line.i * a.n.q[2];
  });
  using R = Ring<C::kStages>;
  R::begin(count, fetch);

  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  float acc[1][D / 8][4] = {}, largest[2], sum[2], slope[2];
  int place[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const Line line = line_of(a, kv, row0 + lane / 4 + 8 * e);
    place[e] = part.length - static_cast<int>(a.n.lq) + line.i;
    slope[e] = a.slopes && line.exists ? a.slopes[b * a.n.slopes + line.h] * kLog2e : 0.f;
    // the sink is counted once: by the first warp of the first part, and the lanes' shares are added up at the end
    const bool counts = a.sinks && line.exists && split == 0 && warp == 0;
    largest[e] = counts ? a.sinks[line.h] * kLog2e : -kInfinity;
    sum[e] = largest[e] != -kInfinity && lane % 4 == 0 ? 1.f : 0.f;
  }
  for (int n = 0; n < count; ++n) {
    R::ready(n, count, fetch);
    if (warp >= C::kActive) continue;
    const Shared tile = streamed + R::slot(n) * 2 * C::kStepBytes;
    const int own = 16 * warp, j0 = part.first + n * C::kStep + own;
    if (j0 >= part.last) continue;
    float s[1][2][4] = {};
    product<T, D, true, 1, 16>(s, queries, 0, tile + own * C::kRowBytes, columns, exact);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = j0 + 8 * c + lane % 4 * 2 + e % 2, p = place[e / 2];
        float t = s[0][c][e] * a.x.scale;
        if (a.x.softcap != 0.f) t = hyperbolic_tangent<kWide<T>>(t) * a.x.softcap;
        t -= slope[e / 2] * fabsf(static_cast<float>(p - j));
        const bool allowed = j < part.last && j <= p && j >= p - static_cast<int>(a.n.left);
        const bool seen = allowed && (!a.table || block_of(j) >= 0);
        s[0][c][e] = seen ? t : -kInfinity;
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float highest = fmaxf(fmaxf(s[0][0][2 * e], s[0][0][2 * e + 1]), fmaxf(s[0][1][2 * e], s[0][1][2 * e + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const float now = fmaxf(largest[e], highest);
      const float base = now == -kInfinity ? 0.f : now;  // no key so far: 2^(-inf - 0) is 0, 2^(-inf + inf) NaN
      const float alpha = ex2(largest[e] - base);
      largest[e] = now;
      float total = 0.f;
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int k = 2 * e; k < 2 * e + 2; ++k) total += s[0][c][k] = ex2(s[0][c][k] - base);
      sum[e] = sum[e] * alpha + total;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) acc[0][c][2 * e] *= alpha, acc[0][c][2 * e + 1] *= alpha;
    }
    const uint32_t all[2] = {};
    product_of_registers<false, T, D, true, 1, 16>(acc, s, tile + C::kStepBytes + own * C::kRowBytes, value_columns,
                                                   exact, all);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring becomes the place where the warps' sums are put

  float* const sums = reinterpret_cast<float*>(streamed.bytes);
  float* const tops = sums + C::kActive * kRows * D;
  float* const totals = tops + C::kActive * kRows;
  if (warp < C::kActive) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = warp * kRows + lane / 4 + 8 * e;
      sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 1);
      sum[e] += __shfl_xor_sync(kAllLanes, sum[e], 2);
      if (lane % 4 == 0) tops[r] = largest[e], totals[r] = sum[e];
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
        *reinterpret_cast<float2*>(sums + r * D + 8 * c + lane % 4 * 2) =
            make_float2(acc[0][c][2 * e], acc[0][c][2 * e + 1]);
    }
  }
  __syncthreads();
  constexpr int LANES = kDecodeThreads / kRows;  // threads of a row
  const int r = static_cast<int>(threadIdx.x) / LANES, own = static_cast<int>(threadIdx.x) % LANES;
  const Line line = line_of(a, kv, row0 + r);
  if (!line.exists) return;
  float top = tops[r], by[C::kActive], total = 0.f;
#pragma unroll
  for (int w = 1; w < C::kActive; ++w) top = fmaxf(top, tops[w * kRows + r]);
  const float base = top == -kInfinity ? 0.f : top;
#pragma unroll
  for (int w = 0; w < C::kActive; ++w) by[w] = ex2(tops[w * kRows + r] - base), total += by[w] * totals[w * kRows + r];
  const int64_t query = (b * a.n.heads + line.h) * a.n.lq + line.i, to = query * a.n.splits + split;
  const float factor = total == 0.f ? 0.f : 1.f / total;
  T* const out = static_cast<T*>(a.out) + b * a.n.out[0] + line.h * a.n.out[1] + line.i * a.n.out[2];
  for (int d = own; d < a.n.dv; d += LANES) {
    float x = 0.f;
#pragma unroll
    for (int w = 0; w < C::kActive; ++w) x += by[w] * sums[(w * kRows + r) * D + d];
    if (a.part)
      a.part[to * a.n.dv + d] = x;
    else
      out[d] = from_float<T>(x * factor);
  }
  if (own != 0) return;
  if (a.part)
    a.top[to] = top, a.total[to] = total;
  else
    a.lse[query] = lse_of(top, total);
}

// One warp a query and head: its parts, in order.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) attention_decode_merge_kernel(const __grid_constant__ Decode a) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (query >= a.n.batch * a.n.heads * a.n.lq) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, splits = static_cast<int>(a.n.splits);
  const float *tops = a.top + query * splits, *totals = a.total + query * splits;
  float top = -kInfinity, total = 0.f;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, tops[s]);
  const float base = top == -kInfinity ? 0.f : top;
  for (int s = 0; s < splits; ++s) total += ex2(tops[s] - base) * totals[s];
  const float factor = total == 0.f ? 0.f : 1.f / total;
  const int64_t i = query % a.n.lq, h = query / a.n.lq % a.n.heads, b = query / a.n.lq / a.n.heads;
  T* const out = static_cast<T*>(a.out) + b * a.n.out[0] + h * a.n.out[1] + i * a.n.out[2];
  for (int64_t d = lane; d < a.n.dv; d += kWarp) {
    float x = 0.f;
    for (int s = 0; s < splits; ++s) x += ex2(tops[s] - base) * a.part[(query * splits + s) * a.n.dv + d];
    out[d] = from_float<T>(x * factor);
  }
  if (lane == 0) a.lse[query] = lse_of(top, total);
}

}  // namespace

void attention_decode(const Decode& a, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const int64_t owners = a.n.batch * (a.n.heads / a.n.group) * ceil_div(a.n.group * a.n.lq, int64_t{kRows});
  const int64_t widest = a.n.d > a.n.dv ? a.n.d : a.n.dv;
  if (owners > 0x7fffffff) throw std::invalid_argument("attention_decode: more than 2^31 - 1 tiles");
  if (widest > 256) throw std::invalid_argument("attention_decode: head sizes above 256 are not served");
  const dim3 grid(static_cast<unsigned>(owners), static_cast<unsigned>(a.n.splits));
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto size) {
      constexpr int D = decltype(size)::value;
      launch(attention_decode_kernel<T, D>, grid, kDecodeThreads, DecodeTiles<T, D>::kBytes, stream, a);
    };
    if (widest <= 64)
      run(std::integral_constant<int, 64>{});
    else if (widest <= 128)
      run(std::integral_constant<int, 128>{});
    else
      run(std::integral_constant<int, 256>{});
  });
}

void attention_decode_merge(const Decode& a, DType dtype, void* stream) {
  const DeviceGuard guard(a.q);
  const int64_t queries = a.n.batch * a.n.heads * a.n.lq;
  dispatch(dtype, [&](auto tag) {
    launch(attention_decode_merge_kernel<typename decltype(tag)::type>,
           dim3(static_cast<unsigned>(ceil_div(queries, int64_t{kWarps}))), kDecodeThreads, 0, stream, a);
  });
}

}  // namespace pk
