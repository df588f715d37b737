// The launcher that looks at ids, lengths and offsets before other kernels trust or skip them.
#pragma once
#include <cstdint>
#include <string>

namespace pk {

// Reports to `record` the first wrong one of n values, whatever the order in which blocks run.  kind: "ids" in
// [0, bound), or `fill` where `ignored`; "offsets" begin with 0, do not decrease and do not exceed bound; "ends" do
// too, and the last one is bound.  out: the values; of wrong ids `fill`, wrong ends put right; null for offsets.
void checks_values(const void* values, void* out, int64_t* record, int64_t what, bool narrow, int64_t n, int64_t bound,
                   int64_t fill, bool ignored, int64_t table, const std::string& kind, void* stream);

}  // namespace pk
