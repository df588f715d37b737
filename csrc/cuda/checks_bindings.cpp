#include "checks.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace pk {

void bind_checks(pybind11::module_& m) { def(m, "checks_values", &checks_values); }

}  // namespace pk
