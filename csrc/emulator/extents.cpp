// Where a launch may go in global memory: the exact elements of the tensors it was given.
#include <algorithm>

#include "checker.h"

namespace emu {

namespace {

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

const Extent* find_extent(uintptr_t a, size_t n) {
  if (last < extents.size() && holds(extents[last], a, n)) return &extents[last];
  for (size_t i = 0; i < extents.size(); ++i)
    if (holds(extents[i], a, n)) {
      last = i;
      return &extents[i];
    }
  return nullptr;
}

int nearest_extent(uintptr_t a) {
  for (size_t i = 0; i < extents.size(); ++i)
    if (a >= extents[i].base && a < extents[i].base + extents[i].span) return static_cast<int>(i);
  return -1;
}

const Extent& extent(int i) { return extents[static_cast<size_t>(i)]; }
bool no_extents() { return extents.empty(); }

}  // namespace emu
