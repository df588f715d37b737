"""One row of a benchmark: an operator at one shape and dtype, against torch eager and torch.compile, checked first."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import explain
from .limits import Limits
from .memory import peak_bytes, saved_bytes
from .run import check_case, outputs_of
from .spec import Case, OpSpec
from .timing import Timing, copy_function, measure, one_thread

_CHECKED, _ROWS = 2**22, 256  # elements from which on a rowwise operator is checked on this many rows
DIRECTIONS = ("forward", "backward", "forward+backward")
OURS, COPY = "pykernels", "copy"


@dataclass
class Row:
    """One operator, shape, dtype and direction.

    Attributes:
        backend: that served pykernels' call.
        kernels: which of its kernels, as `explain` says, where it has several.
        seconds: provider -> Timing; empty where the check failed: a wrong kernel has no speed.
        moved, flops: bytes the operator must move in this direction and operations it must do, by its spec; None where
            the spec does not say.
        saved: provider -> bytes kept for backward beyond the inputs.
        peak: provider -> the most bytes allocated at once beyond the inputs; of forward+backward and of steps.
        beside: times that were not taken in turns with ours ("eager, tuned malloc").
        reads: nearly all bytes moved are read.
        failures: of the check, or of a peer that could not be compiled ("compile: ...").
    """

    op: str
    shape: str
    dtype: str
    direction: str
    backend: str
    seconds: dict[str, Timing] = field(default_factory=dict)
    moved: int | None = None
    flops: int | None = None
    saved: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    beside: dict[str, Timing] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    correct: bool = True
    room: str = ""
    reads: bool = False
    kernels: str = ""

    @property
    def peer(self) -> str | None:
        """The fastest of the others."""
        others = [name for name in self.seconds if name not in (OURS, COPY)]
        return min(others, key=lambda name: self.seconds[name].median, default=None)

    @property
    def ratio(self) -> tuple[float, float, float] | None:
        """The best peer's time / ours: median, p20, p80."""
        return self.seconds[OURS].ratio(self.seconds[self.peer]) if self.peer else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second."""
        return self.moved / self.seconds[OURS].median if self.moved and OURS in self.seconds else None

    @property
    def of_limit(self) -> float | None:
        """Time of a copy that moves as much / ours."""
        if COPY not in self.seconds or OURS not in self.seconds:
            return None
        return self.seconds[COPY].median / self.seconds[OURS].median

    @property
    def rate(self) -> float | None:
        """Operations a second."""
        return self.flops / self.seconds[OURS].median if self.flops and OURS in self.seconds else None

    def limited(self, limits: Limits | None) -> tuple[str, float] | None:
        """What bounds this row from below, "memory", "reading" it or "products", and the share of that bound's speed we
        reach."""
        shares = {"memory": self.of_limit} if self.of_limit else {}
        if self.reads and self.bandwidth and limits and limits.read:
            shares["reading"] = self.bandwidth / limits.read
        peak = limits.flops.get(self.dtype) if limits else None
        if self.rate and peak:
            shares["products"] = self.rate / peak
        return max(shares.items(), key=lambda one: one[1], default=None)

    def as_dict(self, limits: Limits | None = None) -> dict[str, Any]:
        timings, beside = (
            {name: {"median": t.median, "p20": t.p20, "p80": t.p80} for name, t in times.items()}
            for times in (self.seconds, self.beside)
        )
        plain = asdict(replace(self, seconds={}, beside={}))
        ratio = dict(zip(("median", "p20", "p80"), self.ratio, strict=True)) if self.ratio else None
        derived: dict[str, Any] = {"best_peer": self.peer, "ratio": ratio, "bytes_per_second": self.bandwidth}
        derived |= {"flops_per_second": self.rate, "fraction_of_copy_limit": self.of_limit}
        bound = self.limited(limits)
        derived["limit"] = {"bound": bound[0], "fraction": bound[1]} if bound else None
        return {**plain, "seconds": timings, "beside": beside, **derived}


@contextmanager
def _retained_graphs() -> Iterator[None]:
    """A compiled backward may give its buffers away and then cannot run twice; it is timed more than once."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield


