// Attention in bfloat16 on the tile registers (AMX): products of bfloat16 with float32 sums, softmax in float32.
// Compiled with the flags setup.py gives to *_amx.cpp; attention.cpp asks the processor before it comes here.
//
// Transposed as in attention.inc: P^T and dS^T are written over the scores in the layouts the next product reads.
//
// Measured: the tile unit shares an execution port with the vector units, so little of the softmax hides behind the
// products; with real data it also makes the processor lower its frequency by a third.
#include <utility>

#include "amx.h"
#include "attention_rows.h"

namespace pk {
namespace {

constexpr int64_t kForwardQ = 32, kForwardK = 64;

struct Matrix {  // bfloat16 rows
  const bf16* data;
  int64_t stride;
};

// Rows of keys or values in blocks of `unit`: where they lie, or, of the blocks that have rows hidden from every query,
// rows outside what is reached or an end that is not whole, a copy with zeros there, whatever those rows hold.
class KeyRows {
 public:
  KeyRows() = default;
  KeyRows(const AttentionArgs& a, const Strided& x, const Head& head, Span reached, int64_t size, int64_t width,
          int64_t unit, bf16* buffer)
      : rows_{reinterpret_cast<const bf16*>(at(x, a.element, head.b, head.kv, head.k_start)), x.row},
        copied_{buffer, width},
        unit_(unit) {
    // Transposing reads two elements as one word, so a row must be a whole number of words from the next.
    if (size == width && !head.seen && x.row % 2 == 0) {
      first_ = round_up(reached.begin, unit);
      last_ = reached.end / unit * unit;
    }
    for (int64_t k0 = reached.begin / unit * unit; k0 < reached.end; k0 += unit) {
      if (k0 >= first_ && k0 < last_) continue;
      for (int64_t i = k0; i < k0 + unit; ++i) {
        const bool real = i >= reached.begin && i < reached.end && (!head.seen || head.seen[i]);
        bf16* const row = buffer + i * width;
        if (real) std::memcpy(row, rows_.data + i * x.row, size * sizeof(bf16));
        if (!real || size < width) std::memset(row + (real ? size : 0), 0, (width - (real ? size : 0)) * sizeof(bf16));
      }
    }
  }
  Matrix block(int64_t k0) const {
    const Matrix& from = k0 >= first_ && k0 < last_ ? rows_ : copied_;
    return {from.data + k0 * from.stride, from.stride};
  }

 private:
  Matrix rows_{}, copied_{};
  int64_t unit_ = 1, first_ = 0, last_ = 0;  // blocks in [first, last) are read where they lie
};

// `count` (<= unit) rows of a query-like tensor, `unit` rows with zeros behind them; where they lie if they are whole.
Matrix query_rows(const AttentionArgs& a, const Strided& x, const Head& head, int64_t start, int64_t count,
                  int64_t unit, int64_t size, int64_t width, bf16* buffer) {
  const auto* const from = reinterpret_cast<const bf16*>(at(x, a.element, head.b, head.h, head.q_start + start));
  if (count == unit && size == width && x.row % 2 == 0) return {from, x.row};
  for (int64_t i = 0; i < unit; ++i) {
    const int64_t n = i < count ? size : 0;
    if (n) std::memcpy(buffer + i * width, from + i * x.row, n * sizeof(bf16));
    if (n < width) std::memset(buffer + i * width + n, 0, (width - n) * sizeof(bf16));
  }
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

// How many of `steps` steps of vector work belong to each of `products` calls of tile_product's `between`.
PK_INLINE int64_t share_of(int64_t steps, int64_t products) { return (steps + products - 1) / products; }

#include "attention_amx_forward.inc"

#include "attention_amx_backward.inc"
#include "attention_amx_decode.inc"

}  // namespace

const AttentionKernels* attention_kernels_amx() {
  static constexpr AttentionKernels kernels{kForwardQ, forward_bytes,    backward_bytes, forward,      backward,
                                            find_seen, amx_decode_bytes, amx_decode,     decode_merge, decode_part};
  return &kernels;
}

}  // namespace pk
