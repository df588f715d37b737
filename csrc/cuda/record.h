// Ids as kernels read them, and where kernels tell of invalid ones.
#pragma once
#include "platform.h"

namespace pk {

struct Ids {
  const void* data;
  bool narrow;
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return narrow ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

// See pykernels/_errors.py for the words; null: nothing is told.
struct Record {
  int64_t* words;
  int64_t what;
  __device__ __forceinline__ void report(int64_t position, int64_t value, int64_t bound, int64_t table) const {
    auto* const state = reinterpret_cast<unsigned long long*>(words);
    if (!words || atomicCAS(state, 0ull, 1ull) != 0ull) return;
    words[1] = what;
    words[2] = position;
    words[3] = value;
    words[4] = bound;
    words[5] = table;
    __threadfence_system();  // the host, which waits for nothing, must not see half a record
    atomicExch(state, 2ull);
  }
};

}  // namespace pk
