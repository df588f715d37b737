// Kernels that prove the emulator: planted bugs its checks must find, and correct ones they must not.
#pragma once
#include <vector>

namespace pk {

// Every case computes out[i] = in[n - 1 - i] + 1 for n = 128 elements, if it is correct or its bug stays hidden.
struct Case {
  const char* name;
  void (*run)(const float* in, float* out, int n);
};
std::vector<Case> block_cases();    // selftest_block.cu: barriers, shared memory, warps
std::vector<Case> async_cases();    // selftest_async.cu: cp.async, bounds, alignment, spinning, stack
std::vector<Case> grid_cases();     // selftest_grid.cu: between blocks: races, fences, atomics, grid barriers
std::vector<Case> hopper_cases();   // selftest_hopper.cu: TMA, mbarriers, wgmma, proxies
std::vector<Case> cluster_cases();  // selftest_cluster.cu: distributed shared memory, cluster barriers, multicast

}  // namespace pk
