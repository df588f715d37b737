// What attention's kernels for sm_90a share: which tile comes next, TMA's view of the tensors, and the way out of the
// registers of a warpgroup's accumulator.
//
// Blocks stay: there is one for each multiprocessor, and it takes every gridDim.x-th tile.  One warp of a block asks
// TMA for tiles and runs ahead of the products through a ring of slots, also from one tile of the output to the next.
#pragma once
#include "attention_scores.h"
#include "hopper.h"

namespace pk {

constexpr int kWarpgroup = 128;
constexpr int kPanel = 64;     // columns: TMA's box rows, and a row of shared memory, are 128 bytes
constexpr int kL2 = 16 << 20;  // bytes of keys and values that are meant to stay in L2 together
constexpr double kLn2 = 0.6931471805599453;

__host__ __device__ constexpr int tile_bytes(int rows, int columns) { return rows * columns * 2; }

// Scores are the products times a positive scale, masked by position alone.
inline bool plain(const Attention& a) {
  return !(a.bias || a.mask || a.seen || a.slopes || a.seed) && a.x.softcap == 0.f && a.x.scale > 0.f;
}

// A place in a ring of N slots, and the parity of this turn around it.
template <int N>
struct Slot {
  int at = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == N) at = 0, parity ^= 1;
  }
};

// The order in which tiles are taken: heads in sections whose keys and values fit in L2, and in a section tile by tile,
// so that with a causal mask (`reversed`) the longest of all heads go first and the shortest fill the end.
struct Schedule {
  int rows, heads, tiles, total, section, reversed;

  __device__ __forceinline__ int index(int turn) const {
    const int size = section * tiles, first = turn / size * section, in = turn % size;
    const int here = min(section, total / tiles - first);
    return (first + in % here) * tiles + in / here;
  }
};

// `streamed`: bytes of what a tile runs over, of one head.
inline Schedule schedule(const Attention& a, int64_t length, int rows, int64_t heads, int64_t streamed) {
  const int64_t tiles = ceil_div(length, static_cast<int64_t>(rows)) + (a.cu_q ? a.n.batch : 0);
  const int64_t all = heads * (a.cu_q ? 1 : a.n.batch);
  if (tiles * all > 0x7fffffff) throw std::invalid_argument("attention: more than 2^31 - 1 tiles");
  const int64_t section = min(all, max(int64_t{1}, kL2 / max(int64_t{1}, streamed)));
  auto narrow = [](int64_t x) { return static_cast<int>(x); };
  return {rows, narrow(heads), narrow(tiles), narrow(tiles * all), narrow(section), a.n.right < a.n.lq + a.n.lk};
}

// The whole warp: the tile of this turn, kept where the warp reads it (see share()); false: there is none.
template <bool OF_KEYS>
__device__ __forceinline__ bool take(const Attention& a, const Schedule& order, int turn, Head& kept) {
  Head found;
  if (!locate<OF_KEYS>(a, order.rows, order.heads, order.reversed, found, order.index(turn))) return false;
  place(a, found);
  __syncwarp();  // every lane is done with the last one
  if (threadIdx.x % kWarp == 0) kept = found;
  __syncwarp();
  return true;
}

// (batch, heads, length, size), packed batch 1; boxes of `rows` x 64 columns.  Beyond the tensor TMA reads zeros, so a
// head size need not be the instantiation's.
template <class T>
TensorMap rows_map(const void* base, int64_t size, int64_t length, int64_t heads, int64_t batch, int64_t position,
                   int64_t head, int64_t sequence, int rows) {
  auto narrow = [](int64_t x) { return static_cast<int>(x); };
  auto stride = [&](int64_t n, int64_t x) { return n > 1 ? x : position; };  // of one there may be any
  return make_tensor_map<T, 4>(
      static_cast<const T*>(base), {narrow(size), narrow(length), narrow(heads), narrow(batch)},
      {length > 1 ? position : size, stride(heads, head), stride(batch, sequence)}, {kPanel, rows, 1, 1});
}

// One thread: ROWS x COLUMNS from row `row` on, panel by panel.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void load_panels(uint32_t tile, const TensorMap& map, int64_t row, int head, int b,
                                            uint32_t full) {
#pragma unroll
  for (int p = 0; p < COLUMNS / kPanel; ++p)
    tma_load_4d(tile + p * tile_bytes(ROWS, kPanel), map, p * kPanel, static_cast<int>(row), head, b, full);
}

