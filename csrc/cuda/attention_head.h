// Which tile of which sequence a block owns, and which keys a query sees by position.
//
// Causal mask, window, prefix and the ends of what is seen at all leave each query one interval of keys, and each key
// one interval of queries.  Its ends do not decrease from row to row, so the first and the last row of a tile tell
// which tiles of the other side are to be visited, and in which of them every pair is allowed.
#pragma once
#include "attention.h"
#include "platform.h"

namespace pk {

constexpr int kUnbounded = 0x7fffffff;

struct Interval {
  int begin, end;
};

struct Head {
  int b, h, tile;            // sequence, head, which of its tiles
  int lq, lk;                // of this sequence
  int64_t q_first, k_first;  // its first rows in packed tensors
  int64_t pairs;             // weights of one head in the sequences before it
  int shift;                 // query i stands at key i + shift
  int prefix, left, right;
  Interval seen;  // keys that some query sees: what lies outside may be anything, even NaN

  __device__ __forceinline__ Interval keys_of(int i) const {
    const int p = i + shift;
    return {max(seen.begin, p - left), min(min(seen.end, p + right + 1), max(p + 1, prefix))};
  }
  __device__ __forceinline__ Interval queries_of(int j) const {
    const int p = j - shift;
    return {max(max(0, p - right), j < prefix ? 0 : p), min(lq, p + left + 1)};
  }
};

struct Lengths {
  int64_t q_first, k_first;
  int lq, lk;
};

// Of packed sequence n.  Whatever the ends hold, it lies within the tensors.
__device__ __forceinline__ Lengths packed_lengths(const Attention& a, int n) {
  const int64_t zero = 0, q0 = max(a.cu_q[n], zero), k0 = max(a.cu_k[n], zero);
  const int64_t q1 = min(a.cu_q[n + 1], a.n.lq), k1 = min(a.cu_k[n + 1], a.n.lk);
  return {q0, k0, static_cast<int>(min(max(q1 - q0, zero), a.n.max_q)),
          static_cast<int>(min(max(k1 - k0, zero), a.n.max_k))};
}

// Tile number `index` (a block's: its own) of `rows` queries (OF_KEYS: keys) of one of `heads` heads; false: there is
// none.  Packed, the grid has a tile more for each sequence, and each warp finds its sequence from the ends, 32 at a
// time: no length need be known on the host.  REVERSED starts with the last tiles, which under a causal mask take
// longest.
template <bool OF_KEYS>
__device__ __forceinline__ bool locate(const Attention& a, int rows, int heads, bool reversed, Head& x, int index) {
  const int batch = static_cast<int>(a.n.batch);
  const int length = static_cast<int>(OF_KEYS ? a.n.lk : a.n.lq);
  const int tiles = ceil_div(length, rows) + (a.cu_q ? batch : 0);
  const int rest = index / tiles;
  int own = index % tiles;
  if (reversed) own = tiles - 1 - own;
  if (!a.cu_q) {
    x.b = rest / heads, x.h = rest % heads, x.tile = own;
    x.lq = static_cast<int>(a.n.lq), x.lk = static_cast<int>(a.n.lk);
    x.q_first = x.k_first = 0;
    x.pairs = static_cast<int64_t>(x.b) * x.lq * x.lk;
    return true;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t pairs_before = 0;
  for (int n0 = 0; n0 < batch; n0 += kWarp) {
    Lengths s{0, 0, 0, 0};
    if (n0 + lane < batch) s = packed_lengths(a, n0 + lane);
    const int count = ceil_div(OF_KEYS ? s.lk : s.lq, rows);
    const int64_t pairs = static_cast<int64_t>(s.lq) * s.lk;
    int tiles_to = count;
    int64_t pairs_to = pairs;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
      const int t = __shfl_up_sync(kAllLanes, tiles_to, o);
      const int64_t p = __shfl_up_sync(kAllLanes, pairs_to, o);
      if (lane >= o) tiles_to += t, pairs_to += p;
    }
    const uint32_t found = __ballot_sync(kAllLanes, tiles_to > own);
    if (found) {
      const int source = __ffs(static_cast<int>(found)) - 1;
      x.b = n0 + source, x.h = rest;
      x.tile = own - __shfl_sync(kAllLanes, tiles_to - count, source);
      x.lq = __shfl_sync(kAllLanes, s.lq, source), x.lk = __shfl_sync(kAllLanes, s.lk, source);
      x.q_first = __shfl_sync(kAllLanes, s.q_first, source), x.k_first = __shfl_sync(kAllLanes, s.k_first, source);
      x.pairs = pairs_before + __shfl_sync(kAllLanes, pairs_to - pairs, source);
      return true;
    }
    own -= __shfl_sync(kAllLanes, tiles_to, kWarp - 1);
    pairs_before += __shfl_sync(kAllLanes, pairs_to, kWarp - 1);
  }
  return false;
}

template <bool OF_KEYS>
__device__ __forceinline__ bool locate(const Attention& a, int rows, int heads, bool reversed, Head& x) {
  return locate<OF_KEYS>(a, rows, heads, reversed, x, static_cast<int>(blockIdx.x));
}

// What the positions say in the query head x.h.
__device__ __forceinline__ void place(const Attention& a, Head& x) {
  x.shift = a.n.top_left ? 0 : x.lk - x.lq;
  x.left = static_cast<int>(a.n.left), x.right = static_cast<int>(a.n.right);
  x.prefix = a.prefix ? static_cast<int>(min(a.prefix[x.b], static_cast<int64_t>(x.lk))) : kUnbounded;
  x.seen.begin = max(0, x.shift - x.left);
  x.seen.end = min(min(x.lk, x.lq + x.shift + x.right), max(x.lq + x.shift, x.prefix));
  if (a.span) {
    const int32_t* span = a.span + x.b * a.n.span[0] + x.h * a.n.span[1];
    x.seen = {max(x.seen.begin, span[0]), min(x.seen.end, span[1])};
  }
}

// Keeps x where all threads of the block read it.  In registers it would be there through all products, and they have
// none to spare; what is needed once a tile costs little from shared memory.
__device__ __forceinline__ void share(Head& shared, const Head& x) {
  if (threadIdx.x == 0) shared = x;
  __syncthreads();
}

// Where the rows of x's query head begin in tensors laid out (batch, heads, length), packed (heads, total).
__device__ __forceinline__ int64_t row_of_head(const Attention& a, const Head& x) {
  const int64_t head = a.cu_q ? x.h : static_cast<int64_t>(x.b) * a.n.heads + x.h;
  return head * a.n.lq + x.q_first;
}

// Tiles of SIZE rows that hold the interval.
template <int SIZE>
__device__ __forceinline__ Interval tiles_of(Interval x) {
  return {max(x.begin, 0) / SIZE, x.end > x.begin ? ceil_div(x.end, SIZE) : 0};
}

}  // namespace pk
