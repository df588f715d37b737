// def(m, "name", &launcher): exposes a launcher of csrc/cuda/<room>.h to Python.  Pointers become integers (a tensor's
// data_ptr(), 0 for none), DType an integer code; all else is converted as pybind11 does.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace pk {

namespace detail {

template <class T>
using InPython =
    std::conditional_t<std::is_pointer_v<T>, uintptr_t, std::conditional_t<std::is_same_v<T, DType>, int, T>>;

template <class T>
T from_python(InPython<T> x) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(x);
  else
    return static_cast<T>(x);
}

}  // namespace detail

template <class... P>
void def(pybind11::module_& m, const char* name, void (*launcher)(P...)) {
  m.def(name, [launcher](detail::InPython<P>... args) { launcher(detail::from_python<P>(args)...); });
}

}  // namespace pk
