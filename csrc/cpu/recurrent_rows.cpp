// The `.cpu` operators of layers with layer normalisation or zoneout (loops: recurrent_rows.inc), in float32, and of
// the masks that recurrent and inter-layer dropout take.
#include "recurrent_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "isa.h"
#include "recurrent.h"

namespace pk::options {  // helpers named as in recurrent_float.h, which shares the unit
namespace {

constexpr int64_t kRowsForThread = 2;

const RowsKernels& rows_kernels() {
  recurrent_kernels();  // raises where there is no instruction set
  static const RowsKernels* const table = isa() == Isa::kAvx512 ? recurrent_rows_avx512() : recurrent_rows_avx2();
  return *table;
}

const float* read(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
float* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }
Tensor dense(const Optional& t) { return t ? t->contiguous() : Tensor(); }
Tensor fresh(bool wanted, at::IntArrayRef sizes) { return wanted ? at::empty(sizes, at::kFloat) : Tensor(); }
Tensor given(const Tensor& t) { return t.defined() ? t : at::empty({0}, at::kFloat); }

// w (depth, columns) as a right side.
Tensor packed(const Tensor& w) {
  const Tensor from = w.contiguous();
  const Tensor out = at::empty({recurrent_kernels().packed_columns(w.size(0), w.size(1))}, at::kFloat);
  recurrent_kernels().pack_columns(w.size(0), w.size(1), read(from), write(out));
  return out;
}

// The mask of a call's `use` (pykernels/reference/recurrent/_step.py): words of the seed `seed + use * golden ratio`.
Zone mask(double p, bool blend, const Optional& seed, const Tensor& places, int64_t use, int64_t first) {
  if (p == 0) return Zone{};
  Zone zone{blend ? Zone::kBlend : Zone::kMask, static_cast<float>(p), 0, static_cast<uint64_t>(first), 0, nullptr};
  if (blend) return zone;
  TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong && seed->is_cpu(),
              "recurrent: a mask needs a seed, one int64 on the CPU");
  zone.seed =
      static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) + static_cast<uint64_t>(use) * 0x9E3779B97F4A7C15u;
  zone.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  zone.places = places.defined() ? places.const_data_ptr<int64_t>() : nullptr;
  return zone;
}

void check_options(at::ArrayRef<double> zones, at::IntArrayRef firsts) {
  TORCH_CHECK(zones.size() == 2 && firsts.size() == 2, "rows: zones and firsts must have two elements each, not ",
              zones.size(), " and ", firsts.size());
}

// The weights of the loop; all float32.
struct Weights {
  Tensor w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias;
};

struct Sizes {
  Cell cell;
  int64_t hidden, state_size, gated, width, tokens, batch;
  bool lstm, gru;

  Sizes(Cell kind, const Tensor& rows, const Tensor& h0, const Optional& c0, const Weights& w)
      : cell(kind), lstm(kind == Cell::kLstm), gru(kind == Cell::kGru) {
    TORCH_CHECK(w.w_hh.dim() == 2 && h0.dim() == 2 && rows.dim() == 2, "rows: tensors must be 2-D");
    gated = w.w_hh.size(0), hidden = gated / gates_of(cell), state_size = w.w_hh.size(1),
    width = width_of(cell) * hidden;
    tokens = rows.size(0), batch = h0.size(0);
    TORCH_CHECK(hidden > 0 && gated == gates_of(cell) * hidden && (w.w_hr.defined() || state_size == hidden),
                "rows: w_hh has shape ", w.w_hh.sizes());
    check("h0", h0, {batch, state_size});
    TORCH_CHECK(c0.has_value() == lstm, "rows: c0 is an LSTM's");
    if (c0) check("c0", *c0, {batch, hidden});
    TORCH_CHECK(lstm || !(w.w_hr.defined() || w.peephole.defined() || w.norm_c.defined()),
                "rows: w_hr, peephole and norm_c are an LSTM's");
    check("w_hr", w.w_hr, {state_size, hidden});
    check("bias_n", w.bias_n, {hidden});
    check("peephole", w.peephole, {3 * hidden});
    check("norm_hh", w.norm_hh, {gated});
    check("norm_c", w.norm_c, {hidden});
    check("norm_c_bias", w.norm_c_bias, {hidden});
    TORCH_CHECK(w.norm_c.defined() == w.norm_c_bias.defined(), "rows: norm_c and norm_c_bias come together");
    check("w_hh", w.w_hh, {gated, state_size});
  }
  void check(const char* name, const Tensor& t, at::IntArrayRef sizes) const {
    TORCH_CHECK(!t.defined() || (t.sizes() == sizes && t.scalar_type() == at::kFloat && t.is_cpu()), "rows: ", name,
                " must be float32 ", sizes, ", not ", t.defined() ? t.sizes() : sizes);
  }
};

