// Shared-memory swizzle Swizzle<B,4,3>, as TMA writes and wgmma reads it.
#pragma once
#include <cstdint>

namespace emu {

// mode as in a matrix descriptor: 0 none, 1 = 128 bytes, 2 = 64, 3 = 32; 16-byte chunks are exchanged by the row
// number.
inline uint32_t swizzle(uint32_t a, int mode) {
  if (!mode) return a;
  const uint32_t rows = mode == 1 ? 7 : mode == 2 ? 3 : 1;
  return a ^ (a >> 7 & rows) << 4;
}

}  // namespace emu
