// The attention room's `.cpu` operator for generation with a cache: checks, outputs, threads. The arithmetic is in
// attention_decode.inc.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention_tensors.h"
#include "scratch.h"

namespace pk {
namespace {

constexpr const char* kName = "attention_decode";

int64_t integer_at(const Tensor& x, int64_t i) {
  return x.scalar_type() == at::kInt ? x.const_data_ptr<int32_t>()[i * x.stride(0)]
                                     : x.const_data_ptr<int64_t>()[i * x.stride(0)];
}

// A cache of keys and values with its lengths, checked before anything of it is read.
struct Cache {
  std::vector<int64_t> lengths;
  Tensor table;

  Cache(AttentionArgs& a, const Tensor& key, const OptionalTensor& cache_lengths, const OptionalTensor& block_table);

 private:
  void check_blocks(const AttentionArgs& a, int64_t count, int64_t b) const;
};

Cache::Cache(AttentionArgs& a, const Tensor& key, const OptionalTensor& cache_lengths,
             const OptionalTensor& block_table)
    : lengths(a.batch) {
  TORCH_CHECK(
      !cache_lengths || (cache_lengths->dim() == 1 && cache_lengths->size(0) == a.batch &&
                         (cache_lengths->scalar_type() == at::kInt || cache_lengths->scalar_type() == at::kLong)),
      kName, "(): argument 'cache_lengths' must be int32 or int64 of shape (", a.batch, ",)");
  a.block_size = key.size(2);
  a.k_length = key.size(2);
  if (block_table) {
    TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == a.batch && block_table->scalar_type() == at::kInt,
                kName, "(): argument 'block_table' must be int32 of shape (", a.batch, ", blocks)");
    table = block_table->size(1) <= 1 || block_table->stride(1) == 1 ? *block_table : block_table->contiguous();
    a.blocks = table.const_data_ptr<int32_t>();
    a.block_row = table.stride(0);
    a.k_length *= table.size(1);
  }
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = lengths[b] = cache_lengths ? integer_at(*cache_lengths, b) : a.k_length;
    TORCH_CHECK_INDEX(length >= 0 && length <= a.k_length, kName, "(): argument 'cache_lengths': cache_lengths[", b,
                      "] is ", length, ", which is not in [0, ", a.k_length + 1, ")");
    if (block_table) check_blocks(a, key.size(0), b);
  }
  a.lengths = lengths.data();
}

// Of the blocks that hold keys which some query sees; the rest of a table may hold anything.
void Cache::check_blocks(const AttentionArgs& a, int64_t count, int64_t b) const {
  const int64_t first = a.left < 0 ? 0 : std::max<int64_t>(lengths[b] - a.q_length - a.left, 0);
  for (int64_t i = a.block_size ? first / a.block_size : 0; i * a.block_size < lengths[b]; ++i) {
    const int64_t block = a.blocks[b * a.block_row + i];
    TORCH_CHECK_INDEX(block >= 0 && block < count, kName, "(): argument 'block_table': block_table[", b, ", ", i,
                      "] is ", block, ", which is not in [0, ", count, ")");
  }
}

// Parts of the cache: enough for the threads of a large machine, none below 1024 keys. By shapes alone, so that a
// result does not depend on the number of threads.
int64_t default_splits(const AttentionArgs& a) {
  constexpr int64_t kTasks = 32, kFewestKeys = 1024;
  const int64_t owners = std::max<int64_t>(a.batch * a.kv_heads, 1);
  return std::max<int64_t>(1, std::min(kTasks / owners, a.k_length / kFewestKeys));
}

std::tuple<Tensor, Tensor> attention_decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                            const OptionalTensor& cache_lengths, const OptionalTensor& block_table,
                                            const OptionalTensor& sinks_, const OptionalTensor& alibi_slopes,
                                            int64_t window_left, double softcap, double scale, int64_t num_splits,
                                            int64_t) {
  TORCH_CHECK(query.dim() == 4 && key_cache.dim() == 4 && value_cache.dim() == 4, kName,
              "(): query and caches must have 4 dimensions");
  const Tensor q = unit_rows(query), k = unit_rows(key_cache), v = unit_rows(value_cache);
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kName,
              "(): query and caches must have one dtype");
  AttentionArgs a{};
  a.element = element_of(q, "query");
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.q_length = q.size(2);
  a.head_size = q.size(3);
  a.value_size = v.size(3);
  TORCH_CHECK(k.size(3) == a.head_size && v.sizes().slice(0, 3) == k.sizes().slice(0, 3) &&
                  (block_table || k.size(0) == a.batch) &&
                  (a.kv_heads == a.heads || (a.kv_heads > 0 && a.heads % a.kv_heads == 0)) && num_splits >= 0,
              kName, "(): shapes do not fit: query ", q.sizes(), ", caches ", k.sizes(), " and ", v.sizes());
  a.scale = scale;
  a.softcap = static_cast<float>(softcap);
  a.causal = a.bottom_right = true;
  a.left = side_of(window_left);
  a.right = -1;
  a.keep_scale = 1.f;
  const Cache cache(a, k, cache_lengths, block_table);
  Tensor sinks, slopes;
  if (sinks_) {
    sinks = sinks_->to(at::kFloat).contiguous();
    TORCH_CHECK(sinks.dim() == 1 && sinks.size(0) == a.heads, kName, "(): sinks must have ", a.heads, " elements");
    a.sinks = sinks.const_data_ptr<float>();
  }
  if (alibi_slopes) {
    slopes = alibi_slopes->to(at::kFloat).contiguous();
    TORCH_CHECK(slopes.numel() == a.heads * (slopes.dim() == 2 ? a.batch : 1), kName, "(): alibi_slopes does not fit");
    a.slopes = slopes.const_data_ptr<float>();
    a.slopes_batch = slopes.dim() == 2 ? a.heads : 0;
  }
  Tensor lse = at::empty({a.batch, a.heads, a.q_length}, q.options().dtype(at::kFloat));
  Tensor out = rows_like(query, {a.batch, a.heads, a.q_length, a.value_size});
  if (lse.numel() == 0) return {out, lse};
  a.q = strided(q);
  a.k = strided(k);
  a.v = strided(v);
  a.out = strided(out);
  a.lse = {lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2)};
  a.splits = num_splits ? num_splits : default_splits(a);
  const AttentionKernels& kernel = decode_kernels(a);
  const size_t bytes = kernel.decode_bytes(a);
  const int64_t owners = a.batch * a.kv_heads;
  Tensor parts;
  if (a.splits > 1) {
    parts = at::empty({owners * a.splits * kernel.decode_part(a)}, lse.options());
    a.parts = parts.mutable_data_ptr<float>();
  }
  at::parallel_for(0, owners * a.splits, 1,
                   [&](int64_t begin, int64_t end) { kernel.decode(a, scratch(bytes), begin, end); });
  if (a.splits == 1) return {out, lse};
  at::parallel_for(0, owners, 1, [&](int64_t begin, int64_t end) {
    void* const memory = scratch(bytes);
    for (int64_t owner = begin; owner < end; ++owner) {
      kernel.decode_merge(a, memory, owner / a.kv_heads, owner % a.kv_heads);
    }
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("attention_decode.cpu", &attention_decode); }

}  // namespace pk
