// A self-test, not the library's LSTM: each block keeps its slice of W_hh in shared memory for all T steps and meets
// the others once a step.
#include "../cuda/platform.h"
#include "selftest_kernels.h"

namespace pk {

namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

// U: hidden units a block owns.
__global__ void __launch_bounds__(kThreads)
    lstm_kernel(const float* __restrict__ gates_x, const float* __restrict__ whh, const float* __restrict__ h0,
                const float* __restrict__ c0, float* hs, float* __restrict__ c_last, int T, int B, int H, int U) {
  PK_DYN_SHARED(smem);
  float* w = reinterpret_cast<float*>(smem);  // [4][U][H]
  float* c = w + 4 * U * H;                   // [B][U]
  float* h = c + B * U;                       // [B][H]
  const int tid = static_cast<int>(threadIdx.x), u0 = static_cast<int>(blockIdx.x) * U, owned = min(U, H - u0);
  for (int i = tid; i < 4 * owned * H; i += kThreads) {
    const int g = i / (owned * H), u = i / H % owned, k = i % H;
    w[(g * U + u) * H + k] = whh[(g * H + u0 + u) * H + k];
  }
  for (int i = tid; i < B * owned; i += kThreads) c[i / owned * U + i % owned] = c0[i / owned * H + u0 + i % owned];
  for (int t = 0; t < T; ++t) {
    const float* before = t ? hs + static_cast<int64_t>(t - 1) * B * H : h0;
    for (int i = tid; i < B * H; i += kThreads) h[i] = ld_cg(before + i);
    __syncthreads();
    for (int i = tid; i < B * owned; i += kThreads) {
      const int b = i / owned, u = i % owned;
      const float* gx = gates_x + (static_cast<int64_t>(t) * B + b) * 4 * H + u0 + u;
      float a[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        a[g] = gx[g * H];
        for (int k = 0; k < H; ++k) a[g] += w[(g * U + u) * H + k] * h[b * H + k];
      }
      const float now = sigmoid(a[1]) * c[b * U + u] + sigmoid(a[0]) * tanhf(a[2]);
      c[b * U + u] = now;
      hs[(static_cast<int64_t>(t) * B + b) * H + u0 + u] = sigmoid(a[3]) * tanhf(now);
    }
    grid_sync();  // also a block barrier: h may be overwritten after it
  }
  for (int i = tid; i < B * owned; i += kThreads) c_last[i / owned * H + u0 + i % owned] = c[i / owned * U + i % owned];
}

}  // namespace

void selftest_lstm(const float* gates_x, const float* whh, const float* h0, const float* c0, float* hs, float* c_last,
                   int T, int B, int H, int blocks, void* stream) {
  const int U = ceil_div(H, blocks);
  const size_t smem = sizeof(float) * static_cast<size_t>(4 * U * H + B * U + B * H);
  launch_cooperative(lstm_kernel, static_cast<unsigned>(ceil_div(H, U)), kThreads, smem, stream, gates_x, whh, h0, c0,
                     hs, c_last, T, B, H, U);
}

}  // namespace pk
