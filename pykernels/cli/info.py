"""`pykernels info`: versions, devices, which backends are there, and what to do about the others."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from rich.text import Text

from .. import output_pool
from .._backends import BACKENDS, PREFERENCE, REBUILD, room_named
from ..testing import machine
from ..testing.spec import ROOMS
from ._output import console, json_option, print_json

_VARIABLES = {
    "PYKERNELS_BACKEND": ("auto", "reference", *BACKENDS),
    "PYKERNELS_BUILD": ("auto", "all", "none", "cpu", "cuda", "emulator"),
}


@click.command("info", epilog="Example: pykernels info --json")
@json_option
def command(as_json: bool) -> None:
    """Versions, devices and backends; what is missing, why, and the command that gets it."""
    here = machine.describe()
    absent = {name: room_named(name).absent for name in ROOMS}
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    if as_json:
        backends = {
            room: {name: {"available": name not in found, "reason": found.get(name)} for name in BACKENDS}
            for room, found in absent.items()
        }
        pool = output_pool()
        print_json(
            {
                "machine": here.as_dict(),
                "backends": backends,
                "missing": _missing(absent),
                "environment": variables,
                "output_pool": pool and asdict(pool),
            }
        )
        return
    out = console()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(here):
        facts.add_row(Text(name, style="bold"), value)
    out.print(facts)
    out.print()
    rooms = Table(title="Backends", title_justify="left")
    for name in ("room", "reference", *BACKENDS):
        rooms.add_column(name)
    for room, found in absent.items():
        marks = [Text("-", style="dim") if name in found else Text("yes", style="green") for name in BACKENDS]
        rooms.add_row(room, Text("yes", style="green"), *marks)
    out.print(rooms)
    for entry in _missing(absent):
        rooms_named = "" if len(entry["rooms"]) == len(absent) else f" ({', '.join(entry['rooms'])})"
        out.print(Text.assemble((entry["backend"], "bold"), f"{rooms_named}: {entry['reason']}"))
        if entry["command"]:
            out.print(Text(f"    {entry['command']}", style="cyan"), soft_wrap=True)
    for device, order in PREFERENCE.items():
        out.print(f"On {device} tensors the first of {', '.join((*order, 'reference'))} that can serve a call does.")
    for name, chosen in variables.items():
        out.print(f"{name}: {_describe(name, chosen)}")


def _facts(here: machine.Machine) -> list[tuple[str, str]]:
    return [
        ("pykernels", here.pykernels),
        ("torch", f"{here.torch} ({f'CUDA {here.cuda}' if here.cuda else 'CPU build'})"),
        ("triton", here.triton or "not installed"),
        ("Python", f"{here.python}, {here.system}"),
        ("CPU", f"{here.cpu}, {here.threads} threads; {', '.join(here.features) or 'no AVX2'}"),
        ("GPU", "; ".join(here.gpus) or "none"),
        ("Output pool", str(output_pool() or "none: the native CPU kernels are not built")),
    ]


def _missing(absent: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """One entry a backend and reason: what is not there, what it lacks, and the one command that gets it, or None."""
    entries: dict[tuple[str, str], list[str]] = {}
    for room, found in absent.items():
        for backend, reason in found.items():
            text = reason.replace(f"the {room} room has", "these rooms have")
            entries.setdefault((backend, text), []).append(room)
    missing = []
    for (backend, reason), rooms in sorted(entries.items(), key=lambda item: BACKENDS.index(item[0][0])):
        said, command = _remedy(backend, reason)
        missing.append({"backend": backend, "rooms": rooms, "reason": said, "command": command})
    return missing


def _remedy(backend: str, reason: str) -> tuple[str, str | None]:
    """A reason in the light of what this machine has, and the command that helps here."""
    if "no " in reason and "kernels yet" in reason:
        return reason, None
    if backend == "triton":
        if "not installed" in reason:
            return "triton is not installed", "pip install triton"
        if not _nvidia_driver():
            return "torch is a CPU build, and no NVIDIA driver was found here", None
        version = torch.__version__.partition("+")[0]
        return (
            "torch is a CPU build, on a machine with an NVIDIA driver",
            f"pip install --force-reinstall torch=={version}",
        )
    if "x86-64" in reason:
        return reason, None
    build = _build_command()
    reason = reason.partition(": pip install")[0].partition("; rebuild")[0].removesuffix("; where nvcc is found")
    if backend == "emulator":
        return "the emulator is built for tests only", f"PYKERNELS_BUILD=all {build}"
    if backend == "cuda" and not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        here = "" if _nvidia_driver() else ", nor an NVIDIA driver"
        return f"{reason}; nvcc was not found{here} (install the CUDA toolkit, then build)", build if not here else None
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        return f"{reason}; no C++ compiler was found", f"sudo apt install g++ && {build}"
    return reason, build


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _build_command() -> str:
    """Of the checkout that this package is, else of the one that the reader is in."""
    repository = Path(__file__).parents[2]
    if not (repository / "setup.py").exists():
        return f"{REBUILD}  # in the repository"
    return f"pip install --no-deps -e {'.' if repository == Path.cwd() else shlex.quote(str(repository))}"


def _describe(name: str, chosen: str | None) -> str:
    if not chosen:
        return "not set (auto)"
    unknown = [part for part in chosen.split(",") if part not in _VARIABLES[name]]
    return f"{chosen} (unknown: allowed are {', '.join(_VARIABLES[name])})" if unknown else chosen
