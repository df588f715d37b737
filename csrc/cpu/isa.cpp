#include "isa.h"

#include <ATen/Version.h>

#include <string>

namespace pk {

Isa isa() {
  static const Isa found = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.starts_with("AVX512") ? Isa::kAvx512 : capability == "AVX2" ? Isa::kAvx2 : Isa::kNone;
  }();
  return found;
}

const char* isa_name() { return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : ""; }

const char* isa_refusal() {
  static const std::string text = "the native CPU kernels need AVX2; torch reports the CPU capability " +
                                  at::get_cpu_capability() + " (see ATEN_CPU_CAPABILITY). Use the reference backend";
  return text.c_str();
}

}  // namespace pk
