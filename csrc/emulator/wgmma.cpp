// wgmma and setmaxnreg.  Products are computed as late as allowed, when their group is waited for; until then the
// accumulators hold a signalling NaN, which arithmetic would quieten.
#include <algorithm>

#include "checker.h"
#include "hopper.h"
#include "runtime.h"
#include "swizzle.h"

namespace emu {

namespace {

constexpr uint32_t kBusy = 0x7fa5a5a5;

// Shared address of element (row, column) of an operand; rows along M or N, columns along K.
uint32_t element_address(uint64_t desc, bool mn_major, int r, int c) {
  const uint32_t start = static_cast<uint32_t>(desc & 0x3fff) << 4;
  const uint32_t lbo = static_cast<uint32_t>(desc >> 16 & 0x3fff) << 4, sbo = static_cast<uint32_t>(desc >> 32 & 0x3fff)
                                                                              << 4;
  const int mode = static_cast<int>(desc >> 62);
  const int w = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;  // bytes of a swizzled row
  auto u = [](int x) { return static_cast<uint32_t>(x); };
  uint32_t a;
  if (mn_major)
    a = u(c % 8 * w + r % (w / 2) * 2) + u(r / (w / 2)) * (mode ? lbo : sbo) + u(c / 8) * (mode ? sbo : lbo);
  else if (mode)
    a = u(r / 8) * sbo + u(r % 8 * w + c * 2);
  else
    a = u(r / 8) * sbo + u(r % 8 * 16 + c % 8 * 2) + u(c / 8) * lbo;
  return swizzle(start + a, mode);
}

void read_matrix(std::vector<float>& out, uint64_t desc, bool mn_major, int row0, int rows, bool bf16) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 16; ++c) {
      uint16_t u;
      memcpy(&u, smem_ptr(element_address(desc, mn_major, row0 + r, c), 2), 2);
      out[static_cast<size_t>(r * 16 + c)] = half_bits(u, bf16);
    }
}

// One warp's 16 rows of the product that is first in its lanes' queues.
void compute(int warp, const Wgmma& o, void** lanes) {
  static std::vector<float> A, B;
  A.resize(16 * 16), B.resize(static_cast<size_t>(16 * o.n));
  read_matrix(B, o.b_desc, o.b_mn, 0, o.n, o.bf16);
  if (!o.a_regs) read_matrix(A, o.a_desc, o.a_mn, warp % 4 * 16, 16, o.bf16);
  for (int l = 0; l < 32 && o.a_regs; ++l) {  // registers 0, 1: rows g, g + 8 of columns 0-7; 2, 3: of columns 8-15
    const Wgmma& q = static_cast<Thread*>(lanes[l])->wgmma.issued.front();
    if (memcmp(q.a_regs, q.a_value, 16)) fail("%s: A registers changed before wgmma_wait", name_site(q.site).c_str());
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        A[static_cast<size_t>(((l >> 2) + (i & 1) * 8) * 16 + 2 * (l & 3) + e + (i >> 1) * 8)] =
            half_bits(static_cast<uint16_t>(q.a_value[i] >> 16 * e), o.bf16);
  }
  for (int l = 0; l < 32; ++l) {
    const Wgmma& q = static_cast<Thread*>(lanes[l])->wgmma.issued.front();
    for (int i = 0; i < o.n / 2; ++i) {
      const int row = (l >> 2) + (i >> 1 & 1) * 8, col = i / 4 * 8 + 2 * (l & 3) + (i & 1);
      if (!q.chained && memcmp(q.d + i, &kBusy, 4))
        fail("%s: accumulator touched before wgmma_wait", name_site(q.site).c_str());
      const float before = q.chained ? q.d[i] : q.old[static_cast<size_t>(i)];
      q.d[i] = tensor_core_sum(before, &A[static_cast<size_t>(row * 16)], &B[static_cast<size_t>(col * 16)], 16);
    }
  }
}

// All 64 rows of A are charged to every warp: that a warp reads only its 16 is not promised anywhere.
void check_reads(const Block& b, const Wgmma& o) {
  for (int pass = o.a_regs != nullptr; pass < 2; ++pass) {
    const bool mn = pass ? o.b_mn : o.a_mn;
    const uint64_t desc = pass ? o.b_desc : o.a_desc;
    const int rows = pass ? o.n : 64;
    for (int i = 0; i < rows * 2; ++i) {  // 16-byte units
      const uint32_t a = mn ? element_address(desc, true, i % (rows / 8) * 8, i / (rows / 8))
                            : element_address(desc, false, i / 2, i % 2 * 8);
      smem_ptr(a, 16);
      async_read(0, b.arena + a, 16, o.site);
    }
  }
}

uint64_t hash(const void* p, size_t n) {
  uint64_t h = 1469598103934665603ull;
  for (size_t i = 0; i + 4 <= n; i += 4) {
    uint32_t u;
    memcpy(&u, static_cast<const char*>(p) + i, 4);
    h = (h ^ u) * 1099511628211ull;
  }
  return h;
}

// wgmma_fence must come between other instructions' use of these registers and the wgmma's.
void check_fenced(Thread* t, const void* p, size_t bytes, Site s) {
  if (!t->wgmma.fenced) fail("%s: no wgmma_fence before the first wgmma", name_site(s).c_str());
  for (const RegisterUse& r : t->wgmma.uses)
    if (r.p == p) {
      if (r.hash != hash(p, bytes)) fail("%s: registers written since the last wgmma_fence", name_site(s).c_str());
      return;
    }
  t->wgmma.uses.push_back({p, bytes, hash(p, bytes)});
}

