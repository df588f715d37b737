"""Sequences of a vanilla RNN, an LSTM or a GRU, in layers and directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..._backends import explaining
from ...reference.recurrent import Weights, extra_names, unflatten
from .. import _ids
from ._arguments import GATES, call_seed, sequence_arguments
from ._functions import ROOM, Mode, run_layer
from ._layout import Order, order_of
from ._rows import Mode as RowsMode
from ._rows import drop, run_rows

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
    resets: Tensor | None = None,
    peephole: bool = False,
    layer_norm: bool = False,
    zoneout: float | Sequence[float] = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """An LSTM over sequences: `lstm_cell` at every step, in layers and directions as `torch.nn.LSTM` has them.

    Below, D = 2 if `bidirectional` else 1, H = hidden size, P = `proj_size` or, without projections, H.

    Args:
        input: Tensor[T, B, I] (Tensor[B, T, I] with `batch_first`), floating point; all arguments have its dtype and
            device. With `batch_sizes`: Tensor[sum(batch_sizes), I].
        hx: (h0, c0), Tensor[num_layers * D, B, P] and Tensor[num_layers * D, B, H]; None is zeros.
        weights: torch's `_flat_weights`: for each layer and direction W_ih (4H, I or D * P), W_hh (4H, P), b_ih and
            b_hh (4H), both or neither, and with projections W_hr (P, H). After these, with `peephole`, p (3H) = p_i,
            p_f, p_o; with `layer_norm` the gains a_ih (4H), a_hh (4H), a_c (H) and the offset b_c (H).
        dropout: probability of zeroing an element of a layer's output, last layer excepted, when `training`.
        proj_size: with P > 0, h' is replaced by h' W_hr^T (Sak, Senior and Beaufays, 2014).
        lengths: Tensor[B], int32 or int64, in any order: sequence b has `lengths[b]` steps, 0 included. Output beyond
            is 0, the final state is that of the last step, and the second direction begins there.
        batch_sizes: the input is packed, as `torch.nn.utils.rnn.PackedSequence` has it: int64 on the CPU, not
            increasing, B = batch_sizes[0]; not with `lengths` or `batch_first`.
        resets: bool, of the input's shape without its last dimension. True cuts the sequence before that step: the
            state is zero there (an episode begins), and in the second direction for the step before.
        peephole: i and f read c, o reads c': p_i c, p_f c and p_o c' are added to their gates (Gers, Schraudolph and
            Schmidhuber, 2002).
        layer_norm: gates = LN(x W_ih^T) a_ih + LN(h W_hh^T) a_hh + b_ih + b_hh, each LN over all 4H of a token, and
            h' = sigmoid(o) tanh(LN(c') a_c + b_c); eps 1e-5 (Ba, Kiros and Hinton, 2016).
        zoneout: probability with which an element of h' (of c') stays what it was, one number or two (h, c), when
            `training`; otherwise both are blended, h' = zoneout h + (1 - zoneout) h' (Krueger et al., 2017).
        recurrent_dropout: probability of zeroing an element of W_hh for the whole call, the others times
            1 / (1 - p), when `training` (DropConnect: Wan et al., 2013; Merity, Keskar and Socher, 2018).
        recompute: keep only the input, the output and the initial states for backward, which makes gates and c again.
            Same results; the reference, which autograd differentiates, ignores it.
        seed: an int or one-element int64 tensor that fixes the masks; None draws one from torch's generator.
        bounds_check: what happens to a length outside [0, T]. "error": on the CPU an IndexError before anything is
            computed; on a GPU its sequence is taken to have no step, and the next checked call or
            `pykernels.check_errors()` raises, with no synchronisation for it here. "sync": on a GPU this call waits and
            raises. "none": on a GPU nobody looks; the result for that sequence means nothing.
        backend: see `pykernels.explain`.

    Returns:
        (output, (h_n, c_n)): output Tensor[T, B, D * P] (laid out as `input`), h_n and c_n shaped as h0 and c0. c is
        kept in float32 (float64 for float64) and rounded once. T = 0 gives an empty output and the initial state
        (torch refuses it). Under autocast everything is first cast to its lower precision.

    Raises:
        TypeError: an argument is not a Tensor; a `seed` or probability of another type.
        NotImplementedError: not floating point.
        RuntimeError: wrong shapes or number of weights, different dtypes or devices, a probability outside [0, 1],
            `hx` without two states, `resets` that are not bool.
        ValueError: `batch_sizes` together with `lengths` or `batch_first`; `num_layers` below 1, `proj_size` below 0.
        IndexError: a length is outside [0, T], named with its position; see `bounds_check`.
        BackendError: the named backend cannot serve the call.
    """
    if hx is not None and len(hx) != 2:
        raise RuntimeError(f"lstm(): argument 'hx' must hold two states (h_0, c_0), not {len(hx)}")
    options: dict[str, Any] = {
        "num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "dropout": dropout,
        "training": training, "proj_size": proj_size, "lengths": lengths, "batch_sizes": batch_sizes,
        "resets": resets, "peephole": peephole, "layer_norm": layer_norm, "zoneout": zoneout,
        "recurrent_dropout": recurrent_dropout, "recompute": recompute,
    }  # fmt: skip
    state = None if hx is None else tuple(hx)
    input, state, weights = sequence_arguments("lstm", input, state, weights, options)
    served = _served("lstm", "lstm", backend, bounds_check, input, weights, options)
    drawn = call_seed("lstm", seed, input, options)
    if served == "reference":
        return reference.lstm(input, state, weights, **options, seed=drawn)
    output, (h_n, c_n) = _run("lstm", served, input, state, weights, options, drawn)
    _ids.after(bounds_check)
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
    resets: Tensor | None = None,
    layer_norm: bool = False,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A GRU over sequences: `gru_cell` at every step, in layers and directions as `torch.nn.GRU` has them.

    Arguments, shapes and errors as `lstm`, with 3H for 4H, `hx` one tensor h0, and neither projections nor peepholes.
    With `layer_norm` each product is normalised over all 3H of a token and multiplied by its gain, a_ih or a_hh (3H),
    before its bias is added.

    Returns:
        (output, h_n): Tensor[T, B, D * H] (laid out as `input`) and Tensor[num_layers * D, B, H].
    """
    options: dict[str, Any] = {
        "num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "dropout": dropout,
        "training": training, "lengths": lengths, "batch_sizes": batch_sizes, "resets": resets,
        "layer_norm": layer_norm, "zoneout": zoneout, "recurrent_dropout": recurrent_dropout, "recompute": recompute,
    }  # fmt: skip
    everything = {**options, "proj_size": 0, "peephole": False}
    input, state, weights = sequence_arguments("gru", input, None if hx is None else (hx,), weights, everything)
    served = _served("gru", "gru", backend, bounds_check, input, weights, everything)
    options["lengths"] = everything["lengths"]
    drawn = call_seed("gru", seed, input, options)
    if served == "reference":
        return reference.gru(input, None if state is None else state[0], weights, **options, seed=drawn)
    output, (h_n,) = _run("gru", served, input, state, weights, everything, drawn)
    _ids.after(bounds_check)
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
    resets: Tensor | None = None,
    layer_norm: bool = False,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    recompute: bool = False,
    seed: int | Tensor | None = None,
    bounds_check: str = "error",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A vanilla RNN over sequences: `rnn_tanh_cell` or `rnn_relu_cell` at every step, as `torch.nn.RNN`.

    Arguments, shapes and errors as `gru`, with H for 3H, and `nonlinearity` "tanh" or "relu" (ValueError otherwise).
    `recompute` changes nothing: backward reads the output alone.

    Returns:
        (output, h_n): Tensor[T, B, D * H] (laid out as `input`) and Tensor[num_layers * D, B, H].
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn(): argument 'nonlinearity' must be 'tanh' or 'relu', not {nonlinearity!r}")
    options: dict[str, Any] = {
        "num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "dropout": dropout,
        "training": training, "lengths": lengths, "batch_sizes": batch_sizes, "resets": resets,
        "layer_norm": layer_norm, "zoneout": zoneout, "recurrent_dropout": recurrent_dropout, "recompute": recompute,
    }  # fmt: skip
    everything = {**options, "proj_size": 0, "peephole": False}
    input, state, weights = sequence_arguments("rnn", input, None if hx is None else (hx,), weights, everything)
    served = _served("rnn", nonlinearity, backend, bounds_check, input, weights, everything)
    options["lengths"] = everything["lengths"]
    drawn = call_seed("rnn", seed, input, options)
    if served == "reference":
        state = None if state is None else state[0]
        return reference.rnn(input, state, weights, nonlinearity=nonlinearity, **options, seed=drawn)
    output, (h_n,) = _run(nonlinearity, served, input, state, weights, everything, drawn)
    _ids.after(bounds_check)
    return output, h_n


