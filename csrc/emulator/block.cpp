// A block's shared memory, barriers and cp.async copies.
#include <algorithm>

#include "checker.h"
#include "runtime.h"

namespace emu {

void* dyn_shared() { return self()->blk->arena + kReserved; }

void* static_shared(const void* key, size_t size, size_t align, Site s) {
  Block& b = *self()->blk;
  for (const SharedVar& v : layout.vars)
    if (v.key == key) return b.arena + v.offset;
  const size_t offset = (layout.top + align - 1) / align * align;
  layout.static_bytes += size;
  if (layout.static_bytes > kStaticLimit) fail("over 48 KiB of static shared memory at %s", name_site(s).c_str());
  // the dynamic part begins at a multiple of 1024, as PK_DYN_SHARED asks
  const size_t before = cfg.smem ? (layout.static_bytes + 1023) / 1024 * 1024 : layout.static_bytes;
  if (before + cfg.smem > kSharedLimit || offset + size + 128 > kArena)
    fail("static and dynamic shared memory exceed 227 KiB at %s", name_site(s).c_str());
  layout.vars.push_back({key, offset, size});
  layout.top = offset + size + kGap;  // overruns are seen, not absorbed by the next variable
  for (Block* each : live) memset(each->arena + offset, 0xff, size);
  return b.arena + offset;
}

uint32_t smem_addr(const void* p) {
  const ptrdiff_t d = static_cast<const uint8_t*>(p) - self()->blk->arena;
  if (d < 0 || static_cast<size_t>(d) > kArena) fail("smem_addr of a pointer that is not this block's shared memory");
  return static_cast<uint32_t>(d);
}

bool in_shared(size_t offset, size_t bytes) {
  if (offset >= kReserved && offset + bytes <= kReserved + cfg.smem) return true;
  for (const SharedVar& v : layout.vars)
    if (offset >= v.offset && offset + bytes <= v.offset + v.size) return true;
  return false;
}

void* smem_ptr(uint32_t addr, size_t bytes) {
  Block& b = *self()->blk;
  if (!in_shared(addr, bytes)) fail("shared memory address 0x%x (+%zu) is out of bounds", addr, bytes);
  return b.arena + addr;
}

int block_sync(BlockOp op, int predicate, Site site) {
  Thread* t = self();
  Block& b = *t->blk;
  Barrier& r = b.barriers[0];
  if (r.arrived == 0) {
    r.site = site;
    r.count = r.any = 0, r.all = 1;
  } else if (r.site.line != site.line || strcmp(r.site.file, site.file) != 0) {
    fail("divergent __syncthreads: this thread is at %s while %d others are at %s", name_site(site).c_str(), r.arrived,
         name_site(r.site).c_str());
  }
  const int p = predicate != 0;
  r.count += p, r.all &= p, r.any |= p;
  if (++r.arrived == b.threads) {
    r.arrived = 0;
    r.result[0] = r.count, r.result[1] = r.all, r.result[2] = r.any;
    join_block(b);
    wake(r.waiters);
  } else {
    r.waiters.push_back(t);
    wait("__syncthreads", site);
  }
  return op == BlockOp::sync ? 0 : r.result[static_cast<int>(op) - 1];
}

void named_barrier(int id, int n, bool block, Site site) {
  Thread* t = self();
  Block& b = *t->blk;
  if (id < 1 || id > 15 || n % 32 || n < 32 || n > b.threads)
    fail("%s: bad named barrier (id %d, %d threads)", name_site(site).c_str(), id, n);
  Barrier& r = b.barriers[id];
  if (r.arrived == 0)
    r.need = n, r.site = site;
  else if (r.need != n)
    fail("%s: named barrier %d met with %d and %d threads", name_site(site).c_str(), id, r.need, n);
  // who comes to it must come after the whole last round, or could have been counted in that one
  if (!covers(*t, r.last))
    fail("%s: named barrier %d is used again by a thread its last round is not ordered before", name_site(site).c_str(),
         id);
  release(*t, r.gathered);
  if (block) r.members.push_back(t);
  if (++r.arrived == n) {
    r.arrived = 0;
    r.last = handed_on(r.gathered);
    for (Thread* m : r.members) acquire(*m, r.last);
    r.gathered = {}, r.members.clear();
    wake(r.waiters);
  } else if (block) {
    r.waiters.push_back(t);
    wait("a named barrier", site);
  }
}

// cp.async: the data lands when the issuing thread waits for its group, the latest moment; until then the target is
// poison that nobody may touch.
void cp_async(uint32_t dst, const void* src, int bytes, bool pred, Site site) {
  Thread* t = self();
  const size_t n = static_cast<size_t>(bytes);
  if (dst % n || (pred && reinterpret_cast<uintptr_t>(src) % n))
    fail("%s: cp.async operand is not %d-byte aligned", name_site(site).c_str(), bytes);
  void* d = smem_ptr(dst, n);
  checked(d, n, true, site);
  mark_in_flight(d, n, true);
  memset(d, 0xff, n);
  t->copies.push_back({d, pred ? src : nullptr, bytes, t->copy_group, site});
}

void cp_async_commit() { ++self()->copy_group; }

void cp_async_wait(int n) {
  Thread* t = self();
  const int complete = t->copy_group - n;  // groups below it
  size_t kept = 0;
  for (const CpAsync& c : t->copies) {
    if (c.group >= complete) {
      t->copies[kept++] = c;
      continue;
    }
    const size_t bytes = static_cast<size_t>(c.bytes);
    mark_in_flight(c.dst, bytes, false);
    if (c.src) {
      checked(c.src, bytes, false, c.site);
      memcpy(c.dst, c.src, bytes);
    } else {
      memset(c.dst, 0, bytes);
    }
    checked(c.dst, bytes, true, c.site);
  }
  t->copies.resize(kept);
}

void check_no_async_left(const Thread& t) {
  if (!t.copies.empty())
    fail("exits with cp.async never waited for (issued at %s)", name_site(t.copies[0].site).c_str());
  if (!t.wgmma.issued.empty())
    fail("exits with a wgmma never waited for (issued at %s)", name_site(t.wgmma.issued[0].site).c_str());
  if (!t.stores.issued.empty())
    fail("exits with a TMA store never waited for (issued at %s)", name_site(t.stores.issued[0].site).c_str());
  if (t.blk->alive == 1 && !t.blk->hopper.arriving.empty())
    fail("block ends with a TMA copy or st.async in flight (issued at %s)",
         name_site(t.blk->hopper.arriving[0].site).c_str());
  if (t.blk->alive == 1) check_visits(*t.blk);
}

}  // namespace emu
