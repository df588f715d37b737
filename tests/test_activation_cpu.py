"""The native CPU activations, beyond the contract: instruction sets, accuracy of every functor, rows without copies."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels  # noqa: F401  (defines the operators; a missing extension is an error here, not a skip)
from pykernels._cpu.activation import ISA, unsupported
from pykernels.testing.compare import assert_equal

ROOT = Path(__file__).parents[1]
OPS = torch.ops.pykernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALPHA = {"leaky_relu": 0.2, "elu": 1.5, "swish": 1.702}
SAVES_OUTPUT = ("sigmoid", "tanh", "relu")


def _gelu64(x: Tensor) -> Tensor:
    """x Phi(x) with erfc, exact in the tails."""
    return x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5))


UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # truth in float64, torch's own
    "sigmoid": (torch.sigmoid, torch.sigmoid),
    "tanh": (torch.tanh, torch.tanh),
    "relu": (F.relu, F.relu),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "elu": (lambda x: F.elu(x, 1.5), lambda x: F.elu(x, 1.5)),
    "gelu": (_gelu64, F.gelu),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (F.silu, F.silu),
    "swish": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: x * torch.sigmoid(1.702 * x)),
}


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


def kernel(name: str, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    alpha = ALPHA.get(name, 1.0)
    y = OPS.unary_forward.cpu(x, name, alpha)
    return y, OPS.unary_backward.cpu(dy, y if name in SAVES_OUTPUT else x, name, alpha)


def sweeps() -> Iterator[tuple[str, Tensor]]:
    dense = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    yield "[-40,40]", dense
    yield "[-1,1]", dense / 40
    yield "x5", 5 * torch.randn(20_001, dtype=torch.float64)
    yield "x50", 50 * torch.randn(20_001, dtype=torch.float64)
    magnitudes = torch.logspace(-44, 30, 5001, dtype=torch.float64)  # denormals to nearly the largest float32
    yield "magnitudes", torch.cat((magnitudes, -magnitudes))
    yield "negative tail", torch.linspace(-12, -6, 5001, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", UNARY)
def test_accuracy_of_every_functor(name: str, dtype: torch.dtype) -> None:
    truth, own = UNARY[name]
    for label, values in sweeps():
        if dtype is torch.float16:
            values = values[values.abs() < 6e4]
        x = values.to(dtype)
        dy = torch.randn(x.shape).to(dtype)
        expected = with_gradient(truth, x.double(), dy)
        for what, ours, o, e in zip(("y", "dx"), kernel(name, x, dy), expected, with_gradient(own, x, dy), strict=True):
            if dtype is torch.float64:  # the oracle is torch itself here, whose own rounding 1 - y^2 magnifies
                torch.testing.assert_close(ours, o, rtol=1e-11, atol=1e-14 * float(dy.abs().max()))
            else:
                assert_equal(f"{name} {label} {what}", ours, o, e)


def test_gelu_keeps_its_digits_in_the_negative_tail() -> None:
    """1 + erf(x / sqrt 2) cancels below -1; here the relative error stays at a few roundings."""
    x = torch.linspace(-13.0, -1.0, 10_001)
    oracle = _gelu64(x.double())
    relative = ((OPS.unary_forward.cpu(x, "gelu", 1.0).double() - oracle) / oracle).abs().max()
    assert relative < 6e-7
    assert ((F.gelu(x).double() - oracle) / oracle).abs().max() > 0.5  # what it is measured against


@pytest.mark.parametrize("name", UNARY)
def test_nan_of_any_payload_and_infinities(name: str) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, 0x7FC001FF, -4194304], dtype=torch.int32)
    x = bits.view(torch.float32).repeat(11)  # more than one block, and a tail
    assert OPS.unary_forward.cpu(x, name, ALPHA.get(name, 1.0)).isnan().all()
    x = torch.tensor([math.inf, -math.inf]).repeat(33)
    ours, oracle = OPS.unary_forward.cpu(x, name, ALPHA.get(name, 1.0)), UNARY[name][0](x.double()).float()
    torch.testing.assert_close(ours, oracle, equal_nan=True, rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_length_and_nothing_outside(dtype: torch.dtype) -> None:
    """Lengths 1..130 at every offset of a few: each element as in one long call, and the guard bands untouched."""
    x, dy = torch.randn(140).to(dtype), torch.randn(140).to(dtype)
    y, dx = kernel("gelu", x, dy)
    for n in range(1, 131):
        start = n % 9
        part = x[start : start + n]
        assert torch.equal(OPS.unary_forward.cpu(part, "gelu", 1.0), y[start : start + n])
        assert torch.equal(OPS.unary_backward.cpu(dy[start : start + n], part, "gelu", 1.0), dx[start : start + n])
        band = torch.full((n + 128,), 7.0, dtype=dtype)
        band[64 : 64 + n] = part
        OPS.unary_.cpu(band[64 : 64 + n], "gelu", 1.0)  # in place: what is written is seen
        assert torch.equal(band[64 : 64 + n], y[start : start + n])
        assert (band[:64] == 7).all() and (band[64 + n :] == 7).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_results_written_past_the_caches(dtype: torch.dtype) -> None:
    """From 32 MiB on results are streamed, where a row's alignment allows it: the same bits as in two halves."""
    count = 2**25 // dtype.itemsize + 7001
    x, dy = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    half = count // 2  # the second half starts at an odd element
    for whole, first, second in zip(
        kernel("silu", x, dy), kernel("silu", x[:half], dy[:half]), kernel("silu", x[half:], dy[half:]), strict=True
    ):
        assert torch.equal(whole[:half], first) and torch.equal(whole[half:], second)
    rows, cols = 512, 2 * (2**16 // dtype.itemsize + 12)  # a half's row is no multiple of the vector's size
    x, dy = x[: rows * cols // 2].repeat(2).view(rows, cols), dy[: rows * cols // 2].view(rows, cols // 2)
    dx = OPS.glu_backward.cpu(dy, x, -1, "silu", True)
    parts = [OPS.glu_backward.cpu(a, b, -1, "silu", True) for a, b in zip(dy.chunk(2), x.chunk(2), strict=True)]
    assert dx.nbytes > 2**25 and torch.equal(dx, torch.cat(parts))
    expanded = x[:256].repeat(4, 1)
    y = OPS.glu_forward.cpu(expanded, -1, "silu", True)
    assert y.nbytes > 2**25 and torch.equal(y[:256], OPS.glu_forward.cpu(x[:256], -1, "silu", True))


def copies(call: Callable[[], object]) -> int:
    """How often torch's copy kernel ran inside `call`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


def test_rows_are_read_in_place() -> None:
    fused = torch.randn(6, 4, 128)
    gate, up = fused.chunk(2, -1)
    dy = torch.randn(6, 4, 64)
    expected = F.silu(gate) * up
    assert copies(lambda: OPS.gated_forward.cpu(gate, up, "silu")) == 0
    assert copies(lambda: OPS.gated_backward.cpu(dy, gate, up, "silu", [True, True])) == 0
    assert copies(lambda: OPS.unary_forward.cpu(gate, "gelu", 1.0)) == 0
    assert copies(lambda: OPS.unary_backward.cpu(dy[:1, :1].expand(6, 4, 64), gate, "gelu", 1.0)) == 0  # row stride 0
    assert copies(lambda: OPS.glu_forward.cpu(fused[::2], 1, "silu", True)) == 0
    torch.testing.assert_close(OPS.gated_forward.cpu(gate, up, "silu"), expected)
    # what has no rows is copied, once, and only that operand
    expanded = torch.randn(()).expand(6, 4, 64)
    assert copies(lambda: OPS.gated_backward.cpu(expanded, gate, up, "silu", [True, True])) == 1
    assert copies(lambda: OPS.unary_forward.cpu(torch.randn(64, 32).t(), "gelu", 1.0)) == 0  # dense: order is kept
    assert OPS.unary_forward.cpu(torch.randn(64, 32).t(), "gelu", 1.0).stride() == (1, 32)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    x, dy, weight = torch.randn(300, 7, 41), torch.randn(300, 7, 41), torch.rand(7)

    def everything() -> list[Tensor]:
        return [
            OPS.unary_forward.cpu(x, "gelu", 1.0),
            OPS.glu_backward.cpu(dy[..., :20], x[..., :40], -1, "silu", True),
            *OPS.parametric_backward.cpu(dy, x, weight, "swish", [True, True]),
            *OPS.parametric_backward.cpu(dy, x, weight[:1], "prelu", [True, True]),
            OPS.rrelu_forward.cpu(x, 0.1, 0.3, torch.tensor([11])),
            *OPS.fused_backward.cpu(dy, x, x[0, 0], torch.tensor([11]), "gelu", 1.0, 0.2, [True, True, True]),
        ]

    first = everything()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


def _philox_word(seed: int, offset: int) -> int:
    """Philox4x32-10 in plain Python: first output word for counter (offset, 0, 0), key = seed."""
    low = 2**32 - 1
    c = [offset & low, offset >> 32, 0, 0]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_philox_words(dtype: torch.dtype) -> None:
    """slope = u exactly (lower 0, upper 1, x = -1): the top 24 bits of every word, as far as the dtype holds them."""
    assert _philox_word(0, 0) == 0x6627E8D5  # Random123's known answer for a zero counter and key
    seed = 0xFEDC_BA98_7654_3210
    tensor = torch.tensor([seed - 2**64])
    y = OPS.rrelu_forward.cpu(torch.full((5, 27), -1.0, dtype=dtype), 0.0, 1.0, tensor)
    words = torch.tensor([_philox_word(seed, i) >> 8 for i in range(135)], dtype=torch.float64)
    assert torch.equal(-y.flatten(), (words * 2.0**-24).to(dtype))
    rows = torch.full((5, 54), -1.0, dtype=dtype)[:, :27]  # the offset is logical, whatever the strides
    assert torch.equal(OPS.rrelu_forward.cpu(rows, 0.0, 1.0, tensor), y)
    assert torch.equal(OPS.rrelu_backward.cpu(torch.full_like(y, -1.0), rows, 0.0, 1.0, tensor), y)


_PROBE = """
import sys, torch, pykernels
from pykernels._cpu.activation import ISA, unsupported
print(ISA, unsupported(torch.ones(1)), sep="|")
x, results = torch.linspace(-9, 9, 1003), []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    v = x.to(dtype)
    for name in ("sigmoid", "tanh", "elu", "gelu", "gelu_tanh", "silu"):
        y = torch.ops.pykernels.unary_forward.cpu(v, name, 1.0)
        dx = torch.ops.pykernels.unary_backward.cpu(v, y if name in ("sigmoid", "tanh") else v, name, 1.0)
        results += [y, dx]
    results.append(torch.ops.pykernels.rrelu_forward.cpu(-v.abs(), 0.0, 1.0, torch.tensor([3])))
    gate, up = v[:1002].view(2, 501).unbind(0)
    results += torch.ops.pykernels.gated_backward.cpu(up, gate, up, "gelu", [True, True])
    results += torch.ops.pykernels.parametric_backward.cpu(gate, up, torch.ones(1, dtype=dtype), "swish", [True, True])
    wide, bias, seed = v[:1002].view(3, 334), v[:334] / 9, torch.tensor([-3])
    for name, dy in (("gelu", wide.flip(1)), ("swiglu", wide[:, ::2])):
        results.append(torch.ops.pykernels.fused_forward.cpu(wide, bias, seed, name, 1.0, 0.3))
        results += torch.ops.pykernels.fused_backward.cpu(dy, wide, bias, seed, name, 1.0, 0.3, [True, True, True])
torch.save(results, sys.argv[1])
"""


def probe(capability: str, results: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _PROBE, str(results)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """AVX2 and AVX-512 (where the processor has it) are both run, whatever this process uses."""
    assert ISA in ("avx2", "avx512")
    found = []
    for capability in ("avx2", "avx512") if ISA == "avx512" else ("avx2",):
        done = probe(capability, tmp_path / capability)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{capability}|None"
        found.append(torch.load(tmp_path / capability))
    for a, b in zip(found[0], found[-1], strict=True):
        eps = torch.finfo(a.dtype).eps  # one rounding apart where the two evaluate differently, two in fast forms
        torch.testing.assert_close(a, b, rtol=16 * eps if a.dtype.itemsize > 2 else 2 * eps, atol=8 * eps)


def test_no_avx2_is_refused(tmp_path: Path) -> None:
    done = probe("default", tmp_path / "none")
    assert done.stdout.startswith("|the native CPU kernels need AVX2; torch reports the CPU capability ")
    assert done.returncode != 0 and "need AVX2" in done.stderr  # the operator itself refuses too, before it computes
    assert unsupported(torch.ones(1)) is None
    assert "complex64" in str(unsupported(torch.ones(1, dtype=torch.complex64)))
    assert "meta" in str(unsupported(torch.ones(1, device="meta")))


def test_schemas_may_come_after_the_extension() -> None:
    """C++ adds implementations to operators that Python defines; either order works."""
    import pykernels._cpu_ext as built

    code = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('_cpu_ext', {built.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "library = torch.library.Library('pykernels', 'DEF')\n"
        "library.define('unary_forward.cpu(Tensor x, str activation, float alpha) -> Tensor')\n"
        "print(float(torch.ops.pykernels.unary_forward.cpu(torch.ones(3), 'relu', 1.0).sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3.0", done.stderr


def test_instruction_sets_share_no_function() -> None:
    """Of a function that several units define weakly the linker keeps one: it could be another instruction set's."""
    work = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.version_info.major}{sys.version_info.minor}" / "cpu"
    objects = sorted(work.glob("*.cpp.o"))
    if not objects:
        pytest.skip(f"no object files in {work.relative_to(ROOT)}: the extension was not built in this checkout")
    found: dict[str, set[str]] = {}
    for path in objects:
        unit = path.name.removesuffix(".cpp.o")
        isa = unit.rpartition("_")[2] if unit.endswith(("_avx2", "_avx512", "_amx")) else "none"
        lines = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        symbols = [line[17:] for line in lines]
        for symbol in symbols:
            if symbol[0] in "Wu":
                found.setdefault(symbol[2:], set()).add(isa)
        if unit.startswith("activation_a"):
            assert [s[2:] for s in symbols if s[0] in "TDB"] == [f"pk::activation_kernels_{isa}()"]
    assert {"none"} in found.values(), "nothing was read"
    assert not {name: sets for name, sets in found.items() if len(sets) > 1}


def test_direct_calls_are_checked() -> None:
    """The operators guard memory themselves: they can be called without the public functions."""
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="up has shape"):
        OPS.gated_forward.cpu(x, x[:2], "silu")
    with pytest.raises(RuntimeError, match="unknown activation 'mish'"):
        OPS.unary_forward.cpu(x, "mish", 1.0)
    with pytest.raises(RuntimeError, match="must be even"):
        OPS.glu_forward.cpu(x[:, :5], 1, "silu", True)
    with pytest.raises(RuntimeError, match="weight has 3 elements"):
        OPS.parametric_forward.cpu(x, torch.ones(3), "prelu")
    with pytest.raises(NotImplementedError, match="float32, float64, bfloat16 or float16"):
        OPS.unary_forward.cpu(torch.ones(3, dtype=torch.int32), "relu", 1.0)
    with pytest.raises(RuntimeError, match="single memory location"):
        OPS.unary_.cpu(torch.ones(1).expand(4), "relu", 1.0)
    with pytest.raises(RuntimeError, match="seed must be one int64"):
        OPS.rrelu_forward.cpu(x, 0.1, 0.3, torch.ones(2))
    with pytest.raises(RuntimeError, match="bias has shape"):
        OPS.fused_forward.cpu(x, torch.ones(5), None, "gelu", 1.0, 0.0)
    with pytest.raises(RuntimeError, match="last size of x must be even"):
        OPS.fused_forward.cpu(x[:, :5], None, None, "swiglu", 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"p must be in \[0, 1\)"):
        OPS.fused_forward.cpu(x, None, None, "gelu", 1.0, 1.0)
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        OPS.fused_forward.cpu(x, None, None, "gelu", 1.0, 0.5)
    with pytest.raises(RuntimeError, match="fused_backward: dy is"):
        OPS.fused_backward.cpu(x, x, None, None, "swiglu", 1.0, 0.0, [True, False, False])