// d^T x, for small weights in partial sums. torch is faster at x^T d.
Tensor weight_gradient(const Tensor& d, const Tensor& x) {
  const int64_t tokens = d.size(0);
  const int64_t step = d.size(1) * x.size(1) <= kSmallWeight ? kPartialTokens : std::max<int64_t>(tokens, 1);
  Tensor sums = at::zeros({x.size(1), d.size(1)}, at::kFloat);
  for (int64_t t = 0; t < tokens; t += step) {
    const int64_t n = std::min(step, tokens - t);
    sums.addmm_(x.narrow(0, t, n).t(), d.narrow(0, t, n));
  }
  return sums.t().contiguous();
}

Tensor places_of(const Optional& places, int64_t tokens) {
  TORCH_CHECK(!places || (places->scalar_type() == at::kLong && places->is_cpu() && places->dim() == 1 &&
                          places->size(0) == tokens),
              "rows: places must be int64, one for each token");
  return places ? places->contiguous() : Tensor();
}

// Of tokens with padding behind them, those that are there; and back, zeros for padding.
Tensor present(const Tensor& t, int64_t tokens) { return t.dim() == 2 ? t.narrow(0, 0, tokens) : t; }
Optional present(const Optional& t, int64_t tokens) { return t ? Optional(t->narrow(0, 0, tokens)) : std::nullopt; }
Tensor padded(const Tensor& t, int64_t room) {
  if (t.dim() != 2) return t;
  const Tensor out = at::zeros({room, t.size(1)}, t.scalar_type());
  out.narrow(0, 0, t.size(0)).copy_(t);
  return out;
}

