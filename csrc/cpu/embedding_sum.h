// Sums of the rows of dy that a run of sorted positions points to: what gradients and row updates share.
//
// Included once per instruction set, anonymous namespace: see simd.h.
#pragma once
#include <algorithm>
#include <type_traits>

#include "embedding_kernels.h"
#include "embedding_lanes.h"

namespace pk {
namespace {

// Rows asked for ahead of their use. A row from memory takes as long as the work on eight of 512 bytes.
constexpr int64_t kRowsAhead = 8;
// One line of a row is asked for before that. In a large table it is on a page of its own, whose address takes as long
// to find as the row to fetch; that holds up the seven lines behind it.
constexpr int64_t kPagesAhead = 32;

// While the row of ids[p] is in use. Inlined by force: a function that only prefetches is pure to the compiler (GCC
// 12), and its calls are dropped.
template <class Id>
PK_INLINE void ask_ahead(const void* table, int64_t stride, int64_t bytes, const Id* ids, int64_t p, int64_t last) {
  const char* const rows = static_cast<const char*>(table);
  ask_for_row(rows + int64_t{ids[std::min(p + kPagesAhead, last)]} * stride, 1);
  ask_for_row(rows + int64_t{ids[std::min(p + kRowsAhead, last)]} * stride, bytes);
}

template <class Call>
PK_INLINE void with_ids(const Ids& ids, Call call) {
  ids.narrow ? call(static_cast<const int32_t*>(ids.data)) : call(static_cast<const int64_t*>(ids.data));
}

template <class Call>
PK_INLINE void with_lanes(TableDtype dtype, Call call) {
  switch (dtype) {
    case TableDtype::kFloat:
      return call(RowLanes<float>{});
    case TableDtype::kDouble:
      return call(RowLanes<double>{});
    case TableDtype::kBFloat16:
      return call(BFloat16Row{});
    case TableDtype::kHalf:
      return call(HalfRow{});
  }
}

PK_INLINE VecF where_place(const int32_t* places, int32_t place, VecF x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(places), _mm512_set1_epi32(place)), x);
#else
  const __m256i found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(found, _mm256_set1_epi32(place))), x);
#endif
}
PK_INLINE VecD where_place(const int32_t* places, int32_t place, VecD x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i found = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  return _mm512_maskz_mov_pd(_mm256_cmpeq_epi32_mask(found, _mm256_set1_epi32(place)), x);
#else
  const __m128i equal =
      _mm_cmpeq_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)), _mm_set1_epi32(place));
  return _mm256_and_pd(_mm256_castsi256_pd(_mm256_cvtepi32_epi64(equal)), x);
#endif
}

enum class Term { kRow, kBag, kScaledBag, kMaximum };

// Sums the rows of dy that the entries [begin, end) point to, in their order; emit(column, block, n) takes the sums.
template <class L, Term kTerm, class Emit>
PK_INLINE void sum_entries(const SegmentArgs& a, int64_t begin, int64_t end, Emit emit) {
  using T = typename L::Scalar;
  using V = typename L::V;
  const T* const dy = static_cast<const T*>(a.dy);
  const auto row_of = [&](int64_t entry) {
    const int64_t p = static_cast<int64_t>(a.entries[entry] & a.position_mask);
    return dy + (kTerm == Term::kRow ? p : int64_t{a.bag_of[p]}) * a.dy_stride;
  };
  for_columns<L>(a.cols, [&]<int K>(int64_t c, Count<K>, int64_t n) {
    Block<L, K> sum, x;
    for (auto& v : sum.v) v = V(0);
    for (int64_t i = begin; i < end; ++i) {
      if (c == 0) {
        const int64_t next = std::min(i + kRowsAhead, a.last);
        ask_for_row(row_of(next), a.cols * int64_t{sizeof(T)});
      }
      const T* const row = row_of(i);
      x.load(row + c, n);
      const int64_t p = static_cast<int64_t>(a.entries[i] & a.position_mask);
      if constexpr (kTerm == Term::kScaledBag) {
        const V factor(static_cast<const typename L::Sum*>(a.coefficient)[p]);
        for (int k = 0; k < x.kVectors; ++k) sum.v[k] = fmadd(x.v[k], factor, sum.v[k]);
      } else if constexpr (kTerm == Term::kMaximum) {
        const int32_t* places = a.maxima + int64_t{a.bag_of[p]} * a.cols + c;
        int32_t rest[L::kSize];
        if constexpr (K == 0) {
          std::fill_n(rest, L::kSize, -1);
          std::copy_n(places, n, rest);
          places = rest;
        }
        const int32_t place = static_cast<int32_t>(a.place[p]);
        for (int k = 0; k < x.kVectors; ++k) {
          sum.v[k] = sum.v[k] + where_place(places + k * L::kSize, place, x.v[k]);
        }
      } else {
        for (int k = 0; k < x.kVectors; ++k) sum.v[k] = sum.v[k] + x.v[k];
      }
    }
    emit(c, sum, n);
  });
}

template <class Call>
PK_INLINE void with_term(const SegmentArgs& a, Call call) {
  with_lanes(a.dtype, [&]<class L>(L lanes) {
    if (a.maxima) return call(lanes, std::integral_constant<Term, Term::kMaximum>{});
    if (a.coefficient) return call(lanes, std::integral_constant<Term, Term::kScaledBag>{});
    if (a.bag_of) return call(lanes, std::integral_constant<Term, Term::kBag>{});
    return call(lanes, std::integral_constant<Term, Term::kRow>{});
  });
}

// The sum of a run, over its pieces where it is a long one; emit(column, block, n) takes it.
template <class L, Term kTerm, class Emit>
PK_INLINE void sum_run(const SegmentArgs& a, const Run& run, Emit emit) {
  using Wide = RowLanes<typename L::Sum>;
  using V = typename L::V;
  if (run.partial < 0) return sum_entries<L, kTerm>(a, run.begin, run.end, emit);
  const int64_t pieces = (run.end - run.begin + kPiece - 1) / kPiece;
  const auto* const partials = static_cast<const typename L::Sum*>(a.partials) + run.partial * a.cols;
  for_columns<L>(a.cols, [&]<int K>(int64_t c, Count<K>, int64_t n) {
    Block<L, K> sum;
    for (auto& v : sum.v) v = V(0);
    for (int64_t i = 0; i < pieces; ++i) {
      Block<Wide, K> x;
      x.load(partials + i * a.cols + c, n);
      for (int k = 0; k < x.kVectors; ++k) sum.v[k] = sum.v[k] + x.v[k];
    }
    emit(c, sum, n);
  });
}

}  // namespace
}  // namespace pk
