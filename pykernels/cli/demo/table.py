"""What the demo found, as rows: the terminal, the page and the JSON show the same figures."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from ...testing.training import CURVE_BOUND, CURVE_STEPS, Outcome, Side

NO_SPEED = "not equal"  # in place of a speed: a training that goes wrong may be as fast as it likes


def final_loss(side: Side) -> float:
    """Mean of the last ten losses."""
    last = side.losses[-10:]
    return sum(last) / len(last)


def megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def rows(outcomes: list[Outcome]) -> list[tuple[str, list[str]]]:
    """(label, one cell a model); a label without cells starts a group."""

    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(outcome) for outcome in outcomes]

    def mark(outcome: Outcome, check: str) -> str:
        return "equal" if outcome.checks[check] else "DIFFERENT"

    def speed(outcome: Outcome, cell: str) -> str:
        return cell if outcome.equal else NO_SPEED

    return [
        ("Loss at step 1", []),
        row("stock PyTorch", lambda o: f"{o.stock.losses[0]:.6f}"),
        row("pykernels", lambda o: f"{o.ours.losses[0]:.6f}"),
        row("error, per target", lambda o: f"{o.first.error:.1e}"),
        row("bound", lambda o: f"{o.first.bound:.1e}"),
        row("verdict", lambda o: mark(o, "loss at step 1")),
        ("Gradients at step 1", []),
        row("error", lambda o: f"{o.gradient.error:.1e}"),
        row("bound", lambda o: f"{o.gradient.bound:.1e}"),
        row("verdict", lambda o: mark(o, "gradients at step 1")),
        ("Loss along the curve", []),
        row("stock, last 10 steps", lambda o: f"{final_loss(o.stock):.4f}"),
        row("pykernels, last 10", lambda o: f"{final_loss(o.ours):.4f}"),
        row("largest difference", lambda o: f"{max(o.differences):.1e}"),
        row("verdict", lambda o: mark(o, "loss along the curve")),
        ("Tokens a second", []),
        row("stock PyTorch", lambda o: speed(o, f"{o.rate(o.stock):,.0f}")),
        row("pykernels", lambda o: speed(o, f"{o.rate(o.ours):,.0f}")),
        row("ratio", lambda o: speed(o, f"{o.speed_ratio[0]:.2f}x")),
        row("ratio, p20-p80", lambda o: speed(o, "{:.2f}-{:.2f}".format(*o.speed_ratio[1:]))),
        ("Peak memory", []),
        row("stock PyTorch", lambda o: megabytes(o.stock.peak)),
        row("pykernels", lambda o: megabytes(o.ours.peak)),
        row("ratio", lambda o: f"{o.memory_ratio:.2f}x"),
    ]


def served(outcomes: list[Outcome]) -> list[tuple[str, str, str]]:
    """(operator, models, backend), each pair of operator and backend once."""
    users: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        for operator, backend, _ in outcome.served:
            users.setdefault((operator, backend), []).append(outcome.task.name)
    return [(operator, ", ".join(names), backend) for (operator, backend), names in users.items()]


def notes() -> list[str]:
    """How to read the figures."""
    return [
        "Equal at step 1: every target's loss and every gradient, against stock PyTorch in float64. The bound is twice "
        "(gradients: three times) stock PyTorch's own float32 error, plus one rounding.",
        f"Along the curve: relative difference (absolute below a loss of 1), at most {CURVE_BOUND:g} in the first "
        f"{CURVE_STEPS} steps.",
        "Ratios above 1: pykernels is faster, or needs less memory. The two trainings take turns on one thread; CPU "
        "time, median over the turns. Memory: the most that torch's allocator held at once in a forward and backward "
        "pass, above model, optimizer and batch.",
        "The reference is plain PyTorch: right, not fast. It serves operators that have no kernel for this device.",
    ]


def show(console: Console, outcomes: list[Outcome]) -> None:
    """Prints the table, the operators and the notes."""
    table = Table(title="Stock PyTorch against pykernels, same seed, same batches", title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.task.name, justify="right")
    for label, cells in rows(outcomes):
        if not cells:
            table.add_section()
            table.add_row(RichText(label, style="bold"))
        else:
            table.add_row(f"  {label}", *(_styled(cell) for cell in cells))
    console.print(table)
    if served(outcomes):
        console.print(_operators(outcomes))
    for note in notes():
        console.print(RichText(note, style="dim"))


def _operators(outcomes: list[Outcome]) -> Table:
    operators = Table(title="Which backend served", title_justify="left")
    for name in ("operator", "in", "backend"):
        operators.add_column(name)
    for line in served(outcomes):
        operators.add_row(*line)
    return operators


def _styled(cell: str) -> RichText:
    return RichText(cell, style={"equal": "green", "DIFFERENT": "bold red"}.get(cell, ""))


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything about one task, in plain numbers."""
    speed = None
    if outcome.equal:
        median, low, high = outcome.speed_ratio
        rates = {"stock": outcome.rate(outcome.stock), "pykernels": outcome.rate(outcome.ours)}
        speed = {**rates, "ratio": median, "p20": low, "p80": high}
    return {
        "name": outcome.task.name,
        "shape": outcome.task.shape,
        "equal": outcome.equal,
        "checks": outcome.checks,
        "step1": {
            "stock": outcome.stock.losses[0],
            "pykernels": outcome.ours.losses[0],
            "error": outcome.first.error,
            "bound": outcome.first.bound,
        },
        "step1_gradient": {
            "parameter": outcome.gradient.name,
            "error": outcome.gradient.error,
            "bound": outcome.gradient.bound,
        },
        "curve": {"largest_difference": max(outcome.differences), "bound": CURVE_BOUND, "judged_steps": CURVE_STEPS},
        "losses": {"stock": outcome.stock.losses, "pykernels": outcome.ours.losses},
        "tokens_per_second": speed,
        "peak_bytes": {"stock": outcome.stock.peak, "pykernels": outcome.ours.peak, "ratio": outcome.memory_ratio},
        "served": [{"op": op, "backend": backend, "refused": refused} for op, backend, refused in outcome.served],
    }
