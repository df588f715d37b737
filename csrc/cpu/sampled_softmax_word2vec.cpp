// The operator `word2vec_step_.cpu`: checks, then sentences dealt out over threads. Its schema is defined in Python.
#include "sampled_softmax_word2vec.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "isa.h"
#include "scratch.h"

namespace pk {
namespace {

using at::Tensor;

constexpr auto kName = "word2vec_step_()";
constexpr int64_t kWordsForThread = 4096;  // words a thread must have to be worth waking
constexpr int64_t kBeat = 256;  // words of all threads between two merges of copies; at 64 they cost a tenth more

const Word2VecKernels& kernels() {
  TORCH_CHECK(isa() != Isa::kNone, isa_refusal());
  static const Word2VecKernels* const found =
      isa() == Isa::kAvx512 ? word2vec_kernels_avx512() : word2vec_kernels_avx2();
  return *found;
}

template <class T>
const T* data(const Tensor& x, at::ScalarType dtype, int64_t least, const char* argument) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 1 && x.is_contiguous() && x.scalar_type() == dtype, kName,
              ": argument '", argument, "' must be a contiguous 1-D ", dtype, " tensor on the CPU");
  TORCH_CHECK(x.numel() >= least, kName, ": argument '", argument, "' must have at least ", least, " elements, not ",
              x.numel());
  return static_cast<const T*>(x.const_data_ptr());
}

// Its rows, and how far apart they are.
float* table(Tensor& x, const char* argument, int64_t& stride) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 2 && x.stride(1) == 1 && x.scalar_type() == at::kFloat, kName,
              ": argument '", argument, "' must be a 2-D float32 tensor with contiguous rows on the CPU");
  stride = x.size(0) > 1 ? x.stride(0) : x.size(1);
  TORCH_CHECK(stride >= x.size(1), kName, ": argument '", argument,
              "' is written to, so its rows must not overlap: ", x.sizes(), " with strides ", x.strides());
  return x.mutable_data_ptr<float>();
}

// Everything that is read from an index is looked at first: a wrong one must leave the tables as they are.
void check_below(const int32_t* ids, int64_t count, int64_t bound, const char* argument) {
  uint32_t largest = 0;  // a negative id is a large one
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  if (count == 0 || largest < static_cast<uint64_t>(bound)) return;
  int64_t i = 0;
  while (static_cast<uint32_t>(ids[i]) < static_cast<uint64_t>(bound)) ++i;
  TORCH_CHECK_INDEX(false, kName, ": ", argument, "[", i, "] is ", ids[i], ", which is not in [0, ", bound, ")");
}

void check_spans(const int64_t* offsets, int64_t count, int64_t total, const char* argument) {
  TORCH_CHECK_VALUE(offsets[0] == 0, kName, ": ", argument, "[0] must be 0, not ", offsets[0]);
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(offsets[i] <= offsets[i + 1], kName, ": ", argument, " must not decrease, but ", argument, "[", i,
                      "] is ", offsets[i], " and ", argument, "[", i + 1, "] is ", offsets[i + 1]);
  }
  TORCH_CHECK_VALUE(offsets[count] == total, kName, ": ", argument, "[-1] must be ", total, ", not ", offsets[count]);
}

// How many rows the threads copy and how often they merge them; nothing with one thread.
void share_out(Word2VecArgs& a, int64_t words) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), words / kWordsForThread);
  if (threads < 2 || at::in_parallel_region()) return;
  a.beat = std::max<int64_t>(1, kBeat / threads);
  int classes = kCopyClasses;
  while (classes && a.beat << classes > words / threads / 4) --classes;
  a.copied = std::min(((int64_t{1} << classes) - 1) * kFirstCopies, a.output_rows);
  a.copy_stride = (a.width + 15) / 16 * 16;  // rows begin on cache lines
}

