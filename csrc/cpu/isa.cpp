#include "isa.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>
#include <string>
#include <string_view>

namespace pk {

Isa isa() {
  static const Isa found = [] {
    const std::string capability = at::get_cpu_capability();
    return capability.starts_with("AVX512") ? Isa::kAvx512 : capability == "AVX2" ? Isa::kAvx2 : Isa::kNone;
  }();
  return found;
}

bool has_tile_registers() {
  static const bool found = [] {
    const char* const named = std::getenv("ATEN_CPU_CAPABILITY");
    return isa() == Isa::kAvx512 && !(named && std::string_view(named) == "avx512") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
           __builtin_cpu_supports("amx-bf16") && at::cpu::init_amx();  // which asks the operating system for them
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
