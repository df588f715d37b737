// The access checker: bounds, alignment, uninitialised shared memory, data races, async copies.  Kernels are built with
// -fsanitize=thread but without libtsan; the hooks before each access (hooks.cpp) end in checked_access.
#pragma once
#include <string>
#include <vector>

#include "runtime.h"

namespace emu {

enum class Access : uint8_t { read, write, atomic_read, atomic_write };
inline bool writes(Access a) { return a == Access::write || a == Access::atomic_write; }

void checker_new_launch();
void checker_new_block(Block&);
void forget_handoffs();

// An access whose place is a return address of instrumented code (pc) or known (site).
void checked_access(Thread&, uintptr_t a, size_t n, Access, bool aligned, uint32_t origin);
uint32_t origin_of(Site);
uint32_t origin_of_pc(const void* pc);

void checked(const void* p, size_t n, bool write, Site);               // by the running thread
void checked_as(int lane, const void* p, size_t n, bool write, Site);  // on behalf of a lane of its warp
void async_write(Thread&, void* p, size_t n, Site);                    // by the async proxy (TMA)
void async_read(int lane, const void* p, size_t n, Site);              // by TMA stores and wgmma
void mark_in_flight(const void* p, size_t n, bool on);                 // target of an async copy: hands off
void proxy_fence(Thread&);
void visit(const Thread&, Block&, uint32_t origin);  // a thread reaches into another block's shared memory
void check_visits(const Block&);                     // at the end of the block

// Where kernels may go in global memory: a tensor as runs of `run` bytes at base + sum of index * stride.
struct Extent {
  uintptr_t base;
  size_t run;                                   // bytes of the innermost contiguous piece
  size_t span;                                  // from base to the end of the last piece
  std::vector<std::pair<size_t, size_t>> dims;  // (stride in bytes, count), outermost first
};
void set_extents(std::vector<Extent>);
bool in_extents(uintptr_t a, size_t n);  // true where none were given
std::string name_global(uintptr_t a);

std::string name_origin(uint32_t origin);
bool in_module(uintptr_t a);
void locate_module(const void* pc);

}  // namespace emu
