// Warp collectives: lanes meet in a slot, the last to come computes every lane's result.
#include <algorithm>

#include "checker.h"
#include "runtime.h"

namespace emu {

namespace {

size_t index_of(const Block& b, const Warp& w) { return static_cast<size_t>(&w - b.warps.data()); }

// A lane other than `address_lane` that ldmatrix gives elements of row i.
int receiver(int i, int address_lane, bool trans) {
  const int lane = trans ? i / 2 : 4 * i;
  return lane == address_lane ? lane + (trans ? 4 : 1) : lane;
}

bool needs_all_lanes(Op op) { return op == Op::mma || op == Op::ldmatrix || op == Op::wgmma; }

}  // namespace

void finish_slot(Block& b, Warp& w, size_t i) {
  if (w.slots[i].arrived != w.slots[i].effective || !w.slots[i].effective) return;
  Slot s = w.slots[i];
  w.slots.erase(w.slots.begin() + static_cast<long>(i));
  if (needs_all_lanes(s.op) && s.arrived != kFull)
    fail("%s: this operation needs all 32 lanes, got %08x", name_site(s.site).c_str(), s.arrived);
  const size_t first = index_of(b, w) * 32;
  if (s.fn) s.fn(s.payload, s.arrived);
  if (s.op == Op::syncwarp) join_warp(b, static_cast<int>(first), s.arrived);  // the others order no memory
  static std::vector<Thread*> released;
  for (size_t l = 0; l < 32; ++l)
    if (s.arrived >> l & 1 && &b.thread[first + l] != cur) released.push_back(&b.thread[first + l]);
  wake(released);
}

void warp_collective(Op op, uint32_t mask, void* payload, WarpFn fn, Site site) {
  Thread* t = self();
  Warp& w = t->blk->warps[static_cast<size_t>(t->warp)];
  if (!(mask >> t->lane & 1)) fail("%s: lane %d is not in its own mask %08x", name_site(site).c_str(), t->lane, mask);
  size_t i = 0;
  for (; i < w.slots.size(); ++i) {
    const Slot& s = w.slots[i];
    if (s.mask == mask) {
      if (s.op != op || s.site.line != site.line || strcmp(s.site.file, site.file) != 0)
        fail("divergent warp: this lane is at %s while lanes %08x are at %s", name_site(site).c_str(), s.arrived,
             name_site(s.site).c_str());
      break;
    }
    if (s.mask & mask)
      fail("%s: warp mask %08x overlaps mask %08x waiting at %s", name_site(site).c_str(), mask, s.mask,
           name_site(s.site).c_str());
  }
  if (i == w.slots.size()) w.slots.push_back({mask, mask & w.alive, 0, op, site, fn, {}});
  Slot& s = w.slots[i];
  s.payload[t->lane] = payload;
  s.arrived |= 1u << t->lane;
  if (s.arrived == s.effective)
    finish_slot(*t->blk, w, i);
  else
    wait("a warp collective", site);
}

void warp_sync(uint32_t mask, Site s) { warp_collective(Op::syncwarp, mask, nullptr, nullptr, s); }

uint64_t shfl(Shfl mode, uint32_t mask, uint64_t v, int arg, int width, Site site) {
  struct Lane {
    uint64_t in, out;
    Shfl mode;
    int arg, width;
  } lane{v, ~0ull, mode, arg, width};
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: shuffle width %d", name_site(site).c_str(), width);
  auto exchange = [](void** payload, uint32_t m) {
    for (int l = 0; l < 32; ++l) {
      if (!(m >> l & 1)) continue;
      Lane& q = *static_cast<Lane*>(payload[l]);
      const int base = l & ~(q.width - 1), in = l - base;
      int src = 0;
      switch (q.mode) {
        case Shfl::idx:
          src = q.arg & (q.width - 1);
          break;
        case Shfl::up:
          src = in - q.arg;
          break;
        case Shfl::down:
          src = in + q.arg;
          break;
        case Shfl::bfly:
          src = in ^ q.arg;
          break;
      }
      if (src < 0 || src >= q.width) src = in;
      // a lane that takes no part has no defined value: the reader's stays poisoned
      if (m >> (base + src) & 1) q.out = static_cast<Lane*>(payload[base + src])->in;
    }
  };
  warp_collective(Op::shfl, mask, &lane, exchange, site);
  return lane.out;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  struct Lane {
    bool in;
    uint32_t out;
  } lane{predicate, 0};
  auto vote = [](void** payload, uint32_t m) {
    uint32_t r = 0;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) r |= static_cast<uint32_t>(static_cast<Lane*>(payload[l])->in) << l;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) static_cast<Lane*>(payload[l])->out = r;
  };
  warp_collective(Op::vote, mask, &lane, vote, site);
  return lane.out;
}

