"""Activation kernels on Triton and CUDA: random words, alignment, block ends, 64-bit addresses."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from torch import Tensor

from pykernels._cuda import activation as cuda
from pykernels._cuda._extension import Extension
from pykernels._triton import _lib, _parametric
from pykernels._triton import activation as triton_floor
from pykernels.testing import interpreter
from pykernels.testing.compare import assert_equal

import triton  # isort: skip
import triton.language as tl  # isort: skip

KERNELS = tuple(b for b in BACKENDS if b != "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def ops(backend: str) -> Any:
    """The op functions of a floor, without the registry: what is tested here is the floor itself."""
    if backend == "triton":
        return triton_floor
    extension = Extension(f"_{backend}_ext")
    assert extension.available, extension.reason
    names = [name for name in cuda.__all__ if name != "unsupported"]
    return SimpleNamespace(**{name: functools.partial(getattr(cuda, name), extension) for name in names})


def philox_word(seed: int, offset: int) -> int:
    """First output word of Philox4x32-10, in Python integers."""
    low = 0xFFFFFFFF
    key, counter = [seed & low, (seed >> 32) & low], [offset & low, (offset >> 32) & low, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & low, (a >> 32) ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter[0]


def test_philox_known_answer() -> None:
    """The one vector of Random123's known answers with c2 = c3 = 0."""
    assert philox_word(0, 0) == 0x6627E8D5


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("backend", KERNELS)
def test_rrelu_draws_the_documented_words(backend: str, seed: int) -> None:
    x = torch.full((3, 11), -1.0, device=DEVICE)
    y = ops(backend).rrelu_forward(x, 0.0, 1.0, torch.tensor([seed], device=DEVICE))
    words = [philox_word(seed & (2**64 - 1), i) >> 8 for i in range(x.numel())]
    assert (-y * 2.0**24).to(torch.int64).flatten().tolist() == words


@triton.jit
def uniform_kernel(seed_ptr, offset_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, _lib.philox_uniform(tl.load(seed_ptr), tl.load(offset_ptr + i)))


