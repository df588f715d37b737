// What the activation operators share: names, checks, pointers and threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <xmmintrin.h>

#include <algorithm>
#include <string_view>

#include "activation_kernels.h"
#include "isa.h"

namespace pk {

using at::Tensor;

constexpr int64_t kGrain = 16384;  // elements a thread must have to be worth waking
constexpr int64_t kUnit = 1024;    // threads split the flat range at multiples of this, so that few blocks are partial

inline const ActivationKernels& kernels() {
  static const ActivationKernels* const table = isa() == Isa::kAvx512 ? activation_kernels_avx512()
                                                : isa() == Isa::kAvx2 ? activation_kernels_avx2()
                                                                      : nullptr;
  TORCH_CHECK(table, "pykernels: ", isa_refusal());
  return *table;
}

struct Name {
  std::string_view text;
  Activation activation;
};
constexpr Name kUnary[] = {
    {"sigmoid", Activation::kSigmoid},      {"tanh", Activation::kTanh}, {"relu", Activation::kRelu},
    {"leaky_relu", Activation::kLeakyRelu}, {"elu", Activation::kElu},   {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},   {"silu", Activation::kSilu}, {"swish", Activation::kSwish}};
constexpr Name kGated[] = {{"identity", Activation::kIdentity},  {"sigmoid", Activation::kSigmoid},
                           {"relu", Activation::kRelu},          {"gelu", Activation::kGelu},
                           {"gelu_tanh", Activation::kGeluTanh}, {"silu", Activation::kSilu}};

template <size_t N>
Activation parse(c10::string_view text, const Name (&names)[N], const char* op) {
  for (const Name& name : names) {
    if (name.text == std::string_view(text.data(), text.size())) return name.activation;
  }
  TORCH_CHECK(false, op, ": unknown activation '", text, "'");
}

inline Dtype dtype_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, op, ": expected float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

// Kernels read raw memory, so what the public functions have checked is checked again where it guards memory.
inline void check_twin(const Tensor& x, const Tensor& other, const char* op, const char* name) {
  TORCH_CHECK(other.sizes() == x.sizes(), op, ": ", name, " has shape ", other.sizes(), ", expected ", x.sizes());
  TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.device() == x.device(), op, ": ", name, " is ",
              other.scalar_type(), " on ", other.device(), ", expected ", x.scalar_type(), " on ", x.device());
}

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t total, int64_t unit = kUnit) {
  at::parallel_for(0, (total + unit - 1) / unit, std::max<int64_t>(1, kGrain / unit), [&](int64_t begin, int64_t end) {
    kernel(args, begin * unit, std::min(end * unit, total));
    _mm_sfence();  // what was written past the caches is seen by whoever is told that it is done
  });
}

inline Input input(const Tensor& t, int64_t stride) { return {t.const_data_ptr(), stride}; }
inline Output output(const Tensor& t, int64_t stride) { return {t.mutable_data_ptr(), stride}; }
inline Input half(Input t, int64_t elements, int64_t size) {
  return {static_cast<const char*>(t.data) + elements * size, t.stride};
}
inline Output half(Output t, int64_t elements, int64_t size) {
  return {static_cast<char*>(t.data) + elements * size, t.stride};
}

inline uint64_t seed_of(const Tensor& seed, const char* op) {
  TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == at::kLong && seed.device().is_cpu(), op,
              ": seed must be one int64 element on the CPU, got ", seed.scalar_type(), seed.sizes(), " on ",
              seed.device());
  return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}

}  // namespace pk
