// Self-tests of TMA, mbarriers, wgmma and the async proxy.  A 64 x 64 x 256 product of bf16 through a three-stage ring,
// chosen so that its result is the mirrored input plus 1; each case plants one bug.
#include "../cuda/hopper.h"
#include "selftest.h"

namespace pk {

namespace {

enum class Bug {
  none,
  no_wait_for_empty,
  no_wait_for_full,
  wrong_parity,
  expect_too_little,
  expect_too_much,
  no_barrier_after_init,
  no_fence_after_init,
  no_wgmma_wait,
  released_before_wait,
  no_wgmma_fence,
  accumulator_used_early,
  no_proxy_fence,
  proxy_fenced,
  wrong_count,
  misplaced_tile,
  store_not_waited_for,
  store_overwritten,
  unfenced_store
};

constexpr int BM = 64, BN = 64, BK = 64, kSteps = 4, kStages = 2, kTileBytes = BM * BK * 2;

// A is the identity in its first 64 columns and zero beyond; B's column j holds j, so C[i][j] = B[j][i].
template <Bug BUG>
__global__ void ring(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* out,
                     int n) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bars, [2 * kStages]);
  const uint32_t sa = smem_addr(smem), sb = sa + kStages * kTileBytes;
  const uint32_t full = smem_addr(bars), empty = full + 8 * kStages;
  const int tid = static_cast<int>(threadIdx.x);
  constexpr int kArrivals = BUG == Bug::wrong_count ? 129 : 128;
  if (tid == 0) {
    for (int i = 0; i < kStages; ++i) mbar_init(full + 8 * i, 1), mbar_init(empty + 8 * i, kArrivals);
    if (BUG != Bug::no_fence_after_init) mbar_fence_init();
  }
  if (BUG != Bug::no_barrier_after_init) __syncthreads();
  if (tid >= 128) {
    for (int k = 0; k < kSteps && tid == 128; ++k) {
      const int st = k % kStages;
      if (BUG != Bug::no_wait_for_empty) mbar_wait(empty + 8 * st, (k / kStages & 1) ^ 1);
      constexpr int kExpected = BUG == Bug::expect_too_little ? kTileBytes
                                : BUG == Bug::expect_too_much ? 3 * kTileBytes
                                                              : 2 * kTileBytes;
      mbar_arrive_expect_tx(full + 8 * st, kExpected);
      tma_load_2d(sa + st * kTileBytes + (BUG == Bug::misplaced_tile ? 128 : 0), map_a, k * BK, 0, full + 8 * st);
      tma_load_2d(sb + st * kTileBytes, map_b, k * BK, 0, full + 8 * st);
    }
    return;
  }
  float acc[BN / 2];
  for (int k = 0; k < kSteps; ++k) {
    const int st = k % kStages;
    if (BUG != Bug::no_wait_for_full) mbar_wait(full + 8 * st, (k / kStages & 1) ^ (BUG == Bug::wrong_parity));
    if (BUG == Bug::no_proxy_fence || BUG == Bug::proxy_fenced) {  // threads rewrite a part of the tile
      float* p = reinterpret_cast<float*>(smem + st * kTileBytes) + tid;
      *p = *p * static_cast<float>(n - 127);  // n is 128
      if (BUG == Bug::proxy_fenced) fence_proxy_async();
      named_barrier_sync(1, 128);
    }
    if (BUG != Bug::no_wgmma_fence) wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk)
      wgmma_ss<bf16, BN, false>(acc, wgmma_desc(sa + st * kTileBytes + kk * 32),
                                wgmma_desc(sb + st * kTileBytes + kk * 32), k + kk > 0);
    wgmma_commit();
    if (BUG == Bug::released_before_wait) mbar_arrive(empty + 8 * st);
    if (BUG == Bug::accumulator_used_early) acc[0] += 1;
    if (BUG != Bug::no_wgmma_wait) wgmma_wait<0>();
    if (BUG != Bug::released_before_wait) mbar_arrive(empty + 8 * st);
  }
  // the products are of no further use: C[i][0] over the rows gives the check
  const int lane = tid % 32, row = tid / 32 * 16 + lane / 4;
  if (lane % 4 == 0)
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      out[r] = acc[2 * h] + 1;
      out[r + n / 2] = acc[2 * h + 1] + 1;
    }
}