def test_philox_offsets_beyond_32_bits() -> None:
    offsets = [2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1, 0, 1, 2**31]
    out = torch.empty(8, device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    uniform_kernel[(1,)](seed, torch.tensor(offsets, device=DEVICE), out, N=8)
    assert (out * 2.0**24).to(torch.int64).tolist() == [philox_word(7, o) >> 8 for o in offsets]


def view_at(offset: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor `offset` elements into a 16-byte aligned buffer of NaN, and the buffer."""
    buffer = torch.full((offset + length + 16,), float("nan"), dtype=dtype, device=DEVICE)
    assert buffer.data_ptr() % 16 == 0
    return buffer[offset : offset + length], buffer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_alignment(backend: str, dtype: torch.dtype) -> None:
    """In place at each offset from a 16-byte boundary: the same bits, and nothing outside is touched."""
    kernels = ops(backend)
    for length in (1, 7, 8, 9, 31, 300):
        x = torch.randn(length, device=DEVICE).to(dtype)
        expected = kernels.unary_forward(x, "silu", 1.0)
        for offset in range(16 // dtype.itemsize):
            view, buffer = view_at(offset, length, dtype)
            view.copy_(x)
            kernels.unary_(view, "silu", 1.0)
            assert torch.equal(view, expected), (length, offset)
            assert buffer.isnan().sum() == 16 + offset, (length, offset)


@pytest.mark.parametrize("backend", KERNELS)
def test_operands_of_different_alignment(backend: str) -> None:
    """The halves of a fused projection of odd width, a gradient at yet another offset."""
    kernels = ops(backend)
    for width in (3, 8, 33, 129):
        fused, _ = view_at(1, 5 * 2 * width, torch.bfloat16)
        fused.copy_(torch.randn(fused.shape))
        gate, up = fused.view(5, 2 * width).split(width, 1)
        dy, _ = view_at(3, 5 * width, torch.bfloat16)
        dy = dy.copy_(torch.randn(dy.shape)).view(5, width)
        got = kernels.gated_backward(dy, gate, up, "silu", (True, True))
        expected = kernels.gated_backward(dy.clone(), gate.contiguous(), up.contiguous(), "silu", (True, True))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), width


@pytest.mark.parametrize("backend", KERNELS)
def test_block_ends(backend: str) -> None:
    """Lengths around a block's, flat and as rows: where an unmasked path meets a masked one."""
    kernels = ops(backend)
    shapes = [(n,) for n in (1023, 1024, 1025, 2048, 2049, 3073)]
    shapes += [(2, 1024), (3, 1025), (5, 1023), (33, 32), (129, 9), (1025, 1), (1, 1024)]
    for shape in shapes:
        base = torch.randn(*shape[:-1], shape[-1] + 5, device=DEVICE)
        x = base[..., 2 : 2 + shape[-1]]
        dy = torch.randn(shape, device=DEVICE)
        y, dx = kernels.unary_forward(x, "gelu", 1.0), kernels.unary_backward(dy, x, "gelu", 1.0)
        wide = x.double().requires_grad_()
        oracle = F.gelu(wide)
        (gradient,) = torch.autograd.grad(oracle, wide, dy.double())
        narrow = x.clone().requires_grad_()
        own = F.gelu(narrow)
        (own_gradient,) = torch.autograd.grad(own, narrow, dy)
        assert_equal(f"y of {shape}", y, oracle.detach(), own.detach())
        assert_equal(f"dx of {shape}", dx, gradient, own_gradient)


def far_rows(cols: int) -> Tensor:
    """Two rows 2**31 elements apart. The pages between are never touched, so they are never there."""
    rows = torch.empty(2**31 + cols, dtype=torch.bfloat16, device=DEVICE).as_strided((2, cols), (2**31, 1))
    return rows.copy_(torch.randn(2, cols))


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_more_than_2_31_elements_apart(backend: str) -> None:
    kernels = ops(backend)
    x = far_rows(70)
    expected = kernels.unary_forward(x.contiguous(), "gelu", 1.0)
    with interpreter.checks(races=False):  # its record of writers is as large as the extent
        assert torch.equal(kernels.unary_forward(x, "gelu", 1.0), expected)
        kernels.unary_(x, "gelu", 1.0)
        assert torch.equal(x, expected)


@triton.jit
def offset_type_kernel(out_ptr, FLAT: tl.constexpr):
    row, col, whole = _lib.tile(5, 7, FLAT, 1, 1, 8)
    tl.static_assert(col.dtype == tl.int64)
    if not FLAT:
        tl.static_assert(row.dtype == tl.int64)
    tl.store(out_ptr, whole.to(tl.int32))


@pytest.mark.parametrize("flat", [True, False])
def test_tile_offsets_are_64_bit(flat: bool) -> None:
    """A dense tensor of more than 2**31 elements is one row: its offsets are the columns, so those must be int64."""
    out = torch.full((1,), 9, dtype=torch.int32, device=DEVICE)
    offset_type_kernel[(1,)](out, FLAT=flat)
    assert out.item() == 0


def test_grid_of_many_rows_or_columns() -> None:
    """The second axis of a grid ends at 65535: whichever count is larger takes the first."""
    for rows, cols in ((1, 2**40), (2**31, 1), (2**26, 1024), (2, 2**34), (70000, 5000), (65535, 2**20)):
        programs, constants = _lib.tile_rows(rows, cols)
        assert all(p < 65536 for p in programs[1:]) and programs[0] < 2**31, (rows, cols)
        row_tiles = 1 if constants["FLAT"] else programs[constants["ROW_AXIS"]]
        col_tiles = programs[0] if constants["FLAT"] else programs[1 - constants["ROW_AXIS"]]
        assert row_tiles * constants["ROWS"] >= rows and col_tiles * constants["COLS"] >= cols


@pytest.mark.parametrize("shape, channels", [((700, 2), 2), ((2600,), 1), ((5, 3, 700), 3), ((9, 1500), 1500)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_weight_gradient_sums_in_stages(
    backend: str, shape: tuple[int, ...], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles a program and several programs a channel, and bitwise the same every time."""
    monkeypatch.setattr(_parametric, "PROGRAMS", 2 * channels)
    kernels = ops(backend)
    x, dy = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    weight = torch.rand(channels, device=DEVICE)
    run = lambda: kernels.parametric_backward(dy, x, weight, "prelu", (True, True))
    dx, dweight = run()
    wide = weight.double().requires_grad_()
    (oracle,) = torch.autograd.grad(F.prelu(x.double(), wide), wide, dy.double())
    narrow = weight.clone().requires_grad_()
    (own,) = torch.autograd.grad(F.prelu(x, narrow), narrow, dy)
    assert_equal("dweight", dweight, oracle, own, long_sum=True)
    assert all(torch.equal(a, b) for a, b in zip(run(), (dx, dweight), strict=True))
