"""Fixtures of the whole suite. Without a GPU Triton runs on the repaired interpreter, CUDA C++ on the emulator."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, pykernels included

import pytest

from pykernels.testing import interpreter
from pykernels.testing.spec import OpSpec, load

if not torch.cuda.is_available():
    interpreter.install()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What must be there for a green run: on a machine without a GPU all four floors are executed on the CPU.
BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("cpu", "triton", "emulator")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    torch.set_num_threads(1)  # figures repeat, and parallel workers do not fight


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run by `make gpu`"))
    else:
        items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    """On a GPU, where `make gpu` has minutes for all tests: first what tells most, last what traces the same kernels
    again or asks the reference."""
    name = item.name.partition("[")[0]
    if name == "test_equals_oracle":
        return 0
    again = ("test_compiles_whole", "test_opcheck", "test_reference_equals_torch", "test_oracle_is_torchs")
    return 3 if name in again else 2 if item.path.name == "test_contract.py" else 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """After a kernel's fault every call of the process fails: the worker ends, and xdist goes on with a new one."""
    report = yield
    if report.failed and DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"FAILED {item.nodeid}: the CUDA context is lost: {error}\n{report.longrepr}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(70)
    return report


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN, so an element that no kernel writes is seen."""
    # warn_only: the oracle's operators that have no deterministic kernel on a GPU (gradients of bags) would refuse.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def spec_id(spec: OpSpec) -> str:
    options = next((case.options for case in spec.cases if case.options), {})
    texts = [str(v) for v in options.values() if isinstance(v, (str, float)) and not isinstance(v, bool)]
    names = {name for case in spec.cases for name in case.inputs} - {"input", "gate", "up"}
    tensors = sorted(name for name in names if not name[-1].isdigit())
    return "-".join((spec.name, *texts, *tensors))


def kernel_grid() -> list[tuple[OpSpec, str]]:
    """Every spec with every backend that must serve it on this machine."""
    return [(spec, backend) for spec in load() for backend in spec.kernels if backend in BACKENDS]
