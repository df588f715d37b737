// What is done to a tile of scores between the products: caps, biases, masks, dropout; and which keys a query sees at
// all.
//
// A tile is S^T: row = key, column = query, so that every reduction of the softmax is vertical. Scores are in units of
// log 2 (the softmax is made of powers of two). Included once per instruction set, everything in an anonymous
// namespace.
#pragma once
#include <cmath>

#include "attention_kernels.h"
#include "math.h"
#include "philox.h"
#include "rows_float.h"

namespace pk {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.69314718055994531;
constexpr float kLowest = -3.402823466e38f, kInfinity = __builtin_inff();

// 2^x for x <= 0 or little above, by a polynomial of this degree: 6 to float32 rounding (minimax error 2e-9), 5 to 9e-8
// where the sum is kept in float32, 4 to 3e-6 where all that is made of it is rounded to 16 bits. Exactly 0 below
// 2^-126 and at -inf: denormal products would be slow. A NaN stays. kFlushed: the processor makes denormals zeros (see
// amx.h).
template <int kDegree, bool kFlushed = false>
PK_INLINE VecF exp2_of(VecF x) {
#if defined(CPU_CAPABILITY_AVX512)
  const VecF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const VecF whole = _mm256_floor_ps(x), f = x - whole;
#endif
  VecF p;
  if constexpr (kDegree == 6) {
    p = polynomial(f, VecF(1.f), VecF(0.693146984f), VecF(0.240229836f), VecF(0.055483342f), VecF(0.00967884095f),
                   VecF(0.0012439688f), VecF(0.000217022555f));
  } else if constexpr (kDegree == 5) {
    p = polynomial(f, VecF(0.999999925f), VecF(0.693153073f), VecF(0.240153617f), VecF(0.0558263177f),
                   VecF(0.00898934028f), VecF(0.00187757668f));
  } else {
    static_assert(kDegree == 4);
    p = polynomial(f, VecF(1.00000259f), VecF(0.693003835f), VecF(0.241442754f), VecF(0.0520114623f),
                   VecF(0.013534168f));
  }
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kFlushed) return _mm512_scalef_ps(p, x);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ), p, x);  // floors x itself
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  const VecF scaled = p * VecF(_mm256_castsi256_ps(exponent));
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.f), _CMP_NLT_UQ), scaled);
#endif
}

// One query head of one batch entry.
struct Head {
  int64_t b, h, kv;
  int64_t q_start, q_length, k_start, k_length;  // starts: of packed sequences
  int64_t offset;                                // query i stands at key i + offset
  int64_t prefix;
  int64_t first_element;
  float slope, sink;  // in units of log 2
  const char *bias, *mask;
  const uint8_t* seen;
};

PK_INLINE Head head_of(const AttentionArgs& a, int64_t b, int64_t h) {
  Head x{};
  x.b = a.q_ends ? 0 : b;
  x.h = h;
  x.kv = h / (a.heads / a.kv_heads);
  x.q_length = a.q_length;
  x.k_length = a.k_length;
  if (a.q_ends) {
    x.q_start = a.q_ends[b];
    x.q_length = a.q_ends[b + 1] - x.q_start;
    x.k_start = a.k_ends[b];
    x.k_length = a.k_ends[b + 1] - x.k_start;
  }
  if (a.lengths) x.k_length = a.lengths[b];
  x.offset = a.bottom_right ? x.k_length - x.q_length : 0;
  x.prefix = a.prefix ? a.prefix[b] : 0;
  const int64_t first = a.first_element ? a.first_element[b] : b * a.heads * x.q_length * x.k_length;
  x.first_element = first + h * x.q_length * x.k_length;
  x.slope = a.slopes ? a.slopes[b * a.slopes_batch + h] * kLog2E : 0.f;
  x.sink = a.sinks ? a.sinks[h] * kLog2E : -kInfinity;
  const int64_t bias_size = size_of(a.bias_element);
  if (a.bias.data) x.bias = static_cast<const char*>(a.bias.data) + (b * a.bias.batch + h * a.bias.head) * bias_size;
  if (a.mask.data) x.mask = static_cast<const char*>(a.mask.data) + b * a.mask.batch + h * a.mask.head;
  if (a.seen.data) x.seen = static_cast<const uint8_t*>(a.seen.data) + b * a.seen.batch + x.kv * a.seen.head;
  return x;
}

