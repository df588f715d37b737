// The attention room's interface between attention.cpp (tensors, threads) and the files compiled per instruction set
// (attention_avx2.cpp, attention_avx512.cpp, attention_amx.cpp): plain pointers and numbers, no torch type.
//
// Work is a range of tasks. Forward: a task is one key head of one batch entry with a run of its query blocks.
// Backward: one key head of one batch entry, which owns its dk, dv and the dq of its query heads, so that no sum
// depends on threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pk {

enum class Element : uint8_t { kFloat, kBFloat16, kHalf };

struct Strided {  // (batch, head, position, element): strides in elements, 1 inside a row
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct Plane {  // (batch, head, query, key): strides in elements, 0 where broadcast; key 0 or 1
  void* data = nullptr;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

struct AttentionArgs {
  Element element;  // of q, k, v, out and their gradients
  int64_t batch, heads, kv_heads, head_size, value_size;
  int64_t q_length, k_length;      // of every batch entry; packed sequences have ends instead
  const int64_t *q_ends, *k_ends;  // batch + 1 of each, or null
  const int64_t* first_element;    // of each sequence: the index of its element (0, 0, 0) in the dropout mask; or null

  // A cache, in decoding only. lengths: keys of each batch entry, or null. blocks: which block of block_size keys lies
  // where, a row of block_row for each entry, or null; then `batch` of k and v is the step from block to block.
  const int64_t* lengths;
  const int32_t* blocks;
  int64_t block_row, block_size;
  int64_t splits;  // parts of the keys, each with sums of its own in `parts`; 1: out is written at once
  float* parts;

  double scale;
  float softcap;  // 0: none
  bool causal, bottom_right;
  int64_t left, right;  // window, -1: unbounded
  const int64_t* prefix;

  Strided q, k, v, out, dout, dq, dk, dv;
  Strided lse;        // float; row is the stride between queries
  float* lse_low;     // what rounding lse to a float has left out; strides as lse; null: not wanted
  const float* dlse;  // strides as lse
  const float* slopes;
  int64_t slopes_batch;
  const float* sinks;
  Plane bias;
  Element bias_element;
  Plane dbias;  // zeroed; data null: not wanted
  Element dbias_element;
  bool dbias_once;  // every element belongs to one score and is stored; else dbias is float and accumulated
  Plane mask;       // bytes
  Plane seen;       // bytes, by key head, no queries; null: all keys matter, else those of 0 are read as zeros

  bool dropout;
  uint64_t threshold, seed;  // an element is kept iff its word >= threshold
  float keep_scale;
};

struct AttentionKernels {
  int64_t block_q;                                // queries in a block: the unit of forward's runs
  size_t (*forward_bytes)(const AttentionArgs&);  // of scratch memory, for a thread
  size_t (*backward_bytes)(const AttentionArgs&);
  // The query blocks [first, last) of key head `kv` of batch entry `b`.
  void (*forward)(const AttentionArgs&, void* scratch, int64_t b, int64_t kv, int64_t first, int64_t last);
  void (*backward)(const AttentionArgs&, void* scratch, int64_t b, int64_t kv);
  // Clears the bytes of `seen` (k_length) of the keys that no query of the key head sees, for all masks together.
  void (*find_seen)(const AttentionArgs&, int64_t b, int64_t kv, uint8_t* seen);
  // Forward of calls with few queries: tasks [first, last), each one of the `splits` parts of the keys of a key head,
  // in the order (entry, key head, part); with more than one part they are then merged, a key head at a time. Of the
  // tile registers without bias, mask and dropout only.
  size_t (*decode_bytes)(const AttentionArgs&);
  void (*decode)(const AttentionArgs&, void* scratch, int64_t first, int64_t last);
  void (*decode_merge)(const AttentionArgs&, void* scratch, int64_t b, int64_t kv);
  int64_t (*decode_part)(const AttentionArgs&);  // floats in `parts` for each key head of each entry and each part
};

const AttentionKernels* attention_kernels_avx2();
const AttentionKernels* attention_kernels_avx512();
const AttentionKernels* attention_kernels_amx();  // bfloat16 only

}  // namespace pk
