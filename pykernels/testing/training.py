"""Trains one task twice, stock PyTorch and pykernels in turns, and measures equality, speed and memory.

Ours is the same model after `pykernels.patch`. Equal start: its parameters are copied from the stock model. Equal work:
the same batches in the same order. Fair timing: one thread, chunks of steps in the order A B B A, this thread's CPU
time, medians over the chunks.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

import pykernels

from .compare import Comparison, compare
from .memory import peak_bytes
from .timing import Timing, one_thread

Kind = Literal["torch", "pykernels"]
Functions = Callable[[Kind], Any]
Batch = tuple[Tensor, ...]
Call = tuple[str, tuple[Any, ...], dict[str, Any]]

CURVE_BOUND, CURVE_STEPS = 1e-3, 200
"""Largest difference of the two losses at any of the first CURVE_STEPS steps, relative to the loss (where that is below
1: absolute). Equal trainings stay some 1e-7 apart, but rounding alone may separate them: with three times the learning
rate two correct LSTMs were seen 3e-4 apart after 150 steps and 1e-2 after 1000. So the bound leaves room, and later
steps are shown and not judged. A wrong gradient is caught at step 1 already, where the bound is
the rounding of float32."""

CHUNK = 5


def _no_calls(model: nn.Module) -> list[Call]:
    return []


def _no_functions(kind: Kind) -> None:
    return None


@dataclass(frozen=True)
class Task:
    """One model to train, as it is and patched, from the same start on the same batches.

    Attributes:
        build: functions -> model, whose call gives the loss of each target; draws its parameters from torch's global
            generator.
        batches: number of steps -> that many batches; those of `pykernels.testing.models` take a seed too.
        optimizer: model -> optimizer.
        tokens: targets predicted in one step.
        functions: kind -> what the model calls that torch has no name for: written in stock PyTorch, or pykernels'.
        calls: model -> (function name in `pykernels.functional`, arguments): the operators of the model that
            pykernels serves, with arguments as the training has them.
        evaluate: trained model -> a figure of merit, where it is not the training loss.
        sample: trained model, seed -> pairs (what it was given, what it made of it).
    """

    name: str
    title: str
    shape: str
    tokens: int
    build: Callable[[Any], nn.Module]
    batches: Callable[..., list[Batch]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    functions: Functions = _no_functions
    calls: Callable[[Any], list[Call]] = _no_calls
    evaluate: Callable[[Any], float] | None = None
    sample: Callable[[Any, int], list[tuple[str, str]]] | None = None


@dataclass
class Side:
    """One of the two trainings."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # a step's, one entry a chunk
    peak: int = 0
    evaluation: float | None = None


