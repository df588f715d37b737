// What is built once from the classes' counts: alias tables and Huffman trees, as the loops of
// pykernels/reference/sampled_softmax/tables.py make them, number by number. Schemas are defined in Python.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "pages.h"

namespace pk {
namespace {

using at::Tensor;

const double* numbers(const Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 1 && x.is_contiguous() && x.scalar_type() == at::kDouble &&
                  x.numel() < int64_t{1} << 30,
              name, ": expected a contiguous float64 vector of less than 2^30 classes on the CPU");
  return x.const_data_ptr<double>();
}

// scaled: probability * classes. Vose: a class below 1 is filled up by one above; both are taken from stacks.
std::tuple<Tensor, Tensor> alias_table(const Tensor& scaled) {
  const double* const given = numbers(scaled, "alias_table");
  const int64_t size = scaled.numel();
  Tensor threshold = at::empty({size}, scaled.options()), alias = at::empty({size}, scaled.options().dtype(at::kInt));
  double* const at = threshold.mutable_data_ptr<double>();
  int32_t* const other = alias.mutable_data_ptr<int32_t>();
  std::vector<int32_t> small, large;
  for (int32_t v = 0; v < size; ++v) {
    at[v] = given[v];
    other[v] = v;
    (given[v] < 1 ? small : large).push_back(v);
  }
  while (!small.empty() && !large.empty()) {
    const int32_t low = small.back(), high = large.back();
    small.pop_back();
    other[low] = high;
    at[high] -= 1 - at[low];
    if (at[high] < 1) {
      small.push_back(high);
      large.pop_back();
    }
  }
  for (const int32_t v : large) at[v] = 1;
  for (const int32_t v : small) {  // rounding left them a little below 1
    if (other[v] == v) at[v] = 1;
  }
  return {threshold, alias};
}

// counts ascending, order[leaf] the class of a leaf: (starts, points, codes) of a HuffmanTree.
std::tuple<Tensor, Tensor, Tensor> huffman_paths(const Tensor& counts, const Tensor& order) {
  const double* const leaves = numbers(counts, "huffman_paths");
  const int64_t size = counts.numel(), nodes = 2 * size - 1, root = nodes - 1;
  TORCH_CHECK(size > 0, "huffman_paths: counts must be of at least one class");
  TORCH_CHECK(
      order.is_cpu() && order.sizes() == counts.sizes() && order.is_contiguous() && order.scalar_type() == at::kLong,
      "huffman_paths: order must be int64 of the shape ", counts.sizes(), " on the CPU");
  const int64_t* const class_of = order.const_data_ptr<int64_t>();
  std::vector<bool> met(size);  // every class has a path only where each has one leaf
  for (int64_t leaf = 0; leaf < size; ++leaf) {
    TORCH_CHECK(class_of[leaf] >= 0 && class_of[leaf] < size, "huffman_paths: order holds ", class_of[leaf]);
    TORCH_CHECK(!met[class_of[leaf]], "huffman_paths: order holds ", class_of[leaf], " twice");
    met[class_of[leaf]] = true;
  }
  // Two queues: leaves by count, and inner nodes, which come into being in ascending order.
  struct Node {
    int32_t parent;
    int32_t depth;
    int8_t code;
  };
  std::vector<double> total(size - 1);
  std::vector<Node> node(nodes);
  int64_t leaf = 0, inner = size;
  for (int64_t made = size; made < nodes; ++made) {
    double sum = 0;
    for (const int8_t code : {-1, 1}) {
      const bool from_leaves = leaf < size && (inner == made || leaves[leaf] <= total[inner - size]);
      const int64_t taken = from_leaves ? leaf++ : inner++;
      sum += from_leaves ? leaves[taken] : total[taken - size];
      node[taken] = {static_cast<int32_t>(made), 0, code};
    }
    total[made - size] = sum;
  }
  node[root] = {};
  Tensor starts = at::empty({size + 1}, order.options());
  int64_t* const start = starts.mutable_data_ptr<int64_t>();
  start[0] = 0;
  for (int64_t n = root - 1; n >= 0; --n) {  // a node's parent was made after it
    node[n].depth = node[node[n].parent].depth + 1;
    if (n < size) start[class_of[n] + 1] = node[n].depth;
  }
  if (size == 1) start[1] = 0;
  for (int64_t v = 0; v < size; ++v) start[v + 1] += start[v];
  Tensor points = empty_large({start[size]}, order.options().dtype(at::kInt));
  Tensor codes = empty_large({start[size]}, order.options().dtype(at::kChar));
  int32_t* const point = points.mutable_data_ptr<int32_t>();
  int8_t* const code = codes.mutable_data_ptr<int8_t>();
  for (int64_t n = 0; n < size; ++n) {  // neighbours among the leaves share most of their way
    int64_t at = start[class_of[n] + 1];
    for (int64_t m = n; m != root; m = node[m].parent) {
      --at;
      point[at] = static_cast<int32_t>(root) - node[m].parent;
      code[at] = node[m].code;
    }
  }
  return {starts, points, codes};
}

}  // namespace

TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("alias_table.cpu", &alias_table);
  m.impl("huffman_paths.cpu", &huffman_paths);
}

}  // namespace pk
