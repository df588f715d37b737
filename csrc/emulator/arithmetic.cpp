// Arithmetic that a GPU does not do to the last bit: what its approximate functions may be off by, and sums on tensor
// cores.  On request: otherwise both are as good as float32 can be.
#include <algorithm>
#include <cmath>

#include "runtime.h"

namespace emu {

bool device_arithmetic = false, cut_off_sums = false;

// Up to `error` (relative) beside x, always the same for the same x.
float off_by(float x, float error) {
  const uint32_t u = static_cast<uint32_t>(bits(x)) * 0x9e3779b1u;
  return std::isfinite(x) ? x * (1.f + (u >> 31 ? error : -error)) : x;
}

// Tensor cores add products and accumulator as integers: all are shifted to the exponent of the largest, cut off a few
// bits below float32's, and the sum is cut off to float32 (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of
// NVIDIA tensor cores", PeerJ Computer Science 2021, for Volta to Ampere).  Here two bits are kept.
float tensor_core_sum(float c, const float* a, const float* b, int n) {
  if (!cut_off_sums) {
    float sum = 0.f;
    for (int k = 0; k < n; ++k) sum += a[k] * b[k];
    return sum + c;
  }
  constexpr int kBits = 26;
  double terms[17], largest = std::fabs(static_cast<double>(c)), plain = c;
  terms[n] = c;
  for (int k = 0; k < n; ++k) {
    terms[k] = static_cast<double>(a[k]) * b[k];
    plain += terms[k];
    largest = std::max(largest, std::fabs(terms[k]));
  }
  if (!std::isfinite(plain) || largest < 1e-30) return static_cast<float>(plain);
  const uint64_t exponent = bits(largest) >> 52;  // of a positive number
  const double unit = unbits<double>((exponent - (kBits - 1)) << 52);
  const double units = unbits<double>((2046 - exponent + (kBits - 1)) << 52);  // 1 / unit
  int64_t sum = 0;
  for (int k = 0; k <= n; ++k) sum += static_cast<int64_t>(terms[k] * units);
  const double whole = static_cast<double>(sum) * unit;
  const float found = static_cast<float>(whole);
  return std::fabs(static_cast<double>(found)) > std::fabs(whole) ? std::nextafter(found, 0.f) : found;
}

}  // namespace emu
