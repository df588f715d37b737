// `Lanes<T>`: elements of dtype T in memory <-> two compute vectors (`lo`, `hi`), whole blocks or the first `count`
// elements of one. Only elements inside the count are read or written, so a row may end anywhere.
//
// bfloat16 is split by position instead of by half: `lo` takes the even elements (a shift), `hi` the odd ones (a mask),
// and one blend puts rounded results back. The half-by-half form needs two widening loads and a narrowing shuffle, all
// on the same execution port. Elementwise work does not care about the order; code that does asks `kInterleaved`.
#pragma once
#include <cstring>
#include <type_traits>

#include "math.h"

namespace pk {
namespace {

struct Whole {};
struct Part {
  int64_t count;
};

template <class V>
struct Pair {
  V lo, hi;
};

// Asks for a block's lines ahead of time: 1 KiB is past the end of a page often enough to matter, where the hardware
// prefetcher stops, and a line that will be written is fetched as owned. Worth 5-15% on arrays that live in L3 (256 x
// 8192 float32, forward and backward); reading ahead without the writes is worth nothing.
constexpr int64_t kAhead = 1024;

template <class T>
PK_INLINE void prefetch(const T* p) {
  for (int64_t line = 0; line < 2 * int64_t{sizeof(VecF)} / (sizeof(T) == 2 ? 2 : 1); line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead + line, _MM_HINT_T0);
  }
}
template <class T>
PK_INLINE void prefetch_for_write(T* p) {
  for (int64_t line = 0; line < 2 * int64_t{sizeof(VecF)} / (sizeof(T) == 2 ? 2 : 1); line += 64) {
    asm volatile("prefetchw %0" : : "m"(*(reinterpret_cast<const char*>(p) + kAhead + line)));
  }
}

// Whether whole blocks from p on may be written past the caches (see kStreaming in activation_kernels.h).
PK_INLINE bool streams(bool wanted, const void* p) {
  return wanted && reinterpret_cast<uintptr_t>(p) % sizeof(VecF) == 0;
}
#if defined(CPU_CAPABILITY_AVX512)
PK_INLINE void stream(void* p, __m512i v) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
PK_INLINE void stream(float* p, VecF v) { _mm512_stream_ps(p, v); }
PK_INLINE void stream(double* p, VecD v) { _mm512_stream_pd(p, v); }
#else
PK_INLINE void stream(void* p, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
PK_INLINE void stream(float* p, VecF v) { _mm256_stream_ps(p, v); }
PK_INLINE void stream(double* p, VecD v) { _mm256_stream_pd(p, v); }
#endif

template <class T>
struct Lanes {  // float, double
  using Scalar = T;
  using V = at::vec::Vectorized<T>;
  using Accumulate = T;
  using Math = pk::Math<T, true>;
  static constexpr int64_t kSize = 2 * V::size();
  static constexpr bool kInterleaved = false;

  static PK_INLINE Pair<V> load(const T* p, Whole) {
    prefetch(p);
    return {V::loadu(p), V::loadu(p + V::size())};
  }
  static PK_INLINE Pair<V> load(const T* p, Part part) {
    const int64_t lo = part.count < V::size() ? part.count : V::size();
    return {V::loadu(p, lo), V::loadu(p + lo, part.count - lo)};
  }
  static PK_INLINE void store(T* p, Pair<V> v, Whole, bool streamed = false) {
    if (streamed) {
      stream(p, v.lo);
      stream(p + V::size(), v.hi);
      return;
    }
    prefetch_for_write(p);
    v.lo.store(p);
    v.hi.store(p + V::size());
  }
  static PK_INLINE void store(T* p, Pair<V> v, Part part, bool = false) {
    const int64_t lo = part.count < V::size() ? part.count : V::size();
    v.lo.store(p, lo);
    v.hi.store(p + lo, part.count - lo);
  }
  static PK_INLINE V broadcast(const T* p) { return V(*p); }
};

// Sixteen-bit types: `Words` is a register full of them.
template <class Derived>
struct SixteenBit {
  using Scalar = uint16_t;
  using V = VecF;
  using Accumulate = float;
  using Math = pk::Math<float, false>;
  static constexpr int64_t kSize = 2 * VecF::size();

#if defined(CPU_CAPABILITY_AVX512)
  using Words = __m512i;
  static PK_INLINE __mmask32 mask(Part part) { return static_cast<__mmask32>((uint64_t{1} << part.count) - 1); }
  static PK_INLINE Words read(const uint16_t* p, Whole) { return _mm512_loadu_si512(p); }
  static PK_INLINE Words read(const uint16_t* p, Part part) { return _mm512_maskz_loadu_epi16(mask(part), p); }
  static PK_INLINE void write(uint16_t* p, Words w, Whole) { _mm512_storeu_si512(p, w); }
  static PK_INLINE void write(uint16_t* p, Words w, Part part) { _mm512_mask_storeu_epi16(p, mask(part), w); }
#else
  using Words = __m256i;
  static PK_INLINE Words read(const uint16_t* p, Whole) {
    return _mm256_loadu_si256(reinterpret_cast<const Words*>(p));
  }
  static PK_INLINE Words read(const uint16_t* p, Part part) {
    alignas(32) uint16_t words[kSize] = {};
    std::memcpy(words, p, part.count * sizeof(uint16_t));
    return read(words, Whole{});
  }
  static PK_INLINE void write(uint16_t* p, Words w, Whole) { _mm256_storeu_si256(reinterpret_cast<Words*>(p), w); }
  static PK_INLINE void write(uint16_t* p, Words w, Part part) {
    alignas(32) uint16_t words[kSize];
    write(words, w, Whole{});
    std::memcpy(p, words, part.count * sizeof(uint16_t));
  }
#endif

  template <class Span>
  static PK_INLINE Pair<VecF> load(const uint16_t* p, Span span) {
    if constexpr (std::is_same_v<Span, Whole>) prefetch(p);
    return Derived::widen(read(p, span));
  }
  template <class Span>
  static PK_INLINE void store(uint16_t* p, Pair<VecF> v, Span span, bool streamed = false) {
    if constexpr (std::is_same_v<Span, Whole>) {
      if (streamed) return stream(static_cast<void*>(p), Derived::narrow(v));
      prefetch_for_write(p);
    }
    write(p, Derived::narrow(v), span);
  }
  static PK_INLINE VecF broadcast(const uint16_t* p) {
    alignas(64) uint16_t words[kSize];
    for (auto& word : words) word = *p;
    return Derived::widen(read(words, Whole{})).lo;
  }
};

struct BFloat16Lanes : SixteenBit<BFloat16Lanes> {
  static constexpr bool kInterleaved = true;

  // Round to nearest even on the bits. No NaN test is needed: every NaN here comes from a bfloat16 or is the default
  // one, and both have a zero low half, which rounding leaves alone.
#if defined(CPU_CAPABILITY_AVX512)
  static PK_INLINE Pair<VecF> widen(Words w) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static PK_INLINE Words rounded(VecF v) {
    const Words bits = _mm512_castps_si512(v);
    const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  }
  static PK_INLINE Words narrow(Pair<VecF> v) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(rounded(v.lo), 16), rounded(v.hi));
  }
#else
  static PK_INLINE Pair<VecF> widen(Words w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
  static PK_INLINE Words rounded(VecF v) {
    const Words bits = _mm256_castps_si256(v);
    const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  }
  static PK_INLINE Words narrow(Pair<VecF> v) {
    return _mm256_blend_epi16(_mm256_srli_epi32(rounded(v.lo), 16), rounded(v.hi), 0xAA);
  }
#endif
};

struct HalfLanes : SixteenBit<HalfLanes> {
  static constexpr bool kInterleaved = false;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(CPU_CAPABILITY_AVX512)
  static PK_INLINE Pair<VecF> widen(Words w) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
  }
  static PK_INLINE Words narrow(Pair<VecF> v) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(v.lo, kNearest)), _mm512_cvtps_ph(v.hi, kNearest),
                              1);
  }
#else
  static PK_INLINE Pair<VecF> widen(Words w) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(w)), _mm256_cvtph_ps(_mm256_extracti128_si256(w, 1))};
  }
  static PK_INLINE Words narrow(Pair<VecF> v) {
    return _mm256_set_m128i(_mm256_cvtps_ph(v.hi, kNearest), _mm256_cvtps_ph(v.lo, kNearest));
  }
#endif
};

// Calls step(i, Whole) for whole blocks from 0, then step(i, Part) for what is left of n.
template <class L, class Step>
PK_INLINE void for_blocks(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + L::kSize <= n; i += L::kSize) step(i, Whole{});
  if (i < n) step(i, Part{n - i});
}

}  // namespace
}  // namespace pk
