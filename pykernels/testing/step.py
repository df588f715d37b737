"""Whole training steps, timed side by side: for what an operator alone does not show, as an optimizer's part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .bench import OURS, Row
from .memory import peak_bytes
from .spec import ROOMS
from .timing import copy_function, measure, one_thread


@dataclass(frozen=True)
class Provider:
    """One way to take the step: `run()` takes it, `results()` gives what it left (tables, gradients)."""

    run: Callable[[], Any]
    results: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Step:
    """A step by all who offer it.

    Attributes:
        make: {"pykernels", "eager" (stock torch), ...: Provider}, all from the same start. A peer that is not installed
            raises ModuleNotFoundError: the step is then left out, with the reason.
        moved, flops: bytes that must be moved and operations done, where that can be said.
        room: filled in by `load_steps`.
    """

    name: str
    shape: str
    make: Callable[[], dict[str, Provider]]
    moved: Callable[[], int] | None = None
    flops: Callable[[], int] | None = None
    room: str = ""


def load_steps(room: str | None = None) -> list[Step]:
    """The steps of one room, or of all that have some."""
    found = []
    for name in (room,) if room else ROOMS:
        module = importlib.import_module(f".specs.{name}", __package__)
        found += [replace(step, room=name) for step in getattr(module, "STEPS", ())]
    return found


def row(step: Step, rounds: int = 20, seconds: float = 3.0) -> Row:
    """One row of a benchmark, direction "step", float32. The first steps of all must leave the same values."""
    found = Row(step.name, step.shape, "float32", "step", "cpu", room=step.room)
    with one_thread():
        try:
            providers = step.make()
        except ModuleNotFoundError as error:
            found.failures = [f"{error.name} is not installed"]
            return found
        for provider in providers.values():
            provider.run()
        expected = providers[OURS].results()
        for name, provider in providers.items():
            for ours, theirs in zip(expected, provider.results(), strict=True):
                if (ours - theirs).norm() > 1e-5 * theirs.norm():
                    found.correct = False
                    found.failures.append(f"{name} leaves other values than pykernels")
        if not found.correct:
            return found
        functions = {name: provider.run for name, provider in providers.items()}
        if step.moved:
            found.moved = step.moved()
            functions["copy"] = copy_function(found.moved)
        found.flops = step.flops() if step.flops else None
        found.seconds = measure(functions, rounds, seconds=seconds)
        found.peak = {name: peak_bytes(provider.run) for name, provider in providers.items()}
    return found