@dataclass
class Outcome:
    """What came out of training a task twice.

    Attributes:
        first: the losses of all targets at step 1 against the float64 oracle.
        gradient: the parameter gradients at step 1 against it: the parameter that is worst off.
        served: operator -> the backend that serves it, and why the others do not.
    """

    task: Task
    stock: Side
    ours: Side
    first: Comparison
    gradient: Comparison
    served: list[tuple[str, str, dict[str, str]]]

    @property
    def differences(self) -> list[float]:
        """Difference of the two losses at each step, relative to stock's (absolute where that is below 1).

        Infinite where either is not finite.
        """
        pairs = zip(self.stock.losses, self.ours.losses, strict=True)
        finite = math.isfinite
        return [abs(a - b) / max(abs(a), 1.0) if finite(a) and finite(b) else math.inf for a, b in pairs]

    @property
    def checks(self) -> dict[str, bool]:
        """What is judged, and the verdict."""
        return {
            "loss at step 1": self.first.passed,
            "gradients at step 1": self.gradient.passed,
            "loss along the curve": max(self.differences[:CURVE_STEPS]) <= CURVE_BOUND,
        }

    @property
    def equal(self) -> bool:
        return all(self.checks.values())

    def rate(self, side: Side) -> float:
        """Tokens per second of CPU time, median over the chunks."""
        return self.task.tokens / median(_steady(side.seconds))

    @property
    def speed_ratio(self) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile over the rounds of (stock's time / ours)."""
        return Timing.of(_steady(self.ours.seconds)).ratio(Timing.of(_steady(self.stock.seconds)))

    @property
    def memory_ratio(self) -> float:
        """Stock's peak / ours."""
        return self.stock.peak / max(self.ours.peak, 1)


def _steady(seconds: list[float]) -> list[float]:
    """Without the first round, which warms up caches and the allocator."""
    return seconds[1:] or seconds


def train_both(
    task: Task,
    steps: int,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
    adopt: Callable[[nn.Module], Any] = pykernels.patch,
) -> Outcome:
    """Trains `task` with stock PyTorch and patched for `steps` and compares.

    Args:
        progress: called with the number of training steps just done, `2 * steps` in all.
        adopt: what is done to our model in place of patching it.
    """
    batches = [tuple(t.to(device) for t in batch) for batch in task.batches(steps)]
    models: dict[Kind, nn.Module] = {}
    kinds: tuple[Kind, Kind] = ("torch", "pykernels")
    for kind in kinds:
        torch.manual_seed(seed)
        models[kind] = task.build(task.functions(kind)).to(device)
    adopt(models["pykernels"])
    models["pykernels"].load_state_dict(models["torch"].state_dict(), strict=True)

    with one_thread():
        first, gradient = _first_step(models["torch"], models["pykernels"], batches[0])
        sides = {kind: Side() for kind in models}
        optimizers = {kind: task.optimizer(model) for kind, model in models.items()}
        for start in range(0, steps, CHUNK):
            chunk = batches[start : start + CHUNK]
            order = list(models) if start % (2 * CHUNK) == 0 else list(reversed(models))
            for kind in order:
                _train(models[kind], optimizers[kind], chunk, sides[kind], device)
                progress(len(chunk))
        for kind, model in models.items():
            model.zero_grad(set_to_none=True)
            sides[kind].peak = peak_bytes(functools.partial(_forward_backward, model, batches[0]), device)
            sides[kind].evaluation = task.evaluate(model) if task.evaluate else None
    served = _served(task, models["pykernels"], device)
    return Outcome(task, sides["torch"], sides["pykernels"], first, gradient, served)


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient, as a dense copy, of every parameter that has one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.clone()


def _forward_backward(model: nn.Module, batch: Batch) -> None:
    model(*batch).mean().backward()


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, chunk: list[Batch], side: Side, device: str) -> None:
    start = _now(device)
    losses = []
    for batch in chunk:
        optimizer.zero_grad(set_to_none=True)
        loss = model(*batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    side.seconds.append((_now(device) - start) / len(chunk))
    side.losses += [float(loss) for loss in losses]


def _now(device: str) -> float:
    """This thread's CPU time, which other processes cannot stretch; with a GPU, the wall once it is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def _first_step(stock: nn.Module, ours: nn.Module, batch: Batch) -> tuple[Comparison, Comparison]:
    """Losses and gradients of the first step against the stock model in float64."""
    oracle = copy.deepcopy(stock).double()
    losses, grads = [], []
    for model in (ours, oracle, stock):
        loss = model(*batch)
        loss.mean().backward()
        losses.append(loss.detach())
        grads.append(dict(_gradients(model)))
        model.zero_grad(set_to_none=True)
    return compare("loss", *losses), _compare_gradients(*grads)


def _compare_gradients(mine: dict[str, Tensor], truth: dict[str, Tensor], peers: dict[str, Tensor]) -> Comparison:
    """All gradients as one tensor, each in units of its largest element: a bias of eight elements, which torch may by
    luck round well, is too little to say how much rounding a whole model makes. Names the parameter that is worst off.
    """
    scaled: list[list[Tensor]] = [[], [], []]
    worst, name = -1.0, ""
    for key, peer in peers.items():
        unit = truth[key].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        parts = [g.double() / unit for g in (mine.get(key, torch.zeros_like(peer)), truth[key], peer)]
        for one, part in zip(scaled, parts, strict=True):
            one.append(part.flatten())
        error = float((parts[0] - parts[1]).abs().max())
        if error > worst or error != error:
            worst, name = error, key
    whole = [torch.cat(parts) for parts in scaled]
    dtype = next(iter(peers.values())).dtype
    return compare(name, whole[0].to(dtype), whole[1], whole[2].to(dtype), long_sum=True)


def _served(task: Task, model: nn.Module, device: str) -> list[tuple[str, str, dict[str, str]]]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(move(item) for item in value) if isinstance(value, (tuple, list)) else value

    found = []
    for name, args, kwargs in task.calls(model):
        explanation = pykernels.explain(getattr(pykernels.functional, name), *move(args), **kwargs)
        found.append((name, explanation.backend, dict(explanation.refused)))
    return found
