"""Sequences of a vanilla RNN, an LSTM or a GRU, in layers and directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import is_compiling
from ...reference._random import keep_mask
from ._arguments import dropout_seed, sequence_arguments
from ._functions import ROOM, run_layer

__all__ = ["gru", "lstm", "rnn"]


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
    input, state, weights = sequence_arguments("lstm", input, state, weights, options, proj_size)
    served = ROOM.resolve("lstm", backend, input, *_features(options, proj_size))
    options["seed"] = dropout_seed("lstm", seed, input, options)
    if served == "reference":
        return reference.lstm(input, state, weights, proj_size=proj_size, **options)
    output, (h_n, c_n) = _run("lstm", served, input, state, weights, **options)
    return output, (h_n, c_n)


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
    input, state, weights = sequence_arguments("gru", input, None if hx is None else (hx,), weights, options)
    served = ROOM.resolve("gru", backend, input, *_features(options))
    options["seed"] = dropout_seed("gru", seed, input, options)
    if served == "reference":
        return reference.gru(input, None if state is None else state[0], weights, **options)
    output, (h_n,) = _run("gru", served, input, state, weights, **options)
    return output, h_n


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
    input, state, weights = sequence_arguments("rnn", input, None if hx is None else (hx,), weights, options)
    served = ROOM.resolve("rnn", backend, input, *_features(options))
    options["seed"] = dropout_seed("rnn", seed, input, options)
    if served == "reference":
        return reference.rnn(input, None if state is None else state[0], weights, nonlinearity=nonlinearity, **options)
    output, (h_n,) = _run(nonlinearity, served, input, state, weights, **options)
    return output, h_n


def _features(options: dict[str, Any], proj_size: int = 0) -> tuple[str, ...]:
    """What the call needs beyond the plain operator; backends say which of it they serve."""
    found: tuple[str, ...] = ("proj_size",) if proj_size else ()
    if options["lengths"] is not None and is_compiling():
        found += ("lengths in a compiled graph",)  # the number of tokens is data there
    return found


class _Order:
    """Which tokens of a padded batch exist, sorted by time and by falling length, as the operators want them."""

    def __init__(self, lengths: Tensor, steps: int) -> None:
        batch = lengths.shape[0]
        ordered, self.rows = torch.sort(lengths.long(), descending=True, stable=True)
        self.inverse = torch.argsort(self.rows)
        time = torch.arange(steps, device=lengths.device).unsqueeze(1)
        exists = time < ordered
        self.tokens = (time * batch + self.rows)[exists]
        sizes = exists.sum(1)
        self.batch_sizes = sizes[sizes > 0].cpu()


def _run(
    mode: str,
    backend: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers and directions over the operators: (output, final states)."""
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    padded = input.transpose(0, 1) if batch_first else input
    order = None if lengths is None else _Order(lengths, padded.shape[0])
    if batch_sizes is not None:
        x, batch = input, int(batch_sizes[0])
    else:
        x, batch = padded.reshape(padded.shape[0] * padded.shape[1], padded.shape[2]), padded.shape[1]
    if order is not None:
        x, batch_sizes = x.index_select(0, order.tokens), order.batch_sizes
        hx = None if hx is None else tuple(s.index_select(1, order.rows) for s in hx)
    if hx is None:
        zeros = x.new_zeros(num_layers * directions, batch, weights[1].shape[1])
        hx = (zeros,) * (2 if mode == "lstm" else 1)
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *biases = weights[k * each : (k + 1) * each]
            given = (x, w_ih, w_hh, *(biases or (None, None)), batch_sizes)
            results = run_layer((mode, backend, direction == 1), given, tuple(s[k] for s in hx))
            outputs.append(results[0])
            finals.append(results[1:])
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if seed is not None and layer < num_layers - 1:
            tokens = padded.shape[:-1].numel()  # the mask is addressed by the element's place in the padded layout
            keep = keep_mask(seed.to(x.device), (num_layers - 1, tokens, x.shape[1]), dropout)[layer]
            keep = keep if order is None else keep.index_select(0, order.tokens)
            x = torch.where(keep, x * (1 / (1 - dropout) if dropout < 1 else 0.0), 0)
    final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if order is not None:
        final = tuple(s.index_select(1, order.inverse) for s in final)
        x = x.new_zeros(padded.shape[0] * padded.shape[1], x.shape[1]).index_copy(0, order.tokens, x)
    if batch_sizes is None or order is not None:
        x = x.reshape(padded.shape[0], padded.shape[1], x.shape[1])
        x = x.transpose(0, 1) if batch_first else x
    return x, final
