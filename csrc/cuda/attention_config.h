// Shapes of the kernels' tiles, and the choice of an instantiation.
//
// A warp owns 16 M rows; with M = 2 each fragment of the streamed tile feeds twice as many products, which halves the
// traffic to shared memory that otherwise bounds these kernels.  Sizes are such that nothing spills and that no kernel
// takes more than the 99 KiB of shared memory which every GPU from sm_80 on has for a block.
#pragma once
#include <stdexcept>

#include "attention.h"
#include "products.h"

namespace pk {

template <class T, int D, int M_, int WARPS, int N_, int STAGES_, int BLOCKS>
struct AttentionTiles {
  static constexpr int M = M_, N = N_, kStages = STAGES_;
  static constexpr int kThreads = kWarp * WARPS, kBlocks = BLOCKS;  // BLOCKS: on one multiprocessor
  static constexpr int kOwn = 16 * M * WARPS;                       // rows a block owns
  static constexpr int kOwnBytes = kOwn * D * static_cast<int>(sizeof(T));
  static constexpr int kStepBytes = N * D * static_cast<int>(sizeof(T));  // of one streamed tile
};

// Calls f with the padded head size as a type, 64, 128 or 256, and whether the instantiation must be the GENERAL one:
// float32, features beyond masks by position, or head sizes that are not the padded one.
template <int D_, bool GENERAL_>
struct Instance {
  static constexpr int D = D_;
  static constexpr bool GENERAL = GENERAL_;
};

inline bool attention_is_general(const Attention& a) {
  return a.bias || a.mask || a.seen || a.slopes || a.seed || a.x.softcap != 0.f || !(a.x.scale > 0.f);
}

template <class T, class F>
void choose_instance(const Attention& a, F&& f) {
  const int64_t widest = a.n.d > a.n.dv ? a.n.d : a.n.dv;
  if (widest > 256) throw std::invalid_argument("attention: head sizes above 256 are not served");
  if constexpr (!kWide<T>) {
    if (!attention_is_general(a) && a.n.d == a.n.dv) {
      if (widest == 64) return f(Instance<64, false>{});
      if (widest == 128) return f(Instance<128, false>{});
    }
  }
  if (widest <= 64) return f(Instance<64, true>{});
  if (widest <= 128) return f(Instance<128, true>{});
  return f(Instance<256, true>{});
}

// One block for each tile of `rows` of each head; see locate() about packed sequences.
inline dim3 attention_grid(const Attention& a, int64_t length, int rows, int64_t heads) {
  const int64_t tiles = ceil_div(length, static_cast<int64_t>(rows)) + (a.cu_q ? a.n.batch : 0);
  const int64_t blocks = tiles * heads * (a.cu_q ? 1 : a.n.batch);
  if (blocks > 0x7fffffff) throw std::invalid_argument("attention: more than 2^31 - 1 tiles");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace pk
