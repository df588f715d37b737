// The attention room's `.cpu` operators: checks, outputs, threads. Schemas are defined in Python
// (pykernels/ops/attention); arithmetic is in attention.inc (float32, every element type) and attention_amx.cpp
// (bfloat16 on tile registers).
#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "attention_tensors.h"
#include "isa.h"
#include "scratch.h"

namespace pk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Packed sequences of one query each are not worth a path of their own.
bool one_query(const AttentionArgs& a) { return a.q_length == 1 && !a.q_ends; }

Strided strided_lse(const Tensor& x) {
  void* const data = const_cast<void*>(x.const_data_ptr());
  if (x.dim() == 2) return {data, 0, 1, x.stride(0)};
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

Plane plane(const Tensor& x) {
  const auto stride = [&](int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; };
  return {const_cast<void*>(x.const_data_ptr()), stride(0), stride(1), stride(2), stride(3)};
}

// Keys contiguous or broadcast, as the kernels read planes.
Tensor plane_rows(const Tensor& x) { return x.size(3) <= 1 || x.stride(3) <= 1 ? x : x.contiguous(); }

// Whether a tensor holds numbers that a weight of 0 does not silence: NaN, infinities, or finite ones whose products
// may become infinite (from 2^60 on). Only then is it worth the time to find the keys that masks, bias and position
// together hide from every query; of what positions or a padding mask alone hide nothing is read.
template <class Word>
bool wild(const Tensor& x, Word magnitude, Word least) {
  const auto* const data = static_cast<const Word*>(x.const_data_ptr());
  const int64_t size = x.size(-1), heads = x.size(-3), rows = x.size(-2), batch = x.dim() == 4 ? x.size(0) : 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        const Word* const row = data + (x.dim() == 4 ? b * x.stride(0) : 0) + h * x.stride(-3) + i * x.stride(-2);
        Word largest = 0;
        for (int64_t d = 0; d < size; ++d) largest = std::max<Word>(largest, row[d] & magnitude);
        if (largest >= least) return true;
      }
    }
  }
  return false;
}

bool wild(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return wild<int32_t>(x, 0x7FFFFFFF, 0x5D800000);
  return wild<int16_t>(x, 0x7FFF, x.scalar_type() == at::kHalf ? 0x7C00 : 0x5D80);
}

struct Masks {
  const OptionalTensor &mask, &key_padding_mask, &prefix_length, &alibi_slopes, &cu_seqlens_q, &cu_seqlens_k, &seed;
};

struct Options {
  c10::string_view causal;
  int64_t window_left, window_right;
  double softcap, dropout_p, scale;
};

// Arguments with the tensors that keep them alive.
struct Call {
  AttentionArgs args{};
  Tensor q, k, v, bias, mask, seen, slopes, sinks, prefix, q_ends, k_ends;
  std::vector<int64_t> first_element;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias_,
       const OptionalTensor& sinks_, const Masks& masks, const Options& options);

 private:
  void take_sequences(const Masks& masks);
  void take_masks(const OptionalTensor& bias_, const Masks& masks);
};

void check_plane(const Tensor& x, const AttentionArgs& a, bool packed, const char* name) {
  TORCH_CHECK(x.dim() == 4, "attention: ", name, " must have 4 dimensions, not ", x.dim());
  const std::array<int64_t, 4> full{a.batch, a.heads, a.q_length, a.k_length};
  for (int dim = 0; dim < 4; ++dim) {
    const int64_t n = x.size(dim);
    // Of packed sequences the longest count; the plane may be larger.
    TORCH_CHECK(n == 1 || n == full[dim] || (packed && dim > 1 && n > full[dim]), "attention: ", name, " of shape ",
                x.sizes(), " does not broadcast to (", full[0], ", ", full[1], ", ", full[2], ", ", full[3], ")");
  }
}

