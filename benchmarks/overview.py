"""The README's tables: every row of the committed records in a few lines, and each one in which a peer is ahead."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROOMS = ("activation", "attention", "recurrent", "embedding", "sampled_softmax")
WHOLE = ("forward+backward", "step")
BEHIND = 0.95  # a ratio that is not noise around 1
PEERS = {
    "eager": "torch",
    "compile": "torch.compile",
    "max-autotune": "torch.compile (max-autotune)",
    "dense": "torch (dense gradient)",
    "chunked": "torch (chunked)",
    "fbgemm": "FBGEMM",
}


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / f"cpu-{name}.json").read_text())
    return record


def _told(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['shape']} {row['dtype']}"


def _timed(room: str) -> list[dict[str, Any]]:
    """Rows whose results were right: no speed is told of others."""
    return [row for row in _record(room)["rows"] if row["correct"] and row["ratio"]]


def rooms() -> list[str]:
    lines = [
        "| room | compared with | ops x shapes x dtypes | median | least | most | behind |",
        "|---|---|---|---|---|---|---|",
    ]
    for room in ROOMS:
        rows = [row for row in _timed(room) if row["direction"] in WHOLE]
        timed = {peer for row in rows for peer in row["seconds"]} - {"pykernels", "copy"}
        peers = sorted(PEERS.get(peer, peer) for peer in timed)
        ratios = [row["ratio"]["median"] for row in rows]
        least, most = (find(rows, key=lambda row: row["ratio"]["median"]) for find in (min, max))
        ends = (f"{row['ratio']['median']:.2f} ({_told(row)})" for row in (least, most))
        behind = sum(ratio < BEHIND for ratio in ratios)
        cells = (", ".join(peers), str(len(rows)), f"**{median(ratios):.2f}**", *ends, str(behind))
        lines.append(f"| [{room}](docs/{room}.md) | {' | '.join(cells)} |")
    return lines


def models() -> list[str]:
    lines = ["| model | a step | what is ours | time, stock / ours | memory |", "|---|---|---|---|---|"]
    for row in _record("patched")["rows"]:
        speed = f"**{row['ratio']['median']:.2f}**" if row["equal"] else "check failed"
        cells = (row["model"], row["shape"], row["ours"], speed, f"{row['memory_ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def word_vectors() -> str:
    parts = [f"{row['variant']} {row['ratio']['median']:.1f}" for row in _record("word2vec")["rows"]]
    return (
        f"word2vec, words a CPU second over gensim's ([held-out losses](docs/word2vec.md) beside): {'; '.join(parts)}."
    )


def behind() -> list[str]:
    """Every whole call or step in which a peer is ahead; how many single directions more; what small calls cost."""
    rows = [row for room in ROOMS for row in _timed(room)]
    slow = sorted((row for row in rows if row["ratio"]["median"] < BEHIND), key=lambda row: row["ratio"]["median"])
    whole = [row for row in slow if row["direction"] in WHOLE]
    listed = "; ".join(f"{_told(row)} {row['ratio']['median']:.2f}" for row in whole) or "none"
    costs = {
        op: (kinds["forward+backward"]["pykernels"]["median"] - kinds["forward+backward"]["eager"]["median"]) * 1e6
        for room in ROOMS
        for op, kinds in _record(room)["call_overhead"].items()
        if "forward+backward" in kinds
    }
    worst = max(costs, key=lambda op: costs[op])
    return [
        f"**Where a peer is ahead** (below {BEHIND}), forward and backward: {listed}. Of the directions by themselves "
        f"{len(slow) - len(whole)} of {len(rows) - len([r for r in rows if r['direction'] in WHOLE])} rows are behind.",
        "",
        "**Small tensors.** Forward and backward of a call with next to nothing to compute cost "
        f"{median(costs.values()):+.0f} µs against torch's own in the median of {len(costs)} operators, "
        f"{costs[worst]:+.0f} µs for `{worst}`.",
    ]


def overview() -> str:
    machine = _record("activation")["machine"]
    lines = [
        f"{machine['cpu']} ({', '.join(machine['features'])}), torch {machine['torch']}, one thread, CPU time, medians "
        "of interleaved rounds. A ratio is the best peer's time over ours, both in the same process and every result "
        "checked against float64 in the same run: above 1 ours is faster.",
        "",
        "Operators, forward and backward:",
        "",
        *rooms(),
        "",
        "Whole training steps (forward, backward, optimizer) of small models; losses and first gradients equal:",
        "",
        *models(),
        "",
        word_vectors(),
        "",
        *behind(),
    ]
    return "\n".join(lines)
