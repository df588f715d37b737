"""pykernels, loaded by the Hugging Face `kernels` library: `__init__.py` of a build variant (see `hub.export`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _package() -> ModuleType:
    """The process's pykernels; the one beside this file where none is imported yet."""
    if "pykernels" not in sys.modules:
        folder = Path(__file__).parent / "pykernels"
        spec = importlib.util.spec_from_file_location(
            "pykernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules["pykernels"] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules["pykernels"]
            raise
    return sys.modules["pykernels"]


package = _package()
functional, nn, reference, explain = package.functional, package.nn, package.reference, package.explain
layers = importlib.import_module("pykernels.integrations.hub.layers")

__all__ = ["explain", "functional", "layers", "nn", "package", "reference"]
