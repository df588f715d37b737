// The Python module pykernels._cpu_ext. Importing it registers the operators' implementations (TORCH_LIBRARY_IMPL in
// the rooms' files) and says how it was built.
#include <pybind11/pybind11.h>

#include "isa.h"

#ifndef PK_MODULE
#define PK_MODULE _cpu_ext
#endif
#ifndef PK_TORCH_VERSION
#define PK_TORCH_VERSION "unknown"
#endif

PYBIND11_MODULE(PK_MODULE, m) {
  m.doc() = "Native CPU kernels; build_info() says for which torch they were built and which instruction set runs.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = PK_TORCH_VERSION;
    info["compiler"] = "gcc " __VERSION__;
    info["isa"] = pk::isa_name();
    info["isa_refusal"] = pk::isa() == pk::Isa::kNone ? pk::isa_refusal() : "";
    return info;
  });
}
