"""`pykernels verify`: every operator on every backend and dtype against the float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text

from .. import BackendError, explain
from .._backends import BACKENDS
from ..testing import machine
from ..testing.compare import Comparison
from ..testing.run import check_case
from ..testing.spec import KERNEL_DTYPES, OpSpec, load
from ._output import BadInput, console, json_option, print_json, progress

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*KERNEL_DTYPES, torch.float64)}
_ON = {"cpu": ("cpu", "triton", "emulator"), "cuda": ("triton", "cuda")}
_SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass
class Row:
    """One operator on one backend in one dtype.

    Attributes:
        absent: why the backend cannot serve it here; nothing was checked then.
        output, gradient: the comparison that used most of its allowance, None where there was none.
        failures: what went wrong, one line a tensor or a raised exception.
    """

    op: str
    backend: str
    dtype: str
    cases: int = 0
    absent: str | None = None
    output: Comparison | None = None
    gradient: Comparison | None = None
    failures: list[str] = field(default_factory=list)

    def add(self, case: str, comparison: Comparison) -> None:
        kind = "output" if comparison.name.startswith("out") else "gradient"
        worst = getattr(self, kind)
        if worst is None or _severity(comparison) > _severity(worst):
            setattr(self, kind, comparison)
        if not comparison.passed:
            self.failures.append(f"{case}: {comparison.why}")

    @property
    def verdict(self) -> str:
        return "absent" if self.absent else "FAILED" if self.failures else "ok"

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "backend": self.backend,
            "dtype": self.dtype,
            "verdict": self.verdict.lower(),
            "cases": self.cases,
            "output": _figures(self.output),
            "gradient": _figures(self.gradient),
            "failures": self.failures,
            "absent": self.absent,
        }


def _severity(comparison: Comparison) -> tuple[bool, float]:
    return not comparison.passed, comparison.fraction


def _figures(comparison: Comparison | None) -> dict[str, float] | None:
    if comparison is None:
        return None
    return {"error": comparison.error, "torch_error": comparison.torch_error, "bound": comparison.bound}


@click.command("verify", epilog="Example: pykernels verify --op gelu --op swiglu --backend cpu --dtype bfloat16")
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Operator; repeatable. Default: all.")
@click.option("--backend", "backends", multiple=True, type=click.Choice([*BACKENDS, "reference"]), help="Repeatable.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Repeatable.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is one.")
@json_option
def command(
    ops: tuple[str, ...], backends: tuple[str, ...], dtypes: tuple[str, ...], device: str | None, as_json: bool
) -> None:
    """Check operators against the reference in float64, outputs and gradients.

    A line is one operator on one backend in one dtype, over all cases of its contract: the error of the tensor that
    came closest to its bound, torch's own error there, and how much of the bound was used. On a CPU, Triton kernels
    run in the repaired interpreter and CUDA kernels in the emulator.

    Exit code 1 when a check fails; 2 when an operator is unknown or a named backend is not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    specs = _chosen(ops)
    if device == "cpu" and (not backends or "triton" in backends):
        _ensure_interpreter(ops, backends, dtypes, device, as_json)
    wanted = [DTYPES[name] for name in dtypes] or list(KERNEL_DTYPES)
    jobs = [
        (spec, backend, dtype)
        for spec in specs
        for backend in (backends or spec.kernels)
        for dtype in wanted
        if backends or backend in _ON[device]
    ]
    rows = []
    with progress(sum(len(spec.cases) for spec, _, _ in jobs)) as advance:
        for spec, backend, dtype in jobs:
            advance(0, f"{spec.name} {backend}")
            rows.append(check(spec, backend, dtype, device, advance))
    if backends and (refused := [row for row in rows if row.absent]):
        raise BadInput(f"--backend {refused[0].backend}: {refused[0].absent}")
    failed = [row for row in rows if row.failures]
    if as_json:
        result = {"passed": not failed, "device": device, "rows": [row.as_dict() for row in rows]}
        print_json({**result, "machine": machine.describe().as_dict()})
    else:
        _show(rows)
    raise SystemExit(1 if failed else 0)