// output, h_n, of an LSTM c_n; with `save` products (normalised: (tokens, G H), otherwise empty), kept, stats and of an
// LSTM cells.
std::vector<Tensor> rows_forward(const Tensor& gates, const Tensor& h0, const Optional& c0, const Tensor& w_hh,
                                 const Optional& w_hr, const Optional& bias_n, const Optional& peephole,
                                 const Optional& norm_hh, const Optional& norm_c, const Optional& norm_c_bias,
                                 const Optional& batch_sizes, const Optional& seed, const Optional& places,
                                 c10::string_view kind, at::ScalarType dtype, at::ArrayRef<double> zones,
                                 at::IntArrayRef firsts, bool training, bool reverse, bool save) {
  const AsGiven guard;
  check_options(zones, firsts);
  const Weights w{w_hh, dense(w_hr), dense(bias_n), dense(peephole), dense(norm_hh), dense(norm_c), dense(norm_c_bias)};
  const Sizes s(cell_of(kind), gates, h0, c0, w);
  s.check("gates", gates, {s.tokens, s.gated});
  const Sequence sequence(gates, h0, batch_sizes);
  if (const int64_t n = sequence.tokens(); n < s.tokens) {
    std::vector<Tensor> found =
        rows_forward(present(gates, n), h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias, batch_sizes,
                     seed, present(places, n), kind, dtype, zones, firsts, training, reverse, save);
    for (size_t i = 0; i < found.size(); ++i)
      if (i == 0 || i > (s.lstm ? 2 : 1)) found[i] = padded(found[i], s.tokens);
    return found;
  }
  const Tensor x = gates.contiguous(), h = h0.contiguous(), where = places_of(places, s.tokens);
  const Tensor weight = packed(w_hh.t()), projection = w_hr ? packed(w_hr->t()) : Tensor();
  const bool normed = norm_hh.has_value(), keep = save && normed;

  const Tensor output = at::empty({s.tokens, s.state_size}, at::kFloat), h_n = h.clone();
  const Tensor products = at::empty({keep ? s.tokens : s.batch, s.gated}, at::kFloat);
  const Tensor kept = fresh(save, {s.tokens, s.width}), stats = save ? at::zeros({s.tokens, 3}, at::kFloat) : Tensor();
  const Tensor cells = fresh(save && s.lstm, {s.tokens, s.hidden}), c = s.lstm ? float_copy(c0, *c0) : Tensor();
  const Tensor scratch = at::empty({s.batch, 3 * s.hidden}, at::kFloat);

  RowsForward args{};
  args.cell = s.cell;
  args.rounding = dtype == at::kHalf ? Rounding::kHalf : dtype == at::kBFloat16 ? Rounding::kBFloat16 : Rounding::kNone;
  args.keep = keep;
  args.steps = sequence.steps(reverse);
  args.hidden = s.hidden;
  args.state_size = s.state_size;
  args.weight = read(weight);
  args.projection = read(projection);
  args.x = read(x);
  args.bias_n = read(w.bias_n);
  args.peephole = read(w.peephole);
  args.norm_hh = read(w.norm_hh);
  args.norm_c = read(w.norm_c);
  args.norm_c_bias = read(w.norm_c_bias);
  args.h0 = read(h);
  args.c = write(c);
  args.products = write(products);
  args.kept = write(kept);
  args.cells = write(cells);
  args.stats = write(stats);
  args.output = write(output);
  args.scratch = write(scratch);
  args.zone_h = mask(zones[0], !training, seed, where, 2, firsts[0]);
  args.zone_c = mask(s.lstm ? zones[1] : 0, !training, seed, where, 3, firsts[1]);
  if (sequence.count())
    over_rows(args.steps, 0, sequence.count(), kRowsForThread,
              [&](int64_t row, int64_t end) { rows_kernels().forward(args, row, end); });
  sequence.for_ending(reverse, [&](int64_t row, int64_t rows, int64_t token) {
    std::memcpy(write(h_n) + row * s.state_size, read(output) + token * s.state_size,
                rows * s.state_size * sizeof(float));
  });
  std::vector<Tensor> found{output, h_n};
  if (s.lstm) found.push_back(c);
  if (save) found.insert(found.end(), {keep ? products : at::empty({0}, at::kFloat), kept, stats});
  if (save && s.lstm) found.push_back(cells);
  return found;
}

