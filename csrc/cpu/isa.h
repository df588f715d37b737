// Which instruction set the native kernels use: what torch found on this processor (ATEN_CPU_CAPABILITY overrides it).
#pragma once

namespace pk {

enum class Isa { kNone, kAvx2, kAvx512 };

Isa isa();  // decided once
// Tile registers for bfloat16. Who names the capability avx512 to torch gets no more than that here, too.
bool has_tile_registers();
const char* isa_name();     // "avx512", "avx2", or "" for none
const char* isa_refusal();  // why there is none

}  // namespace pk
