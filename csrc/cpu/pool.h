// Memory for large results, kept after use. The first touch of a fresh page costs more than most of our kernels do to
// what is on it, and malloc maps blocks of 32 MiB and more anew for every call. Here a freed block waits for the next
// result of about its size.
//
// Blocks are private mappings, 2 MiB-aligned, with huge pages where the system has them. A block is either in use or
// idle, under one lock, so no two tensors share one. Idle blocks are bounded: by `max_bytes`, by a quarter of the
// memory that is available, and in time: a thread that runs only while there are idle blocks looks four times a second
// and gives back what has waited for kPatience, or what a shortage asks for. A forked child starts with no idle block,
// and unmaps what it inherited when it frees it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace c10 {
struct Allocator;
}

namespace pk {

constexpr size_t kPooled = size_t{1} << 20;  // results smaller than this come from torch's allocator

struct PoolState {
  int64_t max_bytes;                 // bound on idle bytes; 0: off
  int64_t idle_bytes, idle_blocks;   // kept for reuse
  int64_t used_bytes, used_blocks;   // under live tensors
  int64_t reused, mapped, returned;  // blocks since the start: taken from the idle ones, mapped anew, given back
};

// Both live for ever: tensors may outlive everything.
c10::Allocator* pool_allocator();
// Fresh mappings, which read as zero and cost nothing where nothing is touched; never kept. For kPooled bytes or more.
c10::Allocator* zeroed_allocator();

bool pool_enabled();
PoolState pool_state();
void pool_set_max_bytes(int64_t bytes);  // < 0: the default, an eighth of the memory this process may use
void pool_empty();                       // gives all idle blocks back
// Gives back those idle for longer, and more in a shortage, which it looks for there: what the thread does.
void pool_trim(double idle_seconds, const std::string& proc = "/proc", const std::string& cgroup = "/sys/fs/cgroup");

}  // namespace pk
