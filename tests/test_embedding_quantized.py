"""What is particular to packed tables: torch's own bytes, the same bytes from every backend, strictness, modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels import _errors
from pykernels.ops.embedding import quantized
from pykernels.testing.run import check_case
from pykernels.testing.spec import load

F = pk.functional
PREPACK = {8: torch.ops.quantized.embedding_bag_byte_prepack, 4: torch.ops.quantized.embedding_bag_4bit_prepack}
UNPACK = {8: torch.ops.quantized.embedding_bag_byte_unpack, 4: torch.ops.quantized.embedding_bag_4bit_unpack}
BAG = {
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
}
KERNELS = tuple(b for b in BACKENDS if b != "cpu")
both = pytest.mark.parametrize("bits", (8, 4))


def table(rows: int, size: int, scale: float = 1.0) -> Tensor:
    """Ordinary rows, and at the end one far from zero, one with an outlier, a constant one."""
    weight = torch.randn(rows, size) * scale
    weight[-3] = weight[-3] * 1e-3 + 100 * scale
    weight[-2, 0] *= 1000
    weight[-1] = 0.7 * scale
    return weight


@both
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_bytes_are_torchs(bits: int, dtype: torch.dtype) -> None:
    for size in (2, 30, 64, 130):
        for scale in (1e-6, 0.01, 30.0):
            weight = table(64, size, scale).to(dtype)
            theirs = PREPACK[bits](weight)
            assert torch.equal(pk.reference.quantize_rows(weight, bits), theirs)
            assert torch.equal(F.quantize_rows(weight.to(DEVICE), bits).cpu(), theirs)
            found = F.dequantize_rows(theirs.to(DEVICE), bits).cpu()
            torch.testing.assert_close(found, UNPACK[bits](theirs), rtol=1e-6, atol=1e-6 * float(weight.abs().max()))


@both
def test_bags_are_torchs(bits: int) -> None:
    """torch's operator on what we packed, and ours on what torch packed."""
    weight, ids, offsets = table(50, 96), torch.randint(0, 50, (200,)), torch.tensor([0, 0, 7, 150])
    scale, packed = torch.randn(200), F.quantize_rows(weight, bits)
    for index, starts in ((ids, offsets), (ids.int(), offsets.int()), (ids.view(8, 25), None)):
        weights = scale.view(index.shape)
        ours = F.embedding_bag_quantized(PREPACK[bits](weight), index, starts, bits=bits, per_sample_weights=weights)
        theirs = BAG[bits](packed, index, starts, per_sample_weights=weights.view(-1) if starts is not None else None)
        if starts is None:
            ours = F.embedding_bag_quantized(packed, index, bits=bits)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)  # sums of 143 rows of up to 100