void check_descriptor(uint64_t desc, char which, Site s) {
  if (desc >> 62 == 1 && (desc & 0x38))
    fail("%s: operand %c does not start in the first row of its swizzle pattern", name_site(s).c_str(), which);
}

void check_same_in_warpgroup(Thread* t, const WgmmaArgs& w, Site s) {
  auto& seen = t->blk->hopper.seen[t->warp / 4];
  const bool regs = w.a_regs != nullptr;
  if (t->wgmma.count == seen.size()) seen.push_back({w.a_desc, w.b_desc, w.n, regs, s});
  const WgmmaSeen& first = seen[t->wgmma.count++];
  if (first.a_desc != w.a_desc || first.b_desc != w.b_desc || first.n != w.n || first.from_registers != regs ||
      first.site.line != s.line)
    fail("%s: wgmma differs from the one another warp of the warpgroup issued at %s", name_site(s).c_str(),
         name_site(first.site).c_str());
}

}  // namespace

void wgmma(float* d, const WgmmaArgs& w, Site s) {
  Thread* t = self();
  WgmmaState& state = t->wgmma;
  if (w.n < 8 || w.n > 256 || w.n % 8) fail("%s: wgmma with N = %d", name_site(s).c_str(), w.n);
  if (!w.a_regs) check_descriptor(w.a_desc, 'A', s);
  check_descriptor(w.b_desc, 'B', s);
  Wgmma o{d, w.a_regs, {}, w.a_desc, w.b_desc, w.n, state.group, w.scale_d, false, w.b_mn, w.bf16, false, {}, s};
  for (const Wgmma& earlier : state.issued) o.chained |= earlier.d == d;
  if (!o.chained) check_fenced(t, d, static_cast<size_t>(w.n) * 2, s);
  if (w.a_regs) {
    check_fenced(t, w.a_regs, 16, s);
    memcpy(o.a_value, w.a_regs, 16);
  }
  if (!w.scale_d && o.chained) fail("%s: wgmma restarts an accumulator that is still in flight", name_site(s).c_str());
  if (!w.scale_d)
    o.old.assign(static_cast<size_t>(w.n / 2), 0.f);
  else if (!o.chained)
    o.old.assign(d, d + w.n / 2);
  for (int i = 0; i < w.n / 2 && !o.chained; ++i) memcpy(d + i, &kBusy, 4);
  state.issued.push_back(o);
  check_same_in_warpgroup(t, w, s);
  auto read = [](void** lanes, uint32_t) {
    const Thread* first = static_cast<Thread*>(lanes[0]);
    check_reads(*first->blk, first->wgmma.issued.back());
  };
  warp_collective(Op::wgmma, kFull, t, read, s);
}

void wgmma_fence() {
  Thread* t = self();
  t->wgmma.fenced = true;
  for (RegisterUse& r : t->wgmma.uses) r.hash = hash(r.p, r.bytes);
}

void wgmma_commit() { ++self()->wgmma.group; }

void wgmma_wait(int n, Site s) {
  Thread* t = self();
  t->wgmma.wait_upto = t->wgmma.group - n;
  auto finish = [](void** lanes, uint32_t) {
    Thread* first = static_cast<Thread*>(lanes[0]);
    auto& queue = first->wgmma.issued;
    while (!queue.empty() && queue.front().group < first->wgmma.wait_upto) {
      check_reads(*first->blk, queue.front());
      compute(first->warp, queue.front(), lanes);
      for (int l = 0; l < 32; ++l) {
        WgmmaState& state = static_cast<Thread*>(lanes[l])->wgmma;
        for (RegisterUse& r : state.uses)
          if (r.p == state.issued.front().d) r.hash = hash(r.p, r.bytes);
        state.issued.erase(state.issued.begin());
      }
    }
  };
  warp_collective(Op::wgmma, kFull, t, finish, s);
}

// Registers move between the block's warps through a pool; a launch is taken to own 65536 / threads (of 8) a thread.
void setmaxnreg(int n, bool inc, Site s) {
  struct Lane {
    Thread* t;
    int n;
    bool inc;
  } lane{self(), n, inc};
  if (n < 24 || n > 256 || n % 8) fail("%s: setmaxnreg %d", name_site(s).c_str(), n);
  Block& b = *lane.t->blk;
  Warp& w = b.warps[static_cast<size_t>(lane.t->warp)];
  if (inc ? n < w.registers : n > w.registers)
    fail("%s: setmaxnreg.%s to %d, the warp has %d", name_site(s).c_str(), inc ? "inc" : "dec", n, w.registers);
  auto meet = [](void** lanes, uint32_t) {
    const Lane& q = *static_cast<Lane*>(lanes[0]);
    if (q.inc) return;
    Block& block = *q.t->blk;
    Warp& warp = block.warps[static_cast<size_t>(q.t->warp)];
    block.hopper.register_pool += (warp.registers - q.n) * 32, warp.registers = q.n;
    wake(block.hopper.register_waiters);
  };
  warp_collective(Op::wgmma, kFull, &lane, meet, s);
  if (!inc) return;
  while (w.registers < n && b.hopper.register_pool < (n - w.registers) * 32) {
    b.hopper.register_waiters.push_back(lane.t);
    wait("setmaxnreg.inc", s);
  }
  if (w.registers < n) b.hopper.register_pool -= (n - w.registers) * 32, w.registers = n;
}

}  // namespace emu