Call::Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias_,
           const OptionalTensor& sinks_, const Masks& masks, const Options& options)
    : q(unit_rows(query)), k(unit_rows(key)), v(unit_rows(value)) {
  const bool packed = masks.cu_seqlens_q.has_value();
  const int64_t dims = packed ? 3 : 4;
  TORCH_CHECK(q.dim() == dims && k.dim() == dims && v.dim() == dims, "attention: query, key and value must have ", dims,
              " dimensions");
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "attention: query, key and value ", "must have one dtype");
  args.element = element_of(q, "query");
  args.batch = packed ? 0 : q.size(0);
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.q_length = packed ? 0 : q.size(2);
  args.k_length = packed ? 0 : k.size(2);
  args.head_size = q.size(-1);
  args.value_size = v.size(-1);
  TORCH_CHECK(k.size(-1) == args.head_size && v.sizes().slice(0, dims - 1) == k.sizes().slice(0, dims - 1) &&
                  (packed || k.size(0) == args.batch) &&
                  (args.kv_heads == args.heads || (args.kv_heads > 0 && args.heads % args.kv_heads == 0)),
              "attention: shapes do not fit: query ", q.sizes(), ", key ", k.sizes(), ", value ", v.sizes());
  args.scale = options.scale;
  args.softcap = static_cast<float>(options.softcap);
  args.causal = options.causal != "none";
  args.bottom_right = options.causal != "top_left";
  args.left = side_of(options.window_left);
  args.right = side_of(options.window_right);
  if (packed) take_sequences(masks);
  take_masks(bias_, masks);
  args.q = strided(q);
  args.k = strided(k);
  args.v = strided(v);
  if (sinks_) {
    sinks = sinks_->to(at::kFloat).contiguous();
    TORCH_CHECK(sinks.dim() == 1 && sinks.size(0) == args.heads, "attention: sinks must have ", args.heads,
                " elements");
    args.sinks = sinks.const_data_ptr<float>();
  }
  args.keep_scale = 1.f;
  if (options.dropout_p > 0) {
    TORCH_CHECK(masks.seed && masks.seed->numel() == 1 && masks.seed->scalar_type() == at::kLong,
                "attention: dropout needs a seed of one int64");
    args.dropout = true;
    args.seed = static_cast<uint64_t>(*masks.seed->const_data_ptr<int64_t>());
    args.threshold = static_cast<uint64_t>(std::nearbyint(options.dropout_p * 4294967296.0));
    args.keep_scale = options.dropout_p < 1 ? static_cast<float>(1 / (1 - options.dropout_p)) : 0.f;
  }
}

void Call::take_sequences(const Masks& masks) {
  TORCH_CHECK(masks.cu_seqlens_k, "attention: cu_seqlens_k is missing");
  q_ends = masks.cu_seqlens_q->to(at::kLong).contiguous();
  k_ends = masks.cu_seqlens_k->to(at::kLong).contiguous();
  args.batch = q_ends.numel() - 1;
  TORCH_CHECK(args.batch >= 0 && k_ends.numel() == args.batch + 1,
              "attention: cu_seqlens_q and cu_seqlens_k differ in length");
  args.q_ends = q_ends.const_data_ptr<int64_t>();
  args.k_ends = k_ends.const_data_ptr<int64_t>();
  const auto check = [&](const int64_t* ends, int64_t total, int64_t& longest, const char* name) {
    TORCH_CHECK_VALUE(ends[0] == 0 && ends[args.batch] == total, "attention: ", name, " must start at 0 and end at ",
                      total);
    for (int64_t b = 0; b < args.batch; ++b) {
      TORCH_CHECK_VALUE(ends[b] <= ends[b + 1], "attention: ", name, " must not decrease");
      longest = std::max(longest, ends[b + 1] - ends[b]);
    }
  };
  check(args.q_ends, q.size(0), args.q_length, "cu_seqlens_q");
  check(args.k_ends, k.size(0), args.k_length, "cu_seqlens_k");
  int64_t start = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    first_element.push_back(start);
    start += args.heads * (args.q_ends[b + 1] - args.q_ends[b]) * (args.k_ends[b + 1] - args.k_ends[b]);
  }
  args.first_element = first_element.data();
}

