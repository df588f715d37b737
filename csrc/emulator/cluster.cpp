// Clusters: their barrier, and addresses of other blocks' shared memory.  A block may be reached from the time it is
// known to have started until it ends, and it must not end before it knows that the others are done.
#include "checker.h"
#include "hopper.h"
#include "runtime.h"

namespace emu {

namespace {

constexpr uint32_t kWindow = 1u << 20;  // addresses of rank r begin at (r + 1) * kWindow, the block's own at 0

struct ClusterBarrier {
  uint32_t rounds = 0;  // complete ones
  int pending = 0;      // threads that have neither exited nor come to this round
  Gathered gathered;
  std::shared_ptr<const Message> done;
  std::vector<Thread*> waiters;
} barrier;

void complete_if_due() {
  if (barrier.pending) return;
  ++barrier.rounds;
  for (const Block* b : live) barrier.pending += b->alive;
  barrier.done = handed_on(barrier.gathered);
  barrier.gathered = {};
  wake(barrier.waiters);
}

}  // namespace

void cluster_start(int threads) {
  barrier = {};
  barrier.pending = threads;
}

void cluster_exit(const Thread& t) {
  if (t.cluster_arrivals > barrier.rounds) return;
  --barrier.pending;
  complete_if_due();
}

int cluster_rank() { return self()->blk->rank; }
int cluster_size() { return cfg.cluster; }

void cluster_arrive(bool relaxed, Site s) {
  Thread* t = self();
  if (t->cluster_arrivals != t->cluster_waits)
    fail("%s: arrives at the cluster's barrier again without cluster_wait", name_site(s).c_str());
  ++t->cluster_arrivals;
  if (!relaxed) release(*t, barrier.gathered);
  --barrier.pending;
  complete_if_due();
}

void cluster_wait(Site s) {
  Thread* t = self();
  if (t->cluster_arrivals == t->cluster_waits)
    fail("%s: waits at the cluster's barrier without cluster_arrive", name_site(s).c_str());
  while (barrier.rounds < t->cluster_arrivals) {
    barrier.waiters.push_back(t);
    wait("cluster_wait", s);
  }
  ++t->cluster_waits;
  acquire(*t, barrier.done);  // of this round: the next is complete only after this thread has come to it
}

uint32_t map_cluster(uint32_t addr, int rank, Site s) {
  if (rank < 0 || rank >= cfg.cluster)
    fail("%s: rank %d in a cluster of %d blocks", name_site(s).c_str(), rank, cfg.cluster);
  if (addr >= kWindow) fail("%s: map_cluster of a mapped address", name_site(s).c_str());
  return (static_cast<uint32_t>(rank) + 1) * kWindow + addr;
}

Place place_of(uint32_t addr, size_t bytes, Site s) {
  Block* b = addr < kWindow ? self()->blk : live[addr / kWindow - 1];
  const size_t offset = addr % kWindow;
  if (!in_shared(offset, bytes))
    fail("%s: shared memory address 0x%zx (+%zu) of rank %d is out of bounds", name_site(s).c_str(), offset, bytes,
         b->rank);
  return {b, offset};
}

namespace {

Place aligned_place(uint32_t addr, size_t bytes, Site s) {
  if (addr % bytes)
    fail("%s: shared memory address 0x%x is not %zu-byte aligned", name_site(s).c_str(), addr % kWindow, bytes);
  return place_of(addr, bytes, s);
}

}  // namespace

void ld_cluster(uint32_t addr, void* to, int bytes, Site s) {
  const size_t n = static_cast<size_t>(bytes);
  const Place p = aligned_place(addr, n, s);
  checked_access(*self(), reinterpret_cast<uintptr_t>(p.pointer()), n, Access::read, true, origin_of(s));
  memcpy(to, p.pointer(), n);
}

void st_cluster(uint32_t addr, const void* from, int bytes, Site s) {
  const size_t n = static_cast<size_t>(bytes);
  const Place p = aligned_place(addr, n, s);
  checked_access(*self(), reinterpret_cast<uintptr_t>(p.pointer()), n, Access::write, true, origin_of(s));
  memcpy(p.pointer(), from, n);
}

void visit(const Thread& t, Block& b, uint32_t origin) {
  if (!b.alive)
    fail("shared memory of rank %d reached at %s: that block has exited", b.rank, name_origin(origin).c_str());
  const auto& rest = t.clock.seen->rest;
  if (!t.cluster_waits && !(rest && rest->contains(b.index)))
    fail("shared memory of rank %d reached at %s: that block may not have started, no cluster barrier before", b.rank,
         name_origin(origin).c_str());
  b.visits[{t.blk->index, t.lin}] = {t.clock.tick, origin};
}

void check_visits(const Block& b) {
  for (const auto& [who, last] : b.visits) {
    bool seen = false;
    for (const Thread& t : b.thread) seen = seen || has_seen(t, who.first, who.second, last.tick);
    if (!seen)
      fail("block ends while thread %d of block %d may still be at %s with its shared memory: no cluster barrier after",
           who.second, who.first, name_origin(last.origin).c_str());
  }
}

}  // namespace emu
