"""The recurrent room on csrc/cuda: W_hh packed for the tensor cores, the way to run the loop, pointers.

Small hidden sizes run in one launch of one block for each 16 rows, which keeps W_hh and the state in its shared memory.
Larger ones run in one cooperative launch: the blocks of 16 rows keep the weights of some hidden units each and meet
once a step. Where the device cannot hold these blocks at once, each step is a launch. On sm_90 an LSTM or GRU of 16
bits can also run in clusters, whose blocks exchange the state through distributed shared memory: where `_sm90` says so.
`ext`: the CUDA module, or its emulation on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._packed import GATES, Backward, Floor, Forward, RowsBackward, RowsFloor, RowsForward, Visit, unserved
from . import _sm90
from ._extension import DTYPE_CODES, Extension

__all__ = [
    "cell_backward", "cell_forward", "describe", "gru_backward", "gru_forward", "gru_recompute", "lstm_backward",
    "lstm_forward", "lstm_recompute", "rnn_backward", "rnn_forward", "rows_backward", "rows_forward", "unsupported",
]  # fmt: skip

_CELLS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
_ROWS = 16

#: How a time loop runs: RecurrentPlan::way of csrc/cuda/recurrent.h.
WAYS = {1: "one block for 16 rows", 2: "a cooperative grid", 3: "a launch a step", 4: "a cluster for 16 rows"}
CLUSTERS = 4
WAY = 0  # 0: what the size and the device ask for; tests set another

Plan = tuple[int, int, int, int]  # way, blocks for a tile of rows, blocks of units of each, tiles in a launch


def unsupported(ext: Extension, x: Tensor, *features: str) -> str | None:
    """Why `ext` cannot serve tensors of the dtype and device of x, or one of the features; or None."""
    if not ext.available:
        return ext.reason
    if x.dtype not in DTYPE_CODES:
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    device = "cpu" if ext.name == "_emulator_ext" else "cuda"
    if x.device.type != device:
        return f"{ext.name} serves {device} tensors, not {x.device.type} ones"
    missing = unserved(features)
    if missing:
        return f"the CUDA kernels do not serve {missing}"
    return ext.device_reason(x.device) or _sm90.refusal(ext, x.device)


def describe(ext: Extension, kind: str, by_rows: bool, x: Tensor, shape: tuple[int, int, int]) -> str:
    """Which kernels would serve a layer over states of this shape (directions, rows, hidden size), for `explain`;
    by_rows: with layer normalisation or zoneout."""
    if by_rows:
        return f"kernels for every GPU ({WAYS[3]})"
    if 0 in shape:
        return ""
    state = x.new_empty(shape)
    (ahead, *_), reason = _planned(ext, kind, False, state)
    (back, *_), backward_reason = _planned(ext, kind, True, state)
    ways = WAYS[ahead] if ahead == back else f"{WAYS[ahead]}, backward {WAYS[back]}"
    return _sm90.described(reason, backward_reason, f" ({ways})")


def _packed_weights(w: Tensor, blocks: int) -> Tensor:
    """W (D, gates, units, terms) in the order in which lanes read it, for `blocks` blocks of 8 units a direction.

    (D, block of units, 32 terms, gate, part, lane, 8 numbers): lane l of a warp has unit l // 4 and, of each 16 terms,
    the pairs at 2 (l % 4) and 8 beyond: two operands of mma.m16n8k16. float32 comes in three parts that add up to it.
    """
    ways, gates, units, terms = w.shape
    slices = -(-terms // 32)
    whole = w.new_zeros(ways, gates, blocks * 8, slices * 32)
    whole[..., :units, :terms] = w
    parts = [whole]
    if w.dtype == torch.float32:
        parts = []
        for _ in range(3):
            parts.append(whole.bfloat16())
            whole = whole - parts[-1].float()
    split = torch.stack(parts).view(len(parts), ways, gates, blocks, 8, slices, 2, 2, 4, 2)
    return split.permute(1, 3, 5, 2, 0, 4, 8, 6, 7, 9).contiguous()


def _cluster_weights(w: Tensor, cluster: int, units: int) -> Tensor:
    """W (D, gates, units, terms) for a backward in clusters: packed are, for each block, the rows of its units' gates,
    as terms of a sum: (D, cluster), then as `_packed_weights`."""
    ways, gates, hidden, _ = w.shape
    whole = w.new_zeros(ways, gates, cluster * units * 8, hidden)
    whole[:, :, :hidden] = w
    split = whole.view(ways, gates, cluster, units * 8, hidden).permute(0, 2, 4, 1, 3)
    return _packed_weights(split.reshape(ways * cluster, 1, hidden, -1), cluster * units)


def _aligned(t: Tensor | None) -> Tensor | None:
    """t, where two elements can be read at once; what operators save is, a view that a caller made may not be."""
    return t if t is None or t.data_ptr() % 8 == 0 else t.clone()


def _not_in_clusters(ext: Extension, kind: str, backward: bool, h0: Tensor) -> str | None:
    """Why a loop does not run in clusters, whatever fits there, or None."""
    hidden = h0.shape[-1]
    if kind not in ("lstm", "gru"):
        return "they have no vanilla RNN"
    if h0.dtype == torch.float32:
        return "they have no float32"
    if hidden % 8:
        return f"they have hidden sizes that are multiples of 8, not {hidden}"
    return _sm90.declined(ext, h0.device, _sm90.Kernels(kind, backward, h0.dtype), hidden)


def _planned(ext: Extension, kind: str, backward: bool, h0: Tensor) -> tuple[Plan, str | None]:
    """How a loop runs, and why not in clusters, or None."""
    module: Any = ext.module
    ways, batch, hidden = h0.shape

    def plan(wish: int) -> Plan:
        where, dtype = h0.data_ptr(), DTYPE_CODES[h0.dtype]
        found: Plan = module.recurrent_plan(where, _CELLS[kind], backward, hidden, batch, ways, wish, dtype)
        return found

    reason = _not_in_clusters(ext, kind, backward, h0)
    if reason is None:
        found = plan(CLUSTERS)
        if found[0]:
            return found, None
        reason = f"the weights of hidden size {hidden} do not fit a cluster"
    return plan(WAY), reason


class _Floor(Floor, RowsFloor):
    def __init__(self, ext: Extension) -> None:
        self.ext = ext

    def forward(self, f: Forward) -> None:
        (ways, batch, hidden), steps, device = f.h0.shape, f.steps, f.h0.device
        offsets = steps.offsets_on(device)
        shape = batch, len(steps.sizes), f.gates.shape[1], hidden, ways
        if f.products is not None:
            assert f.kept is not None
            self.ext.call(
                "recurrent_recompute", f.gates, f.products, f.bias, f.peephole, f.c_n, f.kept, f.cells, offsets, *shape,
                _CELLS[f.kind], f.kept.dtype,
            )  # fmt: skip
            return
        plan, _ = _planned(self.ext, f.kind, False, f.h0)
        weights = _packed_weights(f.w_hh.view(ways, GATES[f.kind], hidden, hidden), plan[1] * plan[2])
        tiles = steps.tile_steps(_ROWS, device)
        self.ext.call(
            "recurrent_forward", weights, f.gates, f.bias, f.peephole, f.h0, f.output, f.h_n, f.c_n, f.kept, f.cells,
            offsets, tiles, tiles.new_zeros(ways, tiles.shape[0]), *shape, *plan, _CELLS[f.kind], f.h0.dtype,
        )  # fmt: skip

    def backward(self, b: Backward) -> bool:
        (ways, batch, hidden), steps, device = b.h0.shape, b.steps, b.h0.device
        plan, _ = _planned(self.ext, b.kind, True, b.h0)
        kept, cells, output = b.kept, b.cells, b.output
        if plan[0] == CLUSTERS:
            kept, cells, output = _aligned(kept), _aligned(cells), _aligned(output)
            weights = _cluster_weights(b.w_hh.view(ways, GATES[b.kind], hidden, hidden), plan[1], plan[2])
        else:
            weights = _packed_weights(b.w_hh.mT.unsqueeze(1), plan[1] * plan[2])
        tiles = steps.tile_steps(_ROWS, device)
        self.ext.call(
            "recurrent_backward", weights, b.dy, b.dh, b.peephole, b.h0, b.c0, output, kept, cells, b.dgates,
            b.carry, steps.offsets_on(device), tiles, tiles.new_zeros(ways, tiles.shape[0]), b.dy.stride(1),
            b.dy.stride(0), batch, len(steps.sizes), b.dgates.shape[1], hidden, ways, *plan, _CELLS[b.kind], b.h0.dtype,
        )  # fmt: skip
        return False

    def row_forward(self, r: RowsForward, products: Tensor, visit: Visit) -> None:
        w, z = r.weights, r.zone
        scratch = r.output.new_empty(r.h0.shape[0] * 2 * r.h0.shape[1]) if r.c is not None else None
        self.ext.call(
            "recurrent_row_forward", r.gates, products, w.bias_n, w.peephole, w.norm_hh, w.norm_c, w.norm_c_bias, r.h0,
            r.output, r.h_n, r.c, r.products, r.kept, r.cells, r.stats, scratch, z.seeds, z.places, *z.modes, *z.shares,
            *z.thresholds, *z.firsts, r.h0.shape[1], visit.rows, visit.offset, visit.previous, visit.begun,
            visit.staying, _CELLS[r.kind], r.rounding,
        )  # fmt: skip

    def row_backward(self, r: RowsBackward, visit: Visit) -> None:
        w, z = r.weights, r.zone
        self.ext.call(
            "recurrent_row_backward", r.dy, r.dy.stride(0), r.through, w.peephole, w.norm_hh, w.norm_c, w.norm_c_bias,
            r.h0, r.c0, r.output, r.products, r.kept, r.cells, r.stats, r.carry_h, r.carry_c, r.dgates, r.dstate,
            r.dproducts, r.fresh, r.dnorm, z.seeds, z.places, *z.modes, *z.shares, *z.thresholds, *z.firsts,
            r.h0.shape[1], visit.rows, visit.offset, visit.previous, visit.begun, _CELLS[r.kind],
        )  # fmt: skip


def lstm_forward(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).lstm_forward(*args)


def lstm_recompute(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).lstm_recompute(*args)


def lstm_backward(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).lstm_backward(*args)


def gru_forward(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).gru_forward(*args)


def gru_recompute(ext: Extension, *args: Any) -> Tensor:
    return _Floor(ext).gru_recompute(*args)


def gru_backward(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).gru_backward(*args)


def rnn_forward(ext: Extension, *args: Any) -> tuple[Tensor, Tensor]:
    return _Floor(ext).rnn_forward(*args)


def rnn_backward(ext: Extension, *args: Any) -> tuple[Tensor, ...]:
    return _Floor(ext).rnn_backward(*args)


def cell_forward(ext: Extension, *args: Any) -> list[Tensor]:
    return _Floor(ext).cell_forward(*args)


def cell_backward(ext: Extension, *args: Any) -> list[Tensor]:
    return _Floor(ext).cell_backward(*args)


def rows_forward(ext: Extension, *args: Any) -> list[Tensor]:
    return _Floor(ext).rows_forward(*args)


def rows_backward(ext: Extension, *args: Any) -> list[Tensor]:
    return _Floor(ext).rows_backward(*args)
