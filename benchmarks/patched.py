"""Training steps of patched models against the same in stock PyTorch, at two sizes; and what patching costs.

python benchmarks/patched.py > benchmarks/results/cpu-patched.json        then: python benchmarks/report.py
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels as pk
from pykernels.cli.demo.models import GPT, LSTMLanguageModel
from pykernels.cli.demo.tasks import Sizes, make_tasks
from pykernels.testing import machine, stock
from pykernels.testing.models import dlrm
from pykernels.testing.text import Text, default_text
from pykernels.testing.timing import measure, one_thread
from pykernels.testing.training import Batch, Task, train_both

DEMO = Sizes()
LARGE = replace(
    DEMO,
    skipgram_width=2 * DEMO.skipgram_width, skipgram_batch=4 * DEMO.skipgram_batch,
    lstm_width=2 * DEMO.lstm_width, lstm_hidden=2 * DEMO.lstm_hidden, batch=2 * DEMO.batch,
    gpt_width=2 * DEMO.gpt_width, gpt_batch=2 * DEMO.gpt_batch,
)  # fmt: skip
"""Eight times the arithmetic of a step: twice the width, and twice the batch (skip-gram, whose work grows with the
width and not its square: four times)."""


class Words(nn.Module):
    """Skip-gram of torch.nn modules alone: two `nn.Embedding`s."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.word, self.context = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        for table in (self.word, self.context):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, center: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
        x = self.word(center)
        positive = (x * self.context(context)).sum(-1)
        negative = torch.bmm(self.context(negatives), x.unsqueeze(2)).squeeze(2)
        return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(-1))


