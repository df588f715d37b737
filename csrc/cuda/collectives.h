// Launchers that run one collective each, so that tests can hold it against its definition: on the emulator, and
// unchanged on a GPU, where they show that the emulator's definition is the hardware's.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace pk {

const char* kernel_compiler();

// One warp; in and out: 32 words.  mode: 0 idx, 1 up, 2 down, 3 xor; lane l passes arg[l].
void check_shuffle(const uint32_t* in, const int* arg, uint32_t* out, int mode, int width, void* stream);
// One warp; out: 32 x 4 words: ballot, any, all, match_any of the words in.
void check_votes(const uint32_t* in, uint32_t* out, void* stream);
// One block of `threads`; out: threads x 3: __syncthreads_count, _and, _or of in != 0.
void check_block_votes(const int* in, int* out, int threads, void* stream);
// tile: 32 rows of 8 16-bit elements; lane l gives the address of row l; out: 32 x 4 registers.
void check_ldmatrix(const uint16_t* tile, uint32_t* out, bool trans, void* stream);
// One warp's fragments: a 32 x 4, b 32 x 2 registers, c and d 32 x 4 floats; d = c + a b.
void check_mma(const uint32_t* a, const uint32_t* b, const float* c, float* d, DType dtype, void* stream);
// The same for tf32, from floats: a 32 x 4, b 32 x 2; and the rounding alone, out[i] = in[i] to tf32.
void check_mma_tf32(const float* a, const float* b, const float* c, float* d, void* stream);
void check_tf32(const float* in, float* out, int n, void* stream);
// out[i] = float to T to float of in[i], packed[i] = pack2(in[2 i], in[2 i + 1]) (not for f32).
void check_convert(const float* in, float* out, uint32_t* packed, int n, DType dtype, void* stream);
// Four words for each of n offsets; key = seed.
void check_philox(const uint32_t* counter, uint32_t* out, int n, uint64_t seed, void* stream);
// Rows of `cols` floats, one block each; out: 3 x rows: sums, maxima, sums of squares.
void check_block_reduce(const float* in, float* out, int rows, int cols, void* stream);
// total[0] = sum of in, by the last of `blocks` blocks to finish; partial: blocks floats, counter: a zero.
void check_last_block(const float* in, float* partial, unsigned* counter, float* total, int n, int blocks,
                      void* stream);
// Copies n elements through cp.async, a block of 128 threads for each 1024 bytes; zeros beyond n up to whole tiles.
void check_cp_async(const float* in, float* out, int n, int tiles, void* stream);
// out[i] = in[n - 1 - i], each half of the way by another block of a cooperative grid.
void check_grid_sync(const int* in, int* scratch, int* out, int n, int blocks, void* stream);
// Copies n elements of T in 16-byte vectors, whatever the alignment of either side.
void check_vec_copy(const void* in, void* out, int64_t n, DType dtype, void* stream);

// collectives_sm90.cu: c[M, N] = a[M, K] b[N, K]^T in fp32, bf16 or fp16 inputs; TMA, mbarriers and wgmma.
// b_mn: b is [K, N] instead.  a_registers: A is loaded by threads and passed in registers.
void check_wgmma(const void* a, const void* b, float* c, int M, int N, int K, bool b_mn, bool a_registers, DType dtype,
                 void* stream);
// Copies a [D3, D2, D1, D0] tensor (strides of its outer dimensions in elements) through 4-d TMA loads and stores.
void check_tma_copy(const void* in, void* out, int d0, int d1, int d2, int d3, int64_t s1, int64_t s2, int64_t s3,
                    DType dtype, void* stream);
// Each block of `threads` gets the words of the next rank in its cluster; how: 0 loads, 1 stores, 2 st.async, 3
// st.async of 16 bytes, 4 stores and remote arrivals.  ranks: blocks x 2: rank, size of the cluster.
void check_cluster(const uint32_t* in, uint32_t* out, int* ranks, int blocks, int cluster, int threads, int how,
                   void* stream);
// in: [blocks, 64] of 16 bits; out: [blocks, cluster, 64]: every block gets the row of each rank of its cluster.
void check_multicast(const void* in, void* out, int blocks, int cluster, DType dtype, void* stream);

}  // namespace pk