// Where the online softmax starts: the sink is a score that has been seen already.
PK_INLINE float first_top(const Head& x) { return x.sink > kLowest ? x.sink : kLowest; }
PK_INLINE float first_total(const Head& x) { return x.sink > kLowest ? 1.f : 0.f; }

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys query i may see by its position: one interval, whose ends never decrease with i.
PK_INLINE Span keys_of(const AttentionArgs& a, const Head& x, int64_t i) {
  const int64_t place = i + x.offset;
  Span span{0, x.k_length};
  if (a.left >= 0 && place > a.left) span.begin = place - a.left;
  if (a.causal) span.end = smaller(span.end, larger(place + 1, x.prefix));
  if (a.right >= 0) span.end = smaller(span.end, place + a.right + 1);
  span.begin = smaller(span.begin, x.k_length);
  span.end = larger(span.end, 0);
  return span;
}

// Of the queries [q0, q0 + nq) together.
PK_INLINE Span keys_of(const AttentionArgs& a, const Head& x, int64_t q0, int64_t nq) {
  return {keys_of(a, x, q0).begin, keys_of(a, x, q0 + nq - 1).end};
}

struct Tile {
  int64_t k0, nk, q0, nq;
};

PK_INLINE bool all_seen(const uint8_t* seen, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!seen[i]) return false;
  }
  return true;
}
PK_INLINE bool none_seen(const uint8_t* seen, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (seen[i]) return false;
  }
  return true;
}

PK_INLINE bool inside(const AttentionArgs& a, const Head& x, const Tile& t) {
  return keys_of(a, x, t.q0 + t.nq - 1).begin <= t.k0 && keys_of(a, x, t.q0).end >= t.k0 + t.nk;
}

enum class Seen : uint8_t { kNothing, kSome, kAll };

// What a bool mask leaves of a tile (a mask that no query or no key tells apart is read in full all the same).
PK_INLINE Seen mask_of(const AttentionArgs& a, const Head& x, const Tile& t) {
  if (!x.mask) return Seen::kAll;
  bool any = false, all = true;
  const int64_t rows = a.mask.query ? t.nq : 1, cols = a.mask.key ? t.nk : 1;
  for (int64_t i = 0; i < rows; ++i) {
    const auto* row = reinterpret_cast<const uint8_t*>(x.mask) + (t.q0 + i) * a.mask.query + t.k0 * a.mask.key;
    uint8_t either = 0, both = 1;
    for (int64_t j = 0; j < cols; ++j) {
      either |= row[j];
      both &= row[j];
    }
    any |= either != 0;
    all &= both != 0;
    if (any && !all) return Seen::kSome;
  }
  return all ? Seen::kAll : any ? Seen::kSome : Seen::kNothing;
}

// What has to be done to the scores of a tile.
struct Edits {
  bool skip, scores, interval, mask, seen;
  bool any() const { return scores || interval || mask || seen; }
};

PK_INLINE Edits edits_of(const AttentionArgs& a, const Head& x, const Tile& t, bool whole) {
  Edits e{};
  e.scores = a.softcap > 0.f || x.slope != 0.f || x.bias;
  e.interval = !whole;
  if (!x.seen && !x.mask) return e;
  if (x.seen) {
    e.skip = none_seen(x.seen + t.k0, t.nk);
    e.seen = !all_seen(x.seen + t.k0, t.nk);
  }
  const Seen mask = e.skip ? Seen::kAll : mask_of(a, x, t);
  e.skip |= mask == Seen::kNothing;
  e.mask = mask == Seen::kSome;
  return e;
}
PK_INLINE Edits edits_of(const AttentionArgs& a, const Head& x, const Tile& t) {
  return edits_of(a, x, t, inside(a, x, t));
}

// s[j][i] = edit(s[j][i], bias or mask at (query q0 + i, key k0 + j)), for a plane broadcast in any way. `row(p, n)`
// loads n elements from p; `size` is the plane's element size; `buffer` holds nk x width floats.
template <class Row, class Edit>
PK_INLINE void with_plane(const Plane& plane, const char* base, int64_t size, const Tile& t, int64_t width, float* s,
                          float* buffer, Row row, Edit edit) {
  const auto* start = base + (t.q0 * plane.query + t.k0 * plane.key) * size;
  if (plane.query && plane.key) {
    transpose_rows(t.nq, width, t.nk, buffer, width, [&](int64_t i, int64_t j, int64_t n) PK_LAMBDA {
      return row(start + (i * plane.query + j) * size, n);
    });
    for (int64_t z = 0; z < t.nk * width; z += kWidth) edit(VecF::loadu(s + z), VecF::loadu(buffer + z)).store(s + z);
  } else if (plane.key) {
    for (int64_t j = 0; j < t.nk; ++j) {
      alignas(64) float one[kWidth];
      row(start + j * size, 1).store(one);
      for (int64_t z = j * width; z < (j + 1) * width; z += kWidth) edit(VecF::loadu(s + z), VecF(one[0])).store(s + z);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      alignas(64) float one[kWidth];
      row(start + (i < t.nq ? i : 0) * plane.query * size, 1).store(one);
      buffer[i] = one[0];
    }
    for (int64_t j = 0; j < t.nk; ++j) {
      for (int64_t c = 0; c < width; c += kWidth) {
        edit(VecF::loadu(s + j * width + c), VecF::loadu(buffer + c)).store(s + j * width + c);
      }
    }
  }
}

