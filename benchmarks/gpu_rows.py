"""The rows of `make gpu`: each is one line of JSON on standard output as soon as it is measured.

benchmarks/gpu.py runs this as a process of its own, because a kernel may destroy the CUDA context or hang: the caller
then starts another one behind the job that did (`--first`). Jobs are in an order in which any prefix is a sensible
record: bfloat16 before float32, the first shape of every operator before the second of any, backends side by side,
torch.compile last. Each job begins with a line {"job": its number, ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pykernels import sm90_kernels
from pykernels.testing import bench
from pykernels.testing.limits import probe
from pykernels.testing.spec import Case, OpSpec, load

CLUSTER_HIDDEN = 512  # beyond it the weights do not fit a cluster's shared memory
_SECONDS = 0.15  # about, a measurement


@dataclass(frozen=True)
class Job:
    """One benchmark case on one backend; way: "sm90", kernels that the registry does not choose by itself."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str
    way: str = ""
    modes: tuple[str, ...] = ()  # of torch.compile

    @property
    def served_by(self) -> str:
        return f"{self.backend}, {self.way}" if self.way else self.backend

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.name} {self.case.label} {dtype} {self.served_by}{', compile' if self.modes else ''}"


def _ways(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, hopper: bool) -> list[str]:
    found = [""]
    if hopper and backend != "triton" and dtype == torch.bfloat16:
        if spec.name in ("scaled_dot_product_attention", "attention"):
            found.append("sm90")
        if spec.name in ("lstm", "gru") and case.inputs["h0"].shape[-1] <= CLUSTER_HIDDEN and not case.options:
            found.append("sm90")
    return found


def jobs(device: str, backends: tuple[str, ...], hopper: bool, small: bool) -> list[Job]:
    """All of them, in order. small: an operator of each room and the ways there are, of a size for the emulator."""
    specs = [spec for spec in load() if spec.bench]
    if small:
        first = {spec.room: spec for spec in reversed(specs)}.values()
        lstm = next(spec for spec in specs if spec.name == "lstm")
        specs = [*first, lstm]
    plain: list[tuple[int, Job]] = []
    compiled: list[tuple[int, Job]] = []
    for dtype in (torch.bfloat16,) if small else (torch.bfloat16, torch.float32):
        late = 100 * (dtype == torch.float32)
        for spec in specs:
            for turn, case in enumerate([smallest(spec)] if small else spec.timed(device)):
                modes = () if small else spec.compile_modes(case, dtype)
                if modes is None:  # not timed in this dtype
                    continue
                for backend in (name for name in backends if name in spec.kernels):
                    ways = _ways(spec, case, dtype, backend, hopper)
                    plain += [(late + turn, Job(spec, case, dtype, backend, way)) for way in ways]
                    if modes and backend != "triton":
                        compiled.append((late + turn, Job(spec, case, dtype, backend, modes=modes)))
    ordered = sorted(plain, key=lambda one: one[0]) + sorted(compiled, key=lambda one: one[0])
    return [job for _, job in ordered]


def smallest(spec: OpSpec) -> Case:
    """A case that the emulator runs in no time and that every way can serve."""
    case = spec.bench[0]
    if spec.name == "scaled_dot_product_attention":
        shapes = dict.fromkeys(case.inputs, (1, 1, 64, 64))
    elif spec.name in ("lstm", "gru") and not case.options:  # clusters take hidden sizes that are multiples of 8
        hidden = case.inputs["h0"].shape[-1]
        fit = lambda d: d // hidden * 16 if d % hidden == 0 else min(d, 3)
        shapes = {name: tuple(map(fit, one.shape)) for name, one in case.inputs.items()}
    else:
        return bench.tiny(spec, case)
    inputs = {name: replace(one, shape=shapes[name]) for name, one in case.inputs.items()}
    return replace(case, label="small", inputs=inputs)


def measure(job: Job, device: str) -> list[dict[str, Any]]:
    directions = bench.DIRECTIONS if job.spec.differentiable else bench.DIRECTIONS[:1]
    with sm90_kernels("always" if job.way else "never"):
        rows = bench.rows(
            job.spec,
            job.case,
            job.dtype,
            backend=job.backend,
            device=device,
            compile_modes=job.modes,
            seconds=_SECONDS,
            directions=directions,
        )
    if job.way and not rows[0].kernels.startswith("kernels for sm_90a"):
        raise RuntimeError(f"was served by {rows[0].kernels}")
    return [row.as_dict() | {"backend": job.served_by} for row in rows]


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="No job begins after this many.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first job.")
    parser.add_argument("--small", action="store_true", help="The emulator in the GPU's place, at small shapes.")
    arguments = parser.parse_args()
    begun = time.monotonic()
    device, backends, hopper = "cpu", ("emulator",), True
    if not arguments.small:
        device, backends = "cuda", ("triton", "cuda")
        hopper = torch.cuda.get_device_capability() == (9, 0)
        if arguments.first == 0:
            limits = probe(device)
            _say(limits=limits.as_dict(), copy_bytes_per_second=limits.copy)
    todo = jobs(device, backends, hopper, arguments.small)
    for number, job in list(enumerate(todo))[arguments.first :]:
        if time.monotonic() - begun > arguments.seconds:
            _say(left_out=[job.name for job in todo[number:]])
            break
        _say(job=number, name=job.name, of=len(todo))
        start = time.monotonic()
        try:
            found = measure(job, device)
        except Exception as error:  # of one row: the others go on
            _say(failed=job.name, why=f"{type(error).__name__}: {error}"[:600])
            if device == "cuda" and _lost():
                return 70
            continue
        for row in found:
            _say(row=row | {"took": round(time.monotonic() - start, 2)})
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _lost() -> bool:
    """Whether the CUDA context is: after a fault of a kernel every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
