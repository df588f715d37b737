// Launches and the order in which fibers run.  One OS thread; the blocks of a launch run one after another (all at once
// when cooperative), each CUDA thread a fiber that runs until it must wait.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>

#include "checker.h"
#include "runtime.h"

namespace emu {

Position* cur = nullptr;
Config cfg;
Stats stats;
Options options;
int guards = 0;
uint32_t grid_epoch = 0;
uint32_t idle_reads = 0;
const void* call_frame = nullptr;
std::vector<Block*> live;
SharedLayout layout;

namespace {

constexpr size_t kHeadroom = 8 << 20;  // below the lowest stack: where one overlong frame may land
Context main_context;
std::string error;
std::vector<Thread*> ring;  // threads that can run
size_t head = 0, ready = 0;
uint64_t random_state = 1;
uint64_t idle_yields = 0;
char* stacks = nullptr;
size_t stack_count = 0;
std::vector<uint8_t*> arenas;
Barrier grid_barrier;
void (*kernel_thunk)(void*);

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

void push(Thread* t) { ring[(head + ready++) % ring.size()] = t; }

Thread* pop() {
  if (options.order >= 2 && ready > 1) std::swap(ring[head], ring[(head + next_random() % ready) % ring.size()]);
  Thread* t = ring[head];
  head = (head + 1) % ring.size();
  --ready;
  return t;
}

// Runs something else; returns when this thread is resumed.  After an error nothing is: all goes back to run_all.
void switch_away() {
  Thread* from = self();
  Context* to = &main_context;
  if (ready && error.empty()) {
    Thread* t = pop();
    if (t == from) return;
    cur = t, to = &t->ctx;
  } else {
    cur = nullptr;
  }
  ++stats.switches;
  switch_context(from->ctx, *to);
}

void fiber_main(void* p) {
  Thread* t = static_cast<Thread*>(p);
  kernel_thunk(const_cast<void*>(call_frame));
  check_no_async_left(*t);
  Block& b = *t->blk;
  t->state = State::done;
  --b.alive;
  cluster_exit(*t);
  made_progress();
  Warp& w = b.warps[static_cast<size_t>(t->warp)];
  w.alive &= ~(1u << t->lane);
  for (size_t i = 0; i < w.slots.size(); ++i)
    if (w.slots[i].mask >> t->lane & 1) {
      w.slots[i].effective &= w.alive;
      finish_slot(b, w, i);
      break;
    }
  switch_away();
  __builtin_trap();
}

std::string ranges(const std::vector<int>& v) {
  std::string s;
  for (size_t i = 0; i < v.size();) {
    size_t j = i;
    while (j + 1 < v.size() && v[j + 1] == v[j] + 1) ++j;
    s += (s.empty() ? "" : ",") + std::to_string(v[i]) + (j > i ? "-" + std::to_string(v[j]) : "");
    i = j + 1;
  }
  return s;
}

std::string describe_deadlock() {
  std::string s = "deadlock:";
  for (const Block* b : live) {
    std::map<std::string, std::vector<int>> groups;
    for (const Thread& t : b->thread)
      groups[t.state == State::done ? "have exited" : std::string("wait at ") + t.waiting_at + " " + name_site(t.site)]
          .push_back(t.lin);
    s += " block(" + std::to_string(b->id.x) + "," + std::to_string(b->id.y) + "," + std::to_string(b->id.z) + "):";
    for (const auto& [what, who] : groups) s += " threads " + ranges(who) + " " + what + ";";
    if (s.size() > 1500) return s + " ...";
  }
  return s;
}

void run_all() {
  while (error.empty() && ready) {
    Thread* t = pop();
    cur = t;
    ++stats.switches;
    switch_context(main_context, t->ctx);
  }
  cur = nullptr;
  if (!error.empty()) return;
  for (const Block* b : live)
    if (b->alive) {
      error = describe_deadlock();
      return;
    }
}

void start_thread(Block& b, int lin, size_t stack) {
  Thread& t = b.thread[static_cast<size_t>(lin)];
  const unsigned i = static_cast<unsigned>(lin);
  t.thread = {i % cfg.block.x, i / cfg.block.x % cfg.block.y, i / (cfg.block.x * cfg.block.y)};
  t.block = b.id;
  t.stack = stacks + stack * kStack;
  t.blk = &b, t.lin = lin, t.lane = lin % 32, t.warp = lin / 32;
  t.state = State::ready;
  t.fences = {};
  t.copies.clear(), t.copy_group = 0;
  t.wgmma = {}, t.stores = {};
  t.cluster_arrivals = t.cluster_waits = 0;
  b.warps[static_cast<size_t>(t.warp)].alive |= 1u << t.lane;
  // tops of stacks are spread over cache sets: at one power-of-two distance they would evict each other
  make_context(t.ctx, t.stack, kStack - stack % 32 * 128, fiber_main, &t);
}

void start_block(Block& b, uint3 id, int index, size_t slot, uint8_t* arena) {
  const int n = static_cast<int>(cfg.block.x * cfg.block.y * cfg.block.z);
  b.id = id, b.index = index, b.rank = index % cfg.cluster, b.threads = b.alive = n, b.arena = arena;
  b.visits.clear();
  for (Barrier& r : b.barriers) r = {};
  b.warps.assign(static_cast<size_t>(n + 31) / 32, {});
  for (Warp& w : b.warps) w.registers = std::min(255, 65536 / n) / 8 * 8;
  b.thread.resize(static_cast<size_t>(n));
  b.hopper = {};
  memset(arena, 0xff, layout.top);  // NaN in float, bf16 and half; -1 in the integers
  const size_t first = slot * static_cast<size_t>(n);
  for (int i = 0; i < n; ++i) start_thread(b, i, first + static_cast<size_t>(i));
  clocks_start(b);
  checker_new_block(b);
  for (int i = 0; i < n; ++i) push(&b.thread[static_cast<size_t>(options.order == 1 ? n - 1 - i : i)]);
}

template <class T>
T* map(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: out of memory");
  return static_cast<T*>(p);
}

void validate(const Config& c, size_t threads, size_t blocks) {
  auto bad = [](const std::string& what) { throw std::runtime_error("emulator: " + what); };
  if (!threads || threads > 1024 || c.block.z > 64) bad("block of " + std::to_string(threads) + " threads");
  if (!blocks || c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535)
    bad("grid of " + std::to_string(c.grid.x) + " x " + std::to_string(c.grid.y) + " x " + std::to_string(c.grid.z));
  if (blocks * threads > 0xffffffffu) bad("more than 2^32 threads in one launch");
  if (c.cluster < 1 || c.cluster > 8 || c.grid.x % static_cast<unsigned>(c.cluster))
    bad("clusters of " + std::to_string(c.cluster) + " blocks in a grid of " + std::to_string(c.grid.x) + " along x");
  if (c.smem > kSharedLimit) bad("dynamic shared memory over the limit: " + std::to_string(c.smem));
  if (c.cooperative && blocks > static_cast<size_t>(options.max_resident_blocks))
    bad("cooperative grid of " + std::to_string(blocks) + " blocks cannot be resident at once");
}

void reserve(size_t concurrent, size_t threads) {
  if (concurrent * threads > stack_count) {
    if (stacks) munmap(stacks - kHeadroom, stack_count * kStack + kHeadroom);
    stacks = nullptr, stack_count = 0;
    stacks = map<char>(concurrent * threads * kStack + kHeadroom) + kHeadroom;
    stack_count = concurrent * threads;
  }
  while (arenas.size() < concurrent) arenas.push_back(map<uint8_t>(kArena));
  ring.assign(concurrent * threads + 1, nullptr);
  head = ready = 0;
}

}  // namespace

std::string name_site(Site s) {
  std::string file = s.file;
  const size_t root = file.rfind("csrc/");
  return (root == std::string::npos ? file : file.substr(root)) + ":" + std::to_string(s.line);
}

void fail(const char* fmt, ...) {
  char text[2048];
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  if (!cur) throw std::runtime_error(text);
  const Position& p = *cur;
  char who[128];
  snprintf(who, sizeof who, "block(%u,%u,%u) thread(%u,%u,%u): ", p.block.x, p.block.y, p.block.z, p.thread.x,
           p.thread.y, p.thread.z);
  error = std::string(who) + text;
  switch_away();  // to run_all, for good
  __builtin_trap();
}

void run(const Config& c, void (*thunk)(void*), void* ctx) {
  static std::mutex mutex;
  static std::vector<Block> pool;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t threads = static_cast<size_t>(c.block.x) * c.block.y * c.block.z;
  const size_t blocks = static_cast<size_t>(c.grid.x) * c.grid.y * c.grid.z;
  validate(c, threads, blocks);
  cfg = c, kernel_thunk = thunk, call_frame = ctx;
  const size_t concurrent = c.cooperative ? blocks : static_cast<size_t>(c.cluster);
  reserve(concurrent, threads);
  error.clear();
  idle_yields = 0, idle_reads = 0, grid_epoch = 0;
  random_state = options.order >= 2 ? static_cast<uint64_t>(options.order) * 0x9e3779b97f4a7c15ull | 1 : 1;
  grid_barrier = {};
  layout = {{}, (kReserved + c.smem + 127) / 128 * 128 + 128, 0};
  checker_new_launch();
  pool.resize(concurrent);
  live.clear();
  for (Block& b : pool) live.push_back(&b);
  for (size_t i = 0; i < blocks && error.empty(); ++i) {
    const size_t k = options.order == 1 ? blocks - 1 - i : i, slot = k % concurrent;
    const uint3 id = {static_cast<unsigned>(k % c.grid.x), static_cast<unsigned>(k / c.grid.x % c.grid.y),
                      static_cast<unsigned>(k / c.grid.x / c.grid.y)};
    if (i % concurrent == 0) cluster_start(static_cast<int>(concurrent * threads));
    start_block(pool[slot], id, static_cast<int>(k), slot, arenas[slot]);
    if ((i + 1) % concurrent == 0) run_all();
  }
  if (!error.empty()) throw std::runtime_error(error);
}

int max_resident_blocks() { return options.max_resident_blocks; }

void made_progress() { idle_yields = 0, idle_reads = 0; }

void yield() {
  if (!cur) return;
  if (++idle_yields > options.max_idle_yields)
    fail("livelock: %llu turns of a spin loop and no thread got further", static_cast<unsigned long long>(idle_yields));
  if (!ready) return;
  push(self());
  switch_away();
}

void wait(const char* what, Site s) {
  Thread* t = self();
  t->state = State::waiting, t->waiting_at = what, t->site = s;
  switch_away();
}

void wake(std::vector<Thread*>& w) {
  if (options.order == 1) std::reverse(w.begin(), w.end());
  for (Thread* t : w) t->state = State::ready, push(t);
  w.clear();
  made_progress();
}

void grid_sync(Site site) {
  if (!cfg.cooperative) fail("%s: grid_sync in a launch that is not cooperative", name_site(site).c_str());
  Thread* t = self();
  Barrier& r = grid_barrier;
  if (++r.arrived < static_cast<int>(live.size()) * t->blk->threads) {
    r.waiters.push_back(t);
    wait("grid_sync", site);
    return;
  }
  r.arrived = 0;
  ++grid_epoch;
  for (Block* b : live) join_block(*b);
  wake(r.waiters);
}

}  // namespace emu
