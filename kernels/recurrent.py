"""The recurrent room on Triton: one layer in one direction over packed tokens.

The product with the input is one of torch's over all tokens, and so is each of the gradients after the loop
(pykernels/_packed.py); kernels make what depends on time. Two kinds: small hidden sizes take one launch in which each
program runs all steps for some rows; others one launch a step, of a kernel that makes the product with W_hh and applies
the cell to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._packed import Gradients, Steps, biases, given, gradients, product
from . import _lib
from ._recurrent_backward import recurrent_loop_bwd_kernel, recurrent_step_bwd_kernel
from ._recurrent_cells import GATES, KINDS, WIDTH
from ._recurrent_forward import recurrent_loop_fwd_kernel, recurrent_step_fwd_kernel

__all__ = [
    "gru_backward", "gru_forward", "gru_recompute", "lstm_backward", "lstm_forward", "lstm_recompute", "rnn_backward",
    "rnn_forward", "unsupported",
]  # fmt: skip

#: Hidden sizes up to this run in one launch, forward and backward: beyond, the weights do not stay on the chip.
RESIDENT = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why this backend cannot serve tensors of the dtype and device of x, or one of the features; or None."""
    if features:
        return f"the Triton kernels do not serve {' and '.join(features)} yet"
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
    return Tiles(16, max(16, triton.next_power_of_2(hidden)), 0, 4)


def step_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    height = min(64, max(16, triton.next_power_of_2(rows)))
    return Tiles(height, 16 if height == 16 else 32, 64 if dtype != torch.float32 else 32, 4)


def precision() -> str:
    """How float32 products are made: of six bfloat16 products, unless torch allows tf32."""
    return "bf16x6" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Forward(NamedTuple):
    """`final`: h_n, and c_n in float32. `kept`: the gates after their activations; `cells`: c. Both of every token."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    kept: Tensor
    cells: Tensor


def _constants(kind: str, like: Tensor) -> dict[str, Any]:
    return {"KIND": KINDS[kind], "PRECISE": like.dtype == torch.float32, "PRECISION": precision()}


def _kept(kind: str, input: Tensor, tokens: int, hidden: int, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what backward reads of every token. Float32 gates of an LSTM become their activations in place."""
    if kind not in ("lstm", "gru"):
        return gates.new_empty(0), gates.new_empty(0)
    if kind == "gru":
        return gates.new_empty(tokens, 4 * hidden), gates.new_empty(0)
    in_place = input.dtype == torch.float32 and tokens == gates.shape[0]
    kept = gates if in_place else gates.new_empty(tokens, 4 * hidden, dtype=_kept_dtype(input))
    return kept, gates.new_empty(tokens, hidden)


def _kept_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if input.dtype == torch.float32 else torch.float16


def _forward(
    kind: str, input: Tensor, h0: Tensor, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, batch_sizes: Tensor | None, reverse: bool, keep: bool, known: Tensor | None = None,
) -> Forward:  # fmt: skip
    """known: the output of an earlier run, whose gates are wanted again."""
    batch, hidden = h0.shape
    steps = Steps(input.shape[0], batch, batch_sizes, reverse)
    h0, w_hh = h0.contiguous(), w_hh.contiguous()
    gates, bias = product(input, w_ih.t()), biases(GATES[kind], hidden, b_ih, b_hh)
    output = input.new_empty(input.shape[0], hidden)
    h_n = h0.clone()
    c_n = gates.new_empty(0) if c0 is None else c0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    kept, cells = _kept(kind, input, input.shape[0] if keep else 0, hidden, gates)
    found = Forward(output, h_n, c_n, kept, cells)
    if output.numel() == 0:
        return found
    constants = {**_constants(kind, input), "BIAS": bias is not None, "KEEP": keep and kind in ("lstm", "gru")}
    if known is not None or resident(hidden, input.dtype):
        tiles = loop_tiles(hidden if known is None else min(hidden, 64))
        programs = triton.cdiv(batch, tiles.rows), triton.cdiv(hidden, tiles.units)
        products = None if known is None else product(steps.before(known, h0), w_hh.t())
        _lib.launch(
            recurrent_loop_fwd_kernel, programs, input,
            gates, w_hh, products, bias, h0, output, h_n, c_n, kept, cells,
            steps.offsets_on(input.device), steps.tile_steps(tiles.rows, input.device), hidden, batch,
            REVERSE=reverse, GIVEN=known is not None, BLOCK_B=tiles.rows, BLOCK_H=tiles.units, num_warps=tiles.warps,
            **constants,
        )  # fmt: skip
        return found
    tiles = step_tiles(batch, input.dtype)
    for visit in steps.visits():
        programs = triton.cdiv(hidden, tiles.units), triton.cdiv(visit.rows, tiles.rows)
        _lib.launch(
            recurrent_step_fwd_kernel, programs, input,
            gates, w_hh, bias, h0, output, h_n, c_n, kept, cells, hidden,
            visit.offset, visit.rows, visit.previous, visit.begun, visit.staying,
            **constants, **tiles.constants(),
        )  # fmt: skip
    return found


