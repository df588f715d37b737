// Unary and gated activations, one launcher each way: rows.h moves the bytes, math.h has the functions.
#include "activation.h"

#include <stdexcept>

#include "math.h"
#include "philox.h"
#include "platform.h"
#include "rows.h"

namespace pk {

namespace {

template <class A, bool PRECISE>
struct UnaryForward {
  float alpha;
  __device__ __forceinline__ void operator()(const float (&in)[1], float (&out)[1], int64_t) const {
    out[0] = A::template value<PRECISE>(in[0], alpha);
  }
};

template <class A, bool PRECISE>
struct UnaryBackward {
  float alpha;
  __device__ __forceinline__ void operator()(const float (&in)[2], float (&out)[1], int64_t) const {
    if constexpr (requires { A::gradient_of_output(0.f, 0.f); })
      out[0] = A::gradient_of_output(in[0], in[1]);
    else
      out[0] = A::template gradient<PRECISE>(in[0], in[1], alpha);
  }
};

template <class A, bool PRECISE>
struct GatedForward {
  __device__ __forceinline__ void operator()(const float (&in)[2], float (&out)[1], int64_t) const {
    out[0] = A::template value<PRECISE>(in[0], 1.f) * in[1];
  }
};

template <class A, bool PRECISE>
struct GatedBackward {
  __device__ __forceinline__ void operator()(const float (&in)[3], float (&out)[2], int64_t) const {
    out[0] = A::template gradient<PRECISE>(in[0] * in[2], in[1], 1.f);
    out[1] = in[0] * A::template value<PRECISE>(in[1], 1.f);
  }
};

struct RRelu {
  const int64_t* seed;
  float lower, span;
  __device__ __forceinline__ void operator()(const float (&in)[2], float (&out)[1], int64_t index) const {
    const uint32_t word = philox_word(static_cast<uint64_t>(*seed), static_cast<uint64_t>(index));
    // rounded twice, not fused: the same slope, to the bit, on every backend
    const float slope = __fadd_rn(lower, __fmul_rn(span, philox_uniform(word)));
    out[0] = in[1] <= 0.f ? __fmul_rn(slope, in[0]) : in[0];
  }
};

template <class A>
struct Tag {
  using type = A;
};

// Calls f(Tag<A>{}) with the functions of the named activation.
template <class F>
void dispatch_unary(const std::string& name, F&& f) {
  if (name == "sigmoid") return f(Tag<Sigmoid>{});
  if (name == "tanh") return f(Tag<Tanh>{});
  if (name == "relu") return f(Tag<Relu>{});
  if (name == "leaky_relu") return f(Tag<LeakyRelu>{});
  if (name == "elu") return f(Tag<Elu>{});
  if (name == "gelu") return f(Tag<Gelu>{});
  if (name == "gelu_tanh") return f(Tag<GeluTanh>{});
  if (name == "silu") return f(Tag<Silu>{});
  if (name == "swish") return f(Tag<Swish>{});
  throw std::invalid_argument("unknown activation " + name);
}
template <class F>
void dispatch_gate(const std::string& name, F&& f) {
  if (name == "sigmoid") return f(Tag<Sigmoid>{});
  if (name == "relu") return f(Tag<Relu>{});
  if (name == "gelu") return f(Tag<Gelu>{});
  if (name == "gelu_tanh") return f(Tag<GeluTanh>{});
  if (name == "silu") return f(Tag<Silu>{});
  if (name == "identity") return f(Tag<Identity>{});
  throw std::invalid_argument("unknown gate activation " + name);
}

template <class T>
const T* typed(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* typed(void* p) {
  return static_cast<T*>(p);
}
template <class T>
constexpr bool kPrecise = sizeof(T) == 4;

}  // namespace

void unary_forward(const void* x, void* y, int64_t rows, int64_t cols, int64_t x_stride, int64_t y_stride,
                   const std::string& activation, float alpha, DType dtype, void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T, 1, 1> r{{typed<T>(x)}, {typed<T>(y)}, {x_stride}, {y_stride}, rows, cols, 0, false};
    dispatch_unary(activation, [&](auto a) {
      launch_rows(r, UnaryForward<typename decltype(a)::type, kPrecise<T>>{alpha}, stream);
    });
  });
}

void unary_backward(const void* dy, const void* saved, void* dx, int64_t rows, int64_t cols, int64_t dy_stride,
                    int64_t saved_stride, int64_t dx_stride, const std::string& activation, float alpha, DType dtype,
                    void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T, 2, 1> r{
        {typed<T>(dy), typed<T>(saved)}, {typed<T>(dx)}, {dy_stride, saved_stride}, {dx_stride}, rows, cols, 0, false};
    dispatch_unary(activation, [&](auto a) {
      launch_rows(r, UnaryBackward<typename decltype(a)::type, kPrecise<T>>{alpha}, stream);
    });
  });
}

void gated_forward(const void* gate, const void* up, void* y, int64_t rows, int64_t cols, int64_t gate_stride,
                   int64_t up_stride, int64_t y_stride, const std::string& activation, DType dtype, void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T, 2, 1> r{
        {typed<T>(gate), typed<T>(up)}, {typed<T>(y)}, {gate_stride, up_stride}, {y_stride}, rows, cols, 0, false};
    dispatch_gate(activation,
                  [&](auto a) { launch_rows(r, GatedForward<typename decltype(a)::type, kPrecise<T>>{}, stream); });
  });
}

void gated_backward(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t rows,
                    int64_t cols, int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int64_t dgate_stride,
                    int64_t dup_stride, const std::string& activation, DType dtype, void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T, 3, 2> r{{typed<T>(dy), typed<T>(gate), typed<T>(up)},
                          {typed<T>(dgate), typed<T>(dup)},
                          {dy_stride, gate_stride, up_stride},
                          {dgate_stride, dup_stride},
                          rows,
                          cols,
                          0,
                          false};
    dispatch_gate(activation,
                  [&](auto a) { launch_rows(r, GatedBackward<typename decltype(a)::type, kPrecise<T>>{}, stream); });
  });
}

void rrelu(const void* dy, const void* x, void* out, const int64_t* seed, int64_t rows, int64_t cols, int64_t dy_stride,
           int64_t x_stride, int64_t out_stride, float lower, float span, DType dtype, void* stream) {
  dispatch(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Rows<T, 2, 1> r{
        {typed<T>(dy), typed<T>(x)}, {typed<T>(out)}, {dy_stride, x_stride}, {out_stride}, rows, cols, 0, false};
    launch_rows(r, RRelu{seed, lower, span}, stream);
  });
}

}  // namespace pk
