// Candidate samplers on the CPU: the stream of pykernels/reference/sampled_softmax/samplers.py, bit for bit. Compiled
// without fused multiply-add, which would round otherwise than that file does.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <optional>

namespace pk {
namespace {

using at::Tensor;

uint32_t philox_word(uint64_t seed, uint64_t offset) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

double uniform53(uint64_t seed, uint64_t draw) {
  const uint64_t high = philox_word(seed, 2 * draw), low = philox_word(seed, 2 * draw + 1);
  return static_cast<double>(high << 21 | low >> 11) * 0x1p-53;
}

// exp(x), 0 <= x < 45: the same additions and multiplications as the reference's.
double exp53(double x) {
  constexpr double kInverse[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  const double n = std::floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = kInverse[13];
  for (int k = 12; k >= 0; --k) p = p * r + kInverse[k];
  return p * static_cast<double>(int64_t{1} << static_cast<int64_t>(n));
}

struct Sampler {
  uint64_t seed;
  int64_t size;
  double log_size;          // of size + 1; 0: not log-uniform
  const double* threshold;  // null: uniform
  const int32_t* alias;

  int64_t operator()(uint64_t draw) const {
    const double u = uniform53(seed, draw);
    if (log_size > 0) {
      return std::clamp<int64_t>(static_cast<int64_t>(std::floor(exp53(u * log_size))) - 1, 0, size - 1);
    }
    const double scaled = u * static_cast<double>(size);
    const int64_t bucket = std::min<int64_t>(static_cast<int64_t>(std::floor(scaled)), size - 1);
    if (!threshold || scaled - static_cast<double>(bucket) < threshold[bucket]) return bucket;
    const int64_t id = alias[bucket];
    TORCH_CHECK_INDEX(id >= 0 && id < size, "candidate_sample: alias[", bucket, "] is ", id);
    return id;
  }
};

// The classes already drawn, by open addressing: 16 bytes for each, whatever the number of classes.
class Seen {
 public:
  explicit Seen(int64_t most) {
    while (size_ < 2 * most) size_ *= 2;
    slots_.reset(new int64_t[size_]);
    std::fill_n(slots_.get(), size_, int64_t{-1});
  }
  bool add(int64_t id) {
    for (int64_t at = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> 20) & (size_ - 1);;
         at = (at + 1) & (size_ - 1)) {
      if (slots_[at] == id) return false;
      if (slots_[at] < 0) {
        slots_[at] = id;
        return true;
      }
    }
  }

 private:
  int64_t size_ = 16;
  std::unique_ptr<int64_t[]> slots_;
};

std::tuple<Tensor, Tensor> candidate_sample(const Tensor& seed, const std::optional<Tensor>& threshold,
                                            const std::optional<Tensor>& alias, c10::string_view kind,
                                            int64_t num_sampled, int64_t range_max, bool unique) {
  constexpr auto name = "candidate_sample";
  TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == at::kLong && seed.device().is_cpu(), name,
              ": seed must be one int64 on the CPU");
  TORCH_CHECK(range_max > 0 && num_sampled >= 0 && (!unique || num_sampled <= range_max), name, ": ", num_sampled,
              " of ", range_max, " classes");
  Sampler draw{static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), range_max, 0, nullptr, nullptr};
  Tensor held_threshold, held_alias;
  if (kind == "log_uniform") {
    draw.log_size = std::log(static_cast<double>(range_max + 1));
  } else if (kind == "alias") {
    TORCH_CHECK(threshold && alias && threshold->numel() == range_max && alias->numel() == range_max &&
                    threshold->scalar_type() == at::kDouble && alias->scalar_type() == at::kInt,
                name, ": threshold and alias must hold ", range_max, " classes, float64 and int32");
    held_threshold = threshold->contiguous();
    held_alias = alias->contiguous();
    draw.threshold = held_threshold.const_data_ptr<double>();
    draw.alias = held_alias.const_data_ptr<int32_t>();
  } else {
    TORCH_CHECK(kind == "uniform", name, ": unknown kind ", kind);
  }
  Tensor ids = at::empty({num_sampled}, seed.options()), tries = at::empty({}, seed.options());
  int64_t* const out = ids.mutable_data_ptr<int64_t>();
  uint64_t drawn = 0;
  if (unique) {
    Seen seen(num_sampled);
    for (int64_t k = 0; k < num_sampled; ++drawn) {
      TORCH_CHECK(drawn < uint64_t{1} << 40, name, ": ", num_sampled,
                  " different classes were not found in 2**40 draws");
      const int64_t id = draw(drawn);
      if (seen.add(id)) out[k++] = id;
    }
  } else {
    for (; drawn < static_cast<uint64_t>(num_sampled); ++drawn) out[drawn] = draw(drawn);
  }
  *tries.mutable_data_ptr<int64_t>() = static_cast<int64_t>(drawn);
  return {ids, tries};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("candidate_sample.cpu", &candidate_sample); }

}  // namespace pk
