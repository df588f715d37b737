"""The recurrent room's contract. The cases name tensors one by one: x, h0, c0 and the flat weights w0, w1, ..."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec import Case, Input, OpSpec
from ._recurrent_steps import STEPS as STEPS

KERNELS = ("cpu", "triton", "cuda", "emulator")
PROJECTED = KERNELS  # backends that serve projections and peepholes

_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


def _flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(y for part in result for y in _flat(part))


def _weights(arguments: dict[str, Any]) -> list[Tensor]:
    return [arguments.pop(f"w{i}") for i in range(sum(name[0] == "w" for name in arguments))]


def _of_named_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A cell or sequence function as one of the case's tensors; outputs and final states in one flat tuple."""
    cell = function.__name__.endswith("cell")

    def call(x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
        weights = _weights(arguments)
        hx = h0 if c0 is None else (h0, c0)
        return _flat(function(x, hx, *weights, **arguments) if cell else function(x, hx, weights, **arguments))

    return call


def _torch_sequence(mode: str) -> Callable[..., Any]:
    """torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu as a function of the case's tensors."""

    def call(
        x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, nonlinearity: str = "tanh", **options: Any
    ) -> Any:
        weights = _weights(options)
        layers, both = options.get("num_layers", 1), options.get("bidirectional", False)
        proj = options.get("proj_size", 0)
        states = layers * (2 if both else 1)
        if h0 is None:
            batch = x.shape[0 if options.get("batch_first") else 1]
            h0 = x.new_zeros(states, batch, weights[1].shape[1])
            c0 = x.new_zeros(states, batch, weights[0].shape[0] // 4)
        biases = len(weights) // states - (proj > 0) == 4
        function = getattr(torch, f"rnn_{nonlinearity}" if mode == "rnn" else mode)
        hx = (h0, c0) if mode == "lstm" else h0
        found = function(x, hx, weights, biases, layers, 0.0, False, both, options.get("batch_first", False))
        return _flat(found)

    return call


def _cell_case(
    label: str, mode: str, batch: int, size: int, hidden: int, bias: bool = True, scale: float = 1.0
) -> Case:
    inputs = {"x": Input((batch, size), scale=scale), "h0": Input((batch, hidden))}
    if mode == "lstm":
        inputs["c0"] = Input((batch, hidden), scale=scale)
    gated = _GATES[mode] * hidden
    shapes = [(gated, size), (gated, hidden), *([(gated,)] * 2 if bias else [])]
    return Case(label, {**inputs, **{f"w{i}": Input(s, scale=0.3) for i, s in enumerate(shapes)}})


def _cell_cases(mode: str) -> tuple[Case, ...]:
    one = _cell_case("one", mode, 1, 1, 1)
    if mode == "lstm":
        why = "four terms of six rounded factors each add up to 1.6 times dx; torch's errors happen to cancel"
        one = replace(one, rounding={"dx": 2.0}, why=why)
    return (
        _cell_case("sample", mode, 3, 33, 1),
        one,
        _cell_case("no-bias", mode, 3, 5, 33, bias=False),
        _cell_case("wide", mode, 17, 20, 100),
        _cell_case("saturated", mode, 4, 7, 9, scale=60.0),
        _cell_case("no-rows", mode, 0, 5, 3),
    )


def _case(
    label: str,
    mode: str,
    steps: int,
    batch: int,
    size: int,
    hidden: int,
    bias: bool = True,
    state: bool = True,
    scale: float = 1.0,
    layout: str = "contiguous",
    dy: str = "contiguous",
    **options: Any,
) -> Case:
    layers, both, proj = options.get("num_layers", 1), options.get("bidirectional", False), options.get("proj_size", 0)
    directions, width, gated = 2 if both else 1, proj or hidden, _GATES[mode] * hidden
    shape = (batch, steps, size) if options.get("batch_first") else (steps, batch, size)
    inputs = {"x": Input(shape, scale=scale, layout=layout)}
    if state:
        inputs["h0"] = Input((layers * directions, batch, width))
        if mode == "lstm":
            inputs["c0"] = Input((layers * directions, batch, hidden))
    shapes: list[tuple[int, ...]] = []
    for layer in range(layers):
        for _ in range(directions):
            shapes += [(gated, width * directions if layer else size), (gated, width)]
            shapes += [(gated,)] * 2 * bias + [(proj, hidden)] * (proj > 0)
            shapes += [(3 * hidden,)] * options.get("peephole", False)
            if options.get("layer_norm"):
                shapes += [(gated,)] * 2 + [(hidden,)] * (2 * (mode == "lstm"))
    inputs |= {f"w{i}": Input(s, scale=0.3) for i, s in enumerate(shapes)}
    return Case(label, inputs, options, dy)


def _cases(mode: str) -> tuple[Case, ...]:
    extra = [_case("relu", mode, 7, 3, 5, 6, nonlinearity="relu")] if mode == "rnn" else []
    sample = _case("sample", mode, 3, 3, 28, 1)
    if mode == "gru":
        why = "the nine terms of its second element, the largest, add up to 125 times their sum in magnitude"
        sample = replace(sample, rounding={"dw3": 125.0}, why=why)
    return (
        sample,
        _case("one", mode, 1, 1, 1, 1),
        _case("no-state", mode, 5, 3, 4, 6, state=False),
        _case("no-bias", mode, 5, 3, 4, 6, bias=False),
        _case("deep", mode, 5, 3, 4, 6, num_layers=3),
        _case("both-ways", mode, 5, 3, 4, 6, num_layers=2, bidirectional=True),
        _case("batch-first", mode, 5, 3, 4, 6, batch_first=True),
        _case("long", mode, 40, 2, 3, 9),
        _case("wide", mode, 4, 17, 20, 100),
        _case("saturated", mode, 6, 3, 4, 6, scale=60.0),
        _case("no-rows", mode, 4, 0, 3, 5),
        _case("rows", mode, 5, 3, 4, 6, layout="rows"),
        _case("dy-expanded", mode, 5, 3, 4, 6, dy="expanded"),
        *extra,
    )


def _dropout_cases() -> tuple[Case, ...]:
    """What torch has in another form or not at all: dropout by our mask, and no steps."""
    options = {"dropout": 0.4, "training": True, "seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    return (
        _case("no-steps", "lstm", 0, 3, 4, 6),
        _case("sample", "lstm", 3, 3, 20, 1, num_layers=2, **options),
        _case("dropout-deep", "lstm", 5, 3, 4, 6, num_layers=3, bidirectional=True, **options),
    )


def _flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """The matrix products: one for each weight and element of a step forward, two backward."""
    steps = math.prod(case.inputs["x"].shape[:-1])
    matrices = (x.shape for name, x in case.inputs.items() if name[0] == "w" and len(x.shape) == 2)
    forward = 2 * steps * sum(math.prod(shape) for shape in matrices)
    return {"forward": forward, "backward": 2 * forward}


def _bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Every input is read once and the output, of hidden (or projected) size, written once; backward reads them again
    with the output's gradient and writes a gradient for each input. Weights that a cache does not hold cost more."""
    inputs = sum(math.prod(x.shape) for x in case.inputs.values())
    state = case.inputs["h0"].shape
    out = math.prod(case.inputs["x"].shape[:-1]) * state[-1] * (state[0] if len(state) == 3 else 1)
    element = torch.finfo(dtype).bits // 8
    return {"forward": (inputs + out) * element, "backward": 2 * (inputs + out) * element}


_BENCH = ((64, 32, 256), (64, 32, 512), (100, 128, 64))
_GPU_BENCH = ((1024, 16, 512), (1024, 16, 768), (256, 64, 1024))  # steps are latency: long, and of few rows


def _compiled(case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    """torch.compile does not fuse a recurrence: it calls the same torch.lstm. Half precision: the LSTM's goals."""
    lstm = "c0" in case.inputs and len(case.inputs["x"].shape) == 3
    return () if dtype is torch.float32 or (dtype is torch.bfloat16 and lstm and case.label in _HALF) else None


_HALF = ("T64-B32-H256", "T64-B32-H512")


def _cell(name: str, mode: str) -> OpSpec:
    bench = (_cell_case("B32-H256", mode, 32, 256, 256), _cell_case("B128-H512", mode, 128, 512, 512))
    peer = _of_named_tensors(getattr(torch, name))
    return OpSpec(
        name, "recurrent", _cell_cases(mode), bench, peer, KERNELS, bytes_moved=_bytes, flops=_flops, long_sums=_LONG,
        wrap=_of_named_tensors, compiled=_compiled,
    )  # fmt: skip


def _projected() -> OpSpec:
    """LSTMs with projections and peepholes."""
    cases = (
        _case("sample", "lstm", 3, 3, 20, 1, proj_size=1),
        _case("projected", "lstm", 5, 3, 4, 6, proj_size=3),
        _case("projected-deep", "lstm", 5, 3, 4, 6, proj_size=2, num_layers=2, bidirectional=True),
        _case("projected-wide", "lstm", 4, 17, 20, 100, proj_size=70),
        _case("peephole", "lstm", 5, 3, 4, 33, peephole=True, scale=3.0),
        _case("peephole-no-bias", "lstm", 5, 3, 4, 6, bias=False, peephole=True, num_layers=2, bidirectional=True),
        replace(
            _case("projected-peephole", "lstm", 5, 3, 4, 6, proj_size=3, peephole=True, state=False),
            rounding={"dw2": 3.0, "dw3": 3.0},
            why="the terms of one element add up to 4.8 in magnitude, where the largest gradient is 1.7",
        ),
    )
    bench = (_case("T64-B32-H256-proj64", "lstm", 64, 32, 256, 256, proj_size=64),)
    return OpSpec(
        "lstm", "recurrent", cases, bench, kernels=PROJECTED, bytes_moved=_bytes, flops=_flops, long_sums=_LONG,
        wrap=_of_named_tensors, timed_peer=_torch_sequence("lstm"), compiled=_compiled,
    )  # fmt: skip


def _rows(mode: str, kernels: tuple[str, ...] = ("cpu",)) -> OpSpec:
    """Layer normalisation and zoneout, in training (by a mask) and in evaluation (a blend).

    On GPUs one kernel serves all cells: here the LSTM, tests/test_recurrent_rows.py has the others.
    """
    norm: dict[str, Any] = {"layer_norm": True}
    zone: dict[str, Any] = {"zoneout": 0.3, "seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    train: dict[str, Any] = {**zone, "training": True}
    # Few elements and few tensors: derivatives are taken by differences and for each subset. A row of one or two is
    # normalised to its signs, whose gradients are all rounding: so c's normalisation is for the other cases.
    size, plain = 3 if mode == "rnn" else 1, {**({} if mode == "lstm" else norm), **train}
    cases = [
        _case("sample", mode, 2, 1, 4, size, bias=False, state=False, **plain),
        _case("norm", mode, 5, 3, 4, 33, **norm),
        _case("norm-zoneout-deep", mode, 4, 3, 4, 6, bias=False, num_layers=2, bidirectional=True, **norm, **train),
        _case("zoneout-off", mode, 5, 3, 4, 6, **zone),
    ]
    if mode == "lstm":
        more: dict[str, Any] = {**train, "zoneout": (0.4, 0.2)}
        cases.append(_case("norm-peephole", mode, 5, 5, 4, 20, peephole=True, **norm, **more))
    return OpSpec(
        mode,
        "recurrent",
        tuple(cases),
        kernels=kernels,
        extra=frozenset(("seed",)),
        long_sums=_LONG,
        wrap=_of_named_tensors,
    )


def _sequence(mode: str) -> OpSpec:
    bench = tuple(_case(f"T{t}-B{b}-H{h}", mode, t, b, h, h) for t, b, h in _BENCH)
    if mode != "rnn":
        bench += (_case("T64-B32-H256-both-ways", mode, 64, 32, 256, 256, bidirectional=True),)
    if mode == "gru":
        bench += (_case("T200-B8-H128", mode, 200, 8, 128, 128),)
    gpu = tuple(_case(f"T{t}-B{b}-H{h}", mode, t, b, h, h) for t, b, h in _GPU_BENCH)
    peer = _torch_sequence(mode)
    return OpSpec(
        mode, "recurrent", _cases(mode), bench, peer, KERNELS, bytes_moved=_bytes, flops=_flops, long_sums=_LONG,
        wrap=_of_named_tensors, compiled=_compiled, gpu_bench=gpu,
    )  # fmt: skip


_LONG = frozenset(("x", "h0", "c0", *(f"w{i}" for i in range(24))))

SPECS = (
    _cell("rnn_tanh_cell", "rnn"),
    _cell("rnn_relu_cell", "rnn"),
    _cell("lstm_cell", "lstm"),
    _cell("gru_cell", "gru"),
    _sequence("rnn"),
    _sequence("lstm"),
    _sequence("gru"),
    _projected(),
    _rows("rnn"),
    _rows("lstm", KERNELS),
    _rows("gru"),
    OpSpec(
        "lstm",
        "recurrent",
        _dropout_cases(),
        kernels=("cpu",),  # dropout lies between the layers, in torch: no other kernels run here than above
        extra=frozenset(("seed",)),
        long_sums=_LONG,
        wrap=_of_named_tensors,
    ),
)
