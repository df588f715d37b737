"""`pykernels info`: versions, devices, which backends are there, and what to do about the others."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from .. import output_pool
from .._backends import BACKENDS, PREFERENCE, room_named
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
        out.print(Text.assemble((entry["backend"], "bold"), f" ({', '.join(entry['rooms'])}): {entry['reason']}"))
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
    """One entry a reason; rooms that merely have no kernels yet share one."""
    entries: dict[tuple[str, str], list[str]] = {}
    for room, found in absent.items():
        for backend, reason in found.items():
            text = reason.replace(f"the {room} room has", "these rooms have")
            entries.setdefault((backend, text), []).append(room)
    return [
        {"backend": backend, "rooms": rooms, "reason": reason, "command": _command(reason)}
        for (backend, reason), rooms in sorted(entries.items(), key=lambda item: BACKENDS.index(item[0][0]))
    ]


def _command(reason: str) -> str | None:
    """The command that a reason names, for scripts."""
    found = re.search(r"(?:\w+=\S+ )*(?:pip install|python setup\.py) [^()]*", reason)
    return found.group().strip() if found else None


def _describe(name: str, chosen: str | None) -> str:
    if not chosen:
        return "not set (auto)"
    unknown = [part for part in chosen.split(",") if part not in _VARIABLES[name]]
    return f"{chosen} (unknown: allowed are {', '.join(_VARIABLES[name])})" if unknown else chosen
