// mbarriers, TMA and st.async.  What is written asynchronously lands when a thread first waits on its mbarrier, and not
// before the phase needs it: the latest moment the hardware may choose.  Until then its target holds NaN and is marked
// in flight.
#include <algorithm>

#include "checker.h"
#include "hopper.h"
#include "runtime.h"
#include "swizzle.h"

namespace emu {

namespace {

Mbarrier& find(Block& b, uint32_t addr, Site s) {
  for (Mbarrier& m : b.hopper.mbarriers)
    if (m.addr == addr) return m;
  fail("%s: mbarrier at 0x%x was never initialised", name_site(s).c_str(), addr);
}

void complete_if_due(Mbarrier& m) {
  if (m.pending || m.tx) return;
  m.phase ^= 1, m.pending = m.count;
  m.near_done = handed_on(m.near);
  m.far_done = m.far.of.empty() ? nullptr : handed_on(m.far);
  std::vector<Thread*> w;
  w.swap(m.waiters);
  wake(w);
}

// Calls f(shared address, global address or null outside the tensor) for every element of the box at `at`.
template <class F>
void each_in_box(const TensorMap& t, uint32_t smem, const int* at, F f) {
  uint32_t done = 0;
  for (int w = 0; w < t.box[3]; ++w)
    for (int z = 0; z < t.box[2]; ++z)
      for (int y = 0; y < t.box[1]; ++y) {
        const int row[3] = {at[1] + y, at[2] + z, at[3] + w};
        const char* g = t.base;
        bool inside = true;
        for (int k = 0; k < 3; ++k) {
          inside = inside && row[k] >= 0 && row[k] < t.dim[k + 1];
          if (inside) g += static_cast<size_t>(row[k]) * t.stride[k + 1];
        }
        for (int x = 0; x < t.box[0]; ++x, done += static_cast<uint32_t>(t.element)) {
          const int col = at[0] + x;
          const bool ok = inside && col >= 0 && col < t.dim[0];
          f(swizzle(smem + done, 1), ok ? g + static_cast<size_t>(col) * static_cast<size_t>(t.element) : nullptr);
        }
      }
}

size_t box_bytes(const TensorMap& m) {
  return static_cast<size_t>(m.box[0]) * static_cast<size_t>(m.box[1]) * static_cast<size_t>(m.box[2]) *
         static_cast<size_t>(m.box[3]) * static_cast<size_t>(m.element);
}

void check_target(uint32_t a, Site s) {
  if (a % 1024)
    fail("%s: shared address 0x%x of a 128-byte swizzled TMA box is not 1024-byte aligned", name_site(s).c_str(), a);
}

void land(Block& b, const Arriving& o, Mbarrier& m) {
  const size_t element = static_cast<size_t>(o.map.element);
  if (!o.box) memcpy(b.arena + o.dst, o.value, static_cast<size_t>(o.bytes));
  const auto copy = [&](uint32_t d, const char* g) {
    if (g) {
      checked(g, element, false, o.site);
      memcpy(b.arena + d, g, element);
    } else {
      memset(b.arena + d, 0, element);
    }
  };
  if (o.box) each_in_box(o.map, o.dst, o.at, copy);
  mark_in_flight(b.arena + o.dst, static_cast<size_t>(o.bytes), false);
  m.tx -= o.bytes;
}

// Sends o to a block of the cluster; its mbarrier hands on what the issuing thread has seen.
void send(Block& to, const Arriving& o, bool async_proxy) {
  Thread* t = self();
  const size_t bytes = static_cast<size_t>(o.bytes);
  uint8_t* d = to.arena + o.dst;
  checked(to.arena + o.mbar, 8, false, o.site);
  Mbarrier& m = find(to, o.mbar, o.site);
  if (!m.fenced)
    fail("%s: no mbar_fence_init between the mbarrier's initialisation and its use by TMA or st.async",
         name_site(o.site).c_str());
  if (async_proxy)
    async_write(*t, d, bytes, o.site);
  else
    checked(d, bytes, true, o.site);
  mark_in_flight(d, bytes, true);
  release(*t, async_proxy || &to == t->blk ? m.near : m.far);  // of TMA every wait sees all
  memset(d, 0xff, bytes);
  to.hopper.arriving.push_back(o);
  std::vector<Thread*> w;
  w.swap(m.waiters);
  if (!w.empty()) wake(w);
}

}  // namespace

void mbar_init(uint32_t bar, int count, Site s) {
  Block& b = *self()->blk;
  if (bar % 8) fail("%s: mbarrier at 0x%x is not 8-byte aligned", name_site(s).c_str(), bar);
  checked(smem_ptr(bar, 8), 8, true, s);
  std::erase_if(b.hopper.mbarriers, [&](const Mbarrier& m) { return m.addr == bar; });
  b.hopper.mbarriers.push_back({bar, count, count, 0, 0, {}, {}, {}, {}, {}, self()->lin, false});
}

void mbar_fence_init() {
  for (Mbarrier& m : self()->blk->hopper.mbarriers)
    if (m.initialised_by == self()->lin) m.fenced = true;
}

void mbar_arrive(uint32_t bar, int tx, Site s) {
  Thread* t = self();
  const Place at = place_of(bar, 8, s);
  checked(at.pointer(), 8, false, s);  // its initialisation must be visible here
  Mbarrier& m = find(*at.block, static_cast<uint32_t>(at.offset), s);
  if (!m.pending) fail("%s: too many arrivals at the mbarrier", name_site(s).c_str());
  release(*t, at.block == t->blk ? m.near : m.far);
  m.tx += tx, --m.pending;
  complete_if_due(m);
}

void mbar_wait(uint32_t bar, int parity, bool cluster, Site s) {
  Thread* t = self();
  Block& b = *t->blk;
  checked(b.arena + bar, 8, false, s);
  while (find(b, bar, s).phase == (parity & 1)) {  // copies land one by one, no more of them than the phase needs
    auto& arriving = b.hopper.arriving;
    const auto o = std::find_if(arriving.begin(), arriving.end(), [&](const Arriving& x) { return x.mbar == bar; });
    if (o == arriving.end()) {
      find(b, bar, s).waiters.push_back(t);
      wait("mbar_wait", s);
      continue;
    }
    const Arriving next = *o;
    arriving.erase(o);
    land(b, next, find(b, bar, s));
    complete_if_due(find(b, bar, s));
  }
  acquire(*t, find(b, bar, s).near_done);
  if (cluster) acquire(*t, find(b, bar, s).far_done);
}

void fence_proxy_async() { proxy_fence(*self()); }

TensorMap make_tensor_map(const void* base, int element, int rank, const int* dim, const int64_t* stride,
                          const int* box) {
  TensorMap m{static_cast<const char*>(base),          rank,   {1, 1, 1, 1}, {1, 1, 1, 1},
              {static_cast<size_t>(element), 0, 0, 0}, element};
  if (reinterpret_cast<uintptr_t>(base) % 16) fail("tensor map: base is not 16-byte aligned");
  for (int i = 0; i < rank; ++i) {
    m.dim[i] = dim[i], m.box[i] = box[i];
    if (dim[i] < 1) fail("tensor map: extent %d of dimension %d", dim[i], i);
    if (box[i] < 1 || box[i] > 256) fail("tensor map: box %d of dimension %d", box[i], i);
    if (!i) continue;
    m.stride[i] = static_cast<size_t>(stride[i - 1]) * static_cast<size_t>(element);
    if (m.stride[i] % 16 || m.stride[i] >= 1ull << 40 || (!m.stride[i] && dim[i] > 1))
      fail("tensor map: stride %zu bytes of dimension %d", m.stride[i], i);
  }
  if (box[0] * element > 128 || box[0] * element % 16)
    fail("tensor map: inner box of %d bytes with a 128-byte swizzle", box[0] * element);
  return m;
}

void tma_load(uint32_t dst, const TensorMap& m, const int (&at)[4], uint32_t bar, int mask, Site s) {
  const size_t bytes = box_bytes(m);
  check_target(dst, s);
  smem_ptr(dst, bytes), smem_ptr(bar, 8);
  const int own = 1 << self()->blk->rank;
  if (mask < 0) mask = own;
  if (!mask || mask >> cfg.cluster)
    fail("%s: multicast to the ranks 0x%x in a cluster of %d blocks", name_site(s).c_str(), mask, cfg.cluster);
  for (Block* to : live)
    if (cfg.cluster == 1 ? to == self()->blk : mask >> to->rank & 1)
      send(*to, {dst, bar, static_cast<int>(bytes), true, m, {at[0], at[1], at[2], at[3]}, {}, s}, true);
}

void st_async(uint32_t dst, const uint32_t* value, int bytes, uint32_t bar, Site s) {
  const Place to = place_of(dst, static_cast<size_t>(bytes), s), m = place_of(bar, 8, s);
  if (to.block != m.block) fail("%s: st.async with an mbarrier of another block", name_site(s).c_str());
  if (to.offset % static_cast<size_t>(bytes))
    fail("%s: st.async of %d bytes to shared address 0x%zx", name_site(s).c_str(), bytes, to.offset);
  Arriving o{static_cast<uint32_t>(to.offset), static_cast<uint32_t>(m.offset), bytes, false, {}, {}, {}, s};
  memcpy(o.value, value, static_cast<size_t>(bytes));
  send(*to.block, o, false);
}

// The box is read when the group is waited for (the latest moment); it must stay as it was at issue until then.
void tma_store(const TensorMap& m, uint32_t src, const int (&at)[4], Site s) {
  Thread* t = self();
  const size_t bytes = box_bytes(m);
  check_target(src, s);
  async_read(t->lane, smem_ptr(src, bytes), bytes, s);
  t->stores.issued.push_back({m, src, {at[0], at[1], at[2], at[3]}, t->stores.group, s});
}

void tma_store_commit() { ++self()->stores.group; }

void tma_store_wait(int n) {
  Thread* t = self();
  auto& issued = t->stores.issued;
  while (!issued.empty() && issued[0].group < t->stores.group - n) {
    const TmaStore o = issued[0];
    issued.erase(issued.begin());
    const size_t bytes = box_bytes(o.map), element = static_cast<size_t>(o.map.element);
    async_read(t->lane, smem_ptr(o.src, bytes), bytes, o.site);
    each_in_box(o.map, o.src, o.at, [&](uint32_t a, const char* g) {
      if (!g) return;
      checked(g, element, true, o.site);
      memcpy(const_cast<char*>(g), t->blk->arena + a, element);
    });
  }
}

}  // namespace emu
