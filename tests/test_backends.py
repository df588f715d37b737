"""The registry: choice, refusal, explanation; and that nothing falls back when it was named."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import pykernels as pk
from pykernels import _backends
from pykernels._cuda._extension import _runs
from pykernels.ops import _library
from pykernels.ops.activation._functions import ROOM

ROOT = Path(__file__).parent.parent
f = pk.functional


def test_every_floor_was_built() -> None:
    """A missing floor must not pass for a green one: on a machine without a GPU these three execute everything."""
    if torch.cuda.is_available():
        assert {"cpu", "triton", "cuda"} <= set(ROOM.modules), ROOM.absent
    else:
        assert {"cpu", "triton", "emulator"} <= set(ROOM.modules), ROOM.absent


def test_auto_takes_the_native_kernels_on_the_cpu() -> None:
    x = torch.randn(3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert ROOM.resolve("gelu", None, x.to(dtype)) == "cpu"
    assert ROOM.resolve("gelu", "auto", x) == "cpu"
    assert ROOM.resolve("gelu", "reference", x) == "reference"
    assert ROOM.resolve("gelu", None, x.to("meta")) == "reference"
    assert f.gelu(x.to("meta")).shape == x.shape


def test_explain_tells_the_choice_and_every_refusal_without_running() -> None:
    x = torch.randn(3)
    found = pk.explain(f.gelu, x)
    assert (found.function, found.room, found.backend) == ("gelu", "activation", "cpu")
    assert set(found.refused) == {"triton", "cuda", "emulator"} and all(found.refused.values())
    assert "gelu (activation): cpu" in str(found) and "not emulator: runs only when named" in str(found)
    assert pk.explain(pk.nn.GELU(), x).backend == "cpu"
    assert pk.explain(f.gelu, x.double(), backend="reference").backend == "reference"
    with pytest.raises(TypeError, match="approximate|must be Tensor"):
        pk.explain(f.gelu, "x")
    with pytest.raises(TypeError, match="did not choose a backend"):
        pk.explain(torch.relu, x)
    with pytest.raises(TypeError, match="'function' must be a function or module, not str"):
        pk.explain("gelu", x)  # type: ignore[arg-type]
    leaf = torch.randn(3)
    pk.explain(f.relu, leaf, inplace=True)
    assert (leaf == leaf).all() and leaf._version == 0, "explain must not run the call"


def test_explain_in_one_thread_leaves_the_others_alone() -> None:
    x, results, stop = torch.randn(3), [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            results.append(f.gelu(x))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(200):
        pk.explain(f.gelu, x)
    stop.set()
    thread.join()
    assert results and all(torch.equal(r, results[0]) for r in results)


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(pk.BackendError, match="backend 'triton' cannot serve this call: .*float64"):
        f.gelu(torch.randn(3).double(), backend="triton")
    with pytest.raises(pk.BackendError, match="backend 'cuda' cannot serve this call"):
        f.gelu(torch.randn(3), backend="cuda")
    with pytest.raises(
        ValueError, match="backend must be one of auto, cpu, triton, cuda, emulator, reference, not 'gpu'"
    ):
        f.gelu(torch.randn(3), backend="gpu")
    assert issubclass(pk.BackendError, RuntimeError)


def test_nested_tensors_are_served_by_the_reference() -> None:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = f.gelu(nested)
    torch.testing.assert_close(y.values(), torch.nn.functional.gelu(torch.cat(parts)))
    y.values().sum().backward()
    assert "nested" in pk.explain(f.gelu, nested).refused["cpu"]
    with pytest.raises(pk.BackendError, match="nested"):
        f.gelu(nested, backend="cpu")
    assert pk.explain(f.gelu, parts[0]).backend == "cpu"


def test_transforms_are_served_by_the_reference_and_a_named_backend_refuses() -> None:
    x = torch.randn(4)
    torch.testing.assert_close(
        torch.func.grad(lambda v: f.gelu(v).sum())(x), torch.func.grad(lambda v: torch.nn.functional.gelu(v).sum())(x)
    )
    with pytest.raises(pk.BackendError, match=r"torch\.func transform"):
        torch.func.grad(lambda v: f.gelu(v, backend="cpu").sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(f.gelu(dual)).tangent is not None
        with pytest.raises(pk.BackendError, match="forward-mode"):
            f.gelu(dual, backend="cpu")
    found = torch.func.vmap(lambda v: v + (pk.explain(f.gelu, v).backend == "reference"))(x)
    assert torch.equal(found, x + 1)
    compiled = torch.compile(torch.func.grad(lambda v: f.gelu(v).sum()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(lambda v: f.gelu(v).sum())(x))


def _python(code: str, folder: Path = ROOT, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    outcome = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.strip()


def test_environment_names_the_default_backend() -> None:
    code = "import torch, pykernels as pk; x = torch.randn(3); print(pk.explain(pk.functional.gelu, x).backend)"
    assert _python(code, PYKERNELS_BACKEND="reference") == "reference"
    code = (
        "import torch, pykernels as pk\n"
        "try: pk.functional.gelu(torch.randn(3))\n"
        "except pk.BackendError as error: print(error)"
    )
    assert "backend 'cuda' (from PYKERNELS_BACKEND) cannot serve this call" in _python(code, PYKERNELS_BACKEND="cuda")


def test_without_any_extension_the_reference_serves(tmp_path: Path) -> None:
    """A compiler-less install has the same operators and results."""
    shutil.copytree(ROOT / "pykernels", tmp_path / "pykernels", ignore=shutil.ignore_patterns("*.so", "*.torch"))
    code = """
