"""Checks of the recurrent functions' arguments: shapes, dtypes, layouts, the flat list of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _autocast, _check, _ids
from .._library import as_seed

_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def _check_tensors(function: str, named: dict[str, Tensor | None], input: Tensor) -> None:
    for key, value in named.items():
        if value is not None:
            _check.same(function, key, value, "input", input)


def _require(function: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise RuntimeError(f"{function}(): argument '{name}' must have the shape {shape}, not {tuple(value.shape)}")


def cell_arguments(
    function: str, gates: int, input: Tensor, hx: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    states = {f"hx[{i}]": h for i, h in enumerate(hx)} if len(hx) > 1 else {"hx": hx[0]}
    named = {"w_ih": weights[0], "w_hh": weights[1], "b_ih": weights[2], "b_hh": weights[3]}
    for key, value in {"input": input, **states, **named}.items():
        if value is not None or key in ("w_ih", "w_hh"):
            _check.tensor(function, key, value)
    _check.floating(function, "input", input)
    input, *rest = _autocast.lower((input, *hx, *weights), input.device)
    hx, weights = tuple(rest[: len(hx)]), tuple(rest[len(hx) :])
    _check_tensors(function, {**dict(zip(states, hx, strict=True)), **dict(zip(named, weights, strict=True))}, input)
    w_ih, w_hh, b_ih, b_hh = weights
    if input.dim() != 2:
        raise RuntimeError(f"{function}(): argument 'input' must be 2-D (batch, input size), not {input.dim()}-D")
    assert w_ih is not None and w_hh is not None
    if w_hh.dim() != 2:
        raise RuntimeError(f"{function}(): argument 'w_hh' must be 2-D, not {w_hh.dim()}-D")
    (batch, size), hidden = input.shape, w_hh.shape[1]
    _require(function, "w_hh", w_hh, (gates * hidden, hidden))
    _require(function, "w_ih", w_ih, (gates * hidden, size))
    for key, state in zip(states, hx, strict=True):
        _require(function, key, state, (batch, hidden))
    for key, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _require(function, key, bias, (gates * hidden,))
    return input, hx, weights


def sequence_arguments(
    function: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    options: dict[str, Any],
    proj_size: int = 0,
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    _check.tensor(function, "input", input)
    names = ["hx"] if hx is None or len(hx) == 1 else [f"hx[{i}]" for i in range(len(hx))]
    for key, value in zip(names, hx or (), strict=False):
        _check.tensor(function, key, value)
    for i, weight in enumerate(weights):
        _check.tensor(function, f"weights[{i}]", weight)
    _check.floating(function, "input", input)
    states = len(hx or ())
    input, *rest = _autocast.lower((input, *(hx or ()), *weights), input.device)
    hx, weights = None if hx is None else tuple(rest[:states]), tuple(rest[states:])
    _check_tensors(function, {f"weights[{i}]": w for i, w in enumerate(weights)}, input)
    layers, directions = options["num_layers"], 2 if options["bidirectional"] else 1
    batch = _check_layout(function, input, options)
    hidden, width = _check_weights(function, input.shape[-1], weights, layers, directions, proj_size)
    for key, state, size in zip(names, hx or (), (width, hidden), strict=False):
        _check_tensors(function, {key: state}, input)
        _require(function, key, state, (layers * directions, batch, size))
    return input, hx, weights


def _check_layout(function: str, input: Tensor, options: dict[str, Any]) -> int:
    """Dimensions of the input, `lengths`, `batch_sizes` and `dropout`; returns the batch size."""
    lengths, batch_sizes, dropout = options["lengths"], options["batch_sizes"], options["dropout"]
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"{function}(): argument 'dropout' must be in [0, 1], not {dropout}")
    if batch_sizes is not None:
        if lengths is not None or options["batch_first"]:
            raise ValueError(f"{function}(): argument 'batch_sizes' excludes 'lengths' and 'batch_first'")
        _check.tensor(function, "batch_sizes", batch_sizes)
        sizes = batch_sizes.tolist()
        if input.dim() != 2 or sum(sizes) != input.shape[0]:
            raise RuntimeError(
                f"{function}(): argument 'input' must have the shape (sum(batch_sizes), input size) with "
                f"'batch_sizes', here ({sum(sizes)}, *), not {tuple(input.shape)}"
            )
        if not sizes or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True):
            raise RuntimeError(f"{function}(): argument 'batch_sizes' must be positive and not increase, not {sizes}")
        return int(sizes[0])
    if input.dim() != 3:
        raise RuntimeError(f"{function}(): argument 'input' must be 3-D, not {input.dim()}-D")
    steps, batch = (input.shape[1], input.shape[0]) if options["batch_first"] else (input.shape[0], input.shape[1])
    if lengths is not None:
        _check.tensor(function, "lengths", lengths)
        _ids.integers(function, "lengths", lengths)
        _ids.same_device(function, "lengths", lengths, "input", input)
        _require(function, "lengths", lengths, (batch,))
        _ids.in_range(function, "lengths", lengths, steps + 1)
    return batch


def _check_weights(
    function: str, size: int, weights: Sequence[Tensor], layers: int, directions: int, proj_size: int
) -> tuple[int, int]:
    """Number and shapes of the flat weights; returns the hidden size and the size of h."""
    if layers < 1:
        raise ValueError(f"{function}(): argument 'num_layers' must be at least 1, not {layers}")
    each, left = len(weights) // (layers * directions), len(weights) % (layers * directions)
    projected = int(proj_size > 0)
    if left or each - projected not in (2, 4):
        raise RuntimeError(
            f"{function}(): argument 'weights' must hold {2 + projected} or {4 + projected} tensors for each of the "
            f"{layers * directions} layers and directions, not {len(weights)} in all"
        )
    gated = weights[0].shape[0] if weights[0].dim() == 2 else 0
    hidden, uneven = gated // _GATES[function], gated % _GATES[function]  # Dynamo knows no divmod of symbolic sizes
    if uneven or not hidden:
        expected = f"({_GATES[function]} * hidden size, {size})"
        raise RuntimeError(
            f"{function}(): argument 'weights[0]' must have the shape {expected}, not {tuple(weights[0].shape)}"
        )
    width = proj_size or hidden
    for k in range(layers * directions):
        inputs = size if k < directions else directions * width
        shapes = [(gated, inputs), (gated, width), (gated,), (gated,)][: each - projected]
        for i, shape in enumerate(shapes + [(proj_size, hidden)] * projected):
            _require(function, f"weights[{k * each + i}]", weights[k * each + i], shape)
    return hidden, width


def dropout_seed(function: str, seed: int | Tensor | None, input: Tensor, options: dict[str, Any]) -> Tensor | None:
    """The seed as a tensor, drawn if need be; None where no dropout is active, so that none is drawn."""
    active = options["training"] and options["dropout"] > 0 and options["num_layers"] > 1
    return as_seed(seed, input, function) if active else None
