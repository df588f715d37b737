// The product of a tile: 16 rows of the state (or of the gates' gradient) by the weights of some hidden units, on the
// tensor cores.  A warp has the gates of 8 hidden units in its accumulators, all of one (row, unit) in one thread, so
// that the cell is applied where the product is; with fewer units than warps the terms of the sum are shared out too.
//
// float32 is made of bfloat16: each number is the sum of three (24 bits), and of the nine products of parts the six
// that count are taken, as accurate as float32 arithmetic at a sixth of the tensor cores' rate.
#pragma once
#include "platform.h"
#include "recurrent_cells.h"
#include "vec.h"

namespace pk {

constexpr int kTileRows = 16, kTileThreads = 256, kTileWarps = kTileThreads / kWarp;
constexpr int kUnits = 8;         // hidden units of a warp's block
constexpr int kTerms = 32;        // terms of the sum that one 16-byte load of weights covers
constexpr int kMostUnits = 2;     // blocks of units of a warp
constexpr int kMostTerms = 1024;  // of the state in shared memory at once, where it is not kept there
constexpr int kFragment = 512;    // bytes of the weights of 8 units by 32 terms
constexpr int kPad = 8;           // elements between rows, so that eight rows lie in different banks

template <class T>
using Half = std::conditional_t<std::is_same_v<T, float>, bf16, T>;
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// The sizes of a block's work; both sides of a launch count shared memory with it.
struct TileSizes {
  int gates, parts, units, terms;  // units: blocks of 8 of this block; terms: of the sum, padded to 32
  bool resident, local;            // weights in shared memory; the state as well, which then needs no exchange

  __host__ __device__ int slices() const { return terms / kTerms; }
  __host__ __device__ int chunk() const { return local || terms < kMostTerms ? terms : kMostTerms; }
  __host__ __device__ int row() const { return chunk() + kPad; }
  __host__ __device__ int split() const { return units > 4 ? 1 : units > 2 ? 2 : units > 1 ? 4 : 8; }
  __host__ __device__ size_t weight_bytes() const {
    return static_cast<size_t>(units) * static_cast<size_t>(slices() * gates * parts * kFragment);
  }
  __host__ __device__ size_t state_bytes() const { return static_cast<size_t>(parts * kTileRows * row() * 2); }
  __host__ __device__ size_t carry_bytes() const { return static_cast<size_t>(kTileRows * units * kUnits * 4); }
  __host__ __device__ size_t partial_bytes() const {
    return static_cast<size_t>(split() - 1) * static_cast<size_t>(kTileWarps / split() * gates * kWarp * 16);
  }
  __host__ __device__ size_t bytes() const {
    return (resident ? weight_bytes() : 0) + state_bytes() + carry_bytes() + partial_bytes();
  }
};

// A block's shared memory and place.
template <class T, int GATES>
struct Tile {
  TileSizes sizes;
  const uint4* weights;
  Half<T>* state;  // [parts][16][row]
  float* carry;    // [16][units * 8]: each thread's own
  float* partial;
  int lane, slot, share;  // slot: which blocks of units; share: which terms

