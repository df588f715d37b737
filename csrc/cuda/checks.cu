// One pass over ids, lengths or offsets before the kernels that trust or skip them.
#include "checks.h"

#include "record.h"

namespace pk {
namespace {

constexpr int kThreads = 256;

struct Values {
  Ids values;
  int64_t n, bound, fill;
  bool ignored, sorted;

  __device__ __forceinline__ bool wrong(int64_t i, int64_t value) const {
    if (!sorted) return (value < 0 || value >= bound) && !(ignored && value == fill);
    const int64_t before = i ? values[i - 1] : 0;
    return value < before || value > bound || (i == 0 && value != 0);
  }
  __device__ __forceinline__ bool wrong(int64_t i) const { return wrong(i, values[i]); }
};

__global__ void __launch_bounds__(kThreads)
    check_kernel(const Values v, void* out, const Record record, int64_t table) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads, i = first + static_cast<int>(threadIdx.x);
  bool wrong = false;
  if (i < v.n) {
    const int64_t value = v.values[i];
    wrong = v.wrong(i, value);
    const int64_t kept = wrong && !v.sorted ? v.fill : value;
    if (out && v.values.narrow)
      static_cast<int32_t*>(out)[i] = static_cast<int32_t>(kept);
    else if (out)
      static_cast<int64_t*>(out)[i] = kept;
  }
  if (!__syncthreads_or(wrong)) return;
  // Rare, so it may take its time: an earlier block that has something to report is the one that reports.
  for (int64_t at = 0; at < first; at += kThreads)
    if (__syncthreads_or(v.wrong(at + static_cast<int>(threadIdx.x)))) return;
  if (threadIdx.x) return;
  int64_t at = first;
  while (!v.wrong(at)) ++at;
  record.report(at, v.values[at], v.bound, table);
}

// One block: there are as many ends as sequences.
__global__ void __launch_bounds__(kThreads) check_ends_kernel(const Values v, void* out, const Record record) {
  const auto wrong = [&](int64_t i) { return v.wrong(i) || (i == v.n - 1 && v.values[i] != v.bound); };
  const auto store = [&](int64_t i, int64_t value) {
    if (v.values.narrow)
      static_cast<int32_t*>(out)[i] = static_cast<int32_t>(value);
    else
      static_cast<int64_t*>(out)[i] = value;
  };
  bool any = false;
  for (int64_t i = static_cast<int>(threadIdx.x); i < v.n; i += kThreads) {
    any |= wrong(i);
    store(i, v.values[i]);
  }
  if (!__syncthreads_or(any) || threadIdx.x) return;
  bool told = false;
  int64_t end = 0;  // rare: one thread puts them right, so that sequences neither overlap nor leave rows out
  for (int64_t i = 0; i < v.n; ++i) {
    const int64_t value = v.values[i];
    if (!told && wrong(i)) {
      record.report(i, value, v.bound, 0);
      told = true;
    }
    if (i > 0) end = value > v.bound ? v.bound : value > end ? value : end;
    store(i, i > 0 && i == v.n - 1 ? v.bound : end);
  }
}

}  // namespace

void checks_values(const void* values, void* out, int64_t* record, int64_t what, bool narrow, int64_t n, int64_t bound,
                   int64_t fill, bool ignored, int64_t table, const std::string& kind, void* stream) {
  if (n <= 0) return;
  const DeviceGuard guard(values);
  const bool ends = kind == "ends";
  const Values v{{values, narrow}, n, bound, fill, ignored, ends || kind == "offsets"};
  if (ends) return launch(check_ends_kernel, 1, kThreads, 0, stream, v, out, Record{record, what});
  launch(check_kernel, static_cast<unsigned>(ceil_div(n, int64_t{kThreads})), kThreads, 0, stream, v, out,
         Record{record, what}, table);
}

}  // namespace pk
