"""The contract of an operator, as data: inputs, argument grid, benchmark shapes, bytes and flops.

Written once in `specs/<room>.py`; the contract tests, `pykernels verify`, the benchmarks and the docs read it.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROOMS = ("activation", "attention", "recurrent", "embedding", "sampled_softmax")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Input:
    """One tensor argument.

    values: "normal" (times scale), "special" (infinities, NaN, zeros, denormals, large values, then normal),
        "outlier" (one element of each row x1000), "constant" (one value a row), "uniform" ([0, 1)), "ids" ([0, high)).
    layout: "contiguous", "transposed" (last two dimensions), "expanded" (stride 0 in the first dimension), "rows" (row
        stride larger than the row), "offset" (starts one element into its storage), "every_other" (inner stride 2).
    """

    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    scale: float = 1.0
    high: int = 0
    grad: bool = True
    dtype: torch.dtype | None = None

    def make(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Tensor:
        """The tensor, drawn in float64 on the CPU and rounded, so that every dtype sees the same numbers."""
        if self.values == "ids":
            return torch.randint(0, self.high, self.shape, generator=generator).to(device, self.dtype or torch.int64)
        base = self.shape if self.layout != "expanded" or not self.shape else (1, *self.shape[1:])
        values = self._values(base, generator).to(self.dtype or dtype).to(device)
        return self._laid_out(values)

    def _values(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.values == "uniform":
            return torch.rand(shape, generator=generator, dtype=torch.float64)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale
        if self.values == "special" and x.numel():
            special = torch.tensor(SPECIAL, dtype=torch.float64)[: x.numel()]
            x.view(-1)[: special.numel()] = special
        elif self.values == "outlier" and x.numel():
            x[..., 0] *= 1000.0
        elif self.values == "constant" and x.numel():
            x = x[..., :1].expand(shape).clone()
        return x

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "expanded":
            return x.expand(self.shape)
        if self.layout == "transposed" and x.dim() > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if self.layout == "rows" and x.dim():
            wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
            wide[..., : x.shape[-1]] = x
            return wide[..., : x.shape[-1]]
        if self.layout == "every_other" and x.dim():
            wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
            wide[..., ::2] = x
            return wide[..., ::2]
        if self.layout == "offset":
            flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
            flat[1:] = x.reshape(-1)
            return flat[1:].view(x.shape)
        return x


SPECIAL = (
    float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, -1e-40, 30.0, -30.0, 88.0, -88.0, 104.0, -104.0,
    1e4, -1e4, 5.5, -5.5, 1e-3, -1e-3, 1.0, -1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call: tensor arguments by name, the other arguments, and the layout of the incoming gradient.

    rounding: of tensors (as "dx") whose error may be more than one eps beyond torch's: how many; `why` says why.
    """

    label: str
    inputs: Mapping[str, Input]
    options: Mapping[str, Any] = field(default_factory=dict)
    dy_layout: str = "contiguous"
    rounding: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        if bool(self.rounding) != bool(self.why):
            raise ValueError(f"case {self.label!r}: `rounding` and its `why` go together")

    def make(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The tensors of this case: the same numbers on every call, device and backend."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.label.encode()))
        return {name: spec.make(generator, dtype, device) for name, spec in self.inputs.items()}

    def make_gradient(self, like: Tensor) -> Tensor:
        """An incoming gradient for an output like this one, in the case's layout."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.label.encode()) + 1)
        return Input(tuple(like.shape), layout=self.dy_layout).make(generator, like.dtype, str(like.device))


@dataclass(frozen=True)
class OpSpec:
    """Everything that is promised of one public function.

    Attributes:
        name: of the function in `pykernels.functional` and `pykernels.reference`.
        room: its room.
        cases: what the contract is tested on.
        bench: the shapes that are timed.
        gpu_bench: those that are timed on a GPU, which the others may not fill; none: the same.
        peer: torch's own operator, taking the same arguments (None: torch has none; the reference stands in).
        kernels: backends beside the reference that serve it.
        bytes_moved, flops: of one call, (case, dtype) -> {"forward": n, "backward": n}; memory traffic without caches.
        saved: bytes kept for backward, (case, dtype) -> n.
        long_sums: inputs whose gradients sum over a long axis.
        extra: arguments that both the function and the reference take but torch's operator does not (a seed).
        differentiable: False for in-place updates and inference functions: no test takes gradients of them.
        timed_peer: what is timed in place of `peer`, where torch draws random numbers of its own: the same work, with
            results that cannot be compared. It takes no `seed`.
        compiled: the modes of torch.compile that a benchmark row is compared with unless the user names some,
            (case, dtype) -> modes; compiling takes longer than all the rest. None for the row: it is not timed in this
            dtype (but those of `gpu_bench` are). None here: "default" for every row.
        rowwise: rows of the (only) input do not meet, so a benchmark row of more than 4 Mi elements is checked against
            the oracle on its first 256 rows, and all of it, bit by bit, against the same call on 256 rows at a time.
        reads: nearly all bytes moved are read: a benchmark row's limit is the speed of reading, not of copying.
        wrap: for functions that take lists or nested states of tensors: makes one of the case's arguments from the
            function (and from the reference), giving one tensor or a flat tuple. `peer` takes the case's as it is.
    """

    name: str
    room: str
    cases: tuple[Case, ...]
    bench: tuple[Case, ...] = ()
    peer: Callable[..., Any] | None = None
    kernels: tuple[str, ...] = ()
    bytes_moved: Callable[[Case, torch.dtype], dict[str, int]] | None = None
    flops: Callable[[Case, torch.dtype], dict[str, int]] | None = None
    saved: Callable[[Case, torch.dtype], int] | None = None
    long_sums: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()
    differentiable: bool = True
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    timed_peer: Callable[..., Any] | None = None
    compiled: Callable[[Case, torch.dtype], tuple[str, ...] | None] | None = None
    rowwise: bool = False
    reads: bool = False
    gpu_bench: tuple[Case, ...] = ()

    def timed(self, device: str) -> tuple[Case, ...]:
        """The benchmark shapes of a device."""
        return self.gpu_bench if device.startswith("cuda") and self.gpu_bench else self.bench

    def compile_modes(self, case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
        """The modes of torch.compile that a row is compared with by default; None: the row is not timed."""
        if self.compiled is None:
            return ("default",)
        modes = self.compiled(case, dtype)
        return () if modes is None and case in self.gpu_bench else modes

    @property
    def function(self) -> Callable[..., Any]:
        from .. import functional

        return self._wrapped(getattr(functional, self.name))

    @property
    def reference(self) -> Callable[..., Any]:
        from .. import reference

        return self._wrapped(getattr(reference, self.name))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function if self.wrap is None else self.wrap(function)

    def call_peer(self, **arguments: Any) -> Any:
        """torch's own operator, or the reference where torch has none."""
        if self.peer is None:
            return self.reference(**arguments)
        return self.peer(**{k: v for k, v in arguments.items() if k not in self.extra})

    def call_timed_peer(self, **arguments: Any) -> Any:
        """What is timed beside the function."""
        if self.timed_peer is None:
            return self.call_peer(**arguments)
        return self.timed_peer(**{k: v for k, v in arguments.items() if k != "seed"})


def load(room: str | None = None) -> list[OpSpec]:
    """The specs of one room, or of all that have some."""
    found: list[OpSpec] = []
    for name in (room,) if room else ROOMS:
        try:
            module = importlib.import_module(f".specs.{name}", __package__)
        except ModuleNotFoundError as error:
            if error.name != f"{__package__}.specs.{name}":
                raise
            continue
        found.extend(module.SPECS)
    return found
