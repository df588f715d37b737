#include "bind.h"
#include "collectives.h"

namespace pk {

void bind_collectives(pybind11::module_& m) {
  def(m, "check_shuffle", &check_shuffle);
  def(m, "check_votes", &check_votes);
  def(m, "check_block_votes", &check_block_votes);
  def(m, "check_ldmatrix", &check_ldmatrix);
  def(m, "check_mma", &check_mma);
  def(m, "check_mma_tf32", &check_mma_tf32);
  def(m, "check_tf32", &check_tf32);
  def(m, "check_convert", &check_convert);
  def(m, "check_philox", &check_philox);
  def(m, "check_block_reduce", &check_block_reduce);
  def(m, "check_last_block", &check_last_block);
  def(m, "check_cp_async", &check_cp_async);
  def(m, "check_grid_sync", &check_grid_sync);
  def(m, "check_vec_copy", &check_vec_copy);
  def(m, "check_wgmma", &check_wgmma);
  def(m, "check_tma_copy", &check_tma_copy);
  def(m, "check_cluster", &check_cluster);
  def(m, "check_multicast", &check_multicast);
}

}  // namespace pk
