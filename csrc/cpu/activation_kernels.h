// The activation room's interface between activation.cpp (tensors) and the files compiled per instruction set
// (activation_avx2.cpp, activation_avx512.cpp): plain pointers and numbers, no torch type.
//
// Every tensor is seen as rows of `cols` elements: unit stride inside a row, any stride (in elements) between rows.
// Work is the range [begin, end) of the flat index row * cols + col; a dense tensor is one row, so its stride does not
// matter.
#pragma once
#include <cstdint>

namespace pk {

enum class Dtype : uint8_t { kFloat, kDouble, kBFloat16, kHalf };

enum class Activation : uint8_t {
  kIdentity,
  kSigmoid,
  kTanh,
  kRelu,
  kLeakyRelu,
  kElu,
  kGelu,
  kGeluTanh,
  kSilu,
  kSwish,
  kPrelu,
  kSwishBeta
};

struct Input {
  const void* data = nullptr;
  int64_t stride = 0;
};
struct Output {  // data == nullptr: not wanted
  void* data = nullptr;
  int64_t stride = 0;
};

// Results of one call that together exceed this are written past the caches. A store into memory that is not in a
// cache reads it first; past the caches it does not, which is worth more than finding the result there afterwards:
// with everything read once by the next operator, forward and backward of SwiGLU took 0.8 of the time from 32 MiB on,
// GELU 0.9, and at 8 MiB both took longer.
constexpr int64_t kStreaming = int64_t{32} << 20;

struct UnaryArgs {
  Activation activation;
  Dtype dtype;
  double alpha;
  int64_t cols;
  Input x{};  // backward: what forward saved, the output for sigmoid, tanh and relu, else the input
  Input dy{};
  Output out{};  // y or dx
  bool stream = false;
};

struct GatedArgs {
  Activation activation;
  Dtype dtype;
  int64_t cols;
  Input gate{}, up{}, dy{};
  Output out{};  // forward
  Output dgate{}, dup{};
  bool stream = false;
};

struct ParametricArgs {
  Activation activation;
  Dtype dtype;
  int64_t cols;
  Input x, dy;
  Output out;  // y or dx
  const void* weight;
  int64_t channels;  // row r takes weight[r % channels]; 0: column c takes weight[c]
  void* partial;     // sums of the weight gradient, float (double for double): see the two backward functions
};

struct RreluArgs {
  Dtype dtype;
  double lower, upper;
  uint64_t seed;
  int64_t cols;     // the flat index must be the row-major index of the logical tensor
  Input x{}, dy{};  // dy.data == nullptr: forward
  Output out{};
};

// activation(x + bias), or activation(x + bias) * (up + up_bias), then dropout. The flat index is that of the output,
// row-major.
struct FusedArgs {
  Activation activation;
  Dtype dtype;
  double alpha;
  bool gated;
  int64_t cols;  // with a bias: its length (of each half)
  double scale;  // 1 / (1 - p)
  uint64_t seed;
  int64_t threshold;  // an element is kept iff its word >= threshold; 0: no dropout
  Input x{}, up{}, dy{};
  Output dx{}, dup{};
  Output out{};  // the result, in a backward too
  const void *bias = nullptr, *up_bias = nullptr;
  // Backward: the rows' sums of dx, and of dup, float (double for double), in the order of lanes: padded_row(cols)
  // numbers each, set to zero before. Null: not wanted.
  void *dbias = nullptr, *dup_bias = nullptr;
};

struct ActivationKernels {
  void (*unary_forward)(const UnaryArgs&, int64_t begin, int64_t end);
  void (*unary_backward)(const UnaryArgs&, int64_t begin, int64_t end);
  void (*gated_forward)(const GatedArgs&, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedArgs&, int64_t begin, int64_t end);
  void (*parametric_forward)(const ParametricArgs&, int64_t begin, int64_t end);
  // channels > 0. Work: row segments of kSegment elements; partial[segment] is the segment's sum.
  void (*parametric_backward_by_row)(const ParametricArgs&, int64_t begin, int64_t end);
  // channels == 0. Work: rows, all of which are added to the one row `partial` of padded_row(cols) numbers, set to zero
  // before.
  void (*parametric_backward_by_column)(const ParametricArgs&, int64_t begin, int64_t end);
  void (*rrelu)(const RreluArgs&, int64_t begin, int64_t end);
  void (*fused_forward)(const FusedArgs&, int64_t begin, int64_t end);
  // With dbias, begin and end are multiples of cols.
  void (*fused_backward)(const FusedArgs&, int64_t begin, int64_t end);
  // Sums in the order of lanes -> in the order of columns.
  void (*fused_order)(Dtype dtype, void* sums, int64_t cols);
};

constexpr int64_t kSegment =
    512;  // short, so that a float32 sum keeps its digits; sums of segments are added in double
constexpr int64_t segments_of(int64_t cols) { return (cols + kSegment - 1) / kSegment; }
constexpr int64_t padded_row(int64_t cols) { return (cols + 63) / 64 * 64; }  // whole blocks of every instruction set

const ActivationKernels* activation_kernels_avx2();
const ActivationKernels* activation_kernels_avx512();

}  // namespace pk
