// Attention in bfloat16 on the tile registers (AMX): products of bfloat16 with float32 sums, softmax in float32.
// Compiled with the flags setup.py gives to *_amx.cpp; attention.cpp asks the processor before it comes here.
//
// Transposed as in attention.inc: P^T and dS^T are written over the scores in the layouts the next product reads.
#include "amx.h"
#include "attention_rows.h"

namespace pk {
namespace {

constexpr int64_t kForwardQ = 32, kForwardK = 64, kBackwardQ = 64, kBackwardK = 64;
constexpr float kLazy =
    8.f;  // the reference of the powers may lag this far (2^8) behind the maximum before O is rescaled

struct Matrix {  // bfloat16 rows
  const bf16* data;
  int64_t stride;
  const bf16* at(int64_t i) const { return data + i * stride; }
};

// `count` rows of x from row `start` on, padded with zeros to `padded` rows of `width`; rows hidden from every query
// and rows outside [span.begin, span.end) become zeros too, whatever they hold.
void pack_rows(const AttentionArgs& a, const Strided& x, int64_t b, int64_t h, int64_t start, int64_t first,
               int64_t padded, Span span, int64_t size, int64_t width, const uint8_t* seen, bf16* dst) {
  for (int64_t i = first; i < first + padded; ++i, dst += width) {
    const bool real = i >= span.begin && i < span.end && (!seen || seen[i]);
    const int64_t n = real ? size : 0;
    if (n) std::memcpy(dst, at(x, a.element, b, h, start + i), n * sizeof(bf16));
    if (n < width) std::memset(dst + n, 0, (width - n) * sizeof(bf16));
  }
}

// Rows of keys or values as they lie where that is possible, else packed.
Matrix key_rows(const AttentionArgs& a, const Strided& x, const Head& head, Span span, int64_t size, int64_t width,
                bf16* buffer) {
  const int64_t padded = round_up(head.k_length, kBackwardK);
  if (size == width && padded == head.k_length && !head.seen && span.begin == 0 && span.end == head.k_length) {
    return {reinterpret_cast<const bf16*>(at(x, a.element, head.b, head.kv, head.k_start)), x.row};
  }
  pack_rows(a, x, head.b, head.kv, head.k_start, 0, padded, span, size, width, head.seen, buffer);
  return {buffer, width};
}

// The factor that is left for the exponent after edit_scores, and the one edit_scores applies. Caps and biases need
// true scores; masks do not, and scores may stay as the product left them if the scale keeps their order.
struct Factors {
  float edit, exponent;
};
Factors factors(const AttentionArgs& a, const Edits& e) {
  const float scale = static_cast<float>(a.scale / kLn2);
  if (a.softcap > 0.f) return {static_cast<float>(a.scale / a.softcap), 1.f};
  return e.scores || !(a.scale > 0.) ? Factors{scale, 1.f} : Factors{1.f, scale};
}

void hide_rows(float* s, int64_t from, int64_t to, int64_t width) {
  for (int64_t z = from * width; z < to * width; z += kWidth) VecF(-kInfinity).store(s + z);
}

// ---- forward

struct ForwardScratch {
  int64_t key_width, value_width, keys_padded;
  bf16 *keys, *vt, *q_rows, *qt, *rows, *pairs;
  float *st, *ot, *buffer, *top, *total;
  Matrix k;

