// Shadow memory and the verdict on each access.  Races are found with vector clocks, so that one is reported even where
// the fibers' order happened to be the good one.
#include "checker.h"

#include <algorithm>
#include <cstdlib>
#include <unordered_map>

namespace emu {

namespace {

enum : uint8_t {
  kWritten = 1,
  kAtomicWrite = 2,
  kRead0 = 4,
  kRead1 = 8,
  kAtomicRead0 = 16,
  kAtomicRead1 = 32,
  kAsync = 64,     // last written by the async proxy
  kInFlight = 128  // target of an async copy nobody has waited for
};

struct Event {
  uint32_t thread;  // block index * threads in a block + linear index
  uint32_t tick, origin;
};

// What happened to a granule of 4, 2 or 1 bytes: its last writer and two of its readers (with two kept, at least one is
// another thread than the next writer).
struct Cell {
  Event write, read[2];
  uint16_t write_epoch, read_epoch[2];
  uint8_t flags;
};

constexpr size_t kPage = 4096;
struct Page {
  Cell* cells = nullptr;
  uint8_t shift = 2;  // log2 of the granule: refined when a smaller access comes
};

std::unordered_map<uintptr_t, Page> pages;
std::vector<Cell*> spare[3];
struct Recent {
  uintptr_t key;
  Page* page;
};
Recent recent[64];  // an unordered_map's elements stay where they are

Cell* new_cells(uint8_t shift) {
  const size_t bytes = (kPage >> shift) * sizeof(Cell);
  Cell* c;
  if (spare[shift].empty()) {
    c = static_cast<Cell*>(malloc(bytes));
  } else {
    c = spare[shift].back();
    spare[shift].pop_back();
  }
  memset(static_cast<void*>(c), 0, bytes);
  return c;
}

Page& page(uintptr_t a) {
  const uintptr_t key = a / kPage;
  Recent& r = recent[key % 64];
  if (r.key != key) {
    Page& p = pages[key];
    if (!p.cells) p.cells = new_cells(p.shift);
    r = {key, &p};
  }
  return *r.page;
}

void refine(Page& p, uint8_t shift) {
  Cell* fine = new_cells(shift);
  const size_t n = kPage >> shift;
  for (size_t i = 0; i < n; ++i) fine[i] = p.cells[i >> (p.shift - shift)];
  spare[p.shift].push_back(p.cells);
  p.cells = fine, p.shift = shift;
}

// f(cell, address) for each granule of [a, a + n)
template <class F>
void for_cells(uintptr_t a, size_t n, F f) {
  while (n) {
    Page& p = page(a);
    const size_t here = std::min(n, kPage - a % kPage);
    const uintptr_t odd = a | here;
    if (odd & ((1u << p.shift) - 1)) refine(p, odd & 1 ? 0 : 1);
    const size_t first = a % kPage >> p.shift, count = here >> p.shift;
    for (size_t i = 0; i < count; ++i) f(p.cells[first + i], a + (i << p.shift));
    a += here, n -= here;
  }
}

std::string where_shared(size_t offset) {
  char s[96];
  for (const SharedVar& v : layout.vars)
    if (offset >= v.offset && offset < v.offset + v.size + kGap) {
      snprintf(s, sizeof s, "static shared memory + %zu (of %zu bytes)", offset - v.offset, v.size);
      return s;
    }
  if (offset >= kReserved)
    snprintf(s, sizeof s, "dynamic shared memory + %zu (of %zu bytes)", offset - kReserved, cfg.smem);
  else
    snprintf(s, sizeof s, "shared memory address 0x%zx", offset);
  return s;
}

// The block in whose shared memory `a` is: the thread's own, or another one of its cluster; or null.
Block* home_of(const Thread& t, uintptr_t a) {
  const auto here = [a](const Block* b) { return a - reinterpret_cast<uintptr_t>(b->arena) < kArena; };
  if (here(t.blk)) return t.blk;
  if (cfg.cluster == 1) return nullptr;
  const auto it = std::find_if(live.begin(), live.end(), here);
  return it == live.end() ? nullptr : *it;
}

std::string where(const Thread& t, uintptr_t a) {
  const Block* home = home_of(t, a);
  if (!home) return name_global(a);
  const std::string s = where_shared(a - reinterpret_cast<uintptr_t>(home->arena));
  return home == t.blk ? s : s + " of rank " + std::to_string(home->rank);
}

const char* verb(Access a) {
  switch (a) {
    case Access::read:
      return "read";
    case Access::write:
      return "write";
    case Access::atomic_read:
      return "atomic read";
    case Access::atomic_write:
      return "atomic";
  }
  return "access";
}

bool ordered(const Thread& t, const Event& past, uint16_t epoch) {
  const uint32_t n = static_cast<uint32_t>(t.blk->threads);
  const int block = static_cast<int>(past.thread / n);
  if (block != t.blk->index && epoch != static_cast<uint16_t>(grid_epoch)) return true;
  return has_seen(t, block, static_cast<int>(past.thread % n), past.tick);
}

[[noreturn]] void race(const Thread& t, uintptr_t a, Access mine, uint32_t origin, const char* theirs,
                       const Event& past) {
  const uint32_t n = static_cast<uint32_t>(t.blk->threads);
  const uint32_t block = past.thread / n, lin = past.thread % n;
  bool unfenced = false;
  for (const Thread& other : t.blk->thread)
    unfenced |= other.fences.would_have_seen(static_cast<int>(block), static_cast<int>(lin), past.tick);
  fail("data race on %s: %s by thread %d of block %d at %s, %s by thread %u of block %u at %s, %s", where(t, a).c_str(),
       verb(mine), t.lin, t.blk->index, name_origin(origin).c_str(), theirs, lin, block,
       name_origin(past.origin).c_str(),
       unfenced ? "an atomic handed it over but no __threadfence follows that atomic" : "no barrier between");
}

void check_cell(Thread& t, Cell& c, uintptr_t a, Access kind, const Event& now, bool shared) {
  const bool write = writes(kind), atomic = kind >= Access::atomic_read;
  if (c.flags & kInFlight)
    fail("%s of %s at %s while the async copy issued at %s is in flight", verb(kind), where(t, a).c_str(),
         name_origin(now.origin).c_str(), name_origin(c.write.origin).c_str());
  if (shared && !write && !(c.flags & kWritten) && options.uninitialised)
    fail("read of uninitialised %s at %s", where(t, a).c_str(), name_origin(now.origin).c_str());
  if (!options.races) {
    if (write) c.flags |= kWritten;
    return;
  }
  if (!write && (c.flags & kRead0) && c.read[0].thread == now.thread && c.read[0].tick == now.tick) return;
  if ((c.flags & kWritten) && c.write.thread != now.thread && !(atomic && (c.flags & kAtomicWrite)) &&
      !ordered(t, c.write, c.write_epoch))
    race(t, a, kind, now.origin, c.flags & kAtomicWrite ? "atomic" : "write", c.write);
  const uint16_t epoch = static_cast<uint16_t>(grid_epoch);
  if (write) {
    for (int r = 0; r < 2; ++r)
      if ((c.flags & (kRead0 << r)) && c.read[r].thread != now.thread && !(atomic && (c.flags & (kAtomicRead0 << r))) &&
          !ordered(t, c.read[r], c.read_epoch[r]))
        race(t, a, kind, now.origin, c.flags & (kAtomicRead0 << r) ? "atomic read" : "read", c.read[r]);
    c.write = now, c.write_epoch = epoch;
    c.flags = static_cast<uint8_t>(kWritten | (atomic ? kAtomicWrite : 0));
    return;
  }
  int r = 0;
  if ((c.flags & kRead0) && c.read[0].thread != now.thread)
    r = (c.flags & kRead1) && c.read[1].thread != now.thread && ordered(t, c.read[0], c.read_epoch[0]) ? 0 : 1;
  c.read[r] = now, c.read_epoch[r] = epoch;
  c.flags = static_cast<uint8_t>((c.flags & ~(kAtomicRead0 << r)) | kRead0 << r | (atomic ? kAtomicRead0 << r : 0));
}

}  // namespace

void checker_new_launch() {
  for (auto& [key, p] : pages) spare[p.shift].push_back(p.cells);
  pages.clear();
  for (Recent& r : recent) r = {~uintptr_t{0}, nullptr};
  forget_handoffs();
}

void checker_new_block(Block& b) {
  for (size_t o = 0; o < kArena; o += kPage) {
    const auto it = pages.find((reinterpret_cast<uintptr_t>(b.arena) + o) / kPage);
    if (it == pages.end()) continue;
    const Page& p = it->second;
    memset(static_cast<void*>(p.cells), 0, (kPage >> p.shift) * sizeof(Cell));
  }
}

void checked_access(Thread& t, uintptr_t a, size_t n, Access kind, bool aligned, uint32_t origin) {
  if (a - reinterpret_cast<uintptr_t>(t.stack) < kStack) return;     // its own locals
  if (a - reinterpret_cast<uintptr_t>(&t) < sizeof(Thread)) return;  // threadIdx, blockIdx
  Block* const home = home_of(t, a);
  const bool shared = home != nullptr;
  if (!shared && (in_module(a) || a - reinterpret_cast<uintptr_t>(call_frame) < 4096)) return;
  if (aligned && (a & (n - 1)))
    fail("misaligned %zu-byte %s of %s at %s", n, verb(kind), where(t, a).c_str(), name_origin(origin).c_str());
  if (shared ? !in_shared(a - reinterpret_cast<uintptr_t>(home->arena), n) : !in_extents(a, n))
    fail("out of bounds: %zu-byte %s of %s at %s", n, verb(kind), where(t, a).c_str(), name_origin(origin).c_str());
  if (shared && home != t.blk) visit(t, *home, origin);
  stats.checked_bytes += n;
  const Block& b = *t.blk;
  const Event now = {static_cast<uint32_t>(b.index) * static_cast<uint32_t>(b.threads) + static_cast<uint32_t>(t.lin),
                     t.clock.tick, origin};
  for_cells(a, n, [&](Cell& c, uintptr_t at) { check_cell(t, c, at, kind, now, shared); });
}

void checked(const void* p, size_t n, bool write, Site s) {
  checked_access(*self(), reinterpret_cast<uintptr_t>(p), n, write ? Access::write : Access::read, false, origin_of(s));
}

void checked_as(int lane, const void* p, size_t n, bool write, Site s) {
  Thread& t = self()->blk->thread[static_cast<size_t>(self()->warp * 32 + lane)];
  checked_access(t, reinterpret_cast<uintptr_t>(p), n, write ? Access::write : Access::read, false, origin_of(s));
}

void mark_in_flight(const void* p, size_t n, bool on) {
  for_cells(reinterpret_cast<uintptr_t>(p), n, [on](Cell& c, uintptr_t) {
    c.flags = static_cast<uint8_t>(on ? c.flags | kInFlight : c.flags & ~kInFlight);
  });
}

void async_write(Thread& t, void* p, size_t n, Site s) {
  checked_access(t, reinterpret_cast<uintptr_t>(p), n, Access::write, false, origin_of(s));
  for_cells(reinterpret_cast<uintptr_t>(p), n, [](Cell& c, uintptr_t) { c.flags |= kAsync; });
}

// The async proxy sees its own writes; a thread's own writes only after that thread's fence_proxy_async.
void async_read(int lane, const void* p, size_t n, Site s) {
  checked_as(lane, p, n, false, s);
  const uint32_t threads = static_cast<uint32_t>(self()->blk->threads);
  for_cells(reinterpret_cast<uintptr_t>(p), n, [&](Cell& c, uintptr_t a) {
    if ((c.flags & kAsync) || !(c.flags & kWritten)) return;
    const Block& writer = *live[c.write.thread / threads % live.size()];
    if (writer.hopper.proxy_tick[c.write.thread % threads] > c.write.tick) return;
    fail("no fence_proxy_async between the write of %s at %s and its use at %s", where(*self(), a).c_str(),
         name_origin(c.write.origin).c_str(), name_site(s).c_str());
  });
}

void proxy_fence(Thread& t) { t.blk->hopper.proxy_tick[static_cast<size_t>(t.lin)] = ++t.clock.tick; }

}  // namespace emu
