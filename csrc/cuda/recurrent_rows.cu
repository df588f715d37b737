// One step of a layer with layer normalisation or zoneout, a block for each row of the batch, in float32: statistics
// over all gates of a token are two reductions of the block.  Between its passes over the row a block reads what it
// wrote itself, from the first-level cache.
#include "philox.h"
#include "recurrent_cells.h"
#include "recurrent_rows.h"
#include "reduce.h"

namespace pk {

namespace {

constexpr int kThreads = 128;
constexpr float kEpsilon = 1e-5f;

__device__ __forceinline__ bool is_new(const RowZone& z, int64_t place, int hidden, int unit) {
  const uint64_t offset = static_cast<uint64_t>(z.first + place * hidden + unit);
  return philox_word(static_cast<uint64_t>(*z.seed), offset) >= z.threshold;
}
__device__ __forceinline__ float zoned(const RowZone& z, int64_t place, int hidden, int unit, float before,
                                       float after) {
  if (z.mode == RowZone::kOff) return after;
  if (z.mode == RowZone::kBlend) return z.share * before + (1.f - z.share) * after;
  return is_new(z, place, hidden, unit) ? after : before;
}
// Of the gradient of the state after a step, the part of the new one; `old` gets that of the old one.
__device__ __forceinline__ float unzoned(const RowZone& z, int64_t place, int hidden, int unit, float d, float& old) {
  old = 0.f;
  if (z.mode == RowZone::kOff) return d;
  if (z.mode == RowZone::kBlend) {
    old = z.share * d;
    return (1.f - z.share) * d;
  }
  if (is_new(z, place, hidden, unit)) return d;
  old = d;
  return 0.f;
}

__device__ __forceinline__ float rounded(float x, int rounding) {
  if (rounding == static_cast<int>(DType::f16)) return to_float(from_float<fp16>(x));
  return rounding == static_cast<int>(DType::bf16) ? to_float(from_float<bf16>(x)) : x;
}

// Calls f(unit) for this thread's units.
template <class F>
__device__ __forceinline__ void over(int count, const F& f) {
  for (int u = static_cast<int>(threadIdx.x); u < count; u += kThreads) f(u);
}

struct Moments {
  float mean, scale;  // 1 / deviation
};
__device__ __forceinline__ Moments moments(const float* x, int count) {
  float sum = 0.f, squares = 0.f;
  over(count, [&](int u) { sum += x[u]; });
  const float mean = block_sum<kThreads>(sum) / static_cast<float>(count);
  over(count, [&](int u) { squares += (x[u] - mean) * (x[u] - mean); });
  return {mean, 1.f / sqrtf(block_sum<kThreads>(squares) / static_cast<float>(count) + kEpsilon)};
}

__global__ void __launch_bounds__(kThreads) recurrent_row_forward_kernel(const RowForward f) {
  const int64_t row = blockIdx.x, token = f.step.offset + row;
  const int H = f.step.hidden, G = f.step.gates * H;
  const bool lstm = f.step.gates == 4, gru = f.step.gates == 3;
  const int64_t place = f.places ? f.places[token] : token;
  float* const product = f.products + row * G;
  const float* const x = f.x + token * G;
  const float* const before = row < f.step.begun ? f.output + (f.step.previous + row) * H : f.h0 + row * H;
  if (f.norm_hh) {
    const Moments m = moments(product, G);
    over(G, [&](int u) {
      const float hat = (product[u] - m.mean) * m.scale;
      if (f.hats) f.hats[token * G + u] = hat;
      product[u] = hat * f.norm_hh[u];
    });
    if (f.stats && threadIdx.x == 0) f.stats[token * 3] = m.scale;
    __syncthreads();  // gates of a unit were written by other threads
  }
  float* const output = f.output + token * H;
  float* const kept = f.kept ? f.kept + token * (lstm || gru ? 4 : 1) * H : nullptr;
  const auto finish = [&](int u, float h) {
    h = rounded(zoned(f.zone_h, place, H, u, before[u], rounded(h, f.rounding)), f.rounding);
    output[u] = h;
    if (row >= f.step.staying) f.h_n[row * H + u] = h;
  };
  if (lstm) {
    float *const fresh = f.scratch + row * 2 * H, *const opened = fresh + H, *const c = f.c + row * H;
    over(H, [&](int u) {
      const Peephole p = load_peephole(f.peephole, H, u);
      const float was = c[u];
      const float i = sigmoid<true>(x[u] + product[u] + p.i * was);
      const float g = hyperbolic_tangent<true>(x[2 * H + u] + product[2 * H + u]);
      const float forget = sigmoid<true>(x[H + u] + product[H + u] + p.f * was), now = forget * was + i * g;
      const float o = sigmoid<true>(x[3 * H + u] + product[3 * H + u] + p.o * now);
      const float after = zoned(f.zone_c, place, H, u, was, now);
      fresh[u] = now;
      opened[u] = o;
      c[u] = after;
      if (kept) {
        kept[u] = i, kept[H + u] = forget, kept[2 * H + u] = g, kept[3 * H + u] = o;
        f.cells[token * H + u] = after;
      }
    });
    Moments m{0.f, 1.f};
    if (f.norm_c) m = moments(fresh, H);  // each thread reads its own
    if (f.norm_c && f.stats && threadIdx.x == 0) f.stats[token * 3 + 1] = m.mean, f.stats[token * 3 + 2] = m.scale;
    over(H, [&](int u) {
      float y = fresh[u];
      if (f.norm_c) y = (y - m.mean) * m.scale * f.norm_c[u] + f.norm_c_bias[u];
      finish(u, opened[u] * hyperbolic_tangent<true>(y));
    });
  } else if (gru) {
    over(H, [&](int u) {
      const float r = sigmoid<true>(x[u] + product[u]), z = sigmoid<true>(x[H + u] + product[H + u]);
      const float inner = product[2 * H + u] + (f.bias_n ? f.bias_n[u] : 0.f);
      const float n = hyperbolic_tangent<true>(x[2 * H + u] + r * inner);
      if (kept) kept[u] = r, kept[H + u] = z, kept[2 * H + u] = n, kept[3 * H + u] = inner;
      finish(u, n + z * (before[u] - n));
    });
  } else {
    over(H, [&](int u) {
      const float a = x[u] + product[u], y = f.step.relu ? (a <= 0.f ? 0.f : a) : hyperbolic_tangent<true>(a);
      if (kept) kept[u] = y;
      finish(u, y);
    });
  }
}

__global__ void __launch_bounds__(kThreads) recurrent_row_backward_kernel(const RowBackward f) {
  const int64_t row = blockIdx.x, token = f.step.offset + row;
  const int H = f.step.hidden, G = f.step.gates * H;
  const bool lstm = f.step.gates == 4, gru = f.step.gates == 3, begun = row < f.step.begun;
  const int64_t place = f.places ? f.places[token] : token, earlier = (f.step.previous + row) * H;
  float *const carry = f.carry_h + row * H, *const d = f.dgates + token * G;
  const auto new_part = [&](int u, float& old) {  // of dh
    const float dh = f.dy[token * f.dy_stride + u] + f.through[row * H + u] + carry[u];
    return unzoned(f.zone_h, place, H, u, dh, old);
  };
  if (lstm) {
    const float* const kept = f.kept + token * 4 * H;
    const float* const was = begun ? f.cells + earlier : f.c0 + row * H;
    float *const fresh = f.fresh + token * H, *const dnorm = f.dnorm + token * H, *const carry_c = f.carry_c + row * H;
    const float mean = f.norm_c ? f.stats[token * 3 + 1] : 0.f, scale = f.norm_c ? f.stats[token * 3 + 2] : 1.f;
    float sum = 0.f, dot = 0.f;
    over(H, [&](int u) {
      float old;
      const float dh = new_part(u, old), o = kept[3 * H + u], now = kept[H + u] * was[u] + kept[u] * kept[2 * H + u];
      const float hat = (now - mean) * scale, y = f.norm_c ? hat * f.norm_c[u] + f.norm_c_bias[u] : now;
      const float t = hyperbolic_tangent<true>(y), dy = dh * o * (1.f - t * t);
      carry[u] = old;
      fresh[u] = now;
      dnorm[u] = dy;
      d[3 * H + u] = dh * t * o * (1.f - o);
      if (f.norm_c) sum += dy * f.norm_c[u], dot += dy * f.norm_c[u] * hat;
    });
    float average = 0.f, along = 0.f;
    if (f.norm_c) {
      average = block_sum<kThreads>(sum) / static_cast<float>(H);
      along = block_sum<kThreads>(dot) / static_cast<float>(H);
    }
    over(H, [&](int u) {
      const Peephole p = load_peephole(f.peephole, H, u);
      const float i = kept[u], forget = kept[H + u], g = kept[2 * H + u];
      float old, dc = dnorm[u];
      if (f.norm_c) dc = scale * (dc * f.norm_c[u] - average - (fresh[u] - mean) * scale * along);
      dc += unzoned(f.zone_c, place, H, u, carry_c[u], old) + p.o * d[3 * H + u];
      const float di = dc * g * i * (1.f - i), df = dc * was[u] * forget * (1.f - forget);
      d[u] = di;
      d[H + u] = df;
      d[2 * H + u] = dc * i * (1.f - g * g);
      carry_c[u] = dc * forget + old + p.i * di + p.f * df;
    });
  } else if (gru) {
    const float* const kept = f.kept + token * 4 * H;
    const float* const before = begun ? f.output + earlier : f.h0 + row * H;
    float* const s = f.dstate + token * G;
    over(H, [&](int u) {
      float old;
      const float dh = new_part(u, old), r = kept[u], z = kept[H + u], n = kept[2 * H + u];
      const float dn = dh * (1.f - z) * (1.f - n * n), dr = dn * kept[3 * H + u] * r * (1.f - r);
      const float dz = dh * (before[u] - n) * z * (1.f - z);
      d[u] = s[u] = dr;
      d[H + u] = s[H + u] = dz;
      d[2 * H + u] = dn;
      s[2 * H + u] = dn * r;
      carry[u] = old + dh * z;
    });
  } else {
    over(H, [&](int u) {
      float old;
      const float dh = new_part(u, old), y = f.kept[token * H + u];
      d[u] = f.step.relu ? (y <= 0.f ? 0.f : dh) : dh * (1.f - y * y);
      carry[u] = old;
    });
  }
  if (!f.norm_hh) return;
  __syncthreads();  // gradients of a unit's gates were written by other threads
  const float *const s = f.dstate + token * G, *const hats = f.hats + token * G;
  float sum = 0.f, dot = 0.f;
  over(G, [&](int u) {
    const float e = s[u] * f.norm_hh[u];
    sum += e;
    dot += e * hats[u];
  });
  const float average = block_sum<kThreads>(sum) / static_cast<float>(G);
  const float along = block_sum<kThreads>(dot) / static_cast<float>(G), scale = f.stats[token * 3];
  over(G, [&](int u) { f.dproducts[token * G + u] = scale * (s[u] * f.norm_hh[u] - average - hats[u] * along); });
}

RowStep step_of(int cell, int hidden, int64_t offset, int64_t previous, int64_t begun, int64_t staying) {
  const Cell kind = static_cast<Cell>(cell);
  const int gates = kind == Cell::lstm ? 4 : kind == Cell::gru ? 3 : 1;
  return {hidden, gates, kind == Cell::relu, offset, previous, begun, staying};
}

RowZone zone_of(int mode, float share, int64_t threshold, int64_t first, const int64_t* seed) {
  return {static_cast<RowZone::Mode>(mode), share, static_cast<uint64_t>(threshold), first, seed};
}

}  // namespace

void recurrent_row_forward(const float* x, float* products, const float* bias_n, const float* peephole,
                           const float* norm_hh, const float* norm_c, const float* norm_c_bias, const float* h0,
                           float* output, float* h_n, float* c, float* hats, float* kept, float* cells, float* stats,
                           float* scratch, const int64_t* seeds, const int64_t* places, int mode_h, int mode_c,
                           float share_h, float share_c, int64_t threshold_h, int64_t threshold_c, int64_t first_h,
                           int64_t first_c, int hidden, int64_t rows, int64_t offset, int64_t previous, int64_t begun,
                           int64_t staying, int cell, DType rounding, void* stream) {
  const RowForward f{x,
                     products,
                     bias_n,
                     peephole,
                     norm_hh,
                     norm_c,
                     norm_c_bias,
                     h0,
                     places,
                     output,
                     h_n,
                     c,
                     hats,
                     kept,
                     cells,
                     stats,
                     scratch,
                     static_cast<int>(rounding),
                     step_of(cell, hidden, offset, previous, begun, staying),
                     zone_of(mode_h, share_h, threshold_h, first_h, seeds),
                     zone_of(mode_c, share_c, threshold_c, first_c, seeds ? seeds + 1 : nullptr)};
  const DeviceGuard guard(products);
  launch(recurrent_row_forward_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, f);
}

void recurrent_row_backward(const float* dy, int64_t dy_stride, const float* through, const float* peephole,
                            const float* norm_hh, const float* norm_c, const float* norm_c_bias, const float* h0,
                            const float* c0, const float* output, const float* hats, const float* kept,
                            const float* cells, const float* stats, float* carry_h, float* carry_c, float* dgates,
                            float* dstate, float* dproducts, float* fresh, float* dnorm, const int64_t* seeds,
                            const int64_t* places, int mode_h, int mode_c, float share_h, float share_c,
                            int64_t threshold_h, int64_t threshold_c, int64_t first_h, int64_t first_c, int hidden,
                            int64_t rows, int64_t offset, int64_t previous, int64_t begun, int cell, void* stream) {
  const RowBackward f{dy,
                      dy_stride,
                      through,
                      peephole,
                      norm_hh,
                      norm_c,
                      norm_c_bias,
                      h0,
                      c0,
                      output,
                      hats,
                      kept,
                      cells,
                      stats,
                      places,
                      carry_h,
                      carry_c,
                      dgates,
                      dstate,
                      dproducts,
                      fresh,
                      dnorm,
                      step_of(cell, hidden, offset, previous, begun, 0),
                      zone_of(mode_h, share_h, threshold_h, first_h, seeds),
                      zone_of(mode_c, share_c, threshold_c, first_c, seeds ? seeds + 1 : nullptr)};
  const DeviceGuard guard(dy);
  launch(recurrent_row_backward_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, f);
}

}  // namespace pk
