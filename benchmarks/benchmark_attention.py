"""pytest-benchmark rows of the attention room: `pytest benchmarks/benchmark_attention.py`. See rows.py."""

from __future__ import annotations

from rows import speed

test_speed = speed("attention")
