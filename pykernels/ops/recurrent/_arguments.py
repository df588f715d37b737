"""Checks of the recurrent functions' arguments: shapes, dtypes, layouts, the flat list of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._backends import is_compiling
from ...reference.recurrent import extra_names
from .. import _autocast, _check, _ids
from .._library import as_seed

GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def _require(function: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise RuntimeError(f"{function}(): argument '{name}' must have the shape {shape}, not {tuple(value.shape)}")


def probability(function: str, name: str, value: Any) -> None:
    if not 0 <= _check.number(function, name, value) <= 1:
        raise RuntimeError(f"{function}(): argument '{name}' must be in [0, 1], not {value}")


def cell_arguments(
    function: str, gates: int, input: Tensor, hx: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """The arguments of a cell, checked and under autocast lowered."""
    states = ("hx",) if len(hx) == 1 else ("hx[0]", "hx[1]")
    names = (*states, "w_ih", "w_hh", "b_ih", "b_hh")
    given = (*hx, *weights)
    for key, value in zip(("input", *names), (input, *given), strict=True):
        if not isinstance(value, Tensor) and (value is not None or key[0] != "b"):
            _check.tensor(function, key, value)
    _check.floating(function, "input", input)
    if _autocast.enabled(input.device):
        input, *lowered = _autocast.lower((input, *given), input.device)
        given = tuple(lowered)
    dtype, device = input.dtype, input.device
    for key, value in zip(names, given, strict=True):
        if value is not None and (value.dtype is not dtype or value.device != device):
            _check.same(function, key, value, "input", input)
    w_ih, w_hh, b_ih, b_hh = given[len(hx) :]
    if input.dim() != 2:
        raise RuntimeError(f"{function}(): argument 'input' must be 2-D (batch, input size), not {input.dim()}-D")
    assert w_ih is not None and w_hh is not None
    if w_hh.dim() != 2:
        raise RuntimeError(f"{function}(): argument 'w_hh' must be 2-D, not {w_hh.dim()}-D")
    (batch, size), hidden = input.shape, w_hh.shape[1]
    _require(function, "w_hh", w_hh, (gates * hidden, hidden))
    _require(function, "w_ih", w_ih, (gates * hidden, size))
    for key, state in zip(states, given, strict=False):
        assert state is not None
        _require(function, key, state, (batch, hidden))
    for key, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _require(function, key, bias, (gates * hidden,))
    return input, given[: len(hx)], (w_ih, w_hh, b_ih, b_hh)


def sequence_arguments(
    function: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    options: dict[str, Any],
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    """(input, hx, weights) of a sequence, checked and under autocast lowered. `options` as the functions have them."""
    states = () if hx is None else hx
    names = ("hx",) if len(states) == 1 else ("hx[0]", "hx[1]")
    _check.tensor(function, "input", input)
    for key, value in zip(names, states, strict=False):
        _check.tensor(function, key, value)
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            _check.tensor(function, f"weights[{i}]", weight)
    _check.floating(function, "input", input)
    if _autocast.enabled(input.device):
        input, *rest = _autocast.lower((input, *states, *weights), input.device)
        states, weights = tuple(rest[: len(states)]), rest[len(states) :]
    dtype, device = input.dtype, input.device
    for i, weight in enumerate(weights):
        if weight.dtype is not dtype or weight.device != device:
            _check.same(function, f"weights[{i}]", weight, "input", input)
    for key in ("dropout", "recurrent_dropout"):
        if options[key] != 0:
            probability(function, key, options[key])
    zoneout = options["zoneout"]
    if function == "lstm" and isinstance(zoneout, (tuple, list)):
        if len(zoneout) != 2:
            raise RuntimeError(f"lstm(): argument 'zoneout' must be one number or two (h, c), not {len(zoneout)}")
        for value in zoneout:
            probability(function, "zoneout", value)
    elif zoneout != 0:
        probability(function, "zoneout", zoneout)
    batch = _check_layout(function, input, options)
    hidden, width = _check_weights(function, input.shape[-1], weights, options)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    for key, state, size in zip(names, states, (width, hidden), strict=False):
        _check.same(function, key, state, "input", input)
        _require(function, key, state, (rows, state.shape[1] if batch is None else batch, size))
    return input, None if hx is None else states, tuple(weights)


def _check_layout(function: str, input: Tensor, options: dict[str, Any]) -> int | None:
    """Dimensions of the input, `lengths`, `batch_sizes` and `resets`; returns the batch size, None if that is data."""
    lengths, batch_sizes, resets = options["lengths"], options["batch_sizes"], options["resets"]
    if batch_sizes is not None:
        if lengths is not None or options["batch_first"]:
            raise ValueError(f"{function}(): argument 'batch_sizes' excludes 'lengths' and 'batch_first'")
        _check.tensor(function, "batch_sizes", batch_sizes)
        if input.dim() != 2:
            raise RuntimeError(f"{function}(): argument 'input' must be 2-D with 'batch_sizes', not {input.dim()}-D")
        sizes = [] if is_compiling() else _check_sizes(function, batch_sizes, input)
    elif input.dim() != 3:
        raise RuntimeError(f"{function}(): argument 'input' must be 3-D, not {input.dim()}-D")
    if resets is not None:
        _check.tensor(function, "resets", resets)
        if resets.dtype != torch.bool:
            raise RuntimeError(f"{function}(): argument 'resets' must be bool, not {resets.dtype}")
        _ids.same_device(function, "resets", resets, "input", input)
        _require(function, "resets", resets, tuple(input.shape[:-1]))
    if batch_sizes is not None:
        return int(sizes[0]) if sizes else None
    steps, batch = (input.shape[1], input.shape[0]) if options["batch_first"] else (input.shape[0], input.shape[1])
    if lengths is not None:
        _check.tensor(function, "lengths", lengths)
        _ids.integers(function, "lengths", lengths)
        _ids.same_device(function, "lengths", lengths, "input", input)
        _require(function, "lengths", lengths, (batch,))
        _ids.in_range(function, "lengths", lengths, steps + 1)
    return batch


def _check_sizes(function: str, batch_sizes: Tensor, input: Tensor) -> list[int]:
    """The batch sizes, checked. In a graph they are data: there the operators check what guards memory."""
    sizes: list[int] = batch_sizes.tolist()
    if sum(sizes) != input.shape[0]:
        raise RuntimeError(
            f"{function}(): argument 'input' must have the shape (sum(batch_sizes), input size) with "
            f"'batch_sizes', here ({sum(sizes)}, *), not {tuple(input.shape)}"
        )
    if not sizes or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"{function}(): argument 'batch_sizes' must be positive and not increase, not {sizes}")
    return sizes


def _check_weights(function: str, size: int, weights: Sequence[Tensor], options: dict[str, Any]) -> tuple[int, int]:
    """Number and shapes of the flat weights; returns the hidden size and the size of h."""
    layers, directions, proj_size = options["num_layers"], 2 if options["bidirectional"] else 1, options["proj_size"]
    if layers < 1:
        raise ValueError(f"{function}(): argument 'num_layers' must be at least 1, not {layers}")
    if proj_size < 0:
        raise ValueError(f"{function}(): argument 'proj_size' must not be negative, not {proj_size}")
    extra = extra_names(function, proj_size > 0, options["peephole"], options["layer_norm"])
    each, left = len(weights) // (layers * directions), len(weights) % (layers * directions)
    if left or each - len(extra) not in (2, 4):
        raise RuntimeError(
            f"{function}(): argument 'weights' must hold {2 + len(extra)} or {4 + len(extra)} tensors for each of the "
            f"{layers * directions} layers and directions, not {len(weights)} in all"
        )
    gated = weights[0].shape[0] if weights[0].dim() == 2 else 0
    hidden, uneven = gated // GATES[function], gated % GATES[function]  # Dynamo knows no divmod of symbolic sizes
    if uneven or not hidden:
        expected = f"({GATES[function]} * hidden size, {size})"
        raise RuntimeError(
            f"{function}(): argument 'weights[0]' must have the shape {expected}, not {tuple(weights[0].shape)}"
        )
    width = proj_size or hidden
    shapes = {"w_hr": (proj_size, hidden), "peephole": (3 * hidden,), "norm_c": (hidden,), "norm_c_bias": (hidden,)}
    tail = [*[(gated,)] * (each - len(extra) - 2), *[shapes.get(name, (gated,)) for name in extra]]
    for k in range(layers * directions):
        inputs = size if k < directions else directions * width
        for i, shape in enumerate(((gated, inputs), (gated, width), *tail), k * each):
            if weights[i].shape != shape:
                _require(function, f"weights[{i}]", weights[i], shape)
    return hidden, width


def call_seed(function: str, seed: int | Tensor | None, input: Tensor, options: dict[str, Any]) -> Tensor | None:
    """The seed as a tensor, drawn if need be; None where nothing is random, so that none is drawn."""
    if not options["training"]:
        return None
    zoneout = options["zoneout"]
    active = (options["dropout"] > 0 and options["num_layers"] > 1) or options["recurrent_dropout"] > 0
    active = active or (any(zoneout) if isinstance(zoneout, (tuple, list)) else zoneout > 0)
    return as_seed(seed, input, function) if active else None
