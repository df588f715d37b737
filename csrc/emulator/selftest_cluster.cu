// Self-tests of clusters: their barrier, distributed shared memory, st.async, remote arrivals, multicast.  Four blocks
// of 32 threads exchange the input's quarters, rank r with rank 3 - r; each case plants one bug.
#include "../cuda/hopper.h"
#include "selftest.h"

namespace pk {

namespace {

constexpr int kRanks = 4, kThreads = 32;

// ---- loads and stores, ordered by the cluster's barrier

enum class Plain {
  none,
  stored,
  no_barrier_at_all,
  barrier_too_early,
  block_barrier,
  relaxed,
  no_wait,
  no_barrier_at_the_end,
  rank_outside,
  arrives_twice,
  waits_first,
  overrun,
  misaligned,
  all_to_one
};

template <Plain BUG>
__global__ void plain(const float* in, float* out, int) {
  PK_SHARED(uint32_t, s, [kThreads]);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank(), i = rank * kThreads + tid;
  const int other = BUG == Plain::all_to_one ? 0 : kRanks - 1 - rank;
  const uint32_t mirrored = smem_addr(s + kThreads - 1 - tid);
  if (BUG == Plain::barrier_too_early || BUG == Plain::block_barrier || BUG == Plain::stored ||
      BUG == Plain::all_to_one)
    cluster_sync();
  if (BUG == Plain::stored || BUG == Plain::all_to_one)
    st_cluster(map_cluster(mirrored, other), __float_as_uint(in[i]));
  else
    s[tid] = __float_as_uint(in[i]);
  if (BUG == Plain::block_barrier) __syncthreads();
  if (BUG == Plain::relaxed) {
    cluster_arrive_relaxed();
    cluster_wait();
  }
  if (BUG == Plain::no_wait || BUG == Plain::arrives_twice) cluster_arrive();
  if (BUG == Plain::waits_first) cluster_wait();
  constexpr bool kUnordered = BUG == Plain::no_barrier_at_all || BUG == Plain::barrier_too_early ||
                              BUG == Plain::block_barrier || BUG == Plain::relaxed || BUG == Plain::no_wait;
  if (!kUnordered) cluster_sync();
  const int target = BUG == Plain::rank_outside ? other + 1 : other;
  const uint32_t v = BUG == Plain::stored || BUG == Plain::all_to_one
                         ? s[tid]
                         : ld_cluster<uint32_t>(map_cluster(mirrored, target) + (BUG == Plain::overrun      ? 128
                                                                                 : BUG == Plain::misaligned ? 2
                                                                                                            : 0));
  if (BUG == Plain::no_wait) cluster_wait();
  if (BUG != Plain::no_barrier_at_the_end) cluster_sync();
  out[i] = __uint_as_float(v) + 1;
}

// ---- st.async: kSteps rounds through two buffers, each with its mbarrier

enum class Async {
  none,
  no_expect,
  expect_too_many,
  no_wait_for_data,
  block_scope,
  one_buffer,
  no_barrier_after_init,
  no_fence_after_init,
  barrier_of_another_block,
  last_one_not_waited_for,
  misaligned
};
constexpr int kRounds = 5;

template <Async BUG>
__global__ void async(const float* in, float* out, int) {
  PK_SHARED(float, s, [2 * kThreads]);
  PK_SHARED(uint64_t, bars, [2]);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank(), i = rank * kThreads + tid;
  const int other = kRanks - 1 - rank;
  if (tid == 0) {
    mbar_init(smem_addr(bars), 1), mbar_init(smem_addr(bars + 1), 1);
    if (BUG != Async::no_fence_after_init) mbar_fence_init();
  }
  if (BUG == Async::no_barrier_after_init)
    __syncthreads();
  else
    cluster_sync();
  float v = in[i], received = 0.f;
  for (int k = 0; k < kRounds; ++k) {
    const int buffer = BUG == Async::one_buffer ? 0 : k & 1;
    const uint32_t bar = smem_addr(bars + buffer);
    if (tid == 0) {
      if (BUG == Async::no_expect)
        mbar_arrive(bar);
      else
        mbar_arrive_expect_tx(bar, kThreads * (BUG == Async::expect_too_many ? 8 : 4));
    }
    const uint32_t to = smem_addr(s + buffer * kThreads + kThreads - 1 - tid) + (BUG == Async::misaligned ? 2 : 0);
    st_async(map_cluster(to, other), __float_as_uint(v),
             map_cluster(bar, BUG == Async::barrier_of_another_block ? rank : other));
    if (BUG == Async::last_one_not_waited_for && k + 1 == kRounds) break;
    const int parity = BUG == Async::one_buffer ? k & 1 : k >> 1 & 1;
    if (BUG == Async::block_scope)
      mbar_wait(bar, parity);
    else if (BUG != Async::no_wait_for_data)
      mbar_wait_cluster(bar, parity);
    received = s[buffer * kThreads + tid];
    v += 1.f;
    __syncwarp();  // a lane's store tells that the whole warp has read
  }
  out[i] = received - (kRounds - 1) + 1;
}

// ---- arrivals at another block's mbarrier, after plain stores

enum class Arrive { none, block_scope, never, not_initialised, peer_may_be_gone };

template <Arrive BUG>
__global__ void arrive(const float* in, float* out, int) {
  PK_SHARED(float, s, [kThreads]);
  PK_SHARED(uint64_t, bar, [2]);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank(), i = rank * kThreads + tid;
  const int other = kRanks - 1 - rank;
  if (tid == 0) {
    mbar_init(smem_addr(bar), kThreads), mbar_fence_init();
    if (BUG == Arrive::peer_may_be_gone) mbar_init(smem_addr(bar + 1), kThreads);
  }
  cluster_sync();
  st_cluster(map_cluster(smem_addr(s + kThreads - 1 - tid), other), __float_as_uint(in[i]));
  const uint32_t mine = smem_addr(bar + (BUG == Arrive::not_initialised));
  if (BUG != Arrive::never || rank != 2) mbar_arrive_cluster(map_cluster(mine, other));
  if (BUG == Arrive::block_scope)
    mbar_wait(smem_addr(bar), 0);
  else
    mbar_wait_cluster(smem_addr(bar), 0);
  out[i] = s[tid] + 1;
  if (BUG == Arrive::peer_may_be_gone) mbar_arrive_cluster(map_cluster(smem_addr(bar + 1), other));
}

// ---- multicast: rank 0 sends two boxes of 64 values to all, through one buffer

enum class Multicast {
  none,
  no_expect_elsewhere,
  no_barrier_after_init,
  not_free,
  free_in_block_scope,
  too_many_ranks
};

template <Multicast BUG>
__global__ void multicast(const __grid_constant__ TensorMap from, float* right) {
  PK_DYN_SHARED(smem);
  PK_SHARED(uint64_t, bars, [2]);
  const int tid = static_cast<int>(threadIdx.x), rank = cluster_rank();
  const uint32_t full = smem_addr(bars), empty = smem_addr(bars + 1);
  if (tid == 0) mbar_init(full, 1), mbar_init(empty, kRanks * kThreads), mbar_fence_init();
  if (BUG == Multicast::no_barrier_after_init)
    __syncthreads();
  else
    cluster_sync();
  float ok = 1.f;
  for (int k = 0; k < 2; ++k) {
    if (tid == 0) {
      if (BUG == Multicast::no_expect_elsewhere && rank > 0)
        mbar_arrive(full);
      else
        mbar_arrive_expect_tx(full, 128);
      if (rank == 0) {
        if (k && BUG == Multicast::free_in_block_scope) mbar_wait(empty, 0);
        if (k && BUG != Multicast::not_free && BUG != Multicast::free_in_block_scope) mbar_wait_cluster(empty, 0);
        tma_multicast_2d(smem_addr(smem), from, 0, k, full, BUG == Multicast::too_many_ranks ? 0x1f : 0xf);
      }
    }
    mbar_wait(full, k);
    const bf16* row = reinterpret_cast<const bf16*>(smem);
    for (int c = tid; c < 64; c += kThreads) ok = to_float(row[c]) == static_cast<float>(64 * k + c) ? ok : 0.f;
    mbar_arrive_cluster(map_cluster(empty, 0));
  }
  right[rank * kThreads + tid] = ok;
  cluster_sync();
}

alignas(128) bf16 boxes[2 * 64];

template <Multicast BUG>
void run_multicast(const float* in, float* out, int n) {
  for (int i = 0; i < 128; ++i) boxes[i] = from_float<bf16>(static_cast<float>(i));
  const auto from = make_tensor_map<bf16, 2>(boxes, {64, 2}, {64}, {64, 1});
  launch_cluster(multicast<BUG>, kRanks, kRanks, kThreads, 1024, nullptr, from, out);
  for (int i = 0; i < n; ++i) out[i] = in[n - 1 - i] + out[i];
}

template <void (*KERNEL)(const float*, float*, int)>
void run(const float* in, float* out, int n) {
  launch_cluster(KERNEL, kRanks, n / kThreads, kThreads, 0, nullptr, in, out, n);
}
template <int CLUSTER>
void wrong_size(const float* in, float* out, int n) {
  launch_cluster(plain<Plain::none>, CLUSTER, 9, kThreads, 0, nullptr, in, out, n);
}

}  // namespace

std::vector<Case> cluster_cases() {
  return {
      {"correct_cluster_load", run<plain<Plain::none>>},
      {"correct_cluster_store", run<plain<Plain::stored>>},
      {"no_cluster_barrier", run<plain<Plain::no_barrier_at_all>>},
      {"cluster_barrier_before_the_write", run<plain<Plain::barrier_too_early>>},
      {"block_barrier_taken_for_cluster_barrier", run<plain<Plain::block_barrier>>},
      {"relaxed_cluster_arrive", run<plain<Plain::relaxed>>},
      {"no_cluster_wait", run<plain<Plain::no_wait>>},
      {"no_cluster_barrier_at_the_end", run<plain<Plain::no_barrier_at_the_end>>},
      {"rank_outside_the_cluster", run<plain<Plain::rank_outside>>},
      {"cluster_arrive_twice", run<plain<Plain::arrives_twice>>},
      {"cluster_wait_without_arrive", run<plain<Plain::waits_first>>},
      {"remote_shared_overrun", run<plain<Plain::overrun>>},
      {"misaligned_remote_load", run<plain<Plain::misaligned>>},
      {"all_blocks_write_to_one", run<plain<Plain::all_to_one>>},
      {"cluster_does_not_divide_the_grid", wrong_size<2>},
      {"cluster_too_large", wrong_size<9>},
      {"correct_st_async", run<async<Async::none>>},
      {"st_async_without_expect_tx", run<async<Async::no_expect>>},
      {"st_async_expected_more", run<async<Async::expect_too_many>>},
      {"st_async_not_waited_for", run<async<Async::no_wait_for_data>>},
      {"st_async_waited_for_in_block_scope", run<async<Async::block_scope>>},
      {"st_async_through_one_buffer", run<async<Async::one_buffer>>},
      {"no_cluster_barrier_after_mbarrier_init", run<async<Async::no_barrier_after_init>>},
      {"no_fence_after_init_before_st_async", run<async<Async::no_fence_after_init>>},
      {"st_async_with_another_blocks_mbarrier", run<async<Async::barrier_of_another_block>>},
      {"last_st_async_not_waited_for", run<async<Async::last_one_not_waited_for>>},
      {"misaligned_st_async", run<async<Async::misaligned>>},
      {"correct_remote_arrive", run<arrive<Arrive::none>>},
      {"remote_arrive_waited_for_in_block_scope", run<arrive<Arrive::block_scope>>},
      {"remote_arrive_missing", run<arrive<Arrive::never>>},
      {"remote_arrive_at_no_mbarrier", run<arrive<Arrive::not_initialised>>},
      {"remote_arrive_when_the_peer_may_be_gone", run<arrive<Arrive::peer_may_be_gone>>},
      {"correct_multicast", run_multicast<Multicast::none>},
      {"multicast_without_expect_tx_in_one_block", run_multicast<Multicast::no_expect_elsewhere>},
      {"multicast_before_the_others_are_ready", run_multicast<Multicast::no_barrier_after_init>},
      {"multicast_into_a_buffer_still_read", run_multicast<Multicast::not_free>},
      {"multicast_free_in_block_scope", run_multicast<Multicast::free_in_block_scope>},
      {"multicast_to_a_rank_outside", run_multicast<Multicast::too_many_ranks>},
  };
}

}  // namespace pk