// The lowest number of a bias's dtype means -inf: a mask written with finfo.min.
PK_INLINE float lowest_of(Element e) {
  return e == Element::kFloat ? kLowest : e == Element::kHalf ? -65504.f : -3.38953139e38f;
}

__attribute__((noinline)) void add_bias(const AttentionArgs& a, const Head& x, const Tile& t, int64_t width, float* s,
                                        float* buffer) {
  const Element e = a.bias_element;
  const VecF lowest(lowest_of(e));
  with_plane(
      a.bias, x.bias, size_of(e), t, width, s, buffer,
      [&](const char* p, int64_t n) PK_LAMBDA { return load_row(e, p, 0, n); },
      [&](VecF score, VecF bias) PK_LAMBDA {
        return select_positive(bias - lowest, fmadd(bias, VecF(kLog2E), score), bias - VecF(kInfinity));
      });
}

// Asks for the part `part` of `parts` of what a later tile will read of the bias and add to its gradient. Down a column
// of tiles every row is on another page, which the processor does not fetch ahead by itself.
PK_INLINE void fetch_bias(const AttentionArgs& a, const Head& x, int64_t b, const Tile& t, int64_t part,
                          int64_t parts) {
  const auto fetch = [&](const Plane& plane, const char* base, int64_t size) PK_LAMBDA {
    if (!plane.query || !plane.key) return;
    for (int64_t i = t.q0 + part * t.nq / parts; i < t.q0 + (part + 1) * t.nq / parts; ++i) {
      const char* const row = base + (i * plane.query + t.k0) * size;
      for (int64_t byte = 0; byte < t.nk * size; byte += 64) _mm_prefetch(row + byte, _MM_HINT_T0);
    }
  };
  if (x.bias) fetch(a.bias, x.bias, size_of(a.bias_element));
  if (a.dbias.data) {
    const int64_t size = size_of(a.dbias_element), at = b * a.dbias.batch + x.h * a.dbias.head;
    fetch(a.dbias, static_cast<const char*>(a.dbias.data) + at * size, size);
  }
}

__attribute__((noinline)) void apply_mask(const AttentionArgs& a, const Head& x, const Tile& t, int64_t width, float* s,
                                          float* buffer) {
  with_plane(
      a.mask, x.mask, 1, t, width, s, buffer,
      [](const char* p, int64_t n) PK_LAMBDA { return load_mask(reinterpret_cast<const uint8_t*>(p), n); },
      [](VecF score, VecF hidden) PK_LAMBDA { return select_sign(hidden, VecF(-kInfinity), score); });
}

__attribute__((noinline)) void apply_interval(const AttentionArgs& a, const Head& x, const Tile& t, int64_t width,
                                              float* s) {
  for (int64_t c = 0; c < width; c += kWidth) {
    alignas(64) float begin[kWidth], end[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const Span span = keys_of(a, x, smaller(t.q0 + c + i, x.q_length - 1));
      begin[i] = static_cast<float>(larger(span.begin - t.k0, -1));
      end[i] = static_cast<float>(smaller(span.end - t.k0, t.nk)) - 0.5f;
    }
    const VecF first = VecF::loadu(begin), last = VecF::loadu(end);
    for (int64_t j = 0; j < t.nk; ++j) {
      const VecF key(static_cast<float>(j));
      float* const p = s + j * width + c;
      const VecF out = select_sign(key - first, VecF(-kInfinity), VecF::loadu(p));
      select_sign(last - key, VecF(-kInfinity), out).store(p);
    }
  }
}

