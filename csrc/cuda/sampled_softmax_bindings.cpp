#include "sampled_softmax.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace pk {

void bind_sampled_softmax(pybind11::module_& m) {
  def(m, "sampled_softmax_logistic", &sampled_softmax_logistic);
  def(m, "sampled_softmax_true_logits", &sampled_softmax_true_logits);
  def(m, "sampled_softmax_add_rows", &sampled_softmax_add_rows);
  def(m, "sampled_softmax_sum_rows", &sampled_softmax_sum_rows);
  def(m, "sampled_softmax_logits", &sampled_softmax_logits);
  def(m, "sampled_softmax_slopes", &sampled_softmax_slopes);
  def(m, "sampled_softmax_product", &sampled_softmax_product);
  def(m, "sampled_softmax_join_sample", &sampled_softmax_join_sample);
  def(m, "sampled_softmax_own", &sampled_softmax_own);
  def(m, "sampled_softmax_join_all", &sampled_softmax_join_all);
  def(m, "sampled_softmax_draw", &sampled_softmax_draw);
}

}  // namespace pk
