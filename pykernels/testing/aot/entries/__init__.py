"""What the lint compiles, one module a room: `ENTRIES`, a list of `Entry`. A new room adds a module here."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from ..rules import Entry


def load(path: str | None = None) -> list[Entry]:
    """The entries of every room, or those of one Python file that defines `ENTRIES`."""
    if path is None:
        rooms = sorted(module.name for module in pkgutil.iter_modules(__path__))
        found = [importlib.import_module(f"{__name__}.{room}").ENTRIES for room in rooms]
        return [entry for entries in found for entry in entries]
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.ENTRIES)