class Bags(nn.Module):
    """DLRM of torch.nn modules alone: `nn.EmbeddingBag`s, pairwise products, ReLU layers."""

    def __init__(self, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum", sparse=True) for size in sizes)
        self.bottom = nn.Sequential(nn.Linear(dlrm.NUMBERS, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        features = len(sizes) + 1
        self.top = nn.Sequential(nn.Linear(width + features * (features - 1) // 2, 64), nn.ReLU(), nn.Linear(64, 1))
        for table in self.tables:
            nn.init.normal_(table.weight, std=table.num_embeddings**-0.5)

    def forward(self, numbers: Tensor, clicks: Tensor, *bags: Tensor) -> Tensor:
        dense = self.bottom(numbers.to(self.top[0].weight.dtype))
        pooled = [table(i, o) for table, i, o in zip(self.tables, bags[0::2], bags[1::2], strict=True)]
        x = stock.dot_interaction(dense, torch.stack(pooled, 1))
        return F.binary_cross_entropy_with_logits(self.top(x).squeeze(1), clicks.to(x.dtype), reduction="none")


def tasks(text: Text, large: bool) -> list[tuple[Task, str]]:
    """(task, what is ours in it)."""
    skipgram, lstm, gpt = make_tasks(text, LARGE if large else DEMO)
    width, batch = (64, 4096) if large else (32, 1024)
    example = dlrm.task(text, width=width, batch=batch)
    sizes = (len(text.words().vocabulary), len(set("".join(text.words().vocabulary))), dlrm.HASHES)
    plain = replace(
        example,
        functions=lambda kind: None,
        build=lambda _: Bags(sizes, width),
        optimizer=lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    )
    alone = replace(
        skipgram,
        functions=lambda kind: None,
        calls=lambda model: [],
        build=lambda _: Words(sizes[0], (LARGE if large else DEMO).skipgram_width),
    )
    more = "patch and `negative_sampling_loss`"
    most = "patch, `embedding_bag_multi`, `dot_interaction`, `RowWiseAdagrad`"
    return [
        (alone, "patch"), (skipgram, more), (lstm, "patch"), (gpt, "patch"), (plain, "patch"), (example, most),
    ]  # fmt: skip


def row(task: Task, ours: str, large: bool, seconds: float) -> dict[str, Any]:
    """Trains both for about so many seconds in all, at least 25 steps; the losses are checked along the way."""
    made: dict[int, list[Batch]] = {}
    task = replace(task, batches=lambda steps, make=task.batches: made.setdefault(steps, make(steps)))
    start = time.perf_counter()
    train_both(task, 5)
    once = (time.perf_counter() - start) / 10
    outcome = train_both(task, min(150, max(25, int(seconds / 2 / once) // 5 * 5)))
    median, p20, p80 = outcome.speed_ratio
    print(task.name, ours, "8x" if large else "demo", f"{median:.2f}", outcome.checks, file=sys.stderr)
    rates = {"torch": outcome.rate(outcome.stock), "pykernels": outcome.rate(outcome.ours)}
    return {
        "model": task.title, "shape": task.shape, "size": "8x" if large else "demo", "ours": ours,
        "equal": outcome.equal,
        "tokens": task.tokens,
        "seconds_a_step": {name: task.tokens / rate for name, rate in rates.items()},
        "peak_bytes": {"torch": outcome.stock.peak, "pykernels": outcome.ours.peak},
        "ratio": {"median": median, "p20": p20, "p80": p80},
        "memory_ratio": outcome.memory_ratio,
    }  # fmt: skip


def step_of(model: nn.Module, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        model(*batch).mean().backward()
        model.zero_grad()

    return step


def toys() -> dict[str, tuple[nn.Module, Batch]]:
    """Models with next to nothing to compute."""
    torch.manual_seed(0)
    ids = torch.randint(9, (1, 2))
    numbers, clicks = torch.randn(1, dlrm.NUMBERS), torch.ones(1)
    bags = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)) * 3
    return {
        "LSTM language model": (LSTMLanguageModel(9, 4, 4), (ids, ids)),
        "GPT, two layers": (GPT(9, 4, 1, 2, 2), (ids, ids)),
        "DLRM, three tables": (Bags((9, 9, 9), 4), (numbers, clicks, *bags)),
    }


def overhead() -> list[dict[str, Any]]:
    """Of a training step of a toy: the steps' time, and that of the first step of a fresh process."""
    found = []
    for name, (model, batch) in toys().items():
        ours = copy.deepcopy(model)
        swapped = len(pk.patch(ours).patched)
        timings = measure({"torch": step_of(model, batch), "pykernels": step_of(ours, batch)}, rounds=60, seconds=10)
        first = {kind: _first(name, kind) for kind in ("torch", "pykernels")}
        steps = {kind: timing.median for kind, timing in timings.items()}
        found.append({"model": name, "swapped": swapped, "seconds_a_step": steps, "first_step": first})
    return found


def _first(name: str, kind: str) -> float:
    """Seconds of the first step in a fresh process, everything imported, median of three processes."""
    code = (
        "import sys, time, torch; sys.path.insert(0, 'benchmarks'); import patched, pykernels; "
        "torch.set_num_threads(1);"
        f"model, batch = patched.toys()[{name!r}]; {'pykernels.patch(model);' if kind == 'pykernels' else ''}"
        "step = patched.step_of(model, batch); start = time.thread_time(); step(); print(time.thread_time() - start)"
    )
    root = Path(__file__).resolve().parent.parent
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) for _ in range(3)]
    return sorted(float(run) for run in runs)[1]


def patching() -> dict[str, Any]:
    """Milliseconds of patch and unpatch for a tree of 200 modules."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LSTM(8, 8)) for _ in range(50)))
    times: dict[str, list[float]] = {"patch": [], "unpatch": []}
    for _ in range(7):
        for name, function in (("patch", pk.patch), ("unpatch", pk.unpatch)):
            start = time.thread_time()
            function(model)
            times[name].append(time.thread_time() - start)
    return {"modules": len(list(model.modules())), **{name: sorted(t)[3] for name, t in times.items()}}


def main(seconds: float = 15.0) -> None:
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default, but torch's Adagrad warns where nobody said so
    text = default_text()
    found = [row(task, ours, large, seconds) for large in (False, True) for task, ours in tasks(text, large)]
    with one_thread():
        record = {"machine": machine.describe().as_dict(), "rows": found, "overhead": overhead(), "patch": patching()}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
