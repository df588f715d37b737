"""ATEN_CPU_CAPABILITY, torch's own switch: the kernels for less than this processor has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_CONTRACT = """
import sys
import torch, pykernels as pk
from pykernels.testing.run import check_case
from pykernels.testing.spec import load
torch.set_num_threads(1)
assert pk.explain(pk.functional.uniform_candidate_sampler, torch.zeros(1, 1).long(), 1, 2, False, 9).backend == "cpu"
for spec in load(sys.argv[1]):
    for case in spec.cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wrong = [c.why for c in check_case(spec, case, "cpu", dtype) if not c.passed]
            assert not wrong, (spec.name, case.label, dtype, wrong)
"""


@pytest.mark.parametrize("room", ("sampled_softmax", "recurrent"))
@pytest.mark.parametrize("capability", ("avx2", "avx512"))
def test_lesser_instruction_sets(capability: str, room: str) -> None:
    """They give results of the same quality; avx512 is without tile registers."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", _CONTRACT, room], env=environment, check=True, timeout=600)