def _chosen(ops: tuple[str, ...]) -> list[OpSpec]:
    specs = load()
    known = sorted({spec.name for spec in specs})
    for op in ops:
        if op not in known:
            raise BadInput(f"--op {op}: no such operator; there are {', '.join(known)}")
    return [spec for spec in specs if not ops or spec.name in ops]


def _ensure_interpreter(
    ops: tuple[str, ...], backends: tuple[str, ...], dtypes: tuple[str, ...], device: str, as_json: bool
) -> None:
    """Triton decides between GPU and interpreter when it is first imported, which pykernels has done by now: unless
    this process was started for the interpreter, another one takes over."""
    if machine.describe().triton is None:
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        from ..testing import interpreter

        interpreter.install()
        return
    arguments = [f"--op={op}" for op in ops] + [f"--backend={name}" for name in backends]
    arguments += [f"--dtype={name}" for name in dtypes] + [f"--device={device}"] + (["--json"] if as_json else [])
    process = subprocess.run(
        [sys.executable, "-m", f"{__package__}", "verify", *arguments], env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    raise SystemExit(process.returncode)


def check(
    spec: OpSpec,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    advance: Callable[..., None] = lambda steps=1, what=None: None,
) -> Row:
    """All cases of one operator on one backend in one dtype."""
    row = Row(label(spec), backend, str(dtype).removeprefix("torch."))
    first = spec.cases[0]
    try:
        explain(spec.function, **first.make(dtype, device), **first.options, backend=backend)
    except BackendError as error:
        row.absent = str(error)
        advance(len(spec.cases))
        return row
    for case in spec.cases:
        try:
            for comparison in check_case(spec, case, backend, dtype, device):
                row.add(case.label, comparison)
        except Exception as error:
            row.failures.append(f"{case.label}: raised {type(error).__name__}: {error}")
        row.cases += 1
        advance()
    return row


def label(spec: OpSpec) -> str:
    """The operator with the options that tell it from another spec of its name: those that all of its cases share."""
    first, *others = (case.options for case in spec.cases)
    plain = {name: value for name, value in first.items() if isinstance(value, (str, float))}
    shared = [str(value) for name, value in plain.items() if all(other.get(name) == value for other in others)]
    return " ".join((spec.name, *shared))


def _show(rows: list[Row]) -> None:
    out = console()
    table = Table(title="Against the float64 oracle", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in ("op", "backend", "dtype"):
        table.add_column(name)
    for name in ("cases", "out", "torch", "grad", "torch", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in (row for row in rows if not row.absent):
        worst = [comparison for comparison in (row.output, row.gradient) if comparison]
        used = max((comparison.fraction for comparison in worst), default=0.0)
        figures = [text for comparison in (row.output, row.gradient) for text in _cells(comparison)]
        verdict = Text(row.verdict, style="bold red" if row.failures else "green")
        table.add_row(row.op, row.backend, _SHORT[row.dtype], str(row.cases), *figures, f"{used:.0%}", verdict)
    out.print(table)
    for row in rows:
        for failure in row.failures[:3]:
            out.print(Text(f"{row.op} {row.backend} {row.dtype}: {failure}", style="red"), soft_wrap=True)
        if len(row.failures) > 3:
            out.print(Text(f"  and {len(row.failures) - 3} more", style="red"))
    for reason in dict.fromkeys(f"{row.backend} not checked: {row.absent}" for row in rows if row.absent):
        out.print(reason, soft_wrap=True)
    checked = [row for row in rows if not row.absent]
    failed = sum(bool(row.failures) for row in checked)
    out.print(f"{len(checked) - failed} of {len(checked)} passed, {sum(row.cases for row in checked)} cases.")


def _cells(comparison: Comparison | None) -> tuple[str, str]:
    return (f"{comparison.error:.1e}", f"{comparison.torch_error:.1e}") if comparison else ("-", "-")