import sys
sys.meta_path = [m for m in sys.meta_path if "editable" not in repr(m).lower()]  # it would find the real modules
import warnings
import torch, pykernels as pk
x = torch.randn(5)
with warnings.catch_warnings(record=True) as said:
    torch.testing.assert_close(pk.functional.gelu(x, backend="reference"), torch.nn.functional.gelu(x))
    assert not said
    torch.testing.assert_close(pk.functional.gelu(x), torch.nn.functional.gelu(x))
    pk.functional.silu(x)
(one,) = said
assert "_cpu_ext is not built" in str(one.message) and "pykernels info" in str(one.message), one
assert str(one.message).endswith("--no-deps ."), one
found = pk.explain(pk.functional.gelu, x)
print(found.backend, "|", found.refused["cpu"], "|", hasattr(torch.ops.pykernels.unary_forward, "cpu"))
"""
    backend, reason, defined = _python(code, tmp_path).split(" | ")
    assert backend == "reference" and defined == "True"
    assert "_cpu_ext is not built" in reason and "pip install" in reason


def test_an_extension_built_for_another_torch_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cpu_ext.torch").write_text("1.0.0\n")
    monkeypatch.setattr(_backends, "__file__", str(tmp_path / "_backends.py"))
    _, reason = _backends._find_cpu("activation")
    assert reason is not None and "built for torch 1.0.0" in reason and "rebuild: pip install" in reason


@pytest.mark.parametrize("seed", [7, -3, 2**63 + 5])
def test_a_reference_takes_the_seeds_that_its_operator_takes(seed: int) -> None:
    """An int, any of 64 bits; a tensor of one; and None, which draws one."""
    x, state, weights = torch.randn(3, 2, 4), torch.zeros(1, 2, 5), [torch.randn(5, 4), torch.randn(5, 5)]
    q = x.unsqueeze(0)
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    calls = {
        "rrelu": lambda m, s: m.rrelu(x, training=True, seed=s),
        "bias_activation_dropout": lambda m, s: m.bias_activation_dropout(x, None, "gelu", 0.5, True, s),
        "attention": lambda m, s: m.attention(q, q, q, dropout_p=0.5, seed=s),
        "rnn": lambda m, s: m.rnn(x, state, weights, zoneout=0.5, training=True, seed=s)[0],
    }
    for name, call in calls.items():
        ours, whole, one = call(pk.functional, seed), call(pk.reference, seed), call(pk.reference, signed)
        assert torch.equal(whole, one), name
        torch.testing.assert_close(ours, whole)
        assert not torch.equal(call(pk.reference, None), call(pk.reference, None)), name


def test_a_reference_takes_a_seed_of_any_integer_dtype() -> None:
    """In int32 the words' products would wrap, and a sampler that draws until it has enough would never end."""
    drawn = [
        pk.reference.uniform_candidate_sampler(torch.tensor([[1]]), 1, 3, True, 9, seed=seed)[0]
        for seed in (3, torch.tensor([3], dtype=torch.int32))
    ]
    assert torch.equal(*drawn)


def test_an_extension_of_other_sources_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pull without a build gives, in place of torch's words about schemas."""

    class Other:
        def define(self, schema: str) -> None:
            raise RuntimeError("Inferred operator schema for a C++ kernel function doesn't match the expected one")

    monkeypatch.setattr(_library, "LIBRARY", Other())
    with pytest.raises(ImportError, match="built from other sources than these; rebuild: pip install"):
        _library.define(ROOM, "no_such(Tensor x) -> Tensor", lambda x: x)


def test_a_torch_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    spec = importlib.util.spec_from_file_location("pykernels_of_old", ROOT / "pykernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(
        ImportError, match=r"needs torch 2\.11 or later, this is 2\.10\.1\+cu128: pip install --upgrade"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_import_error_of_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a module that is not there counts as absent; anything else would hide a bug."""

    def broken(name: str, package: str | None = None) -> object:
        raise ModuleNotFoundError("No module named 'typo'", name="typo")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="typo"):
        _backends._find_cuda("activation", "emulator")


@pytest.mark.parametrize(
    ("architecture", "serves", "refuses"),
    [("80", (80, 86, 89), (75, 90, 100)), ("90a", (90,), (80, 100)), ("90+PTX", (90, 100, 103, 120), (80, 89))],
)
def test_which_gpu_a_build_serves(architecture: str, serves: tuple[int, ...], refuses: tuple[int, ...]) -> None:
    """Machine code serves its own major version, "a" code one chip, PTX everything later."""
    assert all(_runs(architecture, capability) for capability in serves)
    assert not any(_runs(architecture, capability) for capability in refuses)