def _hard(size: int) -> Tensor:
    """Rows that are not finite, zeros of both signs, ranges that overflow, the least of numbers."""
    inf, nan = torch.inf, torch.nan
    weight = torch.randn(14, size)
    for row, value in enumerate((nan, inf, -inf, 3e38, 7e4, -7e4, 1e-40, 0.0, -0.0)):
        weight[row, size // 2] = value
    weight[9], weight[10], weight[11] = inf, nan, -0.0
    weight[3, 0], weight[12] = -3e38, weight[12].clamp(max=0)
    weight[12, 0] = 0
    return weight


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same_bytes(backend: str, bits: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for size in (2, 34, 128) if bits == 4 else (1, 2, 33, 128):
            for weight in (_hard(size).to(dtype), table(5, size, 1e-9).to(dtype)):
                expected = pk.reference.quantize_rows(weight, bits)
                assert torch.equal(F.quantize_rows(weight.to(DEVICE), bits, backend=backend).cpu(), expected)


@both
def test_a_row_that_is_not_finite_is_nan(bits: int) -> None:
    weight = _hard(8)
    rows = F.dequantize_rows(F.quantize_rows(weight, bits), bits)
    lost = ~weight.isfinite().all(1)
    if bits == 4:
        lost |= weight.amin(1).abs() > 65504  # bias and scale are halves
    lost[3] = True  # the range overflows
    assert torch.equal(rows.isnan().all(1), lost) and torch.equal(rows.isnan().any(1), lost)
    step = (weight.amax(1) - weight.amin(1))[:, None] / (2**bits - 1)
    inside = ((rows - weight).abs() <= step * 0.51 + 1e-3)[~lost]
    assert inside.all()


@both
def test_constant_rows_are_kept(bits: int) -> None:
    for value in (0.0, -2.5, 3.3, 1e-5):
        weight = torch.full((3, 6), value)
        kept = F.dequantize_rows(F.quantize_rows(weight, bits), bits)
        torch.testing.assert_close(kept, weight, rtol=1e-7 if bits == 8 else 1e-3, atol=0 if bits == 8 else 1e-6)


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_alignment(backend: str, bits: int) -> None:
    """Rows of a wider buffer of 255s, from every offset: the same as from a table of its own, and no byte beside it."""
    packed = F.quantize_rows(table(9, 24), bits).to(DEVICE)
    ids, width = torch.randint(0, 9, (4, 6), device=DEVICE), packed.shape[1]
    expected = F.embedding_bag_quantized(packed, ids, bits=bits, backend=backend)
    for offset in (0, 1, 2, 8):
        for stride in (width, width + 3, 40):
            buffer = torch.full((9 * stride + offset + 16,), 255, dtype=torch.uint8, device=DEVICE)
            view = buffer.as_strided((9, width), (stride, 1), offset)
            view.copy_(packed)
            assert torch.equal(F.embedding_bag_quantized(view, ids, bits=bits, backend=backend), expected)
    apart = packed.t().contiguous().t()
    assert torch.equal(F.embedding_bag_quantized(apart, ids, bits=bits, backend=backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_more_than_2_31_bytes_apart(backend: str) -> None:
    page = F.quantize_rows(torch.tensor([[1.0, 3.0, 2.0, 1.0]])).to(DEVICE)
    packed = page.view(-1).as_strided((2**28, 12), (0, 1))
    far = torch.empty(2**31 + 64, dtype=torch.uint8, device=DEVICE).as_strided((2, 12), (2**31 + 8, 1))
    far.copy_(page.expand(2, 12))
    expected = torch.tensor([[1.0, 3.0, 2.0, 1.0]], device=DEVICE)
    for view, id in ((packed, 2**28 - 1), (far, 1)):
        ids = torch.tensor([id], device=DEVICE)
        found = quantized.embedding_bag_quantized_forward[backend](
            view, ids, None, None, 8, "none", False, -1, torch.float32, 0
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@both
@pytest.mark.parametrize("backend", KERNELS)
def test_invalid_ids_are_skipped_and_reported(backend: str, bits: int) -> None:
    """What a GPU does, where nobody looks before the kernel runs."""
    weight = torch.randn(11, 6, device=DEVICE)
    packed, ids = F.quantize_rows(weight, bits), torch.tensor([3, 0, 11, 3, -1, 10], device=DEVICE)
    rows = F.dequantize_rows(packed, bits)
    rows = torch.where(((ids >= 0) & (ids < 11))[:, None], rows[ids.clamp(0, 10)], 0)
    what, offsets = _errors.code("lookup"), torch.tensor([0, 2, 3], device=DEVICE)
    for starts, mode, expected in (
        (None, "none", rows),
        (offsets, "sum", torch.stack([rows[:2].sum(0), rows[2], rows[3:].sum(0)])),
        (offsets, "mean", torch.stack([rows[:2].sum(0) / 2, rows[2], rows[3:].sum(0) / 2])),
    ):
        run = quantized.embedding_bag_quantized_forward[backend]
        out = run(packed, ids, starts, None, bits, mode, False, -1, torch.float32, what)
        torch.testing.assert_close(out, expected)
        with pytest.raises(IndexError, match=r"input\[[24]\] \(counted flat\) is (11|-1), which is not in \[0, 11\)"):
            pk.check_errors()
    run(packed, ids, offsets - 1, None, bits, "sum", False, -1, torch.float32, what)
    with pytest.raises((IndexError, ValueError)):
        pk.check_errors()


WRONG: dict[str, tuple[type[Exception], str, Callable[..., Any]]] = {
    "bits": (ValueError, "'bits' must be 8 or 4, not 2", lambda p, i: F.embedding_bag_quantized(p, i, bits=2)),
    "floats": (RuntimeError, "'packed' must be uint8", lambda p, i: F.embedding_bag_quantized(p.float(), i)),
    "narrow": (ValueError, r"least 8\) with bits 8, not \(5, 7\)", lambda p, i: F.embedding_bag_quantized(p[:, :7], i)),
    "max": (ValueError, "sum, mean, None, not 'max'", lambda p, i: F.embedding_bag_quantized(p, i, mode="max")),
    "float ids": (RuntimeError, "'indices' must be int32", lambda p, i: F.embedding_bag_quantized(p, i.float())),
    "no offsets": (ValueError, "'offsets' must be a 1-D", lambda p, i: F.embedding_bag_quantized(p, i.view(-1))),
    "offsets of a lookup": (
        ValueError, "'offsets' must be None with mode None",
        lambda p, i: F.embedding_bag_quantized(p, i, torch.tensor([0]), mode=None),
    ),
    "first offset": (
        RuntimeError, r"offsets\[0\] must be 0, not 1",
        lambda p, i: F.embedding_bag_quantized(p, i.view(-1), torch.tensor([1, 2])),
    ),
    "falling offsets": (
        ValueError, "must not decrease",
        lambda p, i: F.embedding_bag_quantized(p, i.view(-1), torch.tensor([0, 3, 2])),
    ),
    "large id": (
        IndexError, r"indices\[1, 2\] is 5, which is not in \[0, 5\)",
        lambda p, i: F.embedding_bag_quantized(p, torch.tensor([[0, 1, 2], [0, 1, 5]])),
    ),
    "padding": (
        RuntimeError, r"'padding_idx' must be in \[-5, 5\), not 5",
        lambda p, i: F.embedding_bag_quantized(p, i, padding_idx=5),
    ),
    "double weights": (
        RuntimeError, "'per_sample_weights' must be float32",
        lambda p, i: F.embedding_bag_quantized(p, i, per_sample_weights=torch.ones(2, 3).double()),
    ),
    "learned weights": (
        RuntimeError, "for inference; detach",
        lambda p, i: F.embedding_bag_quantized(p, i, per_sample_weights=torch.ones(2, 3, requires_grad=True)),
    ),
    "shape of weights": (
        ValueError, r"have the shape \(2, 3\) of indices, not \(2, 2\)",
        lambda p, i: F.embedding_bag_quantized(p, i, per_sample_weights=torch.ones(2, 2)),
    ),
    "dtype": (NotImplementedError, "'dtype' must be", lambda p, i: F.dequantize_rows(p, dtype=torch.int32)),
    "float": (ValueError, "must be 8 or 4, not 8.0", lambda p, i: F.quantize_rows(torch.randn(2, 4), 8.0)),
    "odd columns": (ValueError, "even number of columns", lambda p, i: F.quantize_rows(torch.randn(2, 3), 4)),
    "1-D": (ValueError, "'weight' must be 2-D, not 1-D", lambda p, i: F.quantize_rows(torch.randn(3))),
    "integers": (NotImplementedError, "int64 is not implemented", lambda p, i: F.quantize_rows(i)),
    "list": (TypeError, "'weight' must be Tensor, not list", lambda p, i: F.quantize_rows([[1.0]])),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    error, message, call = WRONG[name]
    packed, ids = F.quantize_rows(torch.randn(5, 4)), torch.tensor([[0, 1, 2], [4, 3, 0]])
    with pytest.raises(error, match=message):
        call(packed, ids)


def test_who_serves() -> None:
    packed, ids = F.quantize_rows(torch.randn(5, 4, device=DEVICE)), torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    assert pk.explain(F.embedding_bag_quantized, packed, ids).backend == BACKENDS[0]
    assert pk.explain(F.quantize_rows, torch.randn(5, 4, device=DEVICE).double()).backend == BACKENDS[0]
    found = pk.explain(F.embedding_bag_quantized, packed, ids, dtype=torch.float64)
    assert found.backend == "reference" and "float64 results" in found.refused[BACKENDS[0]]
    with pytest.raises(pk.BackendError, match="float64 results"):
        F.dequantize_rows(packed, dtype=torch.float64, backend=BACKENDS[0])
    with pytest.raises(pk.BackendError, match="uint8"):
        F.embedding(ids, packed, backend=BACKENDS[0])  # a table of bytes is none of codes


@both
def test_module(bits: int) -> None:
    ids, offsets = torch.randint(0, 20, (30,)), torch.tensor([0, 4, 30])
    bag = pk.nn.EmbeddingBag(20, 16, mode="mean", include_last_offset=True, padding_idx=3)
    packed = pk.nn.QuantizedEmbeddingBag.from_float(bag, bits)
    expected = F.embedding_bag(ids, packed.dequantize(), offsets, mode="mean", include_last_offset=True, padding_idx=3)
    torch.testing.assert_close(packed(ids, offsets), expected)
    torch.testing.assert_close(packed(ids, offsets), bag(ids, offsets), rtol=0, atol=2 * 4 / 2**bits)
    other = pk.nn.QuantizedEmbeddingBag(
        torch.zeros_like(packed.weight), bits=bits, mode="mean", include_last_offset=True, padding_idx=3
    )
    other.load_state_dict(packed.half().state_dict())  # codes stay what they are
    assert torch.equal(other(ids, offsets), packed(ids, offsets))
    assert not list(packed.parameters()) and f"bits={bits}" in repr(packed) and "20, 16" in repr(packed)
    lookup = pk.nn.QuantizedEmbeddingBag.from_float(torch.nn.Embedding(20, 16, dtype=torch.bfloat16), bits)
    assert lookup(ids.view(5, 6)).shape == (5, 6, 16) and lookup(ids).dtype == torch.bfloat16
    for refused in (torch.nn.EmbeddingBag(4, 4, mode="max"), torch.nn.Embedding(4, 4, max_norm=1.0)):
        with pytest.raises(ValueError, match="cannot be packed"):
            pk.nn.QuantizedEmbeddingBag.from_float(refused)


SPECS = {(spec.name, spec.cases[0].options.get("mode", "")): spec for spec in load("embedding")}
POOLED, PACKED = SPECS["embedding_bag_quantized", "sum"], SPECS["quantize_rows", ""]
BAG_OP, PACK_OP = quantized.embedding_bag_quantized_forward, quantized.quantize_rows_forward

# label -> spec, the case that must find it, the operator, its mistake
MISTAKES: dict[str, tuple[Any, str, dict[str, Any], Any]] = {
    "padding takes part": (POOLED, "padding-4", BAG_OP, lambda kernel, *a: kernel(*a[:7], -1, *a[8:])),
    "a mean that is not divided": (POOLED, "last-offset-8", BAG_OP, lambda kernel, *a: kernel(*a[:5], "sum", *a[6:])),
    "weights that are left out": (POOLED, "weighted-8", BAG_OP, lambda kernel, *a: kernel(*a[:3], None, *a[4:])),
    "halves of a byte swapped": (
        POOLED, "offsets-4", BAG_OP,
        lambda kernel, packed, *a: kernel(
            torch.cat([packed[:, :-4] >> 4 | packed[:, :-4] << 4, packed[:, -4:]], 1), *a
        ),
    ),
    "a bias of the row before": (
        POOLED, "sample", BAG_OP,
        lambda kernel, packed, *a: kernel(torch.cat([packed[:, :-4], packed[:, -4:].roll(1, 0)], 1), *a),
    ),
    "codes that are cut off, not rounded": (
        PACKED, "outlier-8", PACK_OP, lambda kernel, weight, bits: kernel(weight, bits) - 1
    ),
    "infinities that are lost": (
        PACKED, "not-finite-8", PACK_OP, lambda kernel, weight, bits: kernel(weight.nan_to_num(0, 0, 0), bits)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_planted_mistake_is_found(
    backend: str, mistake: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    spec, label, table, wrong = MISTAKES[mistake]
    case = next(c for c in spec.cases if c.label == label)
    kernel = table[backend]
    assert all(c.passed for c in check_case(spec, case, backend, torch.float32, DEVICE))
    monkeypatch.setitem(table, backend, lambda *arguments: wrong(kernel, *arguments))
    assert not all(c.passed for c in check_case(spec, case, backend, torch.float32, DEVICE))
