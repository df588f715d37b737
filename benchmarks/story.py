"""Every training of docs/story.md for a few steps, stock PyTorch and pykernels in turns.

python benchmarks/story.py > benchmarks/results/cpu-story.json        then: python benchmarks/report.py
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pykernels.testing import machine
from pykernels.testing.text import default_text
from pykernels.testing.timing import one_thread
from pykernels.testing.training import train_both

STEPS = 40
STORY = (
    ("cbow", "task"),
    ("classify", "task"),
    ("spell", "task"),
    ("lstm_lm", "task"),
    ("lstm_sampled", "task"),
    ("bilstm_vectors", "task"),
    ("seq2seq", "task"),
    ("seq2seq", "task_with_attention"),
    ("gated_conv", "task"),
    ("bert", "task"),
    ("fine_tune", "task_first"),
    ("fine_tune", "task_token"),
    ("fine_tune", "task_span"),
    ("fine_tune", "task_adapters"),
    ("gpt", "task"),
    ("prefix_lm", "task"),
    ("encoder_decoder", "task"),
    ("dlrm", "task"),
)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    text = default_text()
    rows: list[dict[str, Any]] = []
    for script, name in STORY:
        task = getattr(importlib.import_module(script), name)(text)
        outcome = train_both(task, STEPS)
        sides = {"torch": outcome.stock.losses, "pykernels": outcome.ours.losses}
        row: dict[str, Any] = {"script": script, "title": task.title, "shape": task.shape, "equal": outcome.equal}
        row["losses"] = {side: [round(loss, 6) for loss in losses] for side, losses in sides.items()}
        sizes = {"torch": outcome.stock, "pykernels": outcome.ours}
        row["tokens"] = task.tokens
        row["seconds_a_step"] = {name: task.tokens / outcome.rate(side) for name, side in sizes.items()}
        row["peak_bytes"] = {name: side.peak for name, side in sizes.items()}
        if outcome.equal:
            row["ratio"] = dict(zip(("median", "p20", "p80"), outcome.speed_ratio, strict=True))
            row["memory_ratio"] = outcome.memory_ratio
        rows.append(row)
        print(script, outcome.checks, row.get("ratio"), file=sys.stderr, flush=True)
    with one_thread():
        about = machine.describe().as_dict()
    print(json.dumps({"machine": about, "text": text.source, "training_steps": STEPS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
