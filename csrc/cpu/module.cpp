// The Python module pykernels._cpu_ext. Importing it registers the operators' implementations (TORCH_LIBRARY_IMPL in
// the rooms' files) and says how it was built.
#include <pybind11/pybind11.h>

#include "isa.h"
#include "pool.h"
#include "system_memory.h"

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

  m.def("pool_state", [] {
    const pk::PoolState found = pk::pool_state();
    pybind11::dict state;
    state["max_bytes"] = found.max_bytes;
    state["idle_bytes"] = found.idle_bytes;
    state["idle_blocks"] = found.idle_blocks;
    state["used_bytes"] = found.used_bytes;
    state["used_blocks"] = found.used_blocks;
    state["reused"] = found.reused;
    state["mapped"] = found.mapped;
    state["returned"] = found.returned;
    return state;
  });
  using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("pool_set_max_bytes", &pk::pool_set_max_bytes, NoGil());
  m.def("pool_empty", &pk::pool_empty, NoGil());
  m.def("pool_trim", &pk::pool_trim, pybind11::arg("idle_seconds"), pybind11::arg("proc") = "/proc",
        pybind11::arg("cgroup") = "/sys/fs/cgroup", NoGil());
  m.def("system_memory", [](const std::string& proc, const std::string& cgroup) {
    const pk::SystemMemory found = pk::system_memory(proc, cgroup);
    return pybind11::make_tuple(found.limit, found.available);
  });
}
