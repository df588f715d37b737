#include "embedding_sort.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "scratch.h"

namespace pk {
namespace {

constexpr int kDigit = 11;             // bits a pass sorts by: 2048 counters stay in L1
constexpr int64_t kChunk = 32768;      // entries a thread must have to be worth waking
constexpr int64_t kComparisons = 256;  // up to this many entries are sorted by comparing them

constexpr size_t kKept = size_t{32} << 20;  // bytes of scratch that a thread may keep

// One stable counting pass by the bits [shift, shift + width) of read(i). The result does not depend on the number of
// chunks: in each digit the chunks follow one another in order.
template <class Read>
void counting_pass(Read read, uint64_t* out, int64_t count, int shift, int width) {
  const int64_t digits = int64_t{1} << width;
  const uint64_t mask = digits - 1;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t chunks = std::clamp<int64_t>(count / kChunk, 1, threads);
  const auto bound = [&](int64_t chunk) { return count * chunk / chunks; };
  std::vector<int64_t> next(chunks * digits);
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* const counts = next.data() + chunk * digits;
      for (int64_t i = bound(chunk), end = bound(chunk + 1); i < end; ++i) ++counts[(read(i) >> shift) & mask];
    }
  });
  int64_t sum = 0;
  for (int64_t digit = 0; digit < digits; ++digit) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += std::exchange(next[chunk * digits + digit], sum);
  }
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* const places = next.data() + chunk * digits;
      for (int64_t i = bound(chunk), end = bound(chunk + 1); i < end; ++i) {
        const uint64_t entry = read(i);
        out[places[(entry >> shift) & mask]++] = entry;
      }
    }
  });
}

template <class Id>
const uint64_t* sorted_entries(const Id* ids, int64_t count, int64_t rows, int bits, SortedIds& found) {
  const auto entry = [&](int64_t i) { return static_cast<uint64_t>(ids[i]) << bits | static_cast<uint64_t>(i); };
  auto* entries = static_cast<uint64_t*>(found.first.reserve(count * sizeof(uint64_t)));
  if (count <= kComparisons) {
    for (int64_t i = 0; i < count; ++i) entries[i] = entry(i);
    std::sort(entries, entries + count);
    return entries;
  }
  const int id_bits = std::max<int>(1, std::bit_width(static_cast<uint64_t>(rows - 1)));
  const int passes = (id_bits + kDigit - 1) / kDigit, width = (id_bits + passes - 1) / passes;
  counting_pass(entry, entries, count, bits, width);
  if (passes == 1) return entries;
  auto* other = static_cast<uint64_t*>(found.second.reserve(count * sizeof(uint64_t)));
  for (int pass = 1; pass < passes; ++pass) {
    counting_pass([entries](int64_t i) { return entries[i]; }, other, count, bits + pass * width, width);
    std::swap(entries, other);
  }
  return entries;
}

// Where the next run begins: how many ids differ from the one before.
int64_t distinct(const uint64_t* entries, int64_t count, int bits) {
  int64_t found = 1;
  for (int64_t i = 1; i < count; ++i) found += ((entries[i] ^ entries[i - 1]) >> bits) != 0;
  return found;
}

}  // namespace

void* SortBuffer::reserve(size_t bytes) {
  if (bytes <= kKept) return scratch(bytes, slot_);
  own_.reset(new char[bytes]);
  return own_.get();
}

SortedIds sort_ids(const Ids& ids, int64_t rows, int64_t padding, int64_t limit) {
  SortedIds found;
  const int64_t count = ids.count;
  if (count == 0) return found;
  const int bits = std::bit_width(static_cast<uint64_t>(count - 1));
  TORCH_CHECK(bits + std::bit_width(static_cast<uint64_t>(rows - 1)) <= 64, "embedding: ", count, " ids of ", rows,
              " rows do not fit the 64 bits of a sorted entry");
  const uint64_t* const entries = ids.narrow
                                      ? sorted_entries(static_cast<const int32_t*>(ids.data), count, rows, bits, found)
                                      : sorted_entries(static_cast<const int64_t*>(ids.data), count, rows, bits, found);
  Run* const runs = static_cast<Run*>(found.listed.reserve(distinct(entries, count, bits) * sizeof(Run)));
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for (int64_t begin = 0; begin < count;) {
    const uint64_t id = entries[begin] >> bits;
    int64_t end = begin + 1;
    while (end < count && entries[end] >> bits == id) ++end;
    Run run{begin, end, static_cast<int64_t>(id), end - begin, -1};
    begin = end;
    // Positions ascend within a run, so those outside all bags are at its end.
    while (run.end > run.begin && static_cast<int64_t>(entries[run.end - 1] & mask) >= limit) --run.end;
    if (run.id == padding || run.end == run.begin) continue;
    if (run.end - run.begin > kPiece) {
      run.partial = found.pieces;
      found.pieces += (run.end - run.begin + kPiece - 1) / kPiece;
    }
    runs[found.count++] = run;
  }
  found.entries = entries, found.position_bits = bits, found.runs = runs;
  return found;
}

}  // namespace pk
