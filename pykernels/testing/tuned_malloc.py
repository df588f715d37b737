"""Torch eager with a malloc that keeps large blocks: what it could do without our pool of output memory.

The C library maps blocks of 32 MiB and more anew for every call and gives the top of its heap back; told not to, it
reuses them. It reads its settings once, so these times come from a process of their own, not in turns with ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .bench import DIRECTIONS, Call
from .spec import load
from .timing import Timing, measure, one_thread

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}

Job = tuple[str, int, int, str]
"""room, index of the spec in it, index of its benchmark case, dtype."""


def eager_times(jobs: Sequence[Job], rounds: int, seconds: float) -> list[dict[str, Timing]]:
    """For each job: direction -> Timing of torch eager on one thread."""
    if not jobs:
        return []
    command = [sys.executable, "-m", __name__, json.dumps([list(jobs), rounds, seconds])]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torch eager with a tuned malloc: {done.stderr.strip()}")
    return [{direction: Timing(*times) for direction, times in one.items()} for one in json.loads(done.stdout)]


def main(jobs: Sequence[Job], rounds: int, seconds: float) -> list[dict[str, Any]]:
    found = []
    with one_thread():
        for room, spec_index, case_index, dtype in jobs:
            spec = load(room)[spec_index]
            case = spec.bench[case_index]

            def eager(spec: Any = spec, case: Any = case, **leaves: torch.Tensor) -> Any:
                return spec.call_timed_peer(**leaves, **case.options)

            call = Call(eager, case, case.make(getattr(torch, dtype)))
            times = {
                direction: measure({"eager": call.direction(direction)}, rounds, seconds=seconds)["eager"]
                for direction in DIRECTIONS
            }
            found.append({direction: (t.median, t.p20, t.p80) for direction, t in times.items()})
    return found


if __name__ == "__main__":
    print(json.dumps(main(*json.loads(sys.argv[1]))))
