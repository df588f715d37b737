// Positions sorted by id, and the runs of equal ids: what a gradient without atomics is made of.
#pragma once
#include <cstdint>
#include <memory>

#include "embedding_kernels.h"

namespace pk {

// Memory for one call: the thread's scratch, where fresh pages would cost as much as the sort; its own where it is
// large.
class SortBuffer {
 public:
  explicit SortBuffer(int slot) : slot_(slot) {}
  void* reserve(size_t bytes);

 private:
  int slot_;
  std::unique_ptr<char[]> own_;
};

// Valid until the next sort on this thread.
struct SortedIds {
  const uint64_t* entries = nullptr;  // id << position_bits | position, ascending
  int position_bits = 0;
  const Run* runs = nullptr;  // in ascending order of ids; those of the padding and of no bag are left out
  int64_t count = 0;          // of runs
  int64_t pieces = 0;         // rows of partial sums of the long runs

  SortBuffer first{1}, second{2}, listed{3};
};

// ids in [0, rows). Positions from `limit` on are in no bag: they count for a run's total only.
SortedIds sort_ids(const Ids& ids, int64_t rows, int64_t padding, int64_t limit);

}  // namespace pk
