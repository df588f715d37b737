// The emulator's own state: threads, warps, blocks, barriers, and the scheduler's interface.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "emulator.h"
#include "fiber.h"
#include "hopper_state.h"

namespace emu {

constexpr size_t kArena = 320 * 1024;        // shared memory of a block and the gaps that catch overruns
constexpr size_t kReserved = 1024;           // dynamic shared memory starts here: address 0 is never valid
constexpr size_t kGap = 32;                  // behind each static variable
constexpr size_t kSharedLimit = 227 * 1024;  // what sm_90 grants a block
constexpr size_t kStaticLimit = 48 * 1024;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kStackMargin = 24 * 1024;  // left for the emulator's own frames

enum class State : uint8_t { ready, waiting, done };

struct CpAsync {
  void* dst;
  const void* src;  // null: zeros
  int bytes, group;
  Site site;
};

struct Thread : Position {
  Context ctx;
  char* stack;
  Block* blk;
  int lin, lane, warp;
  State state;
  const char* waiting_at;
  Site site;
  Clock clock;
  FenceState fences;
  std::vector<CpAsync> copies;
  int copy_group;
  WgmmaState wgmma;
  StoreState stores;
  uint32_t cluster_arrivals, cluster_waits;  // at the cluster's barrier
};

struct Slot {  // a warp collective some lanes have come to
  uint32_t mask, effective, arrived;
  Op op;
  Site site;
  WarpFn fn;
  void* payload[32];
};

struct Warp {
  uint32_t alive = 0;
  std::vector<Slot> slots;
  int registers = 0;
};

struct Barrier {
  int arrived = 0, need = 0;
  int count = 0, all = 0, any = 0;  // of the predicates so far
  int result[3] = {};
  Site site{};
  std::vector<Thread*> waiters, members;
  Gathered gathered;                    // of this round's arrivals so far
  std::shared_ptr<const Message> last;  // of the whole last round
};

struct SharedVar {
  const void* key;
  size_t offset, size;
};

// Static shared memory, the same in all blocks of a launch: an address in one block is its variable's in every other.
struct SharedLayout {
  std::vector<SharedVar> vars;
  size_t top = 0, static_bytes = 0;
};

struct Visit {  // by a thread of another block of the cluster, to this block's shared memory
  uint32_t tick, origin;
};

struct Block {
  uint3 id;
  int index, rank, threads, alive;  // rank: in its cluster
  uint8_t* arena;
  std::map<std::pair<int, int>, Visit> visits;  // the last one of each (block, thread)
  Barrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Thread> thread;
  HopperState hopper;
};

struct Stats {
  uint64_t switches, ldmatrix_phases, ldmatrix_conflicts, checked_bytes;
};

struct Options {
  int order = 0;  // 0 forward, 1 reversed, >= 2 random with this seed
  bool races = true, uninitialised = true;
  int max_resident_blocks = 132;  // an H100's multiprocessors, one block each
  uint64_t max_idle_yields = 5'000'000;
  uint32_t max_idle_reads = 1u << 25;
};

extern Stats stats;
extern Options options;
extern uint32_t grid_epoch;       // grid_sync rounds of this launch
extern uint32_t idle_reads;       // since any thread wrote or got further
extern std::vector<Block*> live;  // the blocks that run now; those of a cluster by rank
extern SharedLayout layout;
extern const void* call_frame;  // the kernel's arguments, which threads may read
inline Thread* self() { return static_cast<Thread*>(cur); }

void wait(const char* what, Site);
void wake(std::vector<Thread*>&);
void finish_slot(Block&, Warp&, size_t);
void check_no_async_left(const Thread&);
void cluster_start(int threads);
void cluster_exit(const Thread&);
struct Place {
  Block* block;
  size_t offset;
  void* pointer() const { return block->arena + offset; }
};
Place place_of(uint32_t addr, size_t bytes, Site);  // of a shared::cluster address
bool in_shared(size_t offset, size_t bytes);
float half_bits(uint16_t u, bool bf16);
extern bool cut_off_sums;
float tensor_core_sum(float c, const float* a, const float* b, int n);  // c + a . b, n at most 16
std::string name_site(Site);

}  // namespace emu
