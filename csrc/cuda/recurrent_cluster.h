// What the clusters' loops forward and backward have in common: sizes, instantiations, launch.
#pragma once
#include "recurrent_launch.h"

namespace pk {

constexpr int kHeldForward = 8;   // slices of 32 terms whose weights a warp keeps in registers, of at most 16
constexpr int kHeldBackward = 4;  // the same, of at most 8 for each of at most 8 blocks
constexpr int kClusterMost = 8;   // blocks of a cluster that every device has

// Two units of a row, which lie side by side in aligned memory: hidden sizes are multiples of 8.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};
template <class T>
__device__ __forceinline__ Pair<T> load_pair(const T* p) {
  return *reinterpret_cast<const Pair<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store_pair(T* p, float a, float b) {
  if constexpr (std::is_same_v<T, float>)
    *reinterpret_cast<float2*>(p) = make_float2(a, b);
  else
    *reinterpret_cast<uint32_t*>(p) = pack2<T>(a, b);
}

// Bytes of shared memory of a block.  units: warps, each with 8 hidden units.
inline size_t cluster_forward_bytes(int gates, int hidden, int units) {
  const int slices = ceil_div(hidden, kTerms), rest = slices > kHeldForward ? slices - kHeldForward : 0;
  return static_cast<size_t>(4 * kTileRows * (slices * kTerms + kPad)) +
         static_cast<size_t>(units * rest * gates * kFragment);
}
inline size_t cluster_backward_bytes(int gates, int cluster, int units) {
  const int slices = ceil_div(gates * units * kUnits, kTerms),
            rest = slices > kHeldBackward ? slices - kHeldBackward : 0;
  return static_cast<size_t>(4 * kTileRows * (slices * kTerms + kPad)) +
         static_cast<size_t>((rest + 2) * cluster * units * kFragment);
}

template <class F>
void dispatch_cluster(int cell, DType dtype, F&& f) {
  const auto with = [&](auto t) {
    if (static_cast<Cell>(cell) == Cell::lstm) return f(t, std::integral_constant<Kind, Kind::lstm>{});
    if (static_cast<Cell>(cell) == Cell::gru) return f(t, std::integral_constant<Kind, Kind::gru>{});
    throw std::invalid_argument("clusters run LSTM and GRU");
  };
  if (dtype == DType::bf16) return with(std::type_identity<bf16>{});
  if (dtype == DType::f16) return with(std::type_identity<fp16>{});
  throw std::invalid_argument("clusters run bfloat16 and float16");
}

template <class A>
void run_cluster(void (*kernel)(A), A args, const RecurrentPlan& plan, size_t bytes, void* stream) {
  const DeviceGuard guard(args.weights);
  Loop& loop = args.loop;
  loop.tiles = static_cast<int>(ceil_div(loop.batch, static_cast<int64_t>(kTileRows)));
  const int tiles = loop.tiles * loop.ways;
  for (loop.first_tile = 0; loop.first_tile < tiles; loop.first_tile += plan.tiles) {
    const int left = tiles - loop.first_tile;
    const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(left < plan.tiles ? left : plan.tiles));
    launch_cluster(kernel, plan.blocks, grid, static_cast<unsigned>(plan.units * kWarp), bytes, stream, args);
  }
}

// How many clusters the device holds at once; 0: none that large.
int recurrent_cluster_forward_resident(int cell, DType dtype, int cluster, int units, size_t bytes);
int recurrent_cluster_backward_resident(int cell, DType dtype, int cluster, int units, size_t bytes);

}  // namespace pk