void Call::take_masks(const OptionalTensor& bias_, const Masks& masks) {
  const bool packed = args.q_ends != nullptr;
  if (masks.prefix_length) {
    prefix = masks.prefix_length->to(at::kLong).contiguous();
    TORCH_CHECK(prefix.numel() == args.batch, "attention: prefix_length must have ", args.batch, " elements");
    args.prefix = prefix.const_data_ptr<int64_t>();
  }
  if (masks.alibi_slopes) {
    slopes = masks.alibi_slopes->to(at::kFloat).contiguous();
    TORCH_CHECK(slopes.numel() == args.heads || slopes.numel() == args.batch * args.heads,
                "attention: alibi_slopes does not fit");
    args.slopes = slopes.const_data_ptr<float>();
    args.slopes_batch = slopes.dim() == 2 ? args.heads : 0;
  }
  if (bias_) {
    bias = plane_rows(*bias_);
    check_plane(bias, args, packed, "bias");
    args.bias = plane(bias);
    args.bias_element = element_of(bias, "bias");
  }
  if (masks.mask) {
    mask = plane_rows(*masks.mask);
    check_plane(mask, args, packed, "mask");
    TORCH_CHECK(mask.scalar_type() == at::kBool, "attention: mask must be bool");
    args.mask = plane(mask);
  }
  if (masks.key_padding_mask) {
    const Tensor& padding = *masks.key_padding_mask;
    TORCH_CHECK(padding.dim() == 2 && padding.size(0) == args.batch && padding.size(1) >= args.k_length &&
                    (packed || padding.size(1) == args.k_length) && padding.scalar_type() == at::kBool,
                "attention: key_padding_mask must be bool of shape (", args.batch, ", ", args.k_length, ")");
    seen = padding.unsqueeze(1).slice(2, 0, args.k_length).contiguous();
  }
  if ((bias_ || masks.mask) && !one_query(args) && (wild(k) || wild(v))) {
    seen = seen.defined() ? seen.expand({args.batch, args.kv_heads, args.k_length}).clone(at::MemoryFormat::Contiguous)
                          : at::ones({args.batch, args.kv_heads, args.k_length}, k.options().dtype(at::kBool));
    const AttentionKernels& kernel = kernels(args.element);
    auto* const bytes = static_cast<uint8_t*>(seen.mutable_data_ptr());
    at::parallel_for(0, args.batch * args.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t owner = begin; owner < end; ++owner) {
        kernel.find_seen(args, owner / args.kv_heads, owner % args.kv_heads, bytes + owner * args.k_length);
      }
    });
  }
  if (seen.defined()) {
    args.seen = {const_cast<void*>(seen.const_data_ptr()), seen.size(0) > 1 ? seen.stride(0) : 0,
                 seen.size(1) > 1 ? seen.stride(1) : 0, 0, 1};
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const OptionalTensor& bias, const OptionalTensor& sinks, const Masks& masks,
                                           const Options& options) {
  Call call(query, key, value, bias, sinks, masks, options);
  AttentionArgs& a = call.args;
  auto shape = query.sizes().vec();
  shape.pop_back();
  Tensor lse = at::empty(shape, query.options().dtype(at::kFloat)), lse_low = at::empty(shape, lse.options());
  shape.push_back(a.value_size);
  Tensor out = rows_like(query, shape);
  if (lse.numel() == 0) return {out, lse, lse_low};
  a.out = strided(out);
  a.lse = strided_lse(lse);
  a.lse_low = lse_low.mutable_data_ptr<float>();
  if (one_query(a)) {
    a.splits = 1;
    const AttentionKernels& kernel = decode_kernels(a);
    const size_t bytes = kernel.decode_bytes(a);
    at::parallel_for(0, a.batch * a.kv_heads, 1,
                     [&](int64_t begin, int64_t end) { kernel.decode(a, scratch(bytes), begin, end); });
    return {out, lse, lse_low};
  }
  const AttentionKernels& kernel = kernels(a.element);
  const size_t bytes = kernel.forward_bytes(a);
  const int64_t blocks = (a.q_length + kernel.block_q - 1) / kernel.block_q, owners = a.batch * a.kv_heads;
  // A few runs of query blocks for each thread; the results do not depend on where they are cut.
  const int64_t threads = at::get_num_threads(),
                runs = threads == 1 ? 1 : std::min(blocks, (4 * threads + owners - 1) / owners);
  const int64_t length = (blocks + runs - 1) / runs;
  at::parallel_for(0, owners * runs, 1, [&](int64_t begin, int64_t end) {
    void* const memory = scratch(bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t run = task % runs, owner = task / runs;
      kernel.forward(a, memory, owner / a.kv_heads, owner % a.kv_heads, run * length,
                     std::min((run + 1) * length, blocks));
    }
  });
  return {out, lse, lse_low};
}

