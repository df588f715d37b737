// The emulator's CUtensorMap: a tensor of up to four dimensions, innermost first, and the box that TMA moves.
#pragma once
#include <cstddef>

namespace emu {

struct alignas(64) TensorMap {
  const char* base;
  int rank, dim[4], box[4];
  size_t stride[4];  // bytes
  int element;
};

}  // namespace emu
