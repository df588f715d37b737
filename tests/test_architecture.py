"""The house's rules: who may import whom, file sizes, what must not exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pykernels.testing.spec import ROOMS

ROOT = Path(__file__).parent.parent
LIMIT = 500
SOURCES = [
    ROOT / line
    for line in subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    if (ROOT / line).is_file()
]
PYTHON = [p for p in SOURCES if p.suffix == ".py"]


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = ["pykernels", "_triton", *relative.parts[1:]] if relative.parts[0] == "kernels" else list(relative.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, text: str | None = None) -> set[str]:
    """Absolute names of everything a file imports, anywhere in it."""
    module = module_of(path)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(text if text is not None else path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({name, *(f"{name}.{alias.name}" for alias in node.names)})
    return found


def room_of(module: str) -> str | None:
    return next((part for part in module.split(".") if part in ROOMS), None)


FLOORS = {
    # floor: what of pykernels it may import (prefixes), beside its own package's helpers
    "pykernels.reference": ("pykernels.reference",),
    "pykernels._packed": ("pykernels._packed",),
    "pykernels._attended": ("pykernels._attended",),
    "pykernels._sampled": ("pykernels._sampled", "pykernels._segments"),
    "pykernels._segments": ("pykernels._segments",),
    "pykernels._triton": (
        "pykernels._triton",
        "pykernels._attended",
        "pykernels._errors",
        "pykernels._packed",
        "pykernels._sampled",
        "pykernels._segments",
    ),
    "pykernels._cuda": (
        "pykernels._cuda",
        "pykernels._cuda_ext",
        "pykernels._emulator_ext",
        "pykernels._attended",
        "pykernels._errors",
        "pykernels._packed",
        "pykernels._sampled",
        "pykernels._segments",
    ),
    "pykernels._cpu": ("pykernels._cpu", "pykernels._cpu_ext"),
    "pykernels.ops": (
        "pykernels.ops",
        "pykernels._attended",
        "pykernels._backends",
        "pykernels._errors",
        "pykernels.reference",
        "pykernels._triton",
        "pykernels._cuda",
        "pykernels._cpu",
    ),
    "pykernels.nn": ("pykernels.nn", "pykernels.ops", "pykernels._backends"),
}


def violations(path: Path, text: str | None = None) -> list[str]:
    module = module_of(path)
    floor = next((f for f in FLOORS if module == f or module.startswith(f + ".")), None)
    if floor is None:
        return []
    wrong = []
    for name in imports_of(path, text):
        if name != "pykernels" and not name.startswith("pykernels."):
            continue
        if name == "pykernels" or not name.startswith(FLOORS[floor]):
            # `from .. import reference` names the package itself first
            if not any(allowed.startswith(name + ".") or allowed == name for allowed in FLOORS[floor]):
                wrong.append(f"{module} imports {name}")
        elif name.startswith(floor) and room_of(module) and room_of(name) not in (None, room_of(module)):
            wrong.append(f"{module} imports another room, {name}")
    return wrong


def test_floors_import_only_what_they_may() -> None:
    wrong = [w for path in PYTHON for w in violations(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/activation.py", "from ..reference import activation"),
        ("pykernels/_cpu/activation.py", "from .._triton import activation"),
        ("pykernels/reference/attention.py", "from ..ops import attention"),
        ("pykernels/reference/attention.py", "from .recurrent import lstm"),
        ("pykernels/nn/attention.py", "from ..reference import attention"),
    ],
)
def test_a_forbidden_import_is_seen(path: str, line: str) -> None:
    assert violations(ROOT / path, line)


def test_no_file_is_long() -> None:
    kinds = {".py", ".cu", ".h", ".cpp", ".inc", ".sh"}
    long = {
        str(p.relative_to(ROOT)): n
        for p in SOURCES
        if p.suffix in kinds and (n := len(p.read_text().splitlines())) > LIMIT
    }
    assert not long, f"over {LIMIT} lines: {long}"


def test_kernels_folder_is_no_package() -> None:
    """kernels/__init__.py would shadow, or be broken by, the PyPI package `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "pykernels" / "_triton").is_symlink()


def test_cuda_kernels_include_no_torch_and_no_ptx() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*"):
        text = path.read_text()
        assert "<torch/" not in text and "<ATen/" not in text, path
        if path.suffix == ".cu":
            assert "asm(" not in text and "asm volatile" not in text and "<<<" not in text, path


def test_public_names_are_the_same_everywhere() -> None:
    """pk.functional and pk.reference hold the same operators; everything public is in an __all__."""
    from pykernels import functional, nn, reference

    for module in (functional, nn, reference):
        public = {n for n, held in vars(module).items() if not n.startswith("_") and callable(held)}
        assert sorted(module.__all__) == sorted(public), module.__name__
    assert set(functional.__all__) == set(reference.__all__)


def test_two_environment_variables() -> None:
    """PYKERNELS_BACKEND and PYKERNELS_BUILD, and no others of ours."""
    kinds = (".py", ".cpp", ".h", ".cu")
    names = {name for p in SOURCES if p.suffix in kinds for name in re.findall(r"PYKERNELS_[A-Z]+", p.read_text())}
    assert names <= {"PYKERNELS_BACKEND", "PYKERNELS_BUILD"}, names


def test_import_is_light() -> None:
    """Importing pykernels after torch brings its own modules, Triton's where there is a GPU, and little time.

    Time is judged against the import of torch in the same process, which a busy machine stretches alike: 0.27 of it
    (0.27 s of CPU) when this was written, a part that hardly varies; the target is 0.3 s.
    """
    code = """
import sys, time
start = time.process_time()
import torch
between, before = time.process_time(), set(sys.modules)
import pykernels
print((time.process_time() - between) / (between - start))
print(*{name.split(".")[0] for name in set(sys.modules) - before})
print("pykernels.testing" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    parts = []
    for _ in range(3):  # a machine that hiccups does so on either side of the ratio
        said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
        part, packages, testing = said.splitlines()
        foreign = set(packages.split()) - {"pykernels", "triton"} - sys.stdlib_module_names
        foreign = {name for name in foreign if not name.startswith("_sysconfigdata")}  # whose name is the platform's
        assert not foreign and testing == "False", foreign
        parts.append(float(part))
        if parts[-1] < 0.4:
            break
    assert min(parts) < 0.4, f"{parts} of the time that torch takes"
