"""The recurrent room on Triton: one layer over packed tokens, both directions of one in the same launches.

The product with the input is one of torch's over all tokens, and so is each of the gradients after the loop
(pykernels/_packed); kernels make what depends on time. Two kinds: small hidden sizes take one launch in which each
program runs all steps for some rows; others one launch a step, of a kernel that makes the product with W_hh and applies
the cell to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._packed import Backward, Floor, Forward, RowsBackward, RowsFloor, RowsForward, Steps, Visit, unserved
from . import _lib
from ._recurrent_backward import recurrent_loop_bwd_kernel, recurrent_step_bwd_kernel
from ._recurrent_cells import KINDS
from ._recurrent_forward import recurrent_loop_fwd_kernel, recurrent_step_fwd_kernel
from ._recurrent_rows import recurrent_row_bwd_kernel, recurrent_row_fwd_kernel

__all__ = [
    "cell_backward", "cell_forward", "gru_backward", "gru_forward", "gru_recompute", "lstm_backward", "lstm_forward",
    "lstm_recompute", "rnn_backward", "rnn_forward", "rows_backward", "rows_forward", "unsupported",
]  # fmt: skip

#: Hidden sizes up to this run in one launch, forward and backward: beyond, the weights do not stay on the chip.
RESIDENT = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why this backend cannot serve tensors of the dtype and device of x, or one of the features; or None."""
    missing = unserved(features)
    if missing:
        return f"the Triton kernels do not serve {missing}"
    return _lib.unsupported_tensor(x)


class Tiles(NamedTuple):
    """Rows of the batch, hidden units and, in the kernels of one step, terms of the product at a time."""

    rows: int
    units: int
    terms: int
    warps: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_B": self.rows, "BLOCK_H": self.units, "BLOCK_K": self.terms, "num_warps": self.warps}


def resident(hidden: int, dtype: torch.dtype) -> bool:
    return hidden <= RESIDENT[dtype]


def loop_tiles(hidden: int) -> Tiles:
    """16 rows, the smallest product of the tensor cores: the more programs, the more multiprocessors have work."""
    width = max(16, triton.next_power_of_2(hidden))
    return Tiles(16, width, 0, 8 if width == 64 else 4)


def step_tiles(rows: int, like: Tensor) -> Tiles:
    """64 rows at most, 32 before Hopper: four accumulators of more do not fit in registers."""
    exact, most = like.dtype == torch.float32, 64 if _lib.device_properties(like.device).capability >= 90 else 32
    height = min(most, max(16, triton.next_power_of_2(rows)))
    return Tiles(height, 16 if height == 16 else 32, 32 if exact else 64, 4)


