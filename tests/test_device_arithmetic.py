"""The contract where arithmetic is a GPU's: approximate functions as far off as CUDA's tables of errors allow, and sums
on tensor cores cut off instead of rounded (csrc/emulator/arithmetic.cpp)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import spec_id

from pykernels._cuda._extension import Extension
from pykernels.testing.run import check_case
from pykernels.testing.spec import OpSpec, load

emulator = Extension("_emulator_ext")
pytestmark = pytest.mark.skipif(not emulator.available, reason=str(emulator.reason))

#: The rule calibrates on torch's own error, here that of a CPU, whose sums are rounded.
ALLOWED = 1.5


@pytest.fixture(autouse=True)
def _as_on_the_host() -> Iterator[None]:
    yield
    emulator.module.set_device_arithmetic()


def wrong(spec: OpSpec, dtype: torch.dtype) -> list[str]:
    found = [(case, c) for case in spec.cases for c in check_case(spec, case, "emulator", dtype) if not c.passed]
    return [f"{case.label}: {c.why}" for case, c in found if not c.error <= ALLOWED * c.bound]


SPECS = [spec for spec in load() if "emulator" in spec.kernels]
#: Each way in which csrc/cuda multiplies float32: products.h by rows and by columns, recurrent_tile.h forward and back.
PRODUCTS = ("scaled_dot_product_attention", "rnn", "linear_cross_entropy")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name in PRODUCTS], ids=spec_id)
def test_sums_that_are_cut_off_are_float32(spec: OpSpec) -> None:
    emulator.module.set_device_arithmetic(sums=True)
    assert not wrong(spec, torch.float32)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.room == "activation"], ids=spec_id)
def test_approximate_functions_are_good_enough_for_16_bits(spec: OpSpec) -> None:
    emulator.module.set_device_arithmetic(functions=True)
    assert not wrong(spec, torch.float16)


def test_a_tensor_core_cuts_off() -> None:
    """1 + 16 times 2^-26: each is below what is kept beside 1, and their sum is not."""
    a, b = (torch.full((32, n), 2.0**-13, dtype=torch.float16).view(torch.int32) for n in (8, 4))
    c, d = torch.ones(32, 4), torch.empty(32, 4)
    for sums, expected in ((True, 1.0), (False, 1 + 2.0**-22)):
        emulator.module.set_device_arithmetic(sums=sums)
        emulator.call("check_mma", a, b, c, d, torch.float16)
        assert d.unique().tolist() == [expected]