// All edits of a tile whose product is still to be multiplied by `factor`; `slope` (may be null) takes the derivative
// of the cap. `buffer`: nk x width floats.
__attribute__((noinline)) void edit_scores(const AttentionArgs& a, const Head& x, const Edits& e, const Tile& t,
                                           int64_t width, float factor, float* s, float* slope, float* buffer) {
  const int64_t n = t.nk * width;
  if (a.softcap > 0.f) {
    const VecF cap(a.softcap * kLog2E), by(factor);
    for (int64_t z = 0; z < n; z += kWidth) {
      const VecF u = Math<float, true>::tanh(VecF::loadu(s + z) * by);
      (u * cap).store(s + z);
      if (slope) negated_fmadd(u, u, VecF(1.f)).store(slope + z);
    }
  } else if (factor != 1.f) {
    const VecF by(factor);
    for (int64_t z = 0; z < n; z += kWidth) (VecF::loadu(s + z) * by).store(s + z);
  }
  if (x.slope != 0.f) {
    alignas(64) float lane[kWidth];
    for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<float>(i);
    const VecF ramp = VecF::loadu(lane), slope_by(x.slope);
    for (int64_t c = 0; c < width; c += kWidth) {
      const VecF place = ramp + VecF(static_cast<float>(t.q0 + c + x.offset - t.k0));
      for (int64_t j = 0; j < t.nk; ++j) {
        float* const p = s + j * width + c;
        negated_fmadd(slope_by, (place - VecF(static_cast<float>(j))).abs(), VecF::loadu(p)).store(p);
      }
    }
  }
  if (x.bias) add_bias(a, x, t, width, s, buffer);
  if (e.mask) apply_mask(a, x, t, width, s, buffer);
  if (e.interval) apply_interval(a, x, t, width, s);
  if (e.seen) {
    for (int64_t j = 0; j < t.nk; ++j) {
      if (x.seen[t.k0 + j]) continue;
      for (int64_t c = 0; c < width; c += kWidth) VecF(-kInfinity).store(s + j * width + c);
    }
  }
}

// dbias = ds (nk x width) where every element is stored once, dbias (float, broadcast in any way) += ds elsewhere.
__attribute__((noinline)) void add_to_dbias(const AttentionArgs& a, const Head& x, int64_t b, const Tile& t,
                                            int64_t width, const float* ds) {
  const Plane& plane = a.dbias;
  const int64_t start = b * plane.batch + x.h * plane.head + t.q0 * plane.query + t.k0 * plane.key;
  if (a.dbias_once) {
    char* const first = static_cast<char*>(plane.data) + start * size_of(a.dbias_element);
    const int64_t step = plane.query * size_of(a.dbias_element);
    transpose_columns(ds, width, t.nq, t.nk, [&](int64_t i, int64_t j, VecF v, int64_t n) PK_LAMBDA {
      store_row(a.dbias_element, first + i * step, j, v, n);
    });
    return;
  }
  float* const base = static_cast<float*>(plane.data) + start;
  if (plane.query && plane.key) {
    transpose_columns(ds, width, t.nq, t.nk, [&](int64_t i, int64_t j, VecF v, int64_t n) PK_LAMBDA {
      float* const p = base + i * plane.query + j;
      store_row(Element::kFloat, p, 0, load_row(Element::kFloat, p, 0, n) + v, n);
    });
  } else if (plane.key) {
    for (int64_t j = 0; j < t.nk; ++j) {
      float total = 0.f;
      for (int64_t i = 0; i < t.nq; ++i) total += ds[j * width + i];
      base[j] += total;
    }
  } else {
    for (int64_t c = 0; c < t.nq; c += kWidth) {
      VecF total(0.f);
      for (int64_t j = 0; j < t.nk; ++j) total = total + VecF::loadu(ds + j * width + c);
      alignas(64) float lanes[kWidth];
      total.store(lanes);
      for (int64_t i = 0; i < smaller(kWidth, t.nq - c); ++i) base[(c + i) * plane.query] += lanes[i];
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// even lanes decided by the words in `even`, odd lanes by those in `odd`
PK_INLINE VecF kept(Word64 even, Word64 odd, uint64_t threshold, VecF value) {
  if (threshold > UINT32_MAX) return VecF(0.f);
  const __m512i word = _mm512_mask_blend_epi32(0xAAAA, even.v, _mm512_slli_epi64(odd.v, 32));
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(word, _mm512_set1_epi32(static_cast<int>(threshold))), value);
}
#else
PK_INLINE VecF kept(Word64 even, Word64 odd, uint64_t threshold, VecF value) {
  if (threshold > UINT32_MAX) return VecF(0.f);
  const __m256i word = _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xAA);
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(word, least), word)), value);
}
#endif

// Dropout's decisions for one key and the kWidth queries from i on: value where kept, else 0.
struct Dropout {
  uint64_t seed, threshold;
  int64_t first, k_length;

  PK_INLINE VecF keep(int64_t key, int64_t i, VecF value) const {
    const int64_t start = first + i * k_length + key;
    const Word64 even = philox_words(seed, Word64::ramp(start, 2 * k_length));
    const Word64 odd = philox_words(seed, Word64::ramp(start + k_length, 2 * k_length));
    return kept(even, odd, threshold, value);
  }
};

PK_INLINE Dropout dropout_of(const AttentionArgs& a, const Head& x) {
  return {a.seed, a.threshold, x.first_element, x.k_length};
}

}  // namespace
}  // namespace pk