def rows(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    *,
    label: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    compile_modes: tuple[str, ...] = ("default",),
    rounds: int = 20,
    seconds: float = 3.0,
    step: Callable[[str], None] = lambda direction: None,
    directions: Sequence[str] = DIRECTIONS,
) -> list[Row]:
    """These directions of one case; peers are torch eager and torch.compile in the modes given.

    Args:
        label: name of the row; default the operator's.
        step: called before each direction is timed.
    """
    with one_thread(), _retained_graphs():
        label = label or spec.name
        return _rows(spec, case, dtype, label, backend, device, compile_modes, rounds, seconds, step, directions)


def _rows(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    label: str,
    backend: str | None,
    device: str,
    compile_modes: tuple[str, ...],
    rounds: int,
    seconds: float,
    step: Callable[[str], None],
    directions: Sequence[str],
) -> list[Row]:
    inputs = case.make(dtype, device)
    explanation = explain(spec.function, **inputs, **case.options, backend=backend)
    served, kernels = explanation.backend, explanation.kernels
    name = str(dtype).removeprefix("torch.")
    found = [
        Row(label, case.label, name, direction, served, room=spec.room, reads=spec.reads, kernels=kernels)
        for direction in directions
    ]
    failures = _failures(spec, case, served, dtype, inputs, device)
    if failures:
        for row in found:
            row.correct, row.failures = False, failures
        return found
    calls, unavailable = _providers(spec, case, inputs, served, compile_modes)
    moved = spec.bytes_moved(case, dtype) if spec.bytes_moved else {}
    flops = spec.flops(case, dtype) if spec.flops else {}
    for row in found:
        step(row.direction)
        row.failures = unavailable
        row.moved = moved.get(row.direction) or sum(moved.values()) or None
        row.flops = flops.get(row.direction) or sum(flops.values()) or None
        functions = {provider: call.direction(row.direction) for provider, call in calls.items()}
        if row.moved and not row.reads:
            functions[COPY] = copy_function(row.moved, device)
        row.seconds = measure(functions, rounds, seconds=seconds, device=device)
        row.saved = {provider: call.saved for provider, call in calls.items() if provider in (OURS, "eager")}
        if row.direction == DIRECTIONS[2]:
            row.peak = {provider: peak_bytes(call.both, device) for provider, call in calls.items()}
    return found


def _failures(
    spec: OpSpec, case: Case, backend: str, dtype: torch.dtype, inputs: dict[str, Tensor], device: str
) -> list[str]:
    """What is wrong with our results; see `OpSpec.rowwise` for how large ones are judged."""
    (name, one), *others = case.inputs.items()
    if not spec.rowwise or others or math.prod(one.shape) <= _CHECKED:
        return [found.why for found in check_case(spec, case, backend, dtype, device) if not found.passed]
    part = Case(case.label, {name: replace(one, shape=(_ROWS, *one.shape[1:]))}, case.options)
    failures = [found.why for found in check_case(spec, part, backend, dtype, device) if not found.passed]
    x, function = inputs[name], spec.function

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = function(**{name: leaf}, **case.options, backend=backend)
        return y, torch.autograd.grad(y, leaf, y.detach())[0]  # a gradient that need not be drawn

    y, dx = both(x)
    for i in range(0, len(x), _ROWS):
        rows = slice(i, i + _ROWS)
        if not all(torch.equal(a[rows], b) for a, b in zip((y, dx), both(x[rows]), strict=True)):
            failures.append(f"rows {i} to {i + _ROWS} of {len(x)} are not what a call on them alone gives")
    return failures


