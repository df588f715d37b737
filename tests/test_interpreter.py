"""The repaired Triton interpreter computes what a GPU does: each fault of the stock one is shown fixed.

The kernels here are made for the purpose and do nothing useful. The same file passes on every supported Triton.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pykernels.testing import interpreter

if torch.cuda.is_available() and not interpreter.is_active():
    pytest.skip("the kernels are compiled for the GPU in this process", allow_module_level=True)
interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

BF16 = torch.bfloat16


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = (x / y).to(x.dtype)
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "less":
        z = (x < y).to(x.dtype)
    elif OP == "scale":
        z = x * 0.1
    elif OP == "fill":
        z = tl.full((BLOCK,), 0.1, x.dtype)
    tl.store(out_ptr + i, z)


OPERATIONS = ("add", "sub", "mul", "div", "neg", "abs", "maximum", "minimum", "where", "less", "scale", "fill")


@pytest.mark.parametrize("op", OPERATIONS)
def test_bf16_arithmetic_is_torchs(op):
    torch.manual_seed(0)
    x, y, out = torch.randn(64).to(BF16), torch.randn(64).to(BF16), torch.empty(64, dtype=BF16)
    arithmetic_kernel[(1,)](x, y, out, OP=op, BLOCK=64)
    expected = {
        "add": lambda: x + y, "sub": lambda: x - y, "mul": lambda: x * y, "div": lambda: x / y, "neg": lambda: -x,
        "abs": x.abs, "maximum": lambda: torch.maximum(x, y), "minimum": lambda: torch.minimum(x, y),
        "where": lambda: torch.minimum(x, y), "less": lambda: (x < y).to(BF16),
        "scale": lambda: x * torch.tensor(0.1, dtype=BF16), "fill": lambda: torch.full_like(x, 0.1),
    }[op]()  # fmt: skip
    assert torch.equal(out, expected)


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    if ROUNDING is not None:
        x = x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(out_ptr + i, x, mask=i < n)


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_casts_to_bf16_round_to_nearest_even(rounding):
    bits = torch.arange(0, 2**32, 2**32 // 4093, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x00000001], dtype=torch.int32)
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    out = torch.empty(x.shape, dtype=BF16)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), ROUNDING=rounding, BLOCK=1024)
    assert torch.equal(out.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(out[number].view(torch.int16), x.to(BF16)[number].view(torch.int16))


def test_cast_to_bf16_rounds_to_zero_when_asked():
    x = torch.tensor([1.999, -1.999, 3e-39])
    out = torch.empty(3, dtype=BF16)
    copy_kernel[(1,)](x, out, 3, ROUNDING="rtz", BLOCK=4)
    assert torch.equal(out.float(), (x.view(torch.int32) & -65536).view(torch.float32))


@pytest.mark.parametrize("source", [torch.float16, torch.int32, torch.float32])
def test_casts_through_bf16(source):
    x = torch.arange(-300, 300, 7).to(source)
    there, back = torch.empty(x.shape, dtype=BF16), torch.empty(x.shape, dtype=source)
    copy_kernel[(1,)](x, there, x.numel(), ROUNDING=None, BLOCK=128)
    copy_kernel[(1,)](there, back, x.numel(), ROUNDING=None, BLOCK=128)
    assert torch.equal(there, x.to(BF16))
    assert torch.equal(back, x.to(BF16).to(source))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


def dot(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32)
    dot_kernel[(1,)](a, b, out, PRECISION=precision, M=a.shape[0], N=b.shape[1], K=a.shape[1])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_dot_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    torch.testing.assert_close(dot(a, b), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_dot_precisions_are_told_apart():
    """Ten mantissa bits for tf32, the split forms nearly float32, and each visibly different from the next."""
    torch.manual_seed(0)
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    exact = a.double() @ b.double()
    error = {p: (dot(a, b, p) - exact).abs().max().item() for p in ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")}
    assert 1e-3 < error["tf32"] < 3e-2
    assert 2e-6 < error["bf16x3"] < 1e-3
    assert error["tf32x3"] < 3e-5 and error["bf16x6"] < 2e-5 and error["ieee"] < 2e-5


def test_dot_refuses_what_a_gpu_does_not_compile():
    with pytest.raises(Exception, match="K >= 16"):
        dot(torch.randn(16, 8), torch.randn(8, 16))
    with pytest.raises(interpreter.UnsupportedError, match="float64"):
        dot(torch.randn(16, 16).double(), torch.randn(16, 16).double())


@triton.jit
def combine_max(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def combine_affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def reduce_kernel(x_ptr, out_ptr, index_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + r[:, None] * COLUMNS + c[None, :])
    if OP == "sum":
        tl.store(out_ptr + r, tl.sum(x, 1))
    elif OP == "max":
        tl.store(out_ptr + r, tl.max(x, 1))
    elif OP == "min":
        tl.store(out_ptr + r, tl.min(x, 1))
    elif OP == "argmax":
        value, index = tl.max(x, 1, return_indices=True)
        tl.store(out_ptr + r, value)
        tl.store(index_ptr + r, index)
    elif OP == "custom":
        tl.store(out_ptr + r, tl.reduce(x, 1, combine_max))
    elif OP == "cumsum":
        tl.store(out_ptr + r[:, None] * COLUMNS + c[None, :], tl.cumsum(x, 1))
    elif OP == "scan":
        _, h = tl.associative_scan((x, x), 1, combine_affine)
        tl.store(out_ptr + r[:, None] * COLUMNS + c[None, :], h)
    elif OP == "flip":
        tl.store(out_ptr + r[:, None] * COLUMNS + c[None, :], tl.flip(x, 1))
    elif OP == "sort":
        tl.store(out_ptr + r[:, None] * COLUMNS + c[None, :], tl.sort(x, 1))


def reduce(x: torch.Tensor, op: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    wide = op in ("cumsum", "scan", "flip", "sort")
    out = torch.empty(x.shape if wide else (rows,), dtype=x.dtype)
    index = torch.empty(rows, dtype=torch.int32)
    reduce_kernel[(1,)](x, out, index, OP=op, ROWS=rows, COLUMNS=columns)
    return out, index


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_reductions_and_scans(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 16).to(dtype)
    close = {"rtol": 2**-7, "atol": 2**-7} if dtype is BF16 else {}
    torch.testing.assert_close(reduce(x, "sum")[0], x.sum(1), **close)
    torch.testing.assert_close(reduce(x, "cumsum")[0], x.double().cumsum(1).to(dtype), **close)
    for op, expected in (("max", x.amax(1)), ("min", x.amin(1)), ("custom", x.amax(1)), ("argmax", x.amax(1))):
        assert torch.equal(reduce(x, op)[0], expected), op
    assert torch.equal(reduce(x, "argmax")[1].long(), x.argmax(1))
    assert torch.equal(reduce(x, "flip")[0], x.flip(1))
    assert torch.equal(reduce(x, "sort")[0], x.sort(1).values)
    h, rows = torch.zeros(4, dtype=dtype), []
    for t in range(16):  # each step rounded, as in the kernel
        h = x[:, t] if t == 0 else h * x[:, t] + x[:, t]
        rows.append(h)
    assert torch.equal(reduce(x, "scan")[0], torch.stack(rows, 1))


@triton.jit
def nan_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, y))
    tl.store(out_ptr + BLOCK + i, tl.minimum(x, y))
    tl.store(out_ptr + 2 * BLOCK + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 3 * BLOCK + i, tl.clamp(x, -1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_maximum_and_minimum_drop_nan_unless_told(dtype):
    x = torch.tensor([math.nan, 1.0, math.nan, 2.0]).to(dtype)
    y = torch.tensor([3.0, math.nan, math.nan, -4.0]).to(dtype)
    out = torch.empty(4, 4, dtype=dtype)
    nan_kernel[(1,)](x, y, out, BLOCK=4)
    nan = math.nan
    expected = [[3, 1, nan, 2], [3, 1, nan, -4], [nan, nan, nan, 2], [-1, 1, -1, 1]]
    assert torch.equal(out.float().nan_to_num(99.0), torch.tensor(expected, dtype=torch.float32).nan_to_num(99.0))


def test_row_maximum_drops_nan_and_warns_of_nothing(recwarn):
    x = torch.tensor([[math.nan] * 4, [1.0, math.nan, 3.0, 2.0]])
    out, _ = reduce(x, "max")
    assert out[0].isnan() and out[1] == 3
    assert not recwarn.list


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


def test_fma_rounds_once():
    x = torch.full((4,), 1 + 2**-12)
    out = torch.empty(4)
    fma_kernel[(1,)](x, x, -(x * x), out, BLOCK=4)
    assert torch.equal(out, torch.full((4,), 2.0**-24))


@triton.jit
def arguments_kernel(out_ptr, low, high, flag, alpha):
    total = 0
    for i in range(low, high):
        total += i
    for i in tl.range(low, high, num_stages=2):
        total += i
    if flag:
        total += 1000
    tl.store(out_ptr, total)
    tl.store(out_ptr + 1, (alpha * alpha * 1e9).to(tl.int32))


@pytest.mark.parametrize("flag", [True, False])
def test_runtime_ranges_bools_and_floats(flag):
    out = torch.empty(2, dtype=torch.int32)
    arguments_kernel[(1,)](out, 3, 7, flag, 0.1)
    alpha = torch.tensor(0.1)
    assert out.tolist() == [2 * (3 + 4 + 5 + 6) + 1000 * flag, int(alpha * alpha * 1e9)]


@triton.jit
def libdevice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, libdevice.tanh(x))
    tl.store(out_ptr + BLOCK + i, libdevice.erf(x))
    tl.store(out_ptr + 2 * BLOCK + i, libdevice.expm1(x))
    tl.store(out_ptr + 3 * BLOCK + i, libdevice.log1p(tl.abs(x)))
    tl.store(out_ptr + 4 * BLOCK + i, libdevice.pow(tl.abs(x), 1.5))
    tl.store(out_ptr + 5 * BLOCK + i, tl.where(libdevice.isnan(x), 1.0, tl.erf(x)))


def test_libdevice_is_exact_to_an_ulp():
    x = torch.tensor([0.0, -0.5, 1e-6, 3.0, -20.0, math.inf, -math.inf, math.nan])
    out = torch.empty(6, 8)
    libdevice_kernel[(1,)](x, out, BLOCK=8)
    d = x.double()
    last = torch.where(x.isnan(), 1.0, torch.erf(d))
    expected = torch.stack([d.tanh(), d.erf(), d.expm1(), d.abs().log1p(), d.abs() ** 1.5, last])
    torch.testing.assert_close(out, expected.float(), rtol=2**-23, atol=0, equal_nan=True)


@triton.jit
def unmapped_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), libdevice.cyl_bessel_i0(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def half_tanh_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), libdevice.tanh(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def assembly_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr + i, y)


def test_what_cannot_be_interpreted_says_so():
    with pytest.raises(interpreter.UnsupportedError, match=r"libdevice\.cyl_bessel_i0 .*mapped are: .*tanh"):
        unmapped_kernel[(1,)](torch.ones(8), BLOCK=8)
    with pytest.raises(Exception, match=r"libdevice\.tanh takes .* fp16"):
        half_tanh_kernel[(1,)](torch.ones(8, dtype=torch.float16), BLOCK=8)
    with pytest.raises(interpreter.UnsupportedError, match=r"tanh\.approx.*constexpr"):
        assembly_kernel[(1,)](torch.ones(8), BLOCK=8)


def keep_large(configs, named_args, **kwargs):
    return [c for c in configs if c.kwargs["BLOCK"] >= 32]


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}) for b in (16, 32, 64)], key=["n"],
    prune_configs_by={"early_config_prune": keep_large},
)  # fmt: skip
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned_kernel(out_ptr, n, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, BLOCK + EVEN, mask=i < n)


def test_autotune_takes_the_first_configuration_left_by_pruning():
    out = torch.zeros(70, dtype=torch.int32)
    tuned_kernel[lambda meta: (triton.cdiv(70, meta["BLOCK"]),)](out, 70)
    assert (out == 32).all()
    tuned_kernel[lambda meta: (triton.cdiv(64, meta["BLOCK"]),)](out, 64)
    assert (out[:64] == 33).all()


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=600,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip


FRESH = """
import sys, types
package = sys.modules["pykernels"] = types.ModuleType("pykernels")
package.__path__ = ["pykernels"]  # without the registry, which looks for Triton itself
from pykernels.testing import interpreter
assert not interpreter.is_active() and "triton" not in sys.modules
interpreter.install()
interpreter.install()
assert interpreter.is_active()
from pykernels._triton import _lib
assert _lib.interpreting()
"""


def test_install_comes_before_triton_or_says_so():
    fresh = in_a_new_process(FRESH)
    assert fresh.returncode == 0, fresh.stderr
    code = "import triton\nfrom pykernels.testing import interpreter\ninterpreter.install()"
    late = in_a_new_process(code)
    assert "RuntimeError: triton was imported before" in late.stderr
    early = in_a_new_process(code, TRITON_INTERPRET="1")
    assert early.returncode == 0, early.stderr


def test_inductor_compiles_for_the_cpu_beside_the_interpreter():
    """torch.compile imports triton too; its C++ code for the CPU must not notice."""

    def function(x):
        return torch.nn.functional.gelu(x).sum(1) + x.tanh().mean()

    x = torch.randn(16, 16, requires_grad=True)
    result = torch.compile(function)(x)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    expected = function(x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
    out = torch.empty(16)
    copy_kernel[(1,)](result.detach(), out, 16, ROUNDING=None, BLOCK=16)
    assert torch.equal(out, result)
