// Launchers of decoding: a few queries of each sequence over its cache of keys and values.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pk {

// Sizes, strides (in elements) and options, one int64 each and in this order: Python passes them as one tuple.
struct DecodeLayout {
  int64_t q[3], k[3], v[3], out[3];  // strides of batch, head, position; of k and v in a paged cache: of the block
  int64_t table, slopes;             // strides of batch
  int64_t batch, heads, group, lq;   // group: query heads that share a key head
  int64_t limit;                     // keys a sequence can have
  int64_t blocks, block_size;        // of a paged cache
  int64_t d, dv;                     // head sizes: whole 16-byte units
  int64_t left;                      // window, at most limit (unbounded)
  int64_t splits;                    // parts of the keys
  int64_t long_lengths;              // lengths are int64, else int32
  int64_t what;                      // the code that wrong lengths are reported by, wrong blocks by one more
  int64_t exact;                     // float32 products to float32 accuracy; 0: tf32 is enough
};

// scale: gives logits in powers of two; with a softcap the argument of tanh, and `softcap` (0: none) the rest.
struct DecodeNumbers {
  float scale, softcap;
};

// Null: absent.  lengths: keys of each sequence (null: `limit`); one out of range has none.  table: blocks of each
// sequence; one out of range is not seen.  part: for each query, head and part of the keys dv float32 sums, with top
// and total beside them; null: there is one part, and out and lse are written at once.
// record: where wrong values are told of.
struct Decode {
  const void *q, *k, *v, *lengths;
  const int32_t* table;
  const float *sinks, *slopes;
  void* out;
  float *lse, *part, *top, *total;
  int64_t* record;
  DecodeLayout n;
  DecodeNumbers x;
};

// out and the log-sum-exp of each query's logits; with several parts their sums, for attention_decode_merge.
void attention_decode(const Decode& a, DType dtype, void* stream);
void attention_decode_merge(const Decode& a, DType dtype, void* stream);

}  // namespace pk
