// A thread's own copies of the output rows that all threads write all the time: without them, the cache lines of
// frequent words and of the nodes near a tree's root wander between cores with every pair.
//
// Words come by descending frequency and nodes from the root, so these are the first rows. They are merged by adding to
// the table what a thread changed, and taking the result back. Class c, rows [16 (2^c - 1), 16 (2^(c + 1) - 1)), is
// merged every 2^(c + 1) beats: the more often a row is written, the less may it drift from what the others made of it,
// and every class costs the same. Rows of `vectors` are not copied: a context is one of a sentence's few words, used
// again and again for a moment by one thread. Included once per instruction set, anonymous namespace: see simd.h.
#pragma once
#include <sched.h>

#include <algorithm>

#include "sampled_softmax_word2vec.h"
#include "sampled_softmax_word2vec_rows.h"

namespace pk {
namespace {

class Copies {
 public:
  explicit Copies(const Word2VecArgs& a) : a_(a), left_(a.beat) {
    for (int c = 0; first_of(c) < a.copied; ++c) {
      lock(c);
      for_rows_of(c, [&](const float* shared, float* own, float* base) {
        std::copy_n(shared, a.width, own);
        std::copy_n(shared, a.width, base);
      });
      unlock(c);
    }
  }

  // Called with every word.
  PK_INLINE void beat() {
    if (__builtin_expect(a_.copied && --left_ == 0, false)) merge_next();
  }

  // The table has all of it when every thread has called this.
  void finish() {
    for (int c = 0; first_of(c) < a_.copied; ++c) {
      lock(c);
      merge(c);
      unlock(c);
    }
  }

 private:
  static int64_t first_of(int c) { return ((int64_t{1} << c) - 1) * kFirstCopies; }

  template <class Step>
  PK_INLINE void for_rows_of(int c, Step step) {
    const int64_t last = std::min(first_of(c + 1), a_.copied), base = a_.copied * a_.copy_stride;
    for (int64_t row = first_of(c); row < last; ++row) {
      float* const own = a_.copies + row * a_.copy_stride;
      step(a_.outputs + row * a_.output_stride, own, own + base);
    }
  }

  __attribute__((noinline)) void merge_next() {
    left_ = a_.beat;
    const int c = __builtin_ctzll(++beats_);
    if (first_of(c) >= a_.copied || !try_lock(c)) return;  // another thread is at it: its turn comes again
    merge(c);
    unlock(c);
  }
  void merge(int c) {
    for_rows_of(c, [&](float* shared, float* own, float* base) __attribute__((always_inline)) {
      for_blocks<0>(a_.width, [&](int64_t at, auto block, int64_t n) __attribute__((always_inline)) {
        constexpr int kBlock = decltype(block)::value, kCount = kBlock ? kBlock : 1;
        for (int b = 0; b < kCount; ++b) {
          const VecF changed = load_one<kBlock>(own + at, b, n) - load_one<kBlock>(base + at, b, n);
          const VecF sum = load_one<kBlock>(shared + at, b, n) + changed;
          store_one<kBlock>(shared + at, b, sum, n);
          store_one<kBlock>(own + at, b, sum, n);
          store_one<kBlock>(base + at, b, sum, n);
        }
      });
    });
  }

  bool try_lock(int c) { return !__atomic_exchange_n(a_.locks + c, 1, __ATOMIC_ACQUIRE); }
  void lock(int c) {
    while (!try_lock(c)) sched_yield();
  }
  void unlock(int c) { __atomic_store_n(a_.locks + c, 0, __ATOMIC_RELEASE); }

  const Word2VecArgs& a_;
  int64_t left_;
  uint64_t beats_ = 0;
};

}  // namespace
}  // namespace pk
