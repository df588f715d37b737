// Where a launch may go in global memory: the exact elements of the tensors it was given.
#include <algorithm>
#include <cstdio>

#include "checker.h"

namespace emu {

namespace {

constexpr size_t kNear = 4096;  // an address this close to a tensor is described by it
std::vector<Extent> extents;
size_t last = 0;  // the extent found last: neighbouring accesses go to the same tensor

bool holds(const Extent& e, uintptr_t a, size_t n) {
  if (a < e.base || a + n > e.base + e.span) return false;
  size_t offset = a - e.base;
  for (const auto& [stride, count] : e.dims) offset -= std::min(offset / stride, count - 1) * stride;
  return offset + n <= e.run;
}

}  // namespace

void set_extents(std::vector<Extent> e) {
  extents = std::move(e);
  last = 0;
}

bool in_extents(uintptr_t a, size_t n) {
  if (extents.empty() || holds(extents[last], a, n)) return true;
  for (size_t i = 0; i < extents.size(); ++i)
    if (holds(extents[i], a, n)) {
      last = i;
      return true;
    }
  return false;
}

std::string name_global(uintptr_t a) {
  size_t nearest = kNear, which = 0;
  for (size_t i = 0; i < extents.size(); ++i) {
    const Extent& e = extents[i];
    const size_t distance = a < e.base ? e.base - a : a >= e.base + e.span ? a - (e.base + e.span) + 1 : 0;
    if (distance < nearest) nearest = distance, which = i;
  }
  char s[128];
  if (nearest == kNear) {
    snprintf(s, sizeof s, "global address 0x%zx, in none of the %zu tensors", static_cast<size_t>(a), extents.size());
    return s;
  }
  const Extent& e = extents[which];
  if (a < e.base)
    snprintf(s, sizeof s, "%zu bytes before tensor %zu", nearest, which);
  else if (nearest)
    snprintf(s, sizeof s, "%zu bytes behind the end of tensor %zu", nearest - 1, which);
  else
    snprintf(s, sizeof s, "tensor %zu + %zu bytes%s", which, static_cast<size_t>(a - e.base),
             holds(e, a, 1) ? "" : " (between its rows)");
  return s;
}

}  // namespace emu
