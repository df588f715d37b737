#include "activation.h"

#include "bind.h"

namespace pk {

void bind_activation(pybind11::module_& m) {
  def(m, "unary_forward", &unary_forward);
  def(m, "unary_backward", &unary_backward);
  def(m, "gated_forward", &gated_forward);
  def(m, "gated_backward", &gated_backward);
  def(m, "rrelu", &rrelu);
  def(m, "parametric_forward", &parametric_forward);
  def(m, "parametric_backward", &parametric_backward);
  def(m, "fused_forward", &fused_forward);
  def(m, "fused_backward", &fused_backward);
  m.def("fused_parts",
        [](int64_t rows, int64_t cols, int dtype) { return fused_parts(rows, cols, static_cast<DType>(dtype)); });
  m.def("parametric_parts", [](int64_t outer, int64_t channels, int64_t inner, int dtype) {
    return parametric_parts(outer, channels, inner, static_cast<DType>(dtype));
  });
}

}  // namespace pk