struct RowGradients {
  Tensor product, share;  // <dout, out>; the sink's part of the softmax: both in lse's shape
};

RowGradients row_gradients(const Call& call, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  const Tensor product = (dout.to(at::kFloat) * out.to(at::kFloat)).sum(-1);
  if (!call.sinks.defined()) return {product, at::zeros({}, lse.options())};
  const Tensor sinks = lse.dim() == 2 ? call.sinks : call.sinks.unsqueeze(-1);
  return {product, at::where(sinks.isneginf(), at::zeros({}, lse.options()), (sinks - lse).exp())};
}

// The gradient of a bias that is the same for every key: it moves lse alone, and the sink's part against the others.
Tensor query_bias_gradient(const RowGradients& rows, const Tensor& dlse, const Tensor& lse, at::IntArrayRef shape) {
  const Tensor moved = rows.product * rows.share + dlse * (1 - rows.share);
  return at::sum_to(at::where(lse.isneginf(), at::zeros({}, lse.options()), moved).unsqueeze(-1), shape);
}

// dsink_h = -sum over queries of exp(sink_h - lse) * delta: the sink is a key whose value is 0.
Tensor sinks_gradient(const RowGradients& rows, const Tensor& dlse) {
  const Tensor each = rows.share * (dlse - rows.product);
  return each.dim() == 2 ? each.sum(0) : each.sum(at::IntArrayRef{0, 2});
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& dout_, const Tensor& dlse_, const Tensor& query, const Tensor& key,
                   const Tensor& value, const Tensor& out_, const Tensor& lse_, const Tensor& lse_low_,
                   const OptionalTensor& bias, const OptionalTensor& sinks, const Masks& masks, const Options& options,
                   std::array<bool, 5> wanted) {
  Call call(query, key, value, bias, sinks, masks, options);
  AttentionArgs& a = call.args;
  TORCH_CHECK((bias || !wanted[3]) && (sinks || !wanted[4]),
              "attention_backward: output_mask asks for the gradient of a bias or of sinks that are not there");
  const auto none = [&] { return at::empty({0}, query.options()); };
  const Tensor dout = unit_rows(dout_), out = unit_rows(out_), lse = lse_.contiguous(), lse_low = lse_low_.contiguous(),
               dlse = dlse_.to(at::kFloat).contiguous();
  TORCH_CHECK(dout.sizes() == out.sizes() && dout.scalar_type() == out.scalar_type() &&
                  out.scalar_type() == query.scalar_type() && out.size(-1) == a.value_size &&
                  out.sizes().slice(0, out.dim() - 1) == lse.sizes() && dlse.sizes() == lse.sizes() &&
                  lse_low.sizes() == lse.sizes() && query.sizes().slice(0, query.dim() - 1) == lse.sizes(),
              "attention_backward: dout, out, dlse or lse do not fit");
  Tensor dq = wanted[0] ? rows_like(query, query.sizes()) : none(),
         dk = wanted[1] ? rows_like(key, key.sizes()) : none(),
         dv = wanted[2] ? rows_like(value, value.sizes()) : none();
  const bool packed = lse.dim() == 2;
  a.dbias_once = wanted[3] && !packed && bias->sizes().equals({a.batch, a.heads, a.q_length, a.k_length});
  a.dbias_element = a.dbias_once ? a.bias_element : Element::kFloat;
  Tensor dbias = none();
  if (wanted[3]) {
    dbias = at::zeros(bias->sizes(), bias->options().dtype(a.dbias_once ? bias->scalar_type() : at::kFloat));
  }
  a.out = strided(out);
  a.dout = strided(dout);
  a.lse = strided_lse(lse);
  a.lse_low = const_cast<float*>(lse_low.const_data_ptr<float>());
  a.dlse = dlse.const_data_ptr<float>();
  if (wanted[0]) a.dq = strided(dq);
  if (wanted[1]) a.dk = strided(dk);
  if (wanted[2]) a.dv = strided(dv);
  const bool by_query = wanted[3] && !packed && bias->size(3) == 1;
  if (wanted[3] && !by_query) a.dbias = plane(dbias);
  if (lse.numel() > 0 || key.numel() > 0) {
    const AttentionKernels& kernel = kernels(a.element);
    const size_t bytes = kernel.backward_bytes(a);
    // Owners that add to the same elements of dbias run one after another on one thread, in order.
    const int64_t batches = a.dbias.data && a.dbias.batch == 0 ? 1 : a.batch,
                  groups = a.dbias.data && a.dbias.head == 0 ? 1 : a.kv_heads;
    at::parallel_for(0, batches * groups, 1, [&](int64_t begin, int64_t end) {
      void* const memory = scratch(bytes);
      for (int64_t chain = begin; chain < end; ++chain) {
        for (int64_t b = chain / groups; b < a.batch; b += batches) {
          for (int64_t kv = chain % groups; kv < a.kv_heads; kv += groups) kernel.backward(a, memory, b, kv);
        }
      }
    });
  }
  Tensor dsinks = none();
  if (by_query || wanted[4]) {
    const RowGradients rows = row_gradients(call, dout, out, lse);
    if (by_query) dbias = query_bias_gradient(rows, dlse, lse, bias->sizes());
    if (wanted[4]) dsinks = sinks_gradient(rows, dlse);
  }
  if (wanted[3]) dbias = dbias.to(bias->scalar_type());
  return {dq, dk, dv, dbias, dsinks};
}

