#include "scratch.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace pk {
namespace {

struct Block {
  char* data = nullptr;
  size_t size = 0;
  ~Block() {
    if (data) munmap(data, size);
  }
};

thread_local Block blocks[kScratchSlots];

}  // namespace

void* scratch(size_t bytes, int slot) {
  Block& block = blocks[slot];
  if (block.size >= bytes) return block.data;
  if (block.data) munmap(block.data, block.size);
  block = {};
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // Mapped with a margin, so that a 2 MiB boundary is inside; the margins go back.
  char* const all =
      static_cast<char*>(mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (all == MAP_FAILED) throw std::bad_alloc();
  char* const start =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(all) + kHugePage - 1) / kHugePage * kHugePage);
  if (start != all) munmap(all, start - all);
  if (start + size != all + size + kHugePage) munmap(start + size, all + kHugePage - start);
  madvise(start, size, MADV_HUGEPAGE);
  block.data = start;
  block.size = size;
  return start;
}

}  // namespace pk
