#include "embedding.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace pk {

void bind_embedding(pybind11::module_& m) {
  def(m, "embedding_bag_forward", &embedding_bag_forward);
  def(m, "embedding_bag_sizes", &embedding_bag_sizes);
  def(m, "embedding_bag_backward_weights", &embedding_bag_backward_weights);
  def(m, "embedding_keys", &embedding_keys);
  def(m, "embedding_entries", &embedding_entries);
  def(m, "embedding_sum_rows", &embedding_sum_rows);
  def(m, "embedding_update", &embedding_update);
  def(m, "embedding_bag_multi_forward", &embedding_bag_multi_forward);
  def(m, "embedding_bag_quantized", &embedding_bag_quantized);
  def(m, "quantize_rows", &quantize_rows);
  def(m, "dot_interaction_forward", &dot_interaction_forward);
  def(m, "dot_interaction_backward", &dot_interaction_backward);
}

}  // namespace pk