def _backward(
    kind: str, dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor, c0: Tensor | None,
    w_ih: Tensor, w_hh: Tensor, batch_sizes: Tensor | None, output: Tensor, kept: Tensor | None, cells: Tensor | None,
    reverse: bool, mask: Sequence[bool],
) -> tuple[Gradients, Tensor, Tensor]:  # fmt: skip
    """(gradients of the input and the weights, dh0, dc0); mask: input, w_ih, w_hh, biases."""
    (batch, hidden), tokens = h0.shape, input.shape[0]
    steps = Steps(tokens, batch, batch_sizes, reverse)
    device, gated = input.device, GATES[kind] * hidden
    dh = _state(dh_n, h0)
    carry = dh if kind == "gru" else _state(dc_n, h0) if kind == "lstm" else dh.new_empty(0)
    h0, w_hh, output = h0.contiguous(), w_hh.contiguous(), output.contiguous()
    dy = dy if dy.stride(1) == 1 or hidden == 1 else dy.contiguous()
    dgates = input.new_empty(tokens, WIDTH[kind] * hidden)
    if output.numel():
        c0 = None if c0 is None else c0.contiguous()
        constants = _constants(kind, input)
        if resident(hidden, input.dtype):
            tiles = loop_tiles(hidden)
            _lib.launch(
                recurrent_loop_bwd_kernel, (triton.cdiv(batch, tiles.rows),), input,
                dy, w_hh, h0, c0, output, kept, cells, dgates, dh, carry,
                steps.offsets_on(device), steps.tile_steps(tiles.rows, device), hidden, batch, dy.stride(0),
                REVERSE=reverse, BLOCK_B=tiles.rows, BLOCK_H=tiles.units, num_warps=tiles.warps, **constants,
            )  # fmt: skip
        else:
            tiles = step_tiles(batch, input.dtype)
            for visit in reversed(list(steps.visits())):
                programs = triton.cdiv(hidden, tiles.units), triton.cdiv(visit.rows, tiles.rows)
                _lib.launch(
                    recurrent_step_bwd_kernel, programs, input,
                    dy, dh, w_hh, h0, c0, output, kept, cells, dgates, carry, hidden, dy.stride(0),
                    visit.offset, visit.rows, visit.previous, visit.begun, visit.following, visit.staying,
                    **constants, **tiles.constants(),
                )  # fmt: skip
            first = steps.first(dgates)[:, -gated:]
            passed = dh[: first.shape[0]]
            dh[: first.shape[0]] = product(first, w_hh) + (passed if kind == "gru" else 0)
    d_input, d_state = (dgates[:, :gated], dgates[:, -gated:]) if kind == "gru" else (dgates, dgates)
    if kind == "gru":
        w_ih = torch.cat((w_ih[2 * hidden :], w_ih[: 2 * hidden]))  # in the order of d_input: n, r, z
    found = gradients(steps, d_input, d_state, input, h0, output, w_ih, mask)
    if kind == "gru":
        found = found._replace(w_ih=_rzn(found.w_ih, hidden), b_ih=_rzn(found.b_ih, hidden))
    return found, dh, carry