// By a whole warp: a tile into a slot, announced by one arrival at `full`.  Rows that `hides` names are set to 0 on
// their way: they may be NaN, which a weight of 0 does not silence, and packed they may be another sequence's. `there`:
// rows of the tile before the tensor's end.  landed: this warp's own, for tiles with such rows; landings: how many so
// far.
template <int ROWS, int COLUMNS, class Hides>
__device__ __forceinline__ void load_without(unsigned char* tile, const TensorMap& map, int64_t row, int head, int b,
                                             int64_t there, uint32_t full, uint32_t landed, int& landings,
                                             Hides hides) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t hidden[ROWS / kWarp];
  bool some = false;
#pragma unroll
  for (int i = 0; i < ROWS / kWarp; ++i) {
    const int r = i * kWarp + lane;
    hidden[i] = __ballot_sync(kAllLanes, r < there && hides(r));
    some |= hidden[i] != 0;
  }
  const uint32_t arrival = some ? landed : full;
  if (lane == 0) {
    mbar_arrive_expect_tx(arrival, tile_bytes(ROWS, COLUMNS));
    load_panels<ROWS, COLUMNS>(smem_addr(tile), map, row, head, b, arrival);
  }
  if (!some) return;
  mbar_wait(landed, landings++ & 1);
#pragma unroll
  for (int i = 0; i < ROWS / kWarp; ++i)
    for (uint32_t left = hidden[i]; left; left &= left - 1)
#pragma unroll
      for (int p = 0; p < COLUMNS / kPanel; ++p)
        *reinterpret_cast<uint32_t*>(tile + p * tile_bytes(ROWS, kPanel) +
                                     (i * kWarp + __ffs(static_cast<int>(left)) - 1) * 128 + lane * 4) = 0;
  fence_proxy_async();
  __syncwarp();
  if (lane == 0) mbar_arrive(full);
}

// 2^x without the special-function unit, to float32's rounding for x <= 0; 0 from -127 on down, NaN for NaN.  x = n + f
// with f in [-1/2, 1/2]; the polynomial is minimax in relative error and 1 at 0.
__device__ __forceinline__ float ex2_polynomial(float x) {
  constexpr float kMagic = 12582912.f + 127.f;  // 1.5 * 2^23: the sum's low bits are n, and the exponent's bias
  const float least = max_or_nan(x, -127.f), t = least + kMagic, f = least - (t - kMagic);
  float p = fmaf(f, 0.001326472731307149f, 0.009671512991189957f);
  p = fmaf(p, f, 0.05550733581185341f);
  p = fmaf(p, f, 0.24022242426872253f);
  p = fmaf(p, f, 0.6931470036506653f);
  return fmaf(p, f, 1.f) * __uint_as_float(__float_as_uint(t) << 23);
}

// A thread's share of a tile, as it lies in the accumulator, to logits; see Features::logits().  16 columns at a time:
// the addresses of the bias and the mask for more elements than these would spill.
template <bool TRANSPOSED, bool CAP, class T, int N>
__device__ __forceinline__ void logits_by_parts(const Features<T, true>& features, float (&s)[N], float (&cap)[N],
                                                int row, int column) {
  auto& parts = reinterpret_cast<float (&)[N / 8][1][2][4]>(s);
  auto& caps = reinterpret_cast<float (&)[N / 8][1][2][4]>(cap);
#pragma unroll
  for (int n = 0; n < N / 8; ++n) features.template logits<TRANSPOSED, CAP>(parts[n], caps[n], row, column + 16 * n);
}

// Four lanes that share a row hold pairs of columns 8 n + 2 lane; afterwards each holds 8 adjacent ones, words[k] being
// pair k of column block `lane`: a transposition of 4 x 4 words in two exchanges.
__device__ __forceinline__ void gather_units(uint32_t (&words)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t low = words[i], high = words[i + bit];
      const uint32_t given = __shfl_xor_sync(kAllLanes, upper ? low : high, bit);
      words[i] = upper ? given : low, words[i + bit] = upper ? high : given;
    }
}

// A warp's 16 rows of an accumulator of COLUMNS columns from `column` on, times one factor a row, as 16-byte stores to
// the rows below `length` and columns below `size`.
template <class T, int COLUMNS>
__device__ __forceinline__ void store_accumulator(T* dst, int64_t stride, int row0, int length, int column, int size,
                                                  const float (&acc)[COLUMNS / 2], const float (&factor)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = row0 + lane / 4 + 8 * e;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = pack2<T>(acc[4 * (n + i) + 2 * e] * factor[e], acc[4 * (n + i) + 2 * e + 1] * factor[e]);
      gather_units(words);
      const int c = column + 8 * (n + lane % 4);
      if (row < length && c < size)
        *reinterpret_cast<uint4*>(dst + static_cast<int64_t>(row) * stride + c) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace pk