  ForwardScratch(const AttentionArgs& a, Arena& arena)
      : key_width(round_up(a.head_size, 32)),
        value_width(round_up(a.value_size, 32)),
        keys_padded(round_up(a.k_length, kBackwardK)),
        keys(arena.take<bf16>(keys_padded * key_width)),
        vt(arena.take<bf16>(keys_padded * value_width)),
        q_rows(arena.take<bf16>(kForwardQ * key_width)),
        qt(arena.take<bf16>(kForwardQ * key_width)),
        rows(arena.take<bf16>(kForwardK * value_width)),
        pairs(arena.take<bf16>(kForwardK * value_width)),
        st(arena.take<float>(kForwardK * kForwardQ)),
        ot(arena.take<float>(value_width * kForwardQ)),
        buffer(arena.take<float>(kForwardK * kForwardQ)),
        top(arena.take<float>(kForwardQ)),
        total(arena.take<float>(kForwardQ)),
        k{} {}
};

size_t forward_bytes(const AttentionArgs& a) {
  Arena arena{nullptr};
  ForwardScratch{a, arena};
  return arena.used;
}

// The softmax of a tile: P^T as pairs of keys over the scores. O^T is rescaled only when the maximum has grown by
// 2^kLazy.
void online_softmax(const AttentionArgs& a, const Head& x, const Tile& t, float factor, ForwardScratch& w, bool first) {
  const VecF by(factor);
  for (int64_t c = 0; c < kForwardQ; c += kWidth) {
    float* const s = w.st + c;
    VecF m0 = VecF::loadu(s), m1 = VecF::loadu(s + kForwardQ);
    for (int64_t j = 2; j < kForwardK; j += 2) {
      m0 = maximum(m0, VecF::loadu(s + j * kForwardQ));
      m1 = maximum(m1, VecF::loadu(s + (j + 1) * kForwardQ));
    }
    const VecF highest = maximum(m0, m1) * by;
    VecF top = VecF::loadu(w.top + c), sum = VecF::loadu(w.total + c), other(0.f);
    const __mmask16 grown = _mm512_cmp_ps_mask(highest, top + VecF(kLazy), _CMP_GT_OQ);
    if (grown) {
      const VecF next = _mm512_mask_mov_ps(top, grown, highest), shrink = exp2_of<5>(top - next);
      sum = sum * shrink;
      top = next;
      top.store(w.top + c);
      for (int64_t d = 0; !first && d < w.value_width; ++d) {
        float* const o = w.ot + d * kForwardQ + c;
        (VecF::loadu(o) * shrink).store(o);
      }
    }
    const Dropout dropout = dropout_of(a, x);
#pragma GCC unroll 2
    for (int64_t j = 0; j < kForwardK; j += 2) {
      VecF even = exp2_of<5>(_mm512_fmsub_ps(VecF::loadu(s + j * kForwardQ), by, top));
      VecF odd = exp2_of<5>(_mm512_fmsub_ps(VecF::loadu(s + (j + 1) * kForwardQ), by, top));
      sum = sum + even;
      other = other + odd;
      if (a.dropout) {
        even = dropout.keep(t.k0 + j, t.q0 + c, even);
        odd = dropout.keep(t.k0 + j + 1, t.q0 + c, odd);
      }
      _mm512_storeu_si512(s + j * kForwardQ, interleave(even, odd));
    }
    (sum + other).store(w.total + c);
  }
}

void forward_block(const AttentionArgs& a, const Head& x, ForwardScratch& w, int64_t q0, int64_t nq) {
  pack_rows(a, a.q, x.b, x.h, x.q_start, q0, kForwardQ, {q0, q0 + nq}, a.head_size, w.key_width, nullptr, w.q_rows);
  transpose_words(w.q_rows, w.key_width / 2, w.qt, kForwardQ, kForwardQ, w.key_width / 2);
  for (int64_t i = 0; i < kForwardQ; ++i) {
    w.top[i] = first_top(x);
    w.total[i] = first_total(x);
  }
  const Span keys = keys_of(a, x, q0, nq);
  bool first = true;
  for (int64_t k0 = keys.begin / kForwardK * kForwardK; k0 < keys.end; k0 += kForwardK) {
    const Tile t{k0, smaller(kForwardK, x.k_length - k0), q0, nq};
    const Edits edits = edits_of(a, x, t);
    if (edits.skip) continue;
    tile_product(kForwardK, kForwardQ, w.key_width, w.k.at(k0), w.k.stride, w.qt, kForwardQ, w.st, kForwardQ, false);
    const Factors by = factors(a, edits);
    if (edits.any() || by.edit != 1.f) edit_scores(a, x, edits, t, kForwardQ, by.edit, w.st, nullptr, w.buffer);
    hide_rows(w.st, t.nk, kForwardK, kForwardQ);
    online_softmax(a, x, t, by.exponent, w, first);
    tile_product(w.value_width, kForwardQ, kForwardK, w.vt + k0 * w.value_width, kForwardK,
                 reinterpret_cast<const bf16*>(w.st), 2 * kForwardQ, w.ot, kForwardQ, !first);
    first = false;
  }
  finish_block(a, x, q0, nq, first, kForwardQ, w.top, w.total, w.ot);
}

void forward(const AttentionArgs& a, void* scratch, int64_t b, int64_t kv, int64_t first, int64_t last) {
  Arena arena{static_cast<char*>(scratch)};
  ForwardScratch w(a, arena);
  const int64_t group = a.heads / a.kv_heads;
  const Head one = head_of(a, b, kv * group);
  const int64_t q0 = first * kForwardQ, q1 = smaller(last * kForwardQ, one.q_length);
  if (q0 >= q1) return;
  const Tiles tiles;
  const Span reached = keys_of(a, one, q0, q1 - q0);
  w.k = key_rows(a, a.k, one, reached, a.head_size, w.key_width, w.keys);
  for (int64_t k0 = reached.begin / kForwardK * kForwardK; k0 < reached.end; k0 += kForwardK) {
    pack_rows(a, a.v, one.b, kv, one.k_start, k0, kForwardK, reached, a.value_size, w.value_width, one.seen, w.rows);
    transpose_rows_bf16(w.rows, w.value_width, kForwardK, w.value_width, w.vt + k0 * w.value_width, w.pairs);
  }
  for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
    const Head x = head_of(a, b, h);
    for (int64_t q = q0; q < q1; q += kForwardQ) forward_block(a, x, w, q, smaller(kForwardQ, q1 - q));
  }
}

// ---- backward

struct BackwardScratch {
  int64_t key_width, value_width, q_padded, keys_padded;
  bf16 *keys, *values, *kt, *rows, *pairs, *qt, *dot, *q_pairs, *dout_pairs, *ds;
  float *st, *dt, *slope, *buffer, *dqt, *dk, *dv, *lse, *low, *delta;
  Matrix k, v;

