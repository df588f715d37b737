// Launchers of the activation room.  Tensors are `rows` runs of `cols` adjacent elements, each tensor with a row stride
// in elements; any alignment.  `activation` is the name the public functions use; an unknown one is an
// invalid_argument.
#pragma once
#include <cstdint>
#include <string>

#include "dtype.h"

namespace pk {

// y = activation(x); alpha: leaky_relu's slope, elu's alpha, swish's beta.  y may be x.
void unary_forward(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                   const std::string& activation, float alpha, DType dtype, void* stream);
// saved: the output of sigmoid, tanh and relu, the input of all others.
void unary_backward(const void* dy, const void* saved, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                    int64_t saved_stride, int64_t dx_stride, const std::string& activation, float alpha, DType dtype,
                    void* stream);

// y = activation(gate) * up.
void gated_forward(const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t gate_stride,
                   int64_t up_stride, int64_t y_stride, const std::string& activation, DType dtype, void* stream);
// dgate or dup may be null: not wanted.
void gated_backward(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows,
                    int64_t cols, int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int64_t dgate_stride,
                    int64_t dup_stride, const std::string& activation, DType dtype, void* stream);

// out = x <= 0 ? slope * dy : dy, slope = lower + span * uniform(seed, row * cols + col); with dy = x it is the
// forward.
void rrelu(const void* dy, const void* x, void* out, const int64_t* seed, int64_t rows, int64_t cols, int64_t dy_stride,
           int64_t x_stride, int64_t out_stride, float lower, float span, DType dtype, void* stream);

// prelu and swish with a learnt parameter, on (outer, channels, inner); weight: `channels` elements, one for each
// channel.  Strides are those of the outer dimension and of the channel.  Where inner is 1 and channels is not, the
// channels must be adjacent, else the inner elements.
void parametric_forward(const void* x, const void* weight, void* y, int64_t outer, int64_t channels, int64_t inner,
                        int64_t x_outer, int64_t x_channel, int64_t y_outer, int64_t y_channel,
                        const std::string& activation, DType dtype, void* stream);
// How many rows of `channels` doubles parametric_backward needs as scratch.
int64_t parametric_parts(int64_t outer, int64_t channels, int64_t inner, DType dtype);
// dx or dweight may be null: not wanted.  partial: parametric_parts() x channels.
void parametric_backward(const void* dy, const void* x, const void* weight, void* dx, void* dweight, double* partial,
                         int64_t outer, int64_t channels, int64_t inner, int64_t dy_outer, int64_t dy_channel,
                         int64_t x_outer, int64_t x_channel, int64_t dx_outer, int64_t dx_channel,
                         const std::string& activation, DType dtype, void* stream);

// out[c] = sum of partial[p][c] over the parts p, in a fixed order.
void sum_parts(const double* partial, void* out, int64_t parts, int64_t channels, DType dtype, void* stream);

// y = activation(x + bias), or activation(x + bias) * (x' + bias') with the halves of x and of bias at gate_at and
// up_at (0 and 0 where it is not gated); then 0 where the word of the element row * cols + col is below `threshold`,
// and `scale` times that elsewhere.  threshold 0: no dropout.  cols: of y, which is contiguous.  bias may be null.
void fused_forward(const void* x, const void* bias, const int64_t* seed, void* y, int64_t rows, int64_t cols,
                   int64_t x_stride, bool gated, int64_t gate_at, int64_t up_at, const std::string& activation,
                   float alpha, float scale, int64_t threshold, DType dtype, void* stream);
// How many rows of doubles, as long as the bias, fused_backward needs as scratch.
int64_t fused_parts(int64_t rows, int64_t cols, DType dtype);
// dx, dbias or y, which is made again, may be null: not wanted.  partial: fused_parts() rows, with dbias only.
void fused_backward(const void* dy, const void* x, const void* bias, const int64_t* seed, void* dx, void* dbias,
                    void* y, double* partial, int64_t rows, int64_t cols, int64_t dy_stride, int64_t x_stride,
                    int64_t dx_stride, bool gated, int64_t gate_at, int64_t up_at, const std::string& activation,
                    float alpha, float scale, int64_t threshold, DType dtype, void* stream);

}  // namespace pk
