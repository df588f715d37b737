// Element types as launchers and bindings name them: plain C++, no CUDA header.
#pragma once

namespace pk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

}  // namespace pk