  BackwardScratch(const AttentionArgs& a, Arena& arena)
      : key_width(round_up(a.head_size, 32)),
        value_width(round_up(a.value_size, 32)),
        q_padded(round_up(a.q_length, kBackwardQ)),
        keys_padded(round_up(a.k_length, kBackwardK)),
        keys(arena.take<bf16>(keys_padded * key_width)),
        values(arena.take<bf16>(keys_padded * value_width)),
        kt(arena.take<bf16>(keys_padded * key_width)),
        rows(arena.take<bf16>(64 * larger(key_width, value_width))),
        pairs(arena.take<bf16>(64 * larger(key_width, value_width))),
        qt(arena.take<bf16>(q_padded * key_width)),
        dot(arena.take<bf16>(q_padded * value_width)),
        q_pairs(arena.take<bf16>(q_padded * key_width)),
        dout_pairs(arena.take<bf16>(q_padded * value_width)),
        ds(arena.take<bf16>(kBackwardK * kBackwardQ)),
        st(arena.take<float>(kBackwardK * kBackwardQ)),
        dt(arena.take<float>(kBackwardK * kBackwardQ)),
        slope(arena.take<float>(kBackwardK * kBackwardQ)),
        buffer(arena.take<float>(kBackwardK * kBackwardQ)),
        dqt(arena.take<float>(q_padded * key_width)),
        dk(arena.take<float>(keys_padded * key_width)),
        dv(arena.take<float>(keys_padded * value_width)),
        lse(arena.take<float>(q_padded)),
        low(arena.take<float>(q_padded)),
        delta(arena.take<float>(q_padded)),
        k{},
        v{} {}
};

size_t backward_bytes(const AttentionArgs& a) {
  Arena arena{nullptr};
  BackwardScratch{a, arena};
  return arena.used;
}

// Two keys of P and dS, 16 queries each, in the layouts of the three products that read them: P as rows (over the
// scores), dS as rows (w.ds) and as pairs of keys (over dP).
PK_INLINE void store_pair(BackwardScratch& w, int64_t j, int64_t c, VecF p0, VecF p1, VecF d0, VecF d1) {
  const __m512i p = narrow(p0, p1), d = narrow(d0, d1);
  bf16* const row = reinterpret_cast<bf16*>(w.st) + j * 2 * kBackwardQ + c;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(p));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * kBackwardQ), _mm512_extracti64x4_epi64(p, 1));
  bf16* const ds = w.ds + j * kBackwardQ + c;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds), _mm512_castsi512_si256(d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + kBackwardQ), _mm512_extracti64x4_epi64(d, 1));
  _mm512_storeu_si512(w.dt + j * kBackwardQ + c, interleave_words(d));
}