def _state(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A state's gradient in float32 and memory of its own, where the loop carries it on."""
    if gradient is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return gradient.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _rzn(x: Tensor | None, hidden: int) -> Tensor | None:
    return None if x is None else torch.cat((x[hidden:], x[:hidden]))


def lstm_forward(
    input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _refuse(w_hr, peephole)
    found = _forward("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, save)
    return found.output, found.h_n, found.c_n.to(c0.dtype), found.kept, found.cells


def lstm_recompute(
    input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _refuse(w_hr, peephole)
    found = _forward("lstm", input, h0, c0, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, True, output)
    return found.kept, found.cells


def lstm_backward(
    dy: Tensor, dh_n: Tensor | None, dc_n: Tensor | None, input: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor,
    w_hh: Tensor, w_hr: Tensor | None, peephole: Tensor | None, batch_sizes: Tensor | None, output: Tensor,
    gates: Tensor, cells: Tensor, reverse: bool, output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    _refuse(w_hr, peephole)
    of_input, of_h0, of_c0, *rest = output_mask[:6]
    mask = (of_input, *rest)
    found, dh0, dc0 = _backward(
        "lstm", dy, dh_n, dc_n, input, h0, c0, w_ih, w_hh, batch_sizes, output, gates, cells, reverse, mask
    )
    states = (dh0 if of_h0 else None, h0), (dc0 if of_c0 else None, c0)
    weights = (found.w_ih, w_ih), (found.w_hh, w_hh), (found.b_ih, w_ih)
    return given((found.input, input), *states, *weights, (None, w_ih), (None, w_ih))


def gru_forward(
    input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    batch_sizes: Tensor | None, reverse: bool, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = _forward("gru", input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, save)
    return found.output, found.h_n, found.kept


def gru_recompute(
    input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    batch_sizes: Tensor | None, output: Tensor, reverse: bool,
) -> Tensor:  # fmt: skip
    return _forward("gru", input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, True, output).kept


def gru_backward(
    dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
    batch_sizes: Tensor | None, output: Tensor, gates: Tensor, reverse: bool, output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input, of_h0, *rest = output_mask
    mask = (of_input, *rest)
    found, dh0, _ = _backward(
        "gru", dy, dh_n, None, input, h0, None, w_ih, w_hh, batch_sizes, output, gates, None, reverse, mask
    )
    weights = (found.w_ih, w_ih), (found.w_hh, w_hh), (found.b_ih, w_ih), (found.b_hh, w_ih)
    return given((found.input, input), (dh0 if of_h0 else None, h0), *weights)


def rnn_forward(
    input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    batch_sizes: Tensor | None, nonlinearity: str, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _forward(nonlinearity, input, h0, None, w_ih, w_hh, b_ih, b_hh, batch_sizes, reverse, False)
    return found.output, found.h_n


def rnn_backward(
    dy: Tensor, dh_n: Tensor | None, input: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor,
    batch_sizes: Tensor | None, output: Tensor, nonlinearity: str, reverse: bool, output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    of_input, of_h0, *rest = output_mask
    mask = (of_input, *rest)
    found, dh0, _ = _backward(
        nonlinearity, dy, dh_n, None, input, h0, None, w_ih, w_hh, batch_sizes, output, None, None, reverse, mask
    )
    weights = (found.w_ih, w_ih), (found.w_hh, w_hh), (found.b_ih, w_ih)
    return given((found.input, input), (dh0 if of_h0 else None, h0), *weights)


def _refuse(w_hr: Tensor | None, peephole: Tensor | None) -> None:
    """Operators may be called on their own; the public functions never come here with either."""
    if w_hr is not None or peephole is not None:
        raise NotImplementedError("the Triton kernels do not serve projections and peepholes")
