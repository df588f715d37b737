// Whole kernels of the kinds the library has, as self-tests of the emulator and as subjects of tests/mutants.py.
#pragma once
#include "../cuda/dtype.h"

namespace pk {

// Attention forward, head size 64: q, k, v, o [heads, length, 64]; lse [heads, length], natural log.
void selftest_attention(const void* q, const void* k, const void* v, void* o, float* lse, int heads, int length,
                        float scale, bool causal, DType dtype, void* stream);
// LSTM over T steps in one cooperative launch: gates_x [T, B, 4 H] holds the input's part; whh [4 H, H], order i f g o.
void selftest_lstm(const float* gates_x, const float* whh, const float* h0, const float* c0, float* hs, float* c_last,
                   int T, int B, int H, int blocks, void* stream);

}  // namespace pk
