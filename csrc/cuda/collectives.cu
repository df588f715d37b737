#include "collectives.h"

#include "philox.h"
#include "platform.h"
#include "reduce.h"
#include "vec.h"

namespace pk {

namespace {

__global__ void shuffle_kernel(const uint32_t* in, const int* arg, uint32_t* out, int mode, int width) {
  const int lane = static_cast<int>(threadIdx.x), x = arg[lane];
  const uint32_t v = in[lane];
  uint32_t r = 0;
  if (mode == 0) r = __shfl_sync(kAllLanes, v, x, width);
  if (mode == 1) r = __shfl_up_sync(kAllLanes, v, static_cast<unsigned>(x), width);
  if (mode == 2) r = __shfl_down_sync(kAllLanes, v, static_cast<unsigned>(x), width);
  if (mode == 3) r = __shfl_xor_sync(kAllLanes, v, x, width);
  out[lane] = r;
}

__global__ void votes_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int p = in[lane] != 0;
  out[4 * lane] = __ballot_sync(kAllLanes, p);
  out[4 * lane + 1] = static_cast<uint32_t>(__any_sync(kAllLanes, p));
  out[4 * lane + 2] = static_cast<uint32_t>(__all_sync(kAllLanes, p));
  out[4 * lane + 3] = __match_any_sync(kAllLanes, in[lane]);
}

__global__ void block_votes_kernel(const int* in, int* out) {
  const int i = static_cast<int>(threadIdx.x), p = in[i] != 0;
  out[3 * i] = __syncthreads_count(p);
  out[3 * i + 1] = __syncthreads_and(p) != 0;
  out[3 * i + 2] = __syncthreads_or(p) != 0;
}

template <bool TRANS>
__global__ void ldmatrix_kernel(const uint16_t* tile, uint32_t* out) {
  PK_SHARED(uint4, rows, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  rows[lane] = reinterpret_cast<const uint4*>(tile)[lane];
  __syncwarp();
  uint32_t r[4];
  if constexpr (TRANS)
    ldmatrix_x4_trans(r, smem_addr(&rows[lane]));
  else
    ldmatrix_x4(r, smem_addr(&rows[lane]));
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t fragment[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
  float acc[4] = {c[4 * lane], c[4 * lane + 1], c[4 * lane + 2], c[4 * lane + 3]};
  mma_m16n8k16<T>(acc, fragment, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = acc[i];
}

__global__ void mma_tf32_kernel(const float* a, const float* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = to_tf32(a[4 * lane + i]);
  float acc[4] = {c[4 * lane], c[4 * lane + 1], c[4 * lane + 2], c[4 * lane + 3]};
  mma_m16n8k8_tf32(acc, fragment, to_tf32(b[2 * lane]), to_tf32(b[2 * lane + 1]));
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = acc[i];
}

__global__ void tf32_kernel(const float* in, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = __uint_as_float(to_tf32(in[i]));
}

template <class T>
__global__ void convert_kernel(const float* in, float* out, uint32_t* packed, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) out[i] = to_float(from_float<T>(in[i]));
  if constexpr (sizeof(T) == 2) {
    if (2 * i + 1 < n) packed[i] = pack2<T>(in[2 * i], in[2 * i + 1]);
  }
}

__global__ void philox_kernel(const uint32_t* counter, uint32_t* out, int n, uint64_t seed) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const uint32_t* c = counter + 4 * i;
  const Philox4 r =
      philox4x32_10(c[0], c[1], c[2], c[3], static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  for (int k = 0; k < 4; ++k) out[4 * i + k] = r.v[k];
}

constexpr int kThreads = 128;

__global__ void block_reduce_kernel(const float* in, float* out, int rows, int cols) {
  const int row = static_cast<int>(blockIdx.x);
  float sum = 0, squares = 0, largest = -INFINITY;
  for (int c = static_cast<int>(threadIdx.x); c < cols; c += kThreads) {
    const float x = in[static_cast<int64_t>(row) * cols + c];
    sum += x, squares += x * x, largest = fmaxf(largest, x);
  }
  sum = block_sum<kThreads>(sum);
  squares = block_sum<kThreads>(squares);  // through the same shared array, at once
  largest = block_max<kThreads>(largest);
  if (threadIdx.x == 0) out[row] = sum, out[rows + row] = largest, out[2 * rows + row] = squares;
}

__global__ void last_block_kernel(const float* in, float* partial, unsigned* counter, float* total, int n) {
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x))
    sum += in[i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == kThreads - 1) partial[blockIdx.x] = sum;  // not by the thread that hands it over
  if (!last_block_done(counter, gridDim.x)) return;
  sum = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) sum += partial[b];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) total[0] = sum, *counter = 0;
}

