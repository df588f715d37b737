#include "recurrent.h"

#include <tuple>

#include "bind.h"
#include "recurrent_rows.h"

namespace pk {

void bind_recurrent(pybind11::module_& m) {
  def(m, "recurrent_forward", &recurrent_forward);
  def(m, "recurrent_backward", &recurrent_backward);
  def(m, "recurrent_recompute", &recurrent_recompute);
  def(m, "recurrent_row_forward", &recurrent_row_forward);
  def(m, "recurrent_row_backward", &recurrent_row_backward);
  m.def("recurrent_plan",
        [](uintptr_t where, int cell, bool backward, int hidden, int64_t batch, int ways, int wish, int dtype) {
          const RecurrentPlan p = recurrent_plan(reinterpret_cast<const void*>(where), cell, backward, hidden, batch,
                                                 ways, wish, static_cast<DType>(dtype));
          return std::make_tuple(p.way, p.blocks, p.units, p.tiles);
        });
}

}  // namespace pk
