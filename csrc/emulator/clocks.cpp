#include "clocks.h"

#include <algorithm>

#include "runtime.h"

namespace emu {

namespace {

void raise(Ticks& to, const Ticks& from) {
  if (to.size() < from.size()) to.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void raise(Message& to, int block, const std::shared_ptr<const Ticks>& from) {
  std::shared_ptr<const Ticks>& have = to[block];
  if (have == from) return;
  if (!have) {
    have = from;
    return;
  }
  auto both = std::make_shared<Ticks>(*have);
  raise(*both, *from);
  have = both;
}

void raise(Message& to, const Message& from) {
  for (const auto& [block, ticks] : from) raise(to, block, ticks);
}

// The union of what several views hold of other blocks; no copy while there is only one.
class Union {
 public:
  void add(const std::shared_ptr<const Message>& m) {
    if (!m || m == one_) return;
    if (!one_ && !many_) {
      one_ = m;
      return;
    }
    if (!many_) many_ = std::make_shared<Message>(*one_), one_ = m;
    raise(*many_, *m);
  }
  std::shared_ptr<const Message> result() const { return many_ ? many_ : one_; }

 private:
  std::shared_ptr<const Message> one_;
  std::shared_ptr<Message> many_;
};

size_t place(const Thread& t) { return static_cast<size_t>(t.lin); }

// What t could tell another thread: all it has seen, and itself up to now.
Ticks knowledge(const Thread& t) {
  Ticks k = t.clock.seen->own;
  k[place(t)] = t.clock.tick;
  return k;
}

bool covers(const Thread& t, const Ticks& past) {
  const Ticks& own = t.clock.seen->own;
  for (size_t i = 0; i < past.size(); ++i)
    if ((i == place(t) ? t.clock.tick : own[i]) < past[i]) return false;
  return true;
}

}  // namespace

void clocks_start(Block& b) {
  auto none = std::make_shared<View>();
  none->own.assign(b.thread.size(), 0);
  for (Thread& t : b.thread) t.clock = {none, 1};
  b.hopper.proxy_tick.assign(b.thread.size(), 0);
}

bool has_seen(const Thread& t, int block, int lin, uint32_t tick) {
  const View& v = *t.clock.seen;
  const size_t i = static_cast<size_t>(lin);
  if (block == t.blk->index) return (lin == t.lin ? t.clock.tick : v.own[i]) >= tick;
  if (!v.rest) return false;
  const auto it = v.rest->find(block);
  return it != v.rest->end() && (*it->second)[i] >= tick;
}

// Nobody knows more of thread i than i itself, so the join of all threads is just everyone's own tick.
void join_block(Block& b) {
  auto v = std::make_shared<View>();
  Union rest;
  v->own.resize(b.thread.size());
  for (size_t i = 0; i < b.thread.size(); ++i) {
    v->own[i] = b.thread[i].clock.tick;
    rest.add(b.thread[i].clock.seen->rest);
  }
  v->rest = rest.result();
  for (Thread& t : b.thread) t.clock.seen = v, ++t.clock.tick;
}

void join_warp(Block& b, int first, uint32_t lanes) {
  auto v = std::make_shared<View>();
  Union rest;
  const View* last = nullptr;
  for (size_t l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    const Clock& c = b.thread[static_cast<size_t>(first) + l].clock;
    if (c.seen.get() != last) raise(v->own, c.seen->own), rest.add(c.seen->rest);
    last = c.seen.get();
  }
  for (size_t l = 0; l < 32; ++l)
    if (lanes >> l & 1) v->own[static_cast<size_t>(first) + l] = b.thread[static_cast<size_t>(first) + l].clock.tick;
  v->rest = rest.result();
  for (size_t l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    Clock& c = b.thread[static_cast<size_t>(first) + l].clock;
    c.seen = v, ++c.tick;
  }
}

void release(Thread& t, Gathered& to) {
  Ticks& mine = to.of[t.blk->index];
  raise(mine, t.clock.seen->own);
  mine[place(t)] = std::max(mine[place(t)], t.clock.tick);
  const auto& rest = t.clock.seen->rest;
  if (rest && rest != to.added) {
    for (const auto& [block, ticks] : *rest) raise(to.of[block], *ticks);
    to.added = rest;
  }
  ++t.clock.tick;
}

std::shared_ptr<const Message> handed_on(const Gathered& g) {
  auto m = std::make_shared<Message>();
  for (const auto& [block, ticks] : g.of) (*m)[block] = std::make_shared<const Ticks>(ticks);
  return m;
}

void acquire(Thread& t, const std::shared_ptr<const Message>& from) {
  // threads that come from one barrier hold the same view, and take the same: the result is made once
  static struct {
    std::shared_ptr<const View> before, after;
    std::shared_ptr<const Message> from;
  } last;
  if (!from || from->empty()) return;
  if (last.before == t.clock.seen && last.from == from) {
    t.clock.seen = last.after;
    return;
  }
  auto v = std::make_shared<View>(*t.clock.seen);
  std::shared_ptr<Message> rest;
  for (const auto& [block, ticks] : *from) {
    if (block == t.blk->index) {
      raise(v->own, *ticks);
      continue;
    }
    if (!rest) rest = std::make_shared<Message>(v->rest ? *v->rest : Message{});
    raise(*rest, block, ticks);
  }
  if (rest) v->rest = rest;
  last = {t.clock.seen, v, from};
  t.clock.seen = v;
}

bool covers(const Thread& t, const std::shared_ptr<const Message>& past) {
  if (!past) return true;
  const auto it = past->find(t.blk->index);
  return it == past->end() || covers(t, *it->second);
}

void acquire_fence(Thread& t, bool gpu) {
  FenceState& f = t.fences;
  if (!f.taken_block.empty() && !covers(t, f.taken_block)) {
    auto v = std::make_shared<View>(*t.clock.seen);
    raise(v->own, f.taken_block);
    t.clock.seen = v;
  }
  f.taken_block.clear();
  if (!gpu || f.taken_gpu.empty()) return;
  auto v = std::make_shared<View>(*t.clock.seen);
  auto rest = std::make_shared<Message>(v->rest ? *v->rest : Message{});
  for (const auto& [block, ticks] : f.taken_gpu) {
    if (block == t.blk->index)
      raise(v->own, *ticks);
    else
      raise(*rest, block, ticks);
  }
  v->rest = rest;
  t.clock.seen = v;
  f.taken_gpu.clear();
}

void release_fence(Thread& t, bool gpu) {
  FenceState& f = t.fences;
  f.block = knowledge(t);
  if (gpu) {
    auto m = std::make_shared<Message>(t.clock.seen->rest ? *t.clock.seen->rest : Message{});
    raise(*m, t.blk->index, std::make_shared<Ticks>(f.block));
    f.gpu = m;
  }
  ++t.clock.tick;  // what follows the fence is not covered by it
}

void hand_on(Thread& t, Handoff& h) {
  if (t.fences.gpu) raise(h.gpu, *t.fences.gpu);
  if (t.fences.block.empty()) return;
  if (h.owner != t.blk->index) h.block.clear(), h.owner = t.blk->index;
  raise(h.block, t.fences.block);
}

void take(Thread& t, const Handoff& h) {
  raise(t.fences.taken_gpu, h.gpu);
  if (h.owner == t.blk->index) raise(t.fences.taken_block, h.block);
}

bool FenceState::would_have_seen(int block_index, int lin, uint32_t tick) const {
  const auto it = taken_gpu.find(block_index);
  return it != taken_gpu.end() && (*it->second)[static_cast<size_t>(lin)] >= tick;
}

}  // namespace emu