#define PK_ATTENTION_ARGUMENTS                                                                                         \
  const OptionalTensor &bias, const OptionalTensor &sinks, const OptionalTensor &mask,                                 \
      const OptionalTensor &key_padding_mask, const OptionalTensor &prefix_length, const OptionalTensor &alibi_slopes, \
      const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k, const OptionalTensor &seed,              \
      c10::string_view causal, int64_t window_left, int64_t window_right, double softcap, double dropout_p,            \
      double scale
#define PK_ATTENTION_BUNDLES                                                                 \
  {mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed}, { \
    causal, window_left, window_right, softcap, dropout_p, scale                             \
  }

std::tuple<Tensor, Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     PK_ATTENTION_ARGUMENTS) {
  return forward(query, key, value, bias, sinks, PK_ATTENTION_BUNDLES);
}

Gradients attention_backward(const Tensor& dout, const Tensor& dlse, const Tensor& query, const Tensor& key,
                             const Tensor& value, const Tensor& out, const Tensor& lse, const Tensor& lse_low,
                             PK_ATTENTION_ARGUMENTS, std::array<bool, 5> output_mask) {
  return backward(dout, dlse, query, key, value, out, lse, lse_low, bias, sinks, PK_ATTENTION_BUNDLES, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("attention_forward.cpu", &attention_forward);
  m.impl("attention_backward.cpu", &attention_backward);
}

}  // namespace pk