// A row of 64 bf16 values goes out through shared memory and a TMA store.
template <Bug BUG>
__global__ void store(const __grid_constant__ TensorMap to) {
  PK_DYN_SHARED(smem);
  const int i = static_cast<int>(threadIdx.x);
  bf16* row = reinterpret_cast<bf16*>(smem);
  row[i] = from_float<bf16>(static_cast<float>(i));
  if (BUG != Bug::unfenced_store) fence_proxy_async();
  __syncthreads();
  if (i == 0) {
    tma_store_4d(to, smem_addr(smem), 0, 0, 0, 0);
    tma_store_commit();
    if (BUG != Bug::store_not_waited_for && BUG != Bug::store_overwritten) tma_store_wait_read<0>();
  }
  if (BUG == Bug::store_overwritten) {
    __syncthreads();
    row[i] = from_float<bf16>(0.f);
    __syncthreads();
    if (i == 0) tma_store_wait_read<0>();
  }
}

// Inputs of the product are made here: `in` gives n = 128 values, small integers that bf16 holds exactly.
struct Operands {
  bf16 a[BM * BK * kSteps], b[BN * BK * kSteps];
};
alignas(128) Operands operands;

template <Bug BUG>
void run_ring(const float* in, float* out, int n) {
  constexpr int K = BK * kSteps;
  for (int i = 0; i < BM * K; ++i) operands.a[i] = operands.b[i] = from_float<bf16>(0.f);
  // C[i][j] = sum over k of A[i][k] B[j][k]: row i picks element i of B's rows 0 and 1
  for (int i = 0; i < 64; ++i) {
    operands.a[i * K + i * kSteps] = from_float<bf16>(1.f);
    operands.b[i * kSteps] = from_float<bf16>(in[n - 1 - i]);
    operands.b[K + i * kSteps] = from_float<bf16>(in[n / 2 - 1 - i]);
  }
  const auto map_a = make_tensor_map<bf16, 2>(operands.a, {K, BM}, {K}, {BK, BM});
  const auto map_b = make_tensor_map<bf16, 2>(operands.b, {K, BN}, {K}, {BK, BN});
  launch(ring<BUG>, 1, 160, 2 * kStages * kTileBytes, nullptr, map_a, map_b, out, n);
}

template <Bug BUG>
void run_store(const float* in, float* out, int n) {
  const auto to = make_tensor_map<bf16, 4>(operands.a, {64, 1, 1, 1}, {64, 64, 64}, {64, 1, 1, 1});
  const DeviceGuard guard(out);
  launch(store<BUG>, 1, 64, 1024, nullptr, to);
  for (int i = 0; i < n; ++i) {  // what arrived is 0, 1, 2, ...
    const bool right = to_float(operands.a[i % 64]) == static_cast<float>(i % 64);
    out[i] = in[n - 1 - i] + (right ? 1 : 0);
  }
}

// What cuTensorMapEncodeTiled refuses, or does not promise.
void tensor_map_of_repeated_rows(const float*, float*, int) {
  (void)make_tensor_map<bf16, 2>(operands.a, {64, 2}, {0}, {64, 2});
}
void tensor_map_of_odd_rows(const float*, float*, int) {
  (void)make_tensor_map<bf16, 2>(operands.a, {60, 2}, {60}, {64, 2});
}

}  // namespace

std::vector<Case> hopper_cases() {
  return {
      {"tensor_map_of_repeated_rows", tensor_map_of_repeated_rows},
      {"tensor_map_of_odd_rows", tensor_map_of_odd_rows},
      {"correct_tma_ring", run_ring<Bug::none>},
      {"no_wait_for_empty_stage", run_ring<Bug::no_wait_for_empty>},
      {"no_wait_for_full_stage", run_ring<Bug::no_wait_for_full>},
      {"wrong_parity", run_ring<Bug::wrong_parity>},
      {"expect_too_few_bytes", run_ring<Bug::expect_too_little>},
      {"expect_too_many_bytes", run_ring<Bug::expect_too_much>},
      {"arrival_count_too_large", run_ring<Bug::wrong_count>},
      {"no_barrier_after_mbarrier_init", run_ring<Bug::no_barrier_after_init>},
      {"no_fence_after_mbarrier_init", run_ring<Bug::no_fence_after_init>},
      {"tma_tile_misaligned", run_ring<Bug::misplaced_tile>},
      {"no_wgmma_wait", run_ring<Bug::no_wgmma_wait>},
      {"no_wgmma_fence", run_ring<Bug::no_wgmma_fence>},
      {"stage_released_before_wgmma_wait", run_ring<Bug::released_before_wait>},
      {"accumulator_used_before_wgmma_wait", run_ring<Bug::accumulator_used_early>},
      {"no_proxy_fence_before_wgmma", run_ring<Bug::no_proxy_fence>},
      {"correct_proxy_fence", run_ring<Bug::proxy_fenced>},
      {"correct_tma_store", run_store<Bug::none>},
      {"no_proxy_fence_before_tma_store", run_store<Bug::unfenced_store>},
      {"tma_store_never_waited_for", run_store<Bug::store_not_waited_for>},
      {"tma_store_source_overwritten", run_store<Bug::store_overwritten>},
  };
}

}  // namespace pk