void softmax_gradient(const Tile& t, float factor, BackwardScratch& w) {
  const VecF by(factor);
  for (int64_t c = 0; c < kBackwardQ; c += kWidth) {
    const VecF lse = VecF::loadu(w.lse + t.q0 + c), delta = VecF::loadu(w.delta + t.q0 + c);
#pragma GCC unroll 2
    for (int64_t j = 0; j < kBackwardK; j += 2) {
      const float *const s = w.st + j * kBackwardQ + c, *const d = w.dt + j * kBackwardQ + c;
      const VecF p0 = exp2_of<4>(_mm512_fmsub_ps(VecF::loadu(s), by, lse));
      const VecF p1 = exp2_of<4>(_mm512_fmsub_ps(VecF::loadu(s + kBackwardQ), by, lse));
      store_pair(w, j, c, p0, p1, p0 * (VecF::loadu(d) - delta), p1 * (VecF::loadu(d + kBackwardQ) - delta));
    }
  }
}

// The same where dS is wanted in float32 on the way (bias gradient), or dropout or a cap take part.
void softmax_gradient_in_full(const AttentionArgs& a, const Head& x, int64_t b, const Tile& t, float factor,
                              BackwardScratch& w) {
  const Dropout dropout = dropout_of(a, x);
  const VecF by(factor), keep(a.keep_scale);
  for (int64_t c = 0; c < kBackwardQ; c += kWidth) {
    const VecF lse = VecF::loadu(w.lse + t.q0 + c), delta = VecF::loadu(w.delta + t.q0 + c);
    for (int64_t j = 0; j < kBackwardK; ++j) {
      float *const s = w.st + j * kBackwardQ + c, *const d = w.dt + j * kBackwardQ + c;
      const VecF p = exp2_of<4>(_mm512_fmsub_ps(VecF::loadu(s), by, lse));
      const VecF share = a.dropout ? dropout.keep(t.k0 + j, t.q0 + c, keep) : VecF(1.f);
      (p * share).store(s);
      (p * (VecF::loadu(d) * share - delta)).store(d);
    }
  }
  if (a.dbias.data) add_to_dbias(a, x, b, t, kBackwardQ, w.dt);
  const bool capped = a.softcap > 0.f;
  for (int64_t c = 0; c < kBackwardQ; c += kWidth) {
    for (int64_t j = 0; j < kBackwardK; j += 2) {
      const int64_t at = j * kBackwardQ + c;
      VecF d0 = VecF::loadu(w.dt + at), d1 = VecF::loadu(w.dt + at + kBackwardQ);
      if (capped) {
        d0 = j < t.nk ? d0 * VecF::loadu(w.slope + at) : VecF(0.f);
        d1 = j + 1 < t.nk ? d1 * VecF::loadu(w.slope + at + kBackwardQ) : VecF(0.f);
      }
      store_pair(w, j, c, VecF::loadu(w.st + at), VecF::loadu(w.st + at + kBackwardQ), d0, d1);
    }
  }
}

void backward_tile(const AttentionArgs& a, const Head& x, int64_t b, const Tile& t, const Edits& edits,
                   BackwardScratch& w) {
  tile_product(kBackwardK, kBackwardQ, w.key_width, w.k.at(t.k0), w.k.stride, w.qt + t.q0 * w.key_width, kBackwardQ,
               w.st, kBackwardQ, false);
  tile_product(kBackwardK, kBackwardQ, w.value_width, w.v.at(t.k0), w.v.stride, w.dot + t.q0 * w.value_width,
               kBackwardQ, w.dt, kBackwardQ, false);
  const Factors by = factors(a, edits);
  const bool capped = a.softcap > 0.f;
  if (edits.any() || by.edit != 1.f) {
    edit_scores(a, x, edits, t, kBackwardQ, by.edit, w.st, capped ? w.slope : nullptr, w.buffer);
  }
  hide_rows(w.st, t.nk, kBackwardK, kBackwardQ);
  if (capped || a.dropout || a.dbias.data) {
    softmax_gradient_in_full(a, x, b, t, by.exponent, w);
  } else {
    softmax_gradient(t, by.exponent, w);
  }
  tile_product(kBackwardK, w.value_width, kBackwardQ, reinterpret_cast<const bf16*>(w.st), 2 * kBackwardQ,
               w.dout_pairs + t.q0 * w.value_width, w.value_width, w.dv + t.k0 * w.value_width, w.value_width, true);
  tile_product(kBackwardK, w.key_width, kBackwardQ, w.ds, kBackwardQ, w.q_pairs + t.q0 * w.key_width, w.key_width,
               w.dk + t.k0 * w.key_width, w.key_width, true);
  tile_product(w.key_width, kBackwardQ, kBackwardK, w.kt + t.k0 * w.key_width, kBackwardK,
               reinterpret_cast<const bf16*>(w.dt), 2 * kBackwardQ, w.dqt + t.q0 * w.key_width, kBackwardQ, true);
}

