// Emulator controls for Python: tensor extents, run order, checks, statistics, self-tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/bind.h"
#include "checker.h"
#include "runtime.h"
#include "selftest.h"
#include "selftest_kernels.h"

namespace py = pybind11;

namespace pk {

namespace {

// A tensor's exact elements: its strides from the innermost out, merged while dense.
emu::Extent make_extent(uintptr_t base, size_t item, const std::vector<size_t>& sizes,
                        const std::vector<size_t>& strides) {
  std::vector<std::pair<size_t, size_t>> dims;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] > 0) dims.emplace_back(strides[i] * item, sizes[i]);
  std::sort(dims.begin(), dims.end());
  emu::Extent e{base, item, item, {}};
  bool overlapping = false;
  for (const auto& [stride, count] : dims) {
    overlapping |= stride < e.span;
    if (e.dims.empty() && stride == e.run)
      e.run *= count;
    else
      e.dims.insert(e.dims.begin(), {stride, count});
    e.span += stride * (count - 1);
  }
  if (overlapping) e.run = e.span, e.dims.clear();
  return e;
}

using Buffer = std::tuple<uintptr_t, size_t, std::vector<size_t>, std::vector<size_t>>;

void set_buffers(const std::vector<Buffer>& buffers) {
  std::vector<emu::Extent> extents;
  for (const auto& [base, item, sizes, strides] : buffers) {
    if (std::find(sizes.begin(), sizes.end(), size_t{0}) == sizes.end())
      extents.push_back(make_extent(base, item, sizes, strides));
    else
      extents.push_back({base, 0, 0, {}});  // no element may be touched
  }
  emu::set_extents(std::move(extents));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (auto group : {block_cases, async_cases, grid_cases, hopper_cases, cluster_cases})
    for (const Case& c : group()) all.push_back(c);
  return all;
}

std::vector<std::string> selftest_names() {
  std::vector<std::string> names;
  for (const Case& c : cases()) names.emplace_back(c.name);
  return names;
}

void selftest(const std::string& name, uintptr_t in, uintptr_t out, int n, uintptr_t) {
  for (const Case& c : cases())
    if (name == c.name) return c.run(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), n);
  throw std::invalid_argument("no self-test named " + name);
}

py::dict stats() {
  const emu::Stats s = emu::stats;
  emu::stats = {};
  return py::dict(py::arg("switches") = s.switches, py::arg("checked_bytes") = s.checked_bytes,
                  py::arg("ldmatrix_phases") = s.ldmatrix_phases, py::arg("ldmatrix_conflicts") = s.ldmatrix_conflicts);
}

}  // namespace

void bind_emulator(py::module_& m) {
  m.def(
      "set_buffers", &set_buffers, py::arg("buffers"),
      "What global memory the next launches may touch: (address, bytes an element, sizes, strides in elements) each.");
  m.def(
      "set_order", [](int order) { emu::options.order = order; }, py::arg("order"),
      "Order in which threads and blocks run: 0 forward, 1 reversed, others a random order with that seed.");
  m.def(
      "set_checks",
      [](bool races, bool uninitialised) { emu::options.races = races, emu::options.uninitialised = uninitialised; },
      py::arg("races") = true, py::arg("uninitialised") = true,
      "Switches off the race check or the uninitialised-shared-memory check; bounds and alignment always stay on.");
  m.def(
      "set_resident_blocks", [](int n) { emu::options.max_resident_blocks = n; }, py::arg("n"),
      "How many blocks a cooperative launch may have (132 at first, an H100's multiprocessors).");
  m.def(
      "set_device_arithmetic",
      [](bool functions, bool sums) { emu::device_arithmetic = functions, emu::cut_off_sums = sums; },
      py::arg("functions") = false, py::arg("sums") = false,
      "Whether approximate functions are off by what CUDA's tables allow, and tensor cores cut sums off.");
  m.def("stats", &stats, "Counts since the last call.");
  m.def("selftest_names", &selftest_names);
  m.def("selftest", &selftest);
  def(m, "selftest_attention", &selftest_attention);
  def(m, "selftest_lstm", &selftest_lstm);
}

}  // namespace pk