uint32_t match_any(uint32_t mask, uint64_t v, Site site) {
  struct Lane {
    uint64_t in;
    uint32_t out;
  } lane{v, 0};
  auto match = [](void** payload, uint32_t m) {
    for (int l = 0; l < 32; ++l)
      for (int k = 0; k < 32; ++k)
        if (m >> l & m >> k & 1 && static_cast<Lane*>(payload[l])->in == static_cast<Lane*>(payload[k])->in)
          static_cast<Lane*>(payload[l])->out |= 1u << k;
  };
  warp_collective(Op::vote, mask, &lane, match, site);
  return lane.out;
}

void ldmatrix(uint32_t* r, uint32_t addr, int n, bool trans, Site site) {
  struct Lane {
    uint32_t* r;
    uint32_t addr;
    int n;
    bool trans;
    Site site;
  } lane{r, addr, n, trans, site};
  auto load = [](void** payload, uint32_t) {
    const Lane& f = *static_cast<Lane*>(payload[0]);
    for (int j = 0; j < f.n; ++j) {
      uint16_t m[8][8];
      uint32_t worst = 1, per_chunk[8] = {};
      for (int i = 0; i < 8; ++i) {
        const uint32_t a = static_cast<Lane*>(payload[8 * j + i])->addr;
        if (a & 15) fail("%s: ldmatrix row address 0x%x is not 16-byte aligned", name_site(f.site).c_str(), a);
        const void* q = smem_ptr(a, 16);
        // Read for the lane that gives the address and for those that get the data: charging the first alone would pass
        // a row each lane wrote itself.
        checked_as(8 * j + i, q, 16, false, f.site);
        checked_as(receiver(i, 8 * j + i, f.trans), q, 16, false, f.site);
        memcpy(m[i], q, 16);
        worst = std::max(worst, ++per_chunk[a >> 4 & 7]);
      }
      ++stats.ldmatrix_phases;
      stats.ldmatrix_conflicts += worst - 1;
      for (int l = 0; l < 32; ++l) {
        const int g = l >> 2, c = 2 * (l & 3);
        const uint32_t low = f.trans ? m[c][g] : m[g][c], high = f.trans ? m[c + 1][g] : m[g][c + 1];
        static_cast<Lane*>(payload[l])->r[j] = low | high << 16;
      }
    }
  };
  warp_collective(Op::ldmatrix, kFull, &lane, load, site);
}

float half_bits(uint16_t u, bool bf16) {
  if (bf16) return unbits<float>(static_cast<uint64_t>(u) << 16);
#if defined(__aarch64__)
  return static_cast<float>(unbits<__fp16>(u));
#else
  return static_cast<float>(unbits<_Float16>(u));
#endif
}

void mma16816(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, Site site) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    bool bf16;
  } lane{d, a, {b0, b1}, bf16};
  auto product = [](void** payload, uint32_t) {
    float A[16][16], B[8][16];  // B by columns
    for (int l = 0; l < 32; ++l) {
      const Lane& q = *static_cast<Lane*>(payload[l]);
      const int g = l >> 2, c = 2 * (l & 3);
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
          A[g + (i & 1) * 8][c + e + (i >> 1) * 8] = half_bits(static_cast<uint16_t>(q.a[i] >> 16 * e), q.bf16);
      for (int i = 0; i < 2; ++i)
        for (int e = 0; e < 2; ++e) B[g][c + e + i * 8] = half_bits(static_cast<uint16_t>(q.b[i] >> 16 * e), q.bf16);
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) {
        float& d = static_cast<Lane*>(payload[l])->d[e];
        d = tensor_core_sum(d, A[(l >> 2) + (e >> 1) * 8], B[2 * (l & 3) + (e & 1)], 16);
      }
  };
  warp_collective(Op::mma, kFull, &lane, product, site);
}

void mma1688(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } lane{d, a, {b0, b1}};
  auto product = [](void** payload, uint32_t) {
    const auto tf32 = [](uint32_t word) { return unbits<float>(word & 0xffffe000u); };
    float A[16][8], B[8][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& q = *static_cast<Lane*>(payload[l]);
      const int g = l >> 2, c = l & 3;
      for (int i = 0; i < 4; ++i) A[g + (i & 1) * 8][c + (i >> 1) * 4] = tf32(q.a[i]);
      for (int i = 0; i < 2; ++i) B[g][c + i * 4] = tf32(q.b[i]);
    }
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 4; ++e) {
        float& d = static_cast<Lane*>(payload[l])->d[e];
        d = tensor_core_sum(d, A[(l >> 2) + (e >> 1) * 8], B[2 * (l & 3) + (e & 1)], 8);
      }
  };
  warp_collective(Op::mma, kFull, &lane, product, site);
}

}  // namespace emu
