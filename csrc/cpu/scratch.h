// Memory that a kernel needs while it runs: a block per thread and slot, kept until the thread ends and grown when a
// call asks for more. Fresh pages cost more than the work on them (first touch runs at a quarter of memory bandwidth).
#pragma once
#include <cstddef>

namespace pk {

constexpr size_t kHugePage = size_t{2} << 20;  // of x86-64
constexpr int kScratchSlots = 4;

void* scratch(size_t bytes,
              int slot = 0);  // aligned to 64 bytes; the next call for this slot on this thread may move it

}  // namespace pk
