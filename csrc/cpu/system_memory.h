// How much memory this process may use, and how much of it is free now: the machine's figures and those of every
// control group that the process is in (versions 1 and 2), whichever is least.
#pragma once
#include <cstdint>
#include <string>

namespace pk {

struct SystemMemory {
  int64_t limit = 0;      // bytes in all; 0: nothing could be read
  int64_t available = 0;  // bytes that can be had without swapping; file pages that the kernel may drop count
};

// `proc` and `cgroup` are where those file systems are mounted.
SystemMemory system_memory(const std::string& proc = "/proc", const std::string& cgroup = "/sys/fs/cgroup");

}  // namespace pk