void backward_head(const AttentionArgs& a, const Head& x, int64_t b, BackwardScratch& w) {
  const int64_t length = x.q_length;
  for (int64_t q0 = 0; q0 < length; q0 += kBackwardQ) {
    const int64_t nq = smaller(kBackwardQ, length - q0);
    const Span span{q0, q0 + nq};
    const auto pack = [&](const Strided& source, int64_t size, int64_t width, bf16* transposed, bf16* pairs) {
      pack_rows(a, source, x.b, x.h, x.q_start, q0, kBackwardQ, span, size, width, nullptr, w.rows);
      transpose_words(w.rows, width / 2, transposed + q0 * width, kBackwardQ, kBackwardQ, width / 2);
      pair_rows(w.rows, width, kBackwardQ, width, pairs + q0 * width);
    };
    pack(a.q, a.head_size, w.key_width, w.qt, w.q_pairs);
    pack(a.dout, a.value_size, w.value_width, w.dot, w.dout_pairs);
    row_statistics(a, x, q0, kBackwardQ, w.lse + q0, w.low + q0, w.delta + q0);
  }
  std::memset(w.dqt, 0, sizeof(float) * round_up(length, kBackwardQ) * w.key_width);
  const Span reached = keys_of(a, x, 0, length);
  for (int64_t k0 = reached.begin / kBackwardK * kBackwardK; k0 < reached.end; k0 += kBackwardK) {
    const int64_t nk = smaller(kBackwardK, x.k_length - k0);
    for (int64_t q0 = 0; q0 < length; q0 += kBackwardQ) {
      const Tile t{k0, nk, q0, smaller(kBackwardQ, length - q0)};
      const Span keys = keys_of(a, x, q0, t.nq);
      if (larger(k0, keys.begin) >= smaller(k0 + nk, keys.end)) continue;
      const Edits edits = edits_of(a, x, t);
      if (!edits.skip) backward_tile(a, x, b, t, edits, w);
    }
  }
  for (int64_t q0 = 0; q0 < length; q0 += kBackwardQ) {
    store_dq(a, x, q0, smaller(kBackwardQ, length - q0), kBackwardQ, w.dqt + q0 * w.key_width);
  }
}

void backward(const AttentionArgs& a, void* scratch, int64_t b, int64_t kv) {
  Arena arena{static_cast<char*>(scratch)};
  BackwardScratch w(a, arena);
  const int64_t group = a.heads / a.kv_heads;
  const Head one = head_of(a, b, kv * group);
  const int64_t padded = round_up(one.k_length, kBackwardK);
  std::memset(w.dk, 0, sizeof(float) * padded * w.key_width);
  std::memset(w.dv, 0, sizeof(float) * padded * w.value_width);
  if (one.q_length > 0) {
    const Tiles tiles;
    const Span reached = keys_of(a, one, 0, one.q_length);
    w.k = key_rows(a, a.k, one, reached, a.head_size, w.key_width, w.keys);
    w.v = key_rows(a, a.v, one, reached, a.value_size, w.value_width, w.values);
    for (int64_t k0 = reached.begin / kBackwardK * kBackwardK; k0 < reached.end; k0 += kBackwardK) {
      transpose_rows_bf16(w.k.at(k0), w.k.stride, kBackwardK, w.key_width, w.kt + k0 * w.key_width, w.pairs);
    }
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) backward_head(a, head_of(a, b, h), b, w);
  }
  store_rows(a, a.dk, one, w.dk, w.key_width, a.head_size, static_cast<float>(a.scale));
  store_rows(a, a.dv, one, w.dv, w.value_width, a.value_size, 1.f);
}

}  // namespace

const AttentionKernels* attention_kernels_amx() {
  static constexpr AttentionKernels kernels{kForwardQ, forward_bytes, backward_bytes, forward, backward};
  return &kernels;
}

}  // namespace pk