// The gradients of (gates, h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias), zero-size where the
// mask is False or there is no such tensor.
std::vector<Tensor> rows_backward(const Tensor& dy, const Optional& dhn, const Optional& dcn, const Tensor& h0,
                                  const Optional& c0, const Tensor& w_hh, const Optional& w_hr,
                                  const Optional& peephole, const Optional& norm_hh, const Optional& norm_c,
                                  const Optional& norm_c_bias, const Optional& batch_sizes, const Optional& seed,
                                  const Optional& places, const Tensor& output, const Tensor& products,
                                  const Tensor& kept, const Tensor& stats, const Optional& cells, c10::string_view kind,
                                  at::ScalarType, at::ArrayRef<double> zones, at::IntArrayRef firsts, bool training,
                                  bool reverse, std::array<bool, 10> wanted) {
  const AsGiven guard;
  check_options(zones, firsts);
  const Weights w{w_hh, dense(w_hr), Tensor(), dense(peephole), dense(norm_hh), dense(norm_c), dense(norm_c_bias)};
  const Sizes s(cell_of(kind), dy, h0, c0, w);
  const int64_t H = s.hidden, P = s.state_size, N = s.tokens;
  s.check("dy", dy, {N, P});
  s.check("output", output, {N, P});
  if (norm_hh) s.check("products", products, {N, s.gated});
  s.check("kept", kept, {N, s.width});
  s.check("stats", stats, {N, 3});
  if (dhn) s.check("dhn", *dhn, {s.batch, P});
  if (dcn) s.check("dcn", *dcn, {s.batch, H});
  TORCH_CHECK(cells.has_value() == s.lstm, "rows: cells are an LSTM's");
  if (cells) s.check("cells", *cells, {N, H});
  const Sequence sequence(dy, h0, batch_sizes);
  if (const int64_t n = sequence.tokens(); n < N) {
    std::vector<Tensor> found =
        rows_backward(present(dy, n), dhn, dcn, h0, c0, w_hh, w_hr, peephole, norm_hh, norm_c, norm_c_bias, batch_sizes,
                      seed, present(places, n), present(output, n), present(products, n), present(kept, n),
                      present(stats, n), present(cells, n), kind, at::kFloat, zones, firsts, training, reverse, wanted);
    if (wanted[0]) found[0] = padded(found[0], N);
    return found;
  }
  const Tensor gradient = dy.stride(1) == 1 || P == 1 ? dy : dy.contiguous(), h = h0.contiguous(), c = dense(c0);
  const Tensor y = output.contiguous(), where = places_of(places, N), held = kept.contiguous(), c_of = dense(cells);
  const Tensor normed = products.contiguous(), figures = stats.contiguous();
  const Tensor last = dhn ? dhn->contiguous() : at::zeros({s.batch, P}, at::kFloat);
  const Tensor weight = packed(w_hh), projection = w_hr ? packed(*w_hr) : Tensor();
  const Tensor carry_h = at::zeros({s.batch, P}, at::kFloat), carry_c = s.lstm ? float_copy(dcn, *c0) : Tensor();
  const Tensor dgates = at::empty({N, s.gated}, at::kFloat);
  const Tensor dstate = s.gru ? at::empty({N, s.gated}, at::kFloat) : dgates;
  const Tensor dproducts = norm_hh ? at::empty({N, s.gated}, at::kFloat) : dstate;
  const bool of_w_hr = wanted[4] && w_hr.has_value();
  const Tensor dprojected = fresh(of_w_hr, {N, P}), inner = fresh(of_w_hr, {N, H});
  const Tensor now = fresh(s.lstm, {N, H}), dnorm = fresh(s.lstm, {N, H});
  const Tensor scratch = at::empty({s.batch, P + H}, at::kFloat);

  RowsBackward args{};
  args.cell = s.cell;
  args.steps = sequence.steps(reverse);
  args.hidden = H;
  args.state_size = P;
  args.weight = read(weight);
  args.projection = read(projection);
  args.peephole = read(w.peephole);
  args.norm_hh = read(w.norm_hh);
  args.norm_c = read(w.norm_c);
  args.norm_c_bias = read(w.norm_c_bias);
  args.h0 = read(h);
  args.c0 = read(c);
  args.output = read(y);
  args.products = read(normed);
  args.kept = read(held);
  args.cells = read(c_of);
  args.stats = read(figures);
  args.dy = read(gradient);
  args.dy_stride = gradient.stride(0);
  args.dhn = read(last);
  args.carry_h = write(carry_h);
  args.carry_c = write(carry_c);
  args.dgates = write(dgates);
  args.dstate = write(dstate);
  args.dproducts = write(dproducts);
  args.dprojected = write(dprojected);
  args.inner = write(inner);
  args.fresh = write(now);
  args.dnorm = write(dnorm);
  args.scratch = write(scratch);
  args.zone_h = mask(zones[0], !training, seed, where, 2, firsts[0]);
  args.zone_c = mask(s.lstm ? zones[1] : 0, !training, seed, where, 3, firsts[1]);
  if (sequence.count())
    over_rows(args.steps, 0, sequence.count(), kRowsForThread,
              [&](int64_t row, int64_t end) { rows_kernels().backward(args, row, end); });

  const Chunk all{0, sequence.count(), 0, N};
  const auto column_sums = [&](const Tensor& t) {
    const Tensor rows = t.contiguous(), sums = at::zeros({t.size(1)}, at::kFloat);
    recurrent_kernels().add_column_sums(read(rows), t.size(0), t.size(1), write(sums));
    return sums;
  };
  const auto before = [&](const Tensor& after, const Tensor& initial) {
    const Tensor out = at::empty(after.sizes(), at::kFloat);
    gather_previous(args.steps, all, after, initial, out);
    return out;
  };
  std::vector<Tensor> found(10);
  if (wanted[0]) found[0] = dgates;
  if (wanted[1]) {
    const Tensor began = at::zeros({s.batch, s.gated}, at::kFloat);
    gather_first(args.steps, all, dproducts, began);
    found[1] = at::mm(began, w_hh).add_(carry_h);
    const int64_t idle = sequence.rows();  // sequences of no steps hand the gradient through
    if (idle < s.batch) found[1].narrow(0, idle, s.batch - idle).copy_(last.narrow(0, idle, s.batch - idle));
  }
  if (wanted[2]) found[2] = carry_c;
  if (wanted[3]) found[3] = weight_gradient(dproducts, before(y, h));
  if (of_w_hr) found[4] = weight_gradient(dprojected, inner);
  if (wanted[5] && s.gru) found[5] = column_sums(dstate.narrow(1, 2 * H, H));
  if (wanted[6] && peephole) {
    const Tensor was = before(c_of, c), sums = at::empty({3 * H}, at::kFloat);
    sums.narrow(0, 0, H).copy_(column_sums(dgates.narrow(1, 0, H).mul(was)));
    sums.narrow(0, H, H).copy_(column_sums(dgates.narrow(1, H, H).mul(was)));
    sums.narrow(0, 2 * H, H).copy_(column_sums(dgates.narrow(1, 3 * H, H).mul(now)));
    found[6] = sums;
  }
  if (wanted[7] && norm_hh) found[7] = column_sums(dstate.mul(normed));
  if (wanted[8] && norm_c) {
    found[8] = column_sums(now.sub_(figures.narrow(1, 1, 1)).mul_(figures.narrow(1, 2, 1)).mul_(dnorm));
  }
  if (wanted[9] && norm_c) found[9] = column_sums(dnorm);
  for (Tensor& t : found) t = given(t);
  return found;
}

// x's elements with probability 1 - p, times 1 / (1 - p); the others 0.
Tensor drop(const Tensor& x, const Tensor& seed, const Optional& places, int64_t use, int64_t first, double p) {
  const AsGiven guard;
  TORCH_CHECK(x.dim() == 2 && x.is_cpu(), "drop: x must be 2-D");
  const Tensor from = x.to(at::kFloat).contiguous(), out = at::empty(x.sizes(), at::kFloat);
  const Tensor where = places_of(places, x.size(0));
  const Zone zone = mask(p, false, seed, where, use, first);
  const float scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.f;
  at::parallel_for(0, x.numel(), 4096, [&](int64_t begin, int64_t end) {
    rows_kernels().drop(read(from), write(out), x.size(1), begin, end, zone, scale);
  });
  return out.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("rows_forward.cpu", &rows_forward);
  m.impl("rows_backward.cpu", &rows_backward);
  m.impl("drop_forward.cpu", &drop);
}

}  // namespace pk::options
