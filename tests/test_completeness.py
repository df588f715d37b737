"""What a new operator or kernel needs beside its code, and would otherwise be missed: CONTRIBUTING.md has the list."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from conftest import BACKENDS, DEVICE
from test_architecture import ROOT

import pykernels as pk
from pykernels.ops.activation._functions import REFERENCE
from pykernels.testing.aot.entries import activation
from pykernels.testing.spec import load

WITHOUT_SPEC = {  # held by tests of their own
    "compute_accidental_hits": "test_samplers",
    "dropout_mask": "test_attention_masks",
    "fixed_unigram_candidate_sampler": "test_samplers",
    "log_uniform_candidate_sampler": "test_samplers",
    "merge_attention": "test_attention_masks",
    "uniform_candidate_sampler": "test_samplers",
    "word2vec_step_": "test_word2vec",
}


def test_every_public_function_has_its_contract() -> None:
    public = {name for name in pk.functional.__all__ if inspect.isfunction(getattr(pk.functional, name))}
    missing = public - {spec.name for spec in load()} - WITHOUT_SPEC.keys()
    assert not missing, f"no OpSpec in pykernels/testing/specs/: {sorted(missing)}"
    for name, file in WITHOUT_SPEC.items():
        assert re.search(rf"\b{name}\b", (ROOT / "tests" / f"{file}.py").read_text()), (name, file)


def test_every_public_name_is_on_the_page_of_its_family() -> None:
    shared = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("drop_in", "word2vec"))
    for module in (pk.functional, pk.nn):
        for name in module.__all__:
            room = getattr(module, name).__module__.split(".")[2].lstrip("_")
            page = ROOT / "docs" / f"{room}.md"
            text = shared + (page.read_text() if page.exists() else "")
            assert re.search(rf"\b{name}\b", text), f"docs/{room}.md does not name {name}"


def test_every_triton_kernel_is_in_the_lint() -> None:
    """Of CUDA C++ the lint finds every kernel in the objects; of Triton it compiles what its entries launch."""
    (path,) = (ROOT / "pykernels" / "testing" / "aot").glob("baseline_triton_*.json")
    seen = {row.split(" | ")[1].partition("#")[0] for row in json.loads(path.read_text())["rows"]}
    for source in sorted((ROOT / "kernels").rglob("*.py")):
        for name in re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", source.read_text()):
            assert name in seen, (
                f"kernels/{source.name}: {name} is launched by no entry of pykernels/testing/aot/entries/, or has no "
                "baseline (python -m pykernels.testing.aot --kind triton --only NAME --update-baseline)"
            )


def test_every_activation_is_everywhere() -> None:
    assert set(activation.UNARY) == set(REFERENCE), "pykernels/testing/aot/entries/activation.py: UNARY"
    fused = set(pk.reference.activation.UNARY) - {"identity"}
    assert fused == set(REFERENCE), "pykernels/reference/activation.py: UNARY, the names of bias_activation_dropout"


@pytest.mark.parametrize("name", sorted(REFERENCE))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_knows_every_activation(name: str, backend: str) -> None:
    """Its functor by name, alone and fused with bias and dropout."""
    x = torch.linspace(-2, 2, 7, device=DEVICE)
    expected = REFERENCE[name](x, 1.0)
    alone = pk.ops.activation.unary.unary_forward[backend](x, name, 1.0)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-6)
    alpha = 1.0 if name in pk.reference.activation.ALPHA else None
    fused = pk.functional.bias_activation_dropout(x, torch.zeros_like(x), name, alpha=alpha, backend=backend)
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
