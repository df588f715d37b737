"""pytest-benchmark rows of the embedding room: `pytest benchmarks/benchmark_embedding.py`. See rows.py."""

from __future__ import annotations

from rows import speed, steps

test_speed = speed("embedding")
test_step = steps("embedding")
