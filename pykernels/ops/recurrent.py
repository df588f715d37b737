"""Recurrent cells and sequences: vanilla RNN, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _backends, reference
from . import _autocast, _check, _ids
from ._library import as_seed

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_relu_cell", "rnn_tanh_cell"]

_ROOM = _backends.Room("recurrent")
_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a vanilla RNN, `h' = tanh(x W_ih^T + b_ih + h W_hh^T + b_hh)`. As `torch.rnn_tanh_cell`.

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: h, Tensor[B, H].
        w_ih, w_hh: Tensor[H, I], Tensor[H, H].
        b_ih, b_hh: Tensor[H] or None.
        backend: see `pykernels.explain`.

    Returns:
        h', Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        TypeError: an argument is not a Tensor.
        NotImplementedError: not floating point.
        RuntimeError: wrong shapes, different dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    input, states, weights = _cell_arguments("rnn_tanh_cell", 1, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    _ROOM.resolve("rnn_tanh_cell", backend, input)
    return reference.rnn_tanh_cell(input, states[0], *weights)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a vanilla RNN, `h' = relu(x W_ih^T + b_ih + h W_hh^T + b_hh)`. As `torch.rnn_relu_cell`.

    Arguments, shapes and errors as `rnn_tanh_cell`.
    """
    input, states, weights = _cell_arguments("rnn_relu_cell", 1, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    _ROOM.resolve("rnn_relu_cell", backend, input)
    return reference.rnn_relu_cell(input, states[0], *weights)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM. As `torch.lstm_cell`.

    (i, f, g, o) = x W_ih^T + b_ih + h W_hh^T + b_hh; c' = sigmoid(f) c + sigmoid(i) tanh(g); h' = sigmoid(o) tanh(c').
    Source: Hochreiter and Schmidhuber (1997), with the forget gate of Gers et al. (2000).

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: (h, c), each Tensor[B, H].
        w_ih, w_hh: Tensor[4H, I], Tensor[4H, H], gates in the order i, f, g, o.
        b_ih, b_hh: Tensor[4H] or None.
        backend: see `pykernels.explain`.

    Returns:
        (h', c'), each Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        As `rnn_tanh_cell`; RuntimeError also when `hx` does not hold two states.
    """
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell(): argument 'hx' must hold two states (h, c), not {len(hx)}")
    input, states, weights = _cell_arguments("lstm_cell", 4, input, tuple(hx), (w_ih, w_hh, b_ih, b_hh))
    _ROOM.resolve("lstm_cell", backend, input)
    return reference.lstm_cell(input, states, *weights)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU. As `torch.gru_cell`.

    (r, z, n) = x W_ih^T + b_ih and (r', z', n') = h W_hh^T + b_hh; n'' = tanh(n + sigmoid(r + r') n');
    h' = (1 - u) n'' + u h with u = sigmoid(z + z'). Source: Cho et al. (2014), the reset gate after the product.

    Args:
        input: x, Tensor[B, I], floating point; all arguments have its dtype and device.
        hx: h, Tensor[B, H].
        w_ih, w_hh: Tensor[3H, I], Tensor[3H, H], gates in the order r, z, n.
        b_ih, b_hh: Tensor[3H] or None.
        backend: see `pykernels.explain`.

    Returns:
        h', Tensor[B, H]. Under autocast everything is first cast to its lower precision.

    Raises:
        As `rnn_tanh_cell`.
    """
    input, states, weights = _cell_arguments("gru_cell", 3, input, (hx,), (w_ih, w_hh, b_ih, b_hh))
    _ROOM.resolve("gru_cell", backend, input)
    return reference.gru_cell(input, states[0], *weights)


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM over sequences: `lstm_cell` at every step, in layers and directions as `torch.nn.LSTM` has them.

    Below, D = 2 if `bidirectional` else 1, H = hidden size, P = `proj_size` or, without projections, H.

    Args:
        input: Tensor[T, B, I] (Tensor[B, T, I] with `batch_first`), floating point; all arguments have its dtype and
            device. With `batch_sizes`: Tensor[sum(batch_sizes), I].
        hx: (h0, c0), Tensor[num_layers * D, B, P] and Tensor[num_layers * D, B, H]; None is zeros.
        weights: torch's `_flat_weights`: for each layer and direction W_ih (4H, I or D * P), W_hh (4H, P), b_ih and
            b_hh (4H), both or neither, and with projections W_hr (P, H).
        dropout: probability of zeroing an element of a layer's output, last layer excepted, when `training`.
        proj_size: with P > 0, h' is replaced by h' W_hr^T.
        lengths: Tensor[B], int32 or int64, in any order: sequence b has `lengths[b]` steps, 0 included. Output beyond
            is 0, the final state is that of the last step, and the second direction begins there.
        batch_sizes: the input is packed, as `torch.nn.utils.rnn.PackedSequence` has it: int64 on the CPU, not
            increasing, B = batch_sizes[0]; not with `lengths` or `batch_first`.
        seed: an int or one-element int64 tensor that fixes the dropout mask; None draws one from torch's generator.
        backend: see `pykernels.explain`.

    Returns:
        (output, (h_n, c_n)): output Tensor[T, B, D * P] (laid out as `input`), h_n and c_n shaped as h0 and c0. c is
        kept in float32 (float64 for float64) and rounded once. T = 0 gives an empty output and the initial state
        (torch refuses it). Under autocast everything is first cast to its lower precision.

    Raises:
        TypeError: an argument is not a Tensor; a `seed` of another type.
        NotImplementedError: not floating point.
        RuntimeError: wrong shapes or number of weights, different dtypes or devices, `dropout` outside [0, 1], `hx`
            without two states.
        ValueError: `batch_sizes` together with `lengths` or `batch_first`; `num_layers` below 1.
        IndexError: a length is outside [0, T] (read on the CPU in eager mode).
        BackendError: the named backend cannot serve the call.
    """
    if hx is not None and len(hx) != 2:
        raise RuntimeError(f"lstm(): argument 'hx' must hold two states (h_0, c_0), not {len(hx)}")
    state = None if hx is None else tuple(hx)
    options: dict[str, Any] = {"lengths": lengths, "batch_sizes": batch_sizes, "dropout": dropout, "training": training}
    options |= {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    input, state, weights = _sequence_arguments("lstm", input, state, weights, options, proj_size)
    _ROOM.resolve("lstm", backend, input)
    options["seed"] = _dropout_seed("lstm", seed, input, options)
    return reference.lstm(input, state, weights, proj_size=proj_size, **options)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A GRU over sequences: `gru_cell` at every step, in layers and directions as `torch.nn.GRU` has them.

    Arguments, shapes and errors as `lstm`, with 3H for 4H, `hx` one tensor h0, and no projections.

    Returns:
        (output, h_n): Tensor[T, B, D * H] (laid out as `input`) and Tensor[num_layers * D, B, H].
    """
    options: dict[str, Any] = {"lengths": lengths, "batch_sizes": batch_sizes, "dropout": dropout, "training": training}
    options |= {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    input, state, weights = _sequence_arguments("gru", input, None if hx is None else (hx,), weights, options)
    _ROOM.resolve("gru", backend, input)
    options["seed"] = _dropout_seed("gru", seed, input, options)
    return reference.gru(input, None if state is None else state[0], weights, **options)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A vanilla RNN over sequences: `rnn_tanh_cell` or `rnn_relu_cell` at every step, as `torch.nn.RNN`.

    Arguments, shapes and errors as `lstm`, with H for 4H, `hx` one tensor h0, no projections, and `nonlinearity` "tanh"
    or "relu" (ValueError otherwise).

    Returns:
        (output, h_n): Tensor[T, B, D * H] (laid out as `input`) and Tensor[num_layers * D, B, H].
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn(): argument 'nonlinearity' must be 'tanh' or 'relu', not {nonlinearity!r}")
    options: dict[str, Any] = {"lengths": lengths, "batch_sizes": batch_sizes, "dropout": dropout, "training": training}
    options |= {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first}
    input, state, weights = _sequence_arguments("rnn", input, None if hx is None else (hx,), weights, options)
    _ROOM.resolve("rnn", backend, input)
    options["seed"] = _dropout_seed("rnn", seed, input, options)
    return reference.rnn(input, None if state is None else state[0], weights, nonlinearity=nonlinearity, **options)


def _check_tensors(function: str, named: dict[str, Tensor | None], input: Tensor) -> None:
    for key, value in named.items():
        if value is not None:
            _check.same(function, key, value, "input", input)


def _require(function: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise RuntimeError(f"{function}(): argument '{name}' must have the shape {shape}, not {tuple(value.shape)}")


def _cell_arguments(
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


def _sequence_arguments(
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
    each, left = divmod(len(weights), layers * directions)
    projected = int(proj_size > 0)
    if left or each - projected not in (2, 4):
        raise RuntimeError(
            f"{function}(): argument 'weights' must hold {2 + projected} or {4 + projected} tensors for each of the "
            f"{layers * directions} layers and directions, not {len(weights)} in all"
        )
    gated = weights[0].shape[0] if weights[0].dim() == 2 else 0
    hidden, uneven = divmod(gated, _GATES[function])
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


def _dropout_seed(function: str, seed: int | Tensor | None, input: Tensor, options: dict[str, Any]) -> Tensor | None:
    """The seed as a tensor, drawn if need be; None where no dropout is active, so that none is drawn."""
    active = options["training"] and options["dropout"] > 0 and options["num_layers"] > 1
    return as_seed(seed, input, function) if active else None
