"""pytest-benchmark rows of the recurrent room: `pytest benchmarks/benchmark_recurrent.py`. See rows.py."""

from __future__ import annotations

from rows import speed, steps

test_speed = speed("recurrent")
test_step = steps("recurrent")