class Call:
    """One provider's function bound to leaves of its own."""

    def __init__(
        self, function: Callable[..., Tensor], case: Case, inputs: dict[str, Tensor], dy: list[Tensor] | None = None
    ) -> None:
        self.leaves = {
            name: x.detach().clone().requires_grad_(case.inputs[name].grad and x.is_floating_point())
            for name, x in inputs.items()
        }
        self.wanted = [x for x in self.leaves.values() if x.requires_grad]
        self.function = function
        self.outputs = outputs_of(self.forward())
        self.dy = [case.make_gradient(y) for y in self.outputs] if dy is None else dy

    def forward(self) -> Any:
        return self.function(**self.leaves)

    def backward(self) -> Any:
        return torch.autograd.grad(self.outputs, self.wanted, self.dy, retain_graph=True)

    def both(self) -> Any:
        return torch.autograd.grad(outputs_of(self.forward()), self.wanted, self.dy)

    def direction(self, name: str) -> Callable[[], Any]:
        return {"forward": self.forward, "backward": self.backward, "forward+backward": self.both}[name]

    @property
    def saved(self) -> int:
        return saved_bytes(self.forward, self.leaves.values())


def _providers(
    spec: OpSpec, case: Case, inputs: dict[str, Tensor], backend: str, compile_modes: tuple[str, ...]
) -> tuple[dict[str, Call], list[str]]:
    function = spec.function  # looked up once: wrapping it costs microseconds

    def ours(**leaves: Tensor) -> Tensor:
        return function(**leaves, **case.options, backend=backend)

    def eager(**leaves: Tensor) -> Tensor:
        return spec.call_timed_peer(**leaves, **case.options)

    calls, unavailable = {OURS: Call(ours, case, inputs)}, []
    dy = calls[OURS].dy  # of the same shapes for all; drawing a large one takes longer than timing it
    calls["eager"] = Call(eager, case, inputs, dy)
    for mode in compile_modes:
        provider = "compile" if mode == "default" else mode
        torch.compiler.reset()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it does not trace
                call = Call(torch.compile(eager, mode=mode, dynamic=False), case, inputs, dy)
                call.both() if spec.differentiable else call.forward()
        except Exception as error:  # the compiler needs a C++ compiler (CPU) or triton (GPU) of its own
            unavailable.append(f"{provider}: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            calls[provider] = call
    return calls, unavailable


def tiny(spec: OpSpec, case: Case) -> Case:
    """The case's options at a shape of 2 x 4 (of more dimensions: at most 4 in each); where shapes depend on one
    another (the weights of a cell), the smallest ordinary case of the contract."""
    dependent = spec.name in ("bias_activation_dropout", "dot_interaction", "mlp", "prelu", "swish", "attention_decode")
    if spec.room in ("recurrent", "sampled_softmax") or dependent:
        ordinary = [c for c in spec.cases if all(math.prod(x.shape) for x in c.inputs.values())]
        return min(ordinary, key=lambda c: sum(math.prod(x.shape) for x in c.inputs.values()))
    shapes = {n: (2, 4) if len(x.shape) <= 2 else tuple(min(d, 4) for d in x.shape) for n, x in case.inputs.items()}
    small = {n: replace(one, shape=shapes[n], high=min(one.high, 2)) for n, one in case.inputs.items()}  # ids of 2 rows
    return Case("tiny", small, case.options)


def overhead(spec: OpSpec, case: Case, rounds: int = 20) -> dict[str, dict[str, Timing]]:
    """What a call costs when there is next to nothing to compute.

    Returns:
        "no grad" and, of what has gradients, "forward", "forward+backward" -> {"pykernels", "eager"} -> Timing.
    """
    small = tiny(spec, case)
    inputs = small.make(torch.float32)

    function = spec.function  # looked up once: wrapping it costs microseconds

    def ours(**leaves: Tensor) -> Tensor:
        return function(**leaves, **small.options)

    def eager(**leaves: Tensor) -> Tensor:
        return spec.call_timed_peer(**leaves, **small.options)

    found = {}
    with one_thread():
        calls = {OURS: Call(ours, small, inputs), "eager": Call(eager, small, inputs)}
        with torch.no_grad():
            found["no grad"] = measure({name: call.forward for name, call in calls.items()}, rounds)
        if not spec.differentiable:
            return found
        found["forward"] = measure({name: call.forward for name, call in calls.items()}, rounds)
        found["forward+backward"] = measure({name: call.both for name, call in calls.items()}, rounds)
    return found
