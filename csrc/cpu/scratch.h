// Memory that a kernel needs while it runs: one block per thread, kept until the thread ends and grown when a call asks
// for more. Fresh pages cost more than the work on them (first touch runs at a quarter of memory bandwidth).
#pragma once
#include <cstddef>

namespace pk {

void* scratch(size_t bytes);  // aligned to 64 bytes; the next call on this thread may move it

}  // namespace pk
