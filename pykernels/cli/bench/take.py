"""Takes the measurements of a run and makes them one record: plain dictionaries, as the JSON has them."""

from __future__ import annotations

import contextlib
import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ... import BackendError
from ...testing import bench, machine, words
from ...testing.limits import Limits, probe
from ...testing.spec import Case, OpSpec, load
from ...testing.step import Step
from ...testing.step import row as step_row
from ...testing.targets import TARGETS
from ...testing.text import default_text
from ...testing.timing import Timing
from ...testing.tuned_malloc import eager_times
from .._output import BadInput, progress
from ..verify import label

_MAPPED = 2**25  # bytes: the most that malloc can be made to keep by itself


@dataclass(frozen=True)
class Job:
    """One case of a spec in one dtype; `modes` of torch.compile are its peers."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    modes: tuple[str, ...] = ()
    directions: Sequence[str] = bench.DIRECTIONS

    @property
    def name(self) -> str:
        return f"{label(self.spec)} {self.case.label}"


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    jobs: Sequence[Job]
    steps: Sequence[Step] = ()
    calls: Sequence[OpSpec] = ()
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Effort:
    """`rounds` at most and `seconds` about, a measurement; `probe` about, for each limit of the machine."""

    rounds: int
    seconds: float
    probe: float = 0.3


def everything(
    specs: Sequence[OpSpec],
    dtypes: Sequence[torch.dtype],
    steps: Sequence[Step],
    modes: tuple[str, ...] | None,
    device: str = "cpu",
) -> Plan:
    """Every benchmark case of the device. `modes` of torch.compile in place of those that the specs name."""
    jobs = []
    for dtype in dtypes:
        for spec in specs:
            for case in spec.timed(device):
                own = spec.compile_modes(case, dtype)
                if own is not None:
                    directions = bench.DIRECTIONS if spec.differentiable else bench.DIRECTIONS[:1]
                    jobs.append(Job(spec, case, dtype, own if modes is None else modes, directions))
    first = {label(spec): spec for spec in reversed(specs)}  # of a name: the projected LSTM's calls are the LSTM's
    return Plan(jobs, steps, [spec for spec in specs if first[label(spec)] is spec])


def quick(specs: Sequence[OpSpec], steps: Sequence[Step], room: str | None) -> Plan:
    """The rows that a target names, and no others; torch.compile in its default mode where the specs ask for it."""
    wanted: dict[tuple[str, str, str], set[str]] = {}
    for target in TARGETS:
        wanted.setdefault(target.key[:3], set()).add(target.direction)
    jobs = []
    for spec in specs:
        for case in spec.bench:
            for dtype in (torch.float32, torch.bfloat16):
                asked = wanted.get((label(spec), case.label, str(dtype).removeprefix("torch.")), set())
                directions = [name for name in bench.DIRECTIONS if name in asked]
                if directions:
                    modes = tuple({"default"} & set(spec.compile_modes(case, dtype) or ()))
                    jobs.append(Job(spec, case, dtype, modes, directions))
    called = {target.op for target in TARGETS if target.of_call}
    variants = [t.op for t in TARGETS if t.direction == "epoch"] if room in (None, "sampled_softmax") else []
    return Plan(
        jobs,
        [step for step in steps if (step.name, step.shape, "float32") in wanted],
        [spec for spec in specs if label(spec) in called],
        variants,
    )


def record(plan: Plan, effort: Effort, device: str, backend: str | None) -> tuple[dict[str, Any], list[bench.Row]]:
    """Runs the plan; the rows with their samples beside the record."""
    limits = probe(device, effort.probe)
    rows = _rows(plan.jobs, effort, device, backend)
    calls: dict[str, Any] = {}
    found: dict[str, Any] = {}
    if device == "cpu":
        _tuned(rows, plan.jobs, effort)
        rows += _steps(plan.steps, effort)
        calls = _calls(plan.calls, effort)
        if plan.words:
            found["word2vec"] = _words(plan.words)
    figures = {"rows": [row.as_dict(limits) for row in rows], "call_overhead": calls, **found}
    return {**figures, **_facts(limits, device)}, rows


def _facts(limits: Limits, device: str) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {"device": device, "machine": machine.describe().as_dict(), "datetime": now}
    return {"copy_bytes_per_second": limits.copy, "limits": limits.as_dict(), **about}


def _plain(timing: Timing) -> dict[str, Any]:
    return {name: value for name, value in asdict(timing).items() if name != "samples"}


def _rows(jobs: Sequence[Job], effort: Effort, device: str, backend: str | None) -> list[bench.Row]:
    found = []
    with progress(sum(len(job.directions) for job in jobs)) as advance:
        for job in jobs:
            advance(0, f"{job.name}: checking")
            try:
                found += bench.rows(
                    job.spec,
                    job.case,
                    job.dtype,
                    label=label(job.spec),
                    backend=backend,
                    device=device,
                    compile_modes=job.modes,
                    rounds=effort.rounds,
                    seconds=effort.seconds,
                    step=lambda direction, job=job: advance(0, f"{job.name}: {direction}"),  # type: ignore[misc]
                    directions=job.directions,
                )
            except BackendError as error:
                raise BadInput(str(error)) from error
            advance(len(job.directions))
    return found


def _tuned(rows: list[bench.Row], jobs: Sequence[Job], effort: Effort) -> None:
    """Puts torch eager with a tuned malloc beside the rows whose tensors malloc maps anew for every call."""
    large, places, start = [], [], 0
    for job in jobs:
        nbytes = max(math.prod(x.shape) for x in job.case.inputs.values()) * job.dtype.itemsize
        if job.spec.rowwise and nbytes >= _MAPPED:
            known = load(job.spec.room)
            place = known.index(job.spec), job.spec.bench.index(job.case)
            large.append((job.spec.room, *place, str(job.dtype).removeprefix("torch.")))
            places.append(rows[start : start + len(job.directions)])
        start += len(job.directions)
    for beside, times in zip(places, eager_times(large, effort.rounds, effort.seconds), strict=True):
        for row in beside:
            row.beside = {"eager, tuned malloc": times[row.direction]}


def _steps(steps: Sequence[Step], effort: Effort) -> list[bench.Row]:
    found = []
    with progress(len(steps)) as advance:
        for step in steps:
            advance(0, f"{step.name} {step.shape}: step")
            found.append(step_row(step, effort.rounds, effort.seconds))
            advance()
    return found


def _calls(specs: Sequence[OpSpec], effort: Effort) -> dict[str, Any]:
    found = {}
    with progress(len(specs)) as advance:
        for spec in specs:
            advance(0, f"{label(spec)}: cost of a call")
            kinds = bench.overhead(spec, spec.bench[0], effort.rounds)
            found[label(spec)] = {kind: {p: _plain(t) for p, t in by.items()} for kind, by in kinds.items()}
            advance()
    return found


def _words(variants: Sequence[str]) -> dict[str, Any]:
    """Word vectors from the prose that Python ships; {"failures": why} without gensim."""
    parts = re.split(r"[.!?]\s|\n\s*\n", default_text().content.lower())
    sentences = [found for part in parts if len(found := re.findall(r"[a-z]+(?:'[a-z]+)?", part)) > 3]
    with progress(len(variants)) as advance:
        try:
            two = torch.get_num_threads() > 1
            return words.measure(sentences, 3, two, variants, step=lambda name: advance(1, f"word2vec, {name}"))
        except ModuleNotFoundError as error:
            return {"rows": [], "failures": [f"word2vec: {error.name} is not installed"]}


def commit() -> str | None:
    """Of the checkout that this package lies in, read without git; None elsewhere."""
    git = Path(__file__).resolve().parents[3] / ".git"
    with contextlib.suppress(OSError):
        head = (git / "HEAD").read_text().strip()
        return head if not head.startswith("ref: ") else (git / head[5:]).read_text().strip()
    return None