__global__ void cp_async_kernel(const float* in, float* out, int n) {
  constexpr int kTile = 256;  // floats: two 16-byte copies for each of the first 32 threads, in two groups
  PK_SHARED(float4, s, [kTile / 4]);
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kTile;
  for (int half = 0; half < 2; ++half) {
    const int v = half * 32 + i;
    if (i < 32) cp_async16(smem_addr(&s[v]), in + (first + 4 * v < n ? first + 4 * v : 0), first + 4 * v < n);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  const float* f = reinterpret_cast<const float*>(s);
  out[first + i] = f[i];
  cp_async_wait<0>();
  __syncthreads();
  out[first + kThreads + i] = f[kThreads + i];
}

__global__ void grid_sync_kernel(const int* in, int* scratch, int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
            step = static_cast<int>(gridDim.x * blockDim.x);
  for (int k = i; k < n; k += step) scratch[k] = in[k];
  grid_sync();
  for (int k = i; k < n; k += step) out[k] = ld_cg(scratch + n - 1 - k);
}

template <class T>
__global__ void vec_copy_kernel(const T* in, T* out, int64_t n) {
  constexpr int N = Vec16<T>::N;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (i >= n) return;
  const int left = static_cast<int>(min(n - i, static_cast<int64_t>(N)));
  store_vec_part(out + i, load_vec_part(in + i, left, from_float<T>(0.f)), left);
}

}  // namespace

const char* kernel_compiler() {
#if defined(__CUDACC__)
#define PK_TEXT(x) #x
#define PK_VERSION(a, b, c) "nvcc " PK_TEXT(a) "." PK_TEXT(b) "." PK_TEXT(c)
  return PK_VERSION(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__);
#else
  return "g++ " __VERSION__;
#endif
}

void check_shuffle(const uint32_t* in, const int* arg, uint32_t* out, int mode, int width, void* stream) {
  launch(shuffle_kernel, 1, 32, 0, stream, in, arg, out, mode, width);
}
void check_votes(const uint32_t* in, uint32_t* out, void* stream) { launch(votes_kernel, 1, 32, 0, stream, in, out); }
void check_block_votes(const int* in, int* out, int threads, void* stream) {
  launch(block_votes_kernel, 1, static_cast<unsigned>(threads), 0, stream, in, out);
}
void check_ldmatrix(const uint16_t* tile, uint32_t* out, bool trans, void* stream) {
  launch(trans ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, 1, 32, 0, stream, tile, out);
}
void check_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d, DType dtype, void* stream) {
  launch(dtype == DType::bf16 ? mma_kernel<bf16> : mma_kernel<fp16>, 1, 32, 0, stream, a, b, c, d);
}
void check_mma_tf32(const float* a, const float* b, const float* c, float* d, void* stream) {
  launch(mma_tf32_kernel, 1, 32, 0, stream, a, b, c, d);
}
void check_tf32(const float* in, float* out, int n, void* stream) {
  launch(tf32_kernel, static_cast<unsigned>(ceil_div(n, 256)), 256, 0, stream, in, out, n);
}
void check_convert(const float* in, float* out, uint32_t* packed, int n, DType dtype, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(convert_kernel<T>, static_cast<unsigned>(ceil_div(n, 256)), 256, 0, stream, in, out, packed, n);
  });
}
void check_philox(const uint32_t* counter, uint32_t* out, int n, uint64_t seed, void* stream) {
  launch(philox_kernel, static_cast<unsigned>(ceil_div(n, 128)), 128, 0, stream, counter, out, n, seed);
}
void check_block_reduce(const float* in, float* out, int rows, int cols, void* stream) {
  launch(block_reduce_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, in, out, rows, cols);
}
void check_last_block(const float* in, float* partial, unsigned* counter, float* total, int n, int blocks,
                      void* stream) {
  launch(last_block_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, in, partial, counter, total, n);
}
void check_cp_async(const float* in, float* out, int n, int tiles, void* stream) {
  launch(cp_async_kernel, static_cast<unsigned>(tiles), kThreads, 0, stream, in, out, n);
}
void check_grid_sync(const int* in, int* scratch, int* out, int n, int blocks, void* stream) {
  launch_cooperative(grid_sync_kernel, static_cast<unsigned>(blocks), 64, 0, stream, in, scratch, out, n);
}
void check_vec_copy(const void* in, void* out, int64_t n, DType dtype, void* stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const unsigned blocks = static_cast<unsigned>(ceil_div(n, static_cast<int64_t>(Vec16<T>::N) * 64));
    launch(vec_copy_kernel<T>, blocks, 64, 0, stream, static_cast<const T*>(in), static_cast<T*>(out), n);
  });
}

}  // namespace pk
