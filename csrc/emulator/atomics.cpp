// Atomics and fences: the access is checked as an atomic, and what it hands over goes through the location.
#include <unordered_map>

#include "checker.h"

namespace emu {

namespace {

std::unordered_map<uintptr_t, Handoff> handoffs;  // of this launch

}  // namespace

void forget_handoffs() { handoffs.clear(); }

void fence(Scope s) {
  acquire_fence(*self(), s == Scope::gpu);
  release_fence(*self(), s == Scope::gpu);
}

void atomic_access(const void* p, size_t n, Atomic kind, Site site) {
  Thread& t = *self();
  const uintptr_t a = reinterpret_cast<uintptr_t>(p);
  const Access access = kind == Atomic::load_acquire ? Access::atomic_read : Access::atomic_write;
  checked_access(t, a, n, access, true, origin_of(site));
  auto it = handoffs.find(a);
  if (kind == Atomic::store_release) {  // a plain store starts anew: it does not pass on what the location held
    if (it != handoffs.end()) handoffs.erase(it), it = handoffs.end();
    release_fence(t, true);
  } else if (it != handoffs.end()) {
    take(t, it->second);
  }
  if (kind == Atomic::load_acquire) {
    acquire_fence(t, true);
    return;
  }
  if (t.fences.block.empty()) return;  // never fenced: hands on nothing
  hand_on(t, handoffs[a]);
}

}  // namespace emu
