// Candidate samplers: the stream of pykernels/reference/sampled_softmax/samplers.py, bit for bit.  Products and sums of
// doubles are intrinsics, which the compiler does not fuse: fused, they would round otherwise than that file does.
#include "philox.h"
#include "platform.h"
#include "sampled_softmax.h"

namespace pk {
namespace {

constexpr int kThreads = 256, kUniqueThreads = 1024;
constexpr uint64_t kMostDraws = uint64_t{1} << 40;
constexpr unsigned long long kEmpty = ~0ull;

// exp(x), 0 <= x < 45.
__device__ __forceinline__ double exponential53(double x) {
  const double n = floor(__dadd_rn(__dmul_rn(x, 1.4426950408889634), 0.5));
  const double high = __dadd_rn(x, -__dmul_rn(n, 0.693147180369123816490));
  const double r = __dadd_rn(high, -__dmul_rn(n, 1.90821492927058770002e-10));
  constexpr double kInverse[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  double p = kInverse[13];
#pragma unroll
  for (int k = 12; k >= 0; --k) p = __dadd_rn(__dmul_rn(p, r), kInverse[k]);
  return __dmul_rn(p, static_cast<double>(int64_t{1} << static_cast<int64_t>(n)));
}

struct Draw {
  const int64_t* seed;
  const double* threshold;  // null: uniform
  const int32_t* alias;
  int64_t classes;
  double log_classes;  // of classes + 1; 0: not log-uniform

  __device__ __forceinline__ int64_t operator()(uint64_t draw) const {
    const uint64_t key = static_cast<uint64_t>(*seed);
    const uint64_t high = philox_word(key, 2 * draw), low = philox_word(key, 2 * draw + 1);
    const double u = __dmul_rn(static_cast<double>(static_cast<int64_t>(high << 21 | low >> 11)), 0x1p-53);
    if (log_classes > 0.) {
      const int64_t id = static_cast<int64_t>(floor(exponential53(__dmul_rn(u, log_classes)))) - 1;
      return id < 0 ? 0 : id < classes ? id : classes - 1;
    }
    const double scaled = __dmul_rn(u, static_cast<double>(classes));
    int64_t bucket = static_cast<int64_t>(floor(scaled));
    bucket = bucket < classes ? bucket : classes - 1;
    if (!threshold || __dadd_rn(scaled, -static_cast<double>(bucket)) < threshold[bucket]) return bucket;
    return alias[bucket];
  }
};

__global__ void __launch_bounds__(kThreads) draw_kernel(const Draw draw, int64_t* ids, int64_t* tries, int64_t count) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t == 0) *tries = count;
  if (t < count) ids[t] = draw(static_cast<uint64_t>(t));
}

// Classes that were drawn, and the first draw of each, by open addressing.
struct Seen {
  unsigned long long* slots;
  uint64_t mask;

  __device__ __forceinline__ uint64_t add(int64_t id, uint64_t draw) const {
    const auto key = static_cast<unsigned long long>(id);
    uint64_t at = (key * 0x9E3779B97F4A7C15ull >> 20) & mask;
    for (;; at = (at + 1) & mask) {
      const auto was = atomicCAS(slots + 2 * at, kEmpty, key);
      if (was == kEmpty || was == key) break;
    }
    atomicMin(slots + 2 * at + 1, static_cast<unsigned long long>(draw));
    return at;
  }
};

// The first `count` different classes in the order of their first draws, 1024 draws at a time.  Which thread comes
// first to a slot does not matter: it keeps the smallest draw.  One block: a sample is a few thousand classes, and
// asking how many more draws it takes would cost a grid more than the draws.
__global__ void __launch_bounds__(kUniqueThreads)
    draw_unique_kernel(const Draw draw, const Seen seen, int64_t* ids, int64_t* tries, int64_t count) {
  PK_SHARED(int, new_in_warp, [kUniqueThreads / kWarp]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t found = 0;
  for (uint64_t base = 0; found < count && base < kMostDraws; base += kUniqueThreads) {
    const uint64_t t = base + threadIdx.x;
    const int64_t id = draw(t);
    const uint64_t slot = seen.add(id, t);
    __syncthreads();
    const bool is_new = ld_cg(seen.slots + 2 * slot + 1) == t;
    const uint32_t news = __ballot_sync(kAllLanes, is_new);
    if (lane == 0) new_in_warp[warp] = __popc(news);
    __syncthreads();
    int64_t rank = found + __popc(news & ((1u << lane) - 1));
    for (int w = 0; w < kUniqueThreads / kWarp; ++w) {
      rank += w < warp ? new_in_warp[w] : 0;
      found += new_in_warp[w];
    }
    if (is_new && rank < count) {
      ids[rank] = id;
      if (rank == count - 1) *tries = static_cast<int64_t>(t) + 1;
    }
  }
}

}  // namespace

void sampled_softmax_draw(const int64_t* seed, const double* threshold, const int32_t* alias, int64_t* slots,
                          int64_t* ids, int64_t* tries, int64_t count, int64_t classes, int64_t size,
                          double log_classes, const std::string& kind, void* stream) {
  const DeviceGuard guard(tries);
  const bool table = kind == "alias";
  const Draw draw{seed, table ? threshold : nullptr, alias, classes, kind == "log_uniform" ? log_classes : 0.};
  if (slots) {
    const Seen seen{reinterpret_cast<unsigned long long*>(slots), static_cast<uint64_t>(size) - 1};
    launch(draw_unique_kernel, 1, kUniqueThreads, 0, stream, draw, seen, ids, tries, count);
  } else {
    launch(draw_kernel, static_cast<unsigned>(ceil_div(count > 0 ? count : 1, int64_t{kThreads})), kThreads, 0, stream,
           draw, ids, tries, count);
  }
}

}  // namespace pk
