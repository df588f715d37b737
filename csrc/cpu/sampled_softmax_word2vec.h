// What word2vec's loop is told (raw memory, no tensors), and the loop for each instruction set.
#pragma once
#include <cstdint>

namespace pk {

constexpr int kMostRows = 256;   // output rows of one step: the word and its negatives, or a path through the tree
constexpr int kMostWindow = 64;  // words on either side
constexpr int64_t kMostSentence = 10000;  // a longer sentence is split, as every trainer does
constexpr int64_t kFirstCopies = 16;      // rows that are merged most often; each further class has twice as many
constexpr int kCopyClasses = 8;

// Skip-gram pair by pair; skip-gram with one set of targets for the window, its products before its updates; CBOW.
enum class Word2VecMode { kPair, kWindow, kCbow };

struct Word2VecArgs {
  float* vectors{};  // (vocabulary, width)
  float* outputs{};  // (vocabulary, width), or one row for each inner node of the tree
  int64_t vector_stride{}, output_stride{}, vocabulary{}, output_rows{}, width{};
  const int32_t* tokens{};
  const int64_t* offsets{};  // sentence s: tokens [offsets[s], offsets[s + 1])
  int64_t sentences{};
  const uint32_t* keep{};   // a word is kept iff its draw < keep; the largest value: always
  const uint64_t* noise{};  // alias table: threshold in the low half, the other word in the high half
  const int32_t* points{};  // hierarchical softmax: rows of `outputs` on the word's path, from starts[word]
  const int8_t* codes{};    // the turn taken there: label 1 - code
  const int64_t* starts{};
  Word2VecMode mode{};
  int window{}, negatives{};
  bool classic{};  // CBOW: the whole error to every context word, as the first trainers did
  bool with_loss{};
  float first_rate{}, last_rate{};
  uint64_t seed{};
  int64_t first_sentence{};  // number, over all calls, of sentence 0 of this one
  // With threads: how many rows of `outputs` a thread has copies of, this thread's (copies, then their last common
  // state), the words between two merges, and a lock for each class. See sampled_softmax_word2vec_copies.h.
  int64_t copied{}, copy_stride{}, beat{};
  float* copies{};
  int32_t* locks{};

  float* output(int64_t row) const { return row < copied ? copies + row * copy_stride : outputs + row * output_stride; }
};

struct Word2VecCounts {
  int64_t words{}, pairs{};
  double loss{};
};

struct Word2VecKernels {
  void (*train)(const Word2VecArgs&, int64_t begin, int64_t end, Word2VecCounts&);  // sentences
};

const Word2VecKernels* word2vec_kernels_avx2();
const Word2VecKernels* word2vec_kernels_avx512();

}  // namespace pk
