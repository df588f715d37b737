"""pytest-benchmark rows of the sampled-softmax room: `pytest benchmarks/benchmark_sampled_softmax.py`. See rows.py."""

from __future__ import annotations

from rows import speed, steps

test_speed = speed("sampled_softmax")
test_step = steps("sampled_softmax")
