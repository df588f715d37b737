"""A run in the form that pytest-benchmark writes: `pytest-benchmark compare FILE` and its plots read it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from statistics import fmean, median, quantiles, stdev
from typing import Any

from ...testing.bench import COPY, Row
from .take import commit

_VERSION = "5.2.1"  # of the format


def document(rows: Sequence[Row], record: dict[str, Any]) -> dict[str, Any]:
    """One benchmark for each provider of a row, and a group for each row. A sample is the mean of a round's calls."""
    about, found = record["machine"], []
    for row in rows:
        group = " ".join((row.op, row.shape, row.dtype, row.direction))
        for provider, timing in row.seconds.items():
            extra: dict[str, Any] = {"backend": row.backend if provider == "pykernels" else None, "room": row.room}
            if provider != COPY:
                extra |= {"bytes": row.moved, "flops": row.flops, "peak_bytes": row.peak.get(provider)}
            params = {"shape": row.shape, "dtype": row.dtype, "direction": row.direction, "provider": provider}
            found.append({
                "group": group, "name": f"{group}[{provider}]", "fullname": f"pykernels bench::{group}[{provider}]",
                "params": params, "param": provider, "extra_info": extra,
                "options": {"disable_gc": False, "timer": "thread_time", "min_rounds": 5, "warmup": True},
                "stats": stats(list(timing.samples)),
            })  # fmt: skip
    here = {
        "node": platform.node(), "machine": platform.machine(), "system": platform.system(),
        "python_version": about["python"], "python_implementation": platform.python_implementation(),
        "cpu": {"brand_raw": about["cpu"], "flags": list(about["features"]), "count": about["threads"]},
        "torch": about["torch"], "limits": record["limits"],
    }  # fmt: skip
    at = {"id": commit(), "time": None, "dirty": None, "branch": None, "project": "pykernels"}
    return {
        "machine_info": here, "commit_info": at, "benchmarks": found, "datetime": record["datetime"],
        "version": _VERSION,
    }  # fmt: skip


def stats(samples: list[float]) -> dict[str, Any]:
    """As pytest-benchmark has them."""
    mean, middle = fmean(samples), median(samples)
    deviation = stdev(samples) if len(samples) > 1 else 0.0
    q1, _, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [middle] * 3
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [x for x in samples if low <= x <= high]
    beyond = sum(not low <= x <= high for x in samples), sum(abs(x - mean) > deviation for x in samples)
    return {
        "min": min(samples), "max": max(samples), "mean": mean, "stddev": deviation, "rounds": len(samples),
        "median": middle, "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": beyond[0], "stddev_outliers": beyond[1],
        "outliers": f"{beyond[1]};{beyond[0]}", "ld15iqr": min(inside), "hd15iqr": max(inside), "ops": 1 / mean,
        "total": sum(samples), "iterations": 1,
    }  # fmt: skip