  __device__ __forceinline__ Tile(TileSizes s, unsigned char* shared, const uint4* all, int block) : sizes(s) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, slots = kTileWarps / s.split();
    lane = static_cast<int>(threadIdx.x) % kWarp, slot = warp % slots, share = warp / slots;
    const uint4* mine = all + static_cast<int64_t>(block) * static_cast<int64_t>(s.weight_bytes() / 16);
    if (s.resident) {
      uint4* here = reinterpret_cast<uint4*>(shared);
      for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(s.weight_bytes() / 16); i += kTileThreads)
        here[i] = mine[i];
      weights = here;
      shared += s.weight_bytes();
    } else {
      weights = mine;
    }
    state = reinterpret_cast<Half<T>*>(shared);
    carry = reinterpret_cast<float*>(shared + s.state_bytes());
    partial = reinterpret_cast<float*>(shared + s.state_bytes() + s.carry_bytes());
  }

  // Writes x at (row, column) of the state.
  __device__ __forceinline__ void put(int row, int column, float x) const {
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      const Half<T> h = from_float<Half<T>>(x);
      state[(part * kTileRows + row) * sizes.row() + column] = h;
      x -= to_float(h);
    }
  }

  // Fills the state's columns with terms first .. first + chunk; from(row): the row's memory, or null for zeros.
  template <class F>
  __device__ __forceinline__ void load(int first, int columns, bool vectors, const F& from) const {
    const int groups = sizes.chunk() / 8;
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * groups; i += kTileThreads) {
      const int row = i / groups, column = i % groups * 8, at = first + column;
      const T* p = from(row);
      float x[8];
      if (p && vectors && at + 8 <= columns) {
#pragma unroll
        for (int v = 0; v < 8 / Vec16<T>::N; ++v) {
          const uint4 bits = ld_cg(reinterpret_cast<const uint4*>(p + at) + v);
          const Vec16<T> loaded = __builtin_bit_cast(Vec16<T>, bits);
#pragma unroll
          for (int k = 0; k < Vec16<T>::N; ++k) x[v * Vec16<T>::N + k] = to_float(loaded.v[k]);
        }
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) x[k] = p && at + k < columns ? to_float(ld_cg(p + at + k)) : 0.f;
      }
      store8(row, column, x);
    }
  }

  __device__ __forceinline__ void store8(int row, int column, float (&x)[8]) const {
#pragma unroll
    for (int part = 0; part < kParts<T>; ++part) {
      Vec16<Half<T>> h;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        h.v[k] = from_float<Half<T>>(x[k]);
        x[k] -= to_float(h.v[k]);
      }
      store_vec(state + (part * kTileRows + row) * sizes.row() + column, h);
    }
  }

  __device__ __forceinline__ int block_of(int n) const { return slot + n * kTileWarps; }

  // sum += the product of the state's columns, terms first .. first + chunk.
  __device__ __forceinline__ void multiply(float (&sum)[kMostUnits][GATES][4], int first) const {
    constexpr int P = kParts<T>;
    const int slices = min(sizes.chunk(), sizes.terms - first) / kTerms;
    for (int slice = share; slice < slices; slice += sizes.split()) {
      uint32_t a[2][P][4];
#pragma unroll
      for (int part = 0; part < P; ++part) {
        const Half<T>* row = state + (part * kTileRows + lane % 16) * sizes.row() + slice * kTerms + lane / 16 * 8;
        ldmatrix_x4(a[0][part], smem_addr(row));
        ldmatrix_x4(a[1][part], smem_addr(row + 16));
      }
#pragma unroll
      for (int n = 0; n < kMostUnits; ++n) {
        if (block_of(n) >= sizes.units) break;
        const int64_t at = static_cast<int64_t>(block_of(n)) * sizes.slices() + first / kTerms + slice;
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
          const uint4* w = weights + (at * GATES + gate) * P * kWarp + lane;
          if constexpr (P == 1) {
            const uint4 b = w[0];
            mma_m16n8k16<Half<T>>(sum[n][gate], a[0][0], b.x, b.y);
            mma_m16n8k16<Half<T>>(sum[n][gate], a[1][0], b.z, b.w);
          } else {
            float apart[4] = {};  // tensor cores cut their sums off, towards 0: what is added up over all terms is not
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int low = 2; low >= 0; --low) {  // parts of the weights, the small ones first
                const uint2 b = reinterpret_cast<const uint2*>(w + low * kWarp)[half];
#pragma unroll
                for (int part = 2 - low; part >= 0; --part) mma_m16n8k16<Half<T>>(apart, a[half][part], b.x, b.y);
              }
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[n][gate][e] += apart[e];
          }
        }
      }
    }
  }

  // Which share owns an element of the accumulators: the terms' shares share out the elements, too, so that no warp is
  // left alone with the sums and the cell.
  __device__ __forceinline__ int owner(int e) const { return e * min(sizes.split(), 4) / 4; }

  // Adds the shares up, in their order; each element's owner has its sum.  A barrier of the block, also without shares:
  // after it the state may be overwritten.
  __device__ __forceinline__ void gather(float (&sum)[kMostUnits][GATES][4]) const {
    const int split = sizes.split(), step = kTileWarps / split * GATES * kWarp;
    float* const mine = partial + slot * GATES * kWarp + lane;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int other = owner(e);
      if (other == share) continue;
      float* const to = mine + (e * (split - 1) + share - (share > other)) * step;  // what the owner has stays with it
#pragma unroll
      for (int gate = 0; gate < GATES; ++gate) to[gate * kWarp] = sum[0][gate][e];
    }
    __syncthreads();
    if (split == 1) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (owner(e) != share) continue;
      const float* from = mine + e * (split - 1) * step;
      float total[GATES] = {};
#pragma unroll 2
      for (int other = 0; other < split; ++other) {
        if (other == share) {
#pragma unroll
          for (int gate = 0; gate < GATES; ++gate) total[gate] += sum[0][gate][e];
        } else {
#pragma unroll
          for (int gate = 0; gate < GATES; ++gate) total[gate] += from[gate * kWarp];
          from += step;
        }
      }
#pragma unroll
      for (int gate = 0; gate < GATES; ++gate) sum[0][gate][e] = total[gate];
    }
  }

  // Calls f(n, e, row, unit) for the elements that this thread owns; unit: within the block.
  template <class F>
  __device__ __forceinline__ void for_elements(const F& f) const {
#pragma unroll
    for (int n = 0; n < kMostUnits; ++n) {
      if (block_of(n) >= sizes.units) break;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (owner(e) == share) f(n, e, lane / 4 + e / 2 * 8, block_of(n) * kUnits + lane % 4 * 2 + e % 2);
    }
  }

  __device__ __forceinline__ float& own(int row, int unit) const { return carry[row * sizes.units * kUnits + unit]; }
};

// The blocks that share a tile of rows meet: after the wait, all that they stored before is seen.  The counter only
// grows, so that none can overtake another.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
}
__device__ __forceinline__ void await(const uint32_t* counter, uint32_t target) {
  if (threadIdx.x == 0) {
    while (ld_acquire(counter) < target) {
    }
  }
  __syncthreads();
}

}  // namespace pk