Tensor word2vec_step_(Tensor vectors, Tensor outputs, const Tensor& tokens, const Tensor& offsets, const Tensor& keep,
                      const std::optional<Tensor>& noise, const std::optional<Tensor>& points,
                      const std::optional<Tensor>& codes, const std::optional<Tensor>& starts, c10::string_view mode,
                      int64_t window, int64_t negatives, bool classic, bool with_loss, double first_rate,
                      double last_rate, int64_t seed, int64_t first_sentence) {
  Word2VecArgs a;
  a.vectors = table(vectors, "vectors", a.vector_stride);
  a.outputs = table(outputs, "outputs", a.output_stride);
  a.vocabulary = vectors.size(0);
  a.width = vectors.size(1);
  a.output_rows = outputs.size(0);
  TORCH_CHECK_VALUE(outputs.size(1) == a.width, kName, ": outputs must have the ", a.width, " columns of vectors, not ",
                    outputs.size(1));
  a.tokens = data<int32_t>(tokens, at::kInt, 0, "tokens");
  a.offsets = data<int64_t>(offsets, at::kLong, 1, "offsets");
  a.sentences = offsets.numel() - 1;
  a.keep = reinterpret_cast<const uint32_t*>(data<int32_t>(keep, at::kInt, a.vocabulary, "keep"));
  check_below(a.tokens, tokens.numel(), a.vocabulary, "tokens");
  check_spans(a.offsets, a.sentences, tokens.numel(), "offsets");
  TORCH_CHECK_VALUE(window >= 1 && window <= kMostWindow, kName, ": window must be in [1, ", kMostWindow, "], not ",
                    window);
  a.window = static_cast<int>(window);
  if (points) {
    TORCH_CHECK_VALUE(codes && starts, kName, ": points, codes and starts go together");
    a.points = data<int32_t>(*points, at::kInt, 0, "points");
    a.codes = data<int8_t>(*codes, at::kChar, points->numel(), "codes");
    a.starts = data<int64_t>(*starts, at::kLong, a.vocabulary + 1, "starts");
    check_below(a.points, points->numel(), outputs.size(0), "points");
    check_spans(a.starts, a.vocabulary, points->numel(), "starts");
    for (int64_t word = 0; word < a.vocabulary; ++word) {
      TORCH_CHECK_VALUE(a.starts[word + 1] - a.starts[word] <= kMostRows, kName, ": the path of word ", word, " has ",
                        a.starts[word + 1] - a.starts[word], " nodes, more than ", kMostRows);
    }
  } else {
    TORCH_CHECK_VALUE(noise, kName, ": noise, or points, codes and starts, must be given");
    TORCH_CHECK_VALUE(negatives >= 1 && negatives < kMostRows, kName, ": negatives must be in [1, ", kMostRows - 1,
                      "], not ", negatives);
    TORCH_CHECK_VALUE(outputs.size(0) >= a.vocabulary, kName, ": outputs must have the ", a.vocabulary,
                      " rows of vectors, not ", outputs.size(0));
    a.noise = reinterpret_cast<const uint64_t*>(data<int64_t>(*noise, at::kLong, a.vocabulary, "noise"));
    for (int64_t word = 0; word < a.vocabulary; ++word) {
      TORCH_CHECK_VALUE(static_cast<int64_t>(a.noise[word] >> 32) < a.vocabulary, kName, ": noise[", word,
                        "] leads to word ", a.noise[word] >> 32, " of ", a.vocabulary);
    }
    a.negatives = static_cast<int>(negatives);
  }
  TORCH_CHECK_VALUE(mode == "pair" || mode == "window" || mode == "cbow", kName,
                    ": mode must be pair, window or cbow, not '", mode, "'");
  a.mode = mode == "pair" ? Word2VecMode::kPair : mode == "cbow" ? Word2VecMode::kCbow : Word2VecMode::kWindow;
  a.classic = classic;
  a.with_loss = with_loss;
  a.first_rate = static_cast<float>(first_rate);
  a.last_rate = static_cast<float>(last_rate);
  a.seed = static_cast<uint64_t>(seed);
  a.first_sentence = first_sentence;

  Word2VecCounts total;
  std::mutex adding;
  // Threads take runs of sentences with about the same number of words, and write to the tables as they come (Hogwild).
  const auto sentence_at = [&](int64_t word) {
    return std::lower_bound(a.offsets, a.offsets + a.sentences, word) - a.offsets;
  };
  std::array<int32_t, kCopyClasses> locks{};
  a.locks = locks.data();
  share_out(a, tokens.numel());
  at::parallel_for(0, tokens.numel(), kWordsForThread, [&](int64_t begin, int64_t end) {
    Word2VecCounts mine;
    const int64_t last = end == tokens.numel() ? a.sentences : sentence_at(end);
    Word2VecArgs own = a;
    own.copies = static_cast<float*>(scratch(2 * a.copied * a.copy_stride * sizeof(float)));
    kernels().train(own, sentence_at(begin), last, mine);
    const std::lock_guard<std::mutex> lock(adding);
    total.words += mine.words;
    total.pairs += mine.pairs;
    total.loss += mine.loss;
  });
  Tensor counts = at::empty({3}, at::kDouble);
  double* const out = counts.mutable_data_ptr<double>();
  out[0] = static_cast<double>(total.words);
  out[1] = static_cast<double>(total.pairs);
  out[2] = total.loss;
  return counts;
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("word2vec_step_.cpu", &word2vec_step_); }

}  // namespace pk
