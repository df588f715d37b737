"""What this machine can do at most, measured in the same run as the rows that are held against it."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .. import explain
from ..ops.activation.unary import relu
from .timing import copy_function, measure, one_thread

_PAGE = 4096
_MEMORY, _CACHED = 1 << 29, 6 << 20  # bytes: past the share of a cache that one tenant gets; past L2, within L3
_PRODUCTS = {"cpu": (512, 1024, 1536), "cuda": (8192,)}


@dataclass(frozen=True)
class Limits:
    """Ceilings of one thread (CPU) or one GPU; None where it was not measured or does not apply.

    Attributes:
        read, copy: bytes a second from memory: a sum; a copy, read and written bytes together.
        triad: bytes a second of a + s * b with three arrays of 2 MiB (L3).
        flops: dtype -> operations a second of torch's best square matrix product, hot.
        first_touch: bytes a second at which fresh pages are written for the first time, over what writing them costs.
        dispatch: what -> seconds a call on one element: torch's operator, ours, a Python autograd.Function around
            torch's, the public function; "recorded" where autograd records a gradient.
    """

    device: str
    read: float | None = None
    copy: float | None = None
    triad: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    first_touch: float | None = None
    dispatch: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        rates = (("memory read", self.read), ("copy", self.copy), ("triad in L3", self.triad))
        found = [
            "one thread: " * (self.device == "cpu")
            + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates if rate)
        ]
        if self.first_touch:
            found[0] += f", first touch of fresh pages {self.first_touch / 1e9:.1f} GB/s"
            found[0] += f" ({_PAGE / self.first_touch * 1e6:.2f} us for 4 KiB)"
        products = (f"{name} {rate / 1e9:,.0f}" for name, rate in self.flops.items())
        found.append(f"matrix product, GFLOP/s: {', '.join(products)}")
        if self.dispatch:
            calls = (f"{name} {seconds * 1e6:.1f}" for name, seconds in self.dispatch.items())
            found.append(f"a call on one element, microseconds: {', '.join(calls)}")
        return found


def probe(device: str = "cpu", seconds: float = 0.3) -> Limits:
    """Measures the limits of one thread of this CPU, or of this GPU.

    Args:
        seconds: about, for each of some ten measurements.
    """
    with one_thread() if device == "cpu" else contextlib.nullcontext():
        products = {str(d).removeprefix("torch."): _product(d, device, seconds) for d in _DTYPES}
        if device != "cpu":
            copy = _rate(_MEMORY, copy_function(_MEMORY, device), device, seconds)
            return Limits(device, copy=copy, flops=products)
        source = torch.ones(_MEMORY // 4)
        a, b, c = (torch.ones(_CACHED // 12) for _ in range(3))
        return Limits(
            device,
            read=_rate(_MEMORY, source.sum, device, seconds),
            copy=_rate(_MEMORY, copy_function(_MEMORY), device, seconds),
            triad=_rate(_CACHED, lambda: torch.add(a, b, alpha=3.0, out=c), device, seconds),
            flops=products,
            first_touch=_first_touch(),
            dispatch=_dispatch(seconds),
        )


_DTYPES = (torch.float32, torch.bfloat16)


def _rate(amount: float, function: Callable[[], Any], device: str, seconds: float) -> float:
    """Of the best fifth of the rounds: a ceiling is not what a disturbed round reaches."""
    return amount / measure({"": function}, rounds=12, warmup=2, seconds=seconds, device=device)[""].p20


def _product(dtype: torch.dtype, device: str, seconds: float) -> float:
    best = 0.0
    for n in _PRODUCTS[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        function = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        best = max(best, _rate(2.0 * n**3, function, device, seconds / len(_PRODUCTS[device])))
    return best


def _first_touch(nbytes: int = 64 << 20, rounds: int = 5) -> float:
    """Pages come from the system, not from an allocator that may have kept them."""
    extra = []
    for _ in range(rounds):
        with mmap.mmap(-1, nbytes) as pages:
            x = torch.frombuffer(pages, dtype=torch.int8)
            times = []
            for _ in range(2):
                start = time.thread_time()
                x.fill_(1)
                times.append(time.thread_time() - start)
            del x  # the mapping cannot be closed before its view
        extra.append(max(times[0] - times[1], 1e-9))
    return nbytes / median(extra)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def _dispatch(seconds: float) -> dict[str, float]:
    x, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    functions: dict[str, Callable[[], Any]] = {
        "torch operator": lambda: torch.relu(x),
        "torch operator, recorded": lambda: torch.relu(leaf),
        "torch operator in a Python autograd.Function": lambda: _Identity.apply(leaf),
    }
    if explain(relu, x).backend == "cpu":
        overload = torch.ops.pykernels.unary_forward.cpu
        functions["our C++ operator"] = lambda: overload(x, "relu", 0.0)
        functions["pykernels.functional"] = lambda: relu(x)
        functions["pykernels.functional, recorded"] = lambda: relu(leaf)
    return {name: t.median for name, t in measure(functions, rounds=12, seconds=4 * seconds).items()}
