// State behind the sm_90a operations: mbarriers, TMA copies and stores, wgmma, setmaxnreg.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "clocks.h"
#include "emulator.h"
#include "tensor_map.h"

namespace emu {

struct Wgmma {
  float* d;
  const uint32_t* a_regs;  // A from registers (then a_desc is unused): where they are, and what they held at issue
  uint32_t a_value[4];
  uint64_t a_desc, b_desc;
  int n, group;
  bool scale_d, a_mn, b_mn, bf16, chained;
  std::vector<float> old;
  Site site;
};
struct RegisterUse {  // a register array wgmma uses, as the last wgmma_fence saw it
  const void* p;
  size_t bytes;
  uint64_t hash;
};
struct WgmmaState {
  std::vector<Wgmma> issued;
  std::vector<RegisterUse> uses;
  int group = 0, wait_upto = 0;
  size_t count = 0;
  bool fenced = false;
};
struct WgmmaSeen {
  uint64_t a_desc, b_desc;
  int n;
  bool from_registers;
  Site site;
};

struct TmaStore {
  TensorMap map;
  uint32_t src;
  int at[4], group;
  Site site;
};
struct StoreState {
  std::vector<TmaStore> issued;
  int group = 0;
};
struct Arriving {  // on its way to a block's shared memory, and then to that block's mbarrier
  uint32_t dst, mbar;
  int bytes;
  bool box;  // of TMA: part of a tensor; otherwise the value of an st.async
  TensorMap map;
  int at[4];
  uint32_t value[4];
  Site site;
};
struct Mbarrier {
  uint32_t addr;
  int count, pending, tx, phase;
  std::vector<Thread*> waiters;
  Gathered near, far;  // from its own block, and from others: those are seen after a wait of cluster scope only
  std::shared_ptr<const Message> near_done, far_done;
  int initialised_by;
  bool fenced;
};

struct HopperState {
  std::vector<Arriving> arriving;
  std::vector<Mbarrier> mbarriers;
  std::vector<WgmmaSeen> seen[8];  // each warpgroup's wgmmas: its four warps must issue the same ones
  std::vector<Thread*> register_waiters;
  int register_pool = 0;  // what setmaxnreg.dec gave back
  Ticks proxy_tick;       // each thread's tick at its last fence.proxy.async
};

}  // namespace emu