def _served(
    function: str,
    kind: str,
    backend: str | None,
    bounds_check: str,
    input: Tensor,
    weights: Sequence[Tensor],
    options: dict[str, Any],
) -> str:
    """The backend of the call. The lengths in `options` become what its kernels may trust."""
    _ids.before(function, bounds_check)
    if explaining():
        sizes, side = options["batch_sizes"], 0 if options["batch_first"] else 1
        batch = input.shape[side] if sizes is None else int(sizes[0]) if len(sizes) else 0
        states = (2 if options["bidirectional"] else 1, batch, weights[0].shape[0] // GATES.get(kind, 1))
        ROOM.explained = (kind, options["layer_norm"] or any(_zones(options)), input, states)
    served = ROOM.resolve(function, backend, input, *_features(options))
    if options["lengths"] is not None:
        steps = input.shape[1 if options["batch_first"] else 0]
        rest = ("lengths", options["lengths"], steps + 1)
        options["lengths"] = _ids.checked(served, bounds_check, function, *rest, fill=0)
    return served


def _features(options: dict[str, Any]) -> tuple[str, ...]:
    """What the call needs beyond the plain operator; backends say which of it they serve."""
    found: tuple[str, ...] = ()
    if options["proj_size"]:
        found += ("proj_size",)
    if options["peephole"]:
        found += ("peephole",)
    if options["layer_norm"]:
        found += ("layer_norm",)
    zoneout = options["zoneout"]
    if any(zoneout) if isinstance(zoneout, (tuple, list)) else zoneout:
        found += ("zoneout",)
    return found


def _zones(options: dict[str, Any]) -> tuple[float, float]:
    """Zoneout of h and c."""
    h, *c = options["zoneout"] if isinstance(options["zoneout"], (tuple, list)) else (options["zoneout"],) * 2
    return float(h), float(c[0])


def _run(
    mode: str,
    backend: str,
    input: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    options: dict[str, Any],
    seed: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers and directions over the operators: (output, final states)."""
    layers, directions = options["num_layers"], 2 if options["bidirectional"] else 1
    batch_sizes = options["batch_sizes"]
    each = len(weights) // (layers * directions)
    extra = extra_names(mode, options["proj_size"] > 0, options["peephole"], options["layer_norm"])
    by_rows = options["layer_norm"] or any(_zones(options))
    swap = options["batch_first"]
    given = input.transpose(0, 1) if swap else input
    shape = given.shape[:-1]
    x = given if batch_sizes is not None else given.reshape(shape[0] * shape[1], given.shape[2])
    batch = shape[1] if batch_sizes is None else hx[0].shape[1] if hx is not None else int(batch_sizes[0])
    order = _order(options, given, batch)
    if order is not None:
        x, batch_sizes = x.index_select(0, order.tokens), order.batch_sizes
    if hx is None:
        zeros = x.new_zeros(layers * directions, batch, weights[1].shape[1])
        hx = (zeros,)
        if mode == "lstm":
            hx += (x.new_zeros(layers * directions, batch, weights[0].shape[0] // 4) if extra else zeros,)
    connect = options["recurrent_dropout"] if options["training"] else 0.0
    between = options["dropout"] if options["training"] else 0.0
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        ways = []
        for k in range(layer * directions, (layer + 1) * directions):
            w = unflatten(weights[k * each : (k + 1) * each], extra)
            if connect > 0 and seed is not None:
                w = w._replace(w_hh=drop(backend, w.w_hh, seed, 1, k, w.w_hh.shape[0], connect))
            ways.append(w)
        states = tuple([s.select(0, layer) if directions == 1 else s.narrow(0, 2 * layer, 2) for s in hx])
        if order is not None:
            states = tuple([order.initial(s) for s in states])
        if by_rows:
            about = (batch_sizes, seed, None if order is None else order.tokens)
            loop = RowsMode(mode, x.dtype, _zones(options), (0, 0), options["training"], False)
            tokens = shape.numel() * layer * directions
            x, *final = _by_rows(backend, loop, options["recompute"], x, ways, states, tokens, shape.numel(), about)
        else:
            w = ways[0] if directions == 1 else Weights(*(_stacked(parts) for parts in zip(*ways, strict=True)))
            tensors = (x, w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr, w.peephole, batch_sizes)
            x, *final = run_layer(Mode(mode, backend, options["recompute"]), tensors, states)
        if order is not None:
            final = [order.final(s) for s in final]
        finals.append(tuple([s.unsqueeze(0) for s in final] if directions == 1 else final))
        if between > 0 and layer < layers - 1:
            assert seed is not None
            places = None if order is None else order.tokens
            x = drop(backend, x, seed, 0, layer, shape.numel(), between, places)
    final_states = finals[0] if layers == 1 else tuple([torch.cat(parts) for parts in zip(*finals, strict=True)])
    if order is not None:
        x = x.new_zeros(shape.numel(), x.shape[1]).index_copy(0, order.tokens, x)
    x = x.reshape(*shape, x.shape[1])
    return (x.transpose(0, 1) if swap else x), final_states


def _by_rows(
    backend: str, loop: RowsMode, recompute: bool, x: Tensor, ways: list[Weights], states: tuple[Tensor, ...],
    begun: int, tokens: int, given: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(output, *final states) of a layer over operators that serve a direction each, whose masks lie behind each other:
    `begun` tokens before the layer's, `tokens` of a direction."""
    found = []
    for d, w in enumerate(ways):
        own = states if len(ways) == 1 else tuple([s[d] for s in states])
        count = begun + d * tokens
        mode = loop._replace(firsts=(count * w.w_hh.shape[1], count * own[-1].shape[1]), reverse=d == 1)
        found.append(run_rows(backend, mode, recompute, x, w, own, *given))
    if len(found) == 1:
        return found[0]
    outputs, *finals = zip(*found, strict=True)
    return torch.cat(outputs, -1), *(torch.stack(parts) for parts in finals)


def _stacked(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given else None


def _order(options: dict[str, Any], input: Tensor, batch: int) -> Order | None:
    """How the tokens of an input (T, B, I) or, packed, (N, I) must be ordered; None: they are as they should be."""
    lengths, batch_sizes, resets = options["lengths"], options["batch_sizes"], options["resets"]
    if resets is None and (lengths is None or batch_sizes is not None):
        return None
    steps = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    if resets is not None and options["batch_first"]:
        resets = resets.transpose(0, 1)
    return order_of(lengths, resets, batch_sizes, steps, batch, input)
