"""A training that can stop after any step and go on later, to the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pykernels

from ...testing.training import Batch, Task
from .._output import BadInput

FORMAT = 1
CHUNK = 16
"""Steps whose batches are drawn at once, from a seed of their own: the place in the data is the number of the step."""


def stream(task: Task, seed: int, start: int = 0) -> Iterator[Batch]:
    """The batches of the steps from `start` on, without end."""
    chunk = start // CHUNK
    while True:
        batches = task.batches(CHUNK, zlib.crc32(f"{seed} {chunk}".encode()))
        yield from batches[max(start - chunk * CHUNK, 0) :]
        chunk += 1


def digest(content: str) -> str:
    """Tells texts apart."""
    return hashlib.sha256(content.encode()).hexdigest()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed: a step is finished first. Pressed again, it raises KeyboardInterrupt."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class Training:
    """A patched model, its optimizer and the losses so far.

    Attributes:
        facts: what a checkpoint must have been made with to go on from: option or "text" -> value.
    """

    def __init__(self, task: Task, seed: int, device: str, facts: dict[str, str | int]) -> None:
        torch.manual_seed(seed)
        self.task, self.seed, self.device, self.facts = task, seed, device, facts
        self.model = task.build(task.functions("pykernels")).to(device)
        pykernels.patch(self.model)
        self.optimizer = task.optimizer(self.model)
        self.losses: list[float] = []
        self.seconds = 0.0  # of this process's steps

    def steps(self, until: int | None, seconds: float | None = None) -> Iterator[float]:
        """Trains, and yields each step's loss: until so many steps are done in all, or so many seconds have passed."""
        start = time.perf_counter()
        batches = stream(self.task, self.seed, len(self.losses))
        while until is None or len(self.losses) < until:
            batch = tuple(x.to(self.device) for x in next(batches))
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(*batch).mean()
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            self.seconds = time.perf_counter() - start
            yield self.losses[-1]
            if seconds is not None and self.seconds >= seconds:
                return

    def save(self, path: Path) -> None:
        """Writes all that going on needs. The file appears when it is whole; an interruption leaves the old one."""
        state = {
            "format": FORMAT,
            "facts": self.facts,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None,
        }
        unfinished = Path(f"{path}.part")
        try:
            with open(unfinished, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; the file is read as data only (`weights_only`).

        Raises:
            BadInput: it cannot be read, is something else, or was made with other facts.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise BadInput(f"{path}: not a checkpoint, or a broken one") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT or "facts" not in state:
            raise BadInput(f"{path}: not a checkpoint of pykernels train of this version")
        for name, value in self.facts.items():
            if (found := state["facts"].get(name)) != value:
                what = "of another text" if name == "text" else f"of --{name} {found}, not {value}"
                raise BadInput(f"{path}: a checkpoint {what if name != 'model' else f'of {found}, not of {value}'}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"].tolist()
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.startswith("cuda"):
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def samples(self) -> list[tuple[str, str]]:
        """What the model makes of pieces of the text."""
        assert self.task.sample is not None
        return self.task.sample(self.model, self.seed)
