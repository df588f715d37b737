"""pytest-benchmark rows of the activation room: `pytest benchmarks/benchmark_activation.py`. See rows.py."""

from __future__ import annotations

from rows import speed

test_speed = speed("activation")
