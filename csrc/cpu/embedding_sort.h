// Positions sorted by id, and the runs of equal ids: what a gradient without atomics is made of.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "embedding_kernels.h"

namespace pk {

struct SortedIds {
  std::unique_ptr<uint64_t[]> entries;  // id << position_bits | position, ascending
  int position_bits;
  std::vector<Run> runs;  // in ascending order of ids; those of the padding and of no bag are left out
  int64_t pieces = 0;     // rows of partial sums of the long runs
};

// ids in [0, rows). Positions from `limit` on are in no bag: they count for a run's total only.
SortedIds sort_ids(const Ids& ids, int64_t rows, int64_t padding, int64_t limit);

}  // namespace pk
