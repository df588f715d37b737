// Vector clocks: which accesses of which threads a thread is ordered after.  A thread's tick grows each time it
// publishes (barrier, arrive, release); an access at tick k of thread i is ordered before thread t once t has seen tick
// k of i.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emu {

struct Thread;
struct Block;

using Ticks = std::vector<uint32_t>;                          // one a thread of a block
using Message = std::map<int, std::shared_ptr<const Ticks>>;  // by block: what an atomic hands on
struct View {                                                 // what a thread has seen of others
  Ticks own;                                                  // of its own block
  std::shared_ptr<const Message> rest;  // of other blocks, handed over through atomics; mostly null
};

// Views are shared and never changed: after a barrier all its threads hold the same one, so that a barrier of n threads
// costs n, not n * n.
struct Clock {
  std::shared_ptr<const View> seen;
  uint32_t tick = 1;
};

void clocks_start(Block&);
bool has_seen(const Thread&, int block, int lin, uint32_t tick);

void join_block(Block&);
void join_warp(Block&, int first, uint32_t lanes);

// What threads hand on through one place: a named barrier, an mbarrier, a cluster's barrier.  One-sided: release adds
// all that t has seen, acquire takes what handed_on() gave of it.
struct Gathered {
  std::map<int, Ticks> of;               // by block
  std::shared_ptr<const Message> added;  // the last view of other blocks that came in: often the same for many threads
};
void release(Thread& t, Gathered& to);
std::shared_ptr<const Message> handed_on(const Gathered&);
void acquire(Thread& t, const std::shared_ptr<const Message>& from);
bool covers(const Thread& t, const std::shared_ptr<const Message>& past);  // as far as t's own block goes

// Atomics.  A fence keeps what its thread has seen; an atomic after it hands that to the location, and takes what the
// location was handed; the next fence makes the taken part seen.  Relaxed atomics alone order nothing.
struct Handoff {
  Message gpu;  // published by __threadfence
  Ticks block;  // published by __threadfence_block or stronger, for threads of block `owner` only
  int owner = -1;
};
struct FenceState {
  std::shared_ptr<const Message> gpu;  // as of this thread's last __threadfence
  Ticks block;                         // as of its last fence of any scope
  Message taken_gpu;                   // from atomics, not yet behind a fence
  Ticks taken_block;
  bool would_have_seen(int block_index, int lin, uint32_t tick) const;
};
void acquire_fence(Thread&, bool gpu);
void release_fence(Thread&, bool gpu);
void hand_on(Thread&, Handoff&);
void take(Thread&, const Handoff&);

}  // namespace emu
