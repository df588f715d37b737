// One torch-free binding source, two modules: pykernels._cuda_ext (nvcc) and pykernels._emulator_ext (g++, the same
// kernels run on the CPU).  Launchers are bound room by room, in csrc/cuda/<room>_bindings.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace py = pybind11;

namespace pk {

const char* kernel_compiler();  // collectives.cu: the compiler that built the kernels
void bind_activation(py::module_&);
void bind_attention(py::module_&);
void bind_checks(py::module_&);
void bind_collectives(py::module_&);
void bind_embedding(py::module_&);
void bind_recurrent(py::module_&);
void bind_sampled_softmax(py::module_&);
#if defined(PK_EMULATOR)
void bind_emulator(py::module_&);  // csrc/emulator/emulator_bindings.cpp
#endif

namespace {

#if !defined(PK_ARCHS)
#define PK_ARCHS ""
#endif

py::dict build_info() {
  std::vector<std::string> architectures;
  std::istringstream list(PK_ARCHS);
  for (std::string a; std::getline(list, a, ',');) architectures.push_back(a);
  py::dict d;
#if defined(PK_EMULATOR)
  d["backend"] = "emulator";
#else
  d["backend"] = "cuda";
#endif
  d["compiler"] = kernel_compiler();
  d["architectures"] = architectures;
  return d;
}

}  // namespace

}  // namespace pk

PYBIND11_MODULE(PK_MODULE, m) {
  m.def("build_info", &pk::build_info, "Which compiler built the kernels, for which architectures.");
  pk::bind_activation(m);
  pk::bind_attention(m);
  pk::bind_checks(m);
  pk::bind_collectives(m);
  pk::bind_embedding(m);
  pk::bind_recurrent(m);
  pk::bind_sampled_softmax(m);
#if defined(PK_EMULATOR)
  pk::bind_emulator(m);
#endif
}