def precision() -> str:
    """How float32 products are made: of six bfloat16 products, unless torch allows tf32."""
    return "bf16x6" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Floor(Floor, RowsFloor):
    def forward(self, f: Forward) -> None:
        ways, batch, hidden = f.h0.shape
        device, given, steps, tokens = f.output.device, f.products is not None, f.steps, f.gates.shape[1]
        constants = {**_constants(f), "BIAS": f.bias is not None, "KEEP": f.kept is not None}
        if given or resident(hidden, f.output.dtype):
            tiles = loop_tiles(min(hidden, 64) if given else hidden)
            programs = triton.cdiv(batch, tiles.rows), triton.cdiv(hidden, tiles.units), ways
            _lib.launch(
                recurrent_loop_fwd_kernel, programs, f.output,
                f.gates, f.w_hh, f.products, f.bias, f.peephole, f.h0, f.output, f.h_n, f.c_n, f.kept, f.cells,
                steps.offsets_on(device), steps.tile_steps(tiles.rows, device), hidden, batch, tokens,
                GIVEN=given, BLOCK_B=tiles.rows, BLOCK_H=tiles.units, num_warps=tiles.warps, **constants,
            )  # fmt: skip
            return
        tiles = step_tiles(batch, f.output)
        for visit, other in _visits(steps, ways):
            programs = triton.cdiv(hidden, tiles.units), triton.cdiv(max(visit.rows, other.rows), tiles.rows), ways
            _lib.launch(
                recurrent_step_fwd_kernel, programs, f.output,
                f.gates, f.w_hh, f.bias, f.peephole, f.h0, f.output, f.h_n, f.c_n, f.kept, f.cells,
                hidden, tokens, batch,
                visit.offset, visit.rows, visit.previous, visit.begun, visit.staying,
                other.offset, other.rows, other.previous, other.begun, other.staying,
                **constants, **tiles.constants(),
            )  # fmt: skip

    def backward(self, b: Backward) -> bool:
        ways, batch, hidden = b.h0.shape
        device, steps, constants = b.output.device, b.steps, _constants(b)
        kept = b.peephole, b.h0, b.c0, b.output, b.kept, b.cells, b.dgates
        apart, tokens = (b.dy.stride(1), b.dy.stride(0)), b.dgates.shape[1]
        if resident(hidden, b.output.dtype):
            tiles = loop_tiles(hidden)
            _lib.launch(
                recurrent_loop_bwd_kernel, (triton.cdiv(batch, tiles.rows), 1, ways), b.output,
                b.dy, b.w_hh, *kept, b.dh, b.carry,
                steps.offsets_on(device), steps.tile_steps(tiles.rows, device), hidden, batch, *apart, tokens,
                BLOCK_B=tiles.rows, BLOCK_H=tiles.units, num_warps=tiles.warps, **constants,
            )  # fmt: skip
            return True
        tiles = step_tiles(batch, b.output)
        for visit, other in reversed(_visits(steps, ways)):
            programs = triton.cdiv(hidden, tiles.units), triton.cdiv(max(visit.rows, other.rows), tiles.rows), ways
            _lib.launch(
                recurrent_step_bwd_kernel, programs, b.output, b.dy, b.dh, b.w_hh, *kept, b.carry, hidden,
                *apart, tokens, batch, *visit, *other, **constants, **tiles.constants(),
            )  # fmt: skip
        return False

    def row_forward(self, r: RowsForward, products: Tensor, visit: Visit) -> None:
        w, (offset, rows, previous, begun, _, staying) = r.weights, visit
        _lib.launch(
            recurrent_row_fwd_kernel, (rows,), r.output,
            r.gates, products, w.bias_n, w.peephole, w.norm_hh, w.norm_c, w.norm_c_bias, r.h0, r.output, r.h_n, r.c,
            r.products, r.kept, r.cells, r.stats, r.zone.seeds, r.zone.places, r.h0.shape[1], offset, previous, begun,
            staying, *r.zone.shares, *r.zone.thresholds, *r.zone.firsts,
            BIAS=w.bias_n is not None, KEEP=r.kept is not None, ROUND=_ROUND.get(r.rounding, 0), **_row_constants(r),
        )  # fmt: skip

    def row_backward(self, r: RowsBackward, visit: Visit) -> None:
        w = r.weights
        _lib.launch(
            recurrent_row_bwd_kernel, (visit.rows,), r.output,
            r.dy, r.through, r.carry_h, r.carry_c, w.peephole, w.norm_hh, w.norm_c, w.norm_c_bias, r.h0, r.c0,
            r.output, r.products, r.kept, r.cells, r.stats, r.dgates, r.dstate, r.dproducts, r.fresh, r.dnorm,
            r.zone.seeds, r.zone.places, r.h0.shape[1], r.dy.stride(0), visit.offset, visit.previous, visit.begun,
            *r.zone.shares, *r.zone.thresholds, *r.zone.firsts, **_row_constants(r),
        )  # fmt: skip


_ROUND = {torch.float16: 1, torch.bfloat16: 2}


def _row_constants(r: RowsForward | RowsBackward) -> dict[str, Any]:
    w, width = r.weights, max(16, triton.next_power_of_2(r.h0.shape[1]))
    return {
        "KIND": KINDS[r.kind], "PEEPHOLE": w.peephole is not None, "NORM": w.norm_hh is not None,
        "NORM_C": w.norm_c is not None, "ZONE_H": r.zone.modes[0], "ZONE_C": r.zone.modes[1],
        "PLACES": r.zone.places is not None, "BLOCK_H": width, "num_warps": min(16, max(1, width // 128)),
    }  # fmt: skip


def _visits(steps: Steps, ways: int) -> list[tuple[Visit, Visit]]:
    """The steps of both directions that are made together; of one direction twice the same."""
    return list(zip(steps.visits(False), steps.visits(ways == 2), strict=True))


def _constants(given: Forward | Backward) -> dict[str, Any]:
    precise = given.output.dtype == torch.float32
    peephole = given.peephole is not None
    return {
        "KIND": KINDS[given.kind], "PEEPHOLE": peephole, "PRECISE": precise, "PRECISION": precision(),
        "DIRECTIONS": given.h0.shape[0],
    }  # fmt: skip


_floor = _Floor()
lstm_forward, lstm_recompute, lstm_backward = _floor.lstm_forward, _floor.lstm_recompute, _floor.lstm_backward
gru_forward, gru_recompute, gru_backward = _floor.gru_forward, _floor.gru_recompute, _floor.gru_backward
rnn_forward, rnn_backward = _floor.rnn_forward, _floor.rnn_backward
cell_forward, cell_backward = _floor.cell_forward, _floor.cell_backward
rows_forward, rows_backward = _floor.rows_forward, _floor.rows_backward
