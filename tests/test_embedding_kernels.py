"""Embedding kernels on Triton and CUDA: chunks of the sorted ids, reports of invalid ids, 64-bit addresses."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels import _errors
from pykernels._cuda import embedding as cuda
from pykernels._cuda._extension import Extension
from pykernels._triton import _segment
from pykernels._triton import embedding as triton_floor
from pykernels.ops.embedding import _functions as fn
from pykernels.ops.embedding import interaction
from pykernels.testing import interpreter
from pykernels.testing.run import check_case
from pykernels.testing.spec import load

KERNELS = tuple(b for b in BACKENDS if b != "cpu")


def ops(backend: str) -> Any:
    """The op functions of a floor, without the registry: what is tested here is the floor itself."""
    if backend == "triton":
        return triton_floor
    extension = Extension(f"_{backend}_ext")
    assert extension.available, extension.reason
    names = [name for name in cuda.__all__ if name != "unsupported"]
    return SimpleNamespace(**{name: functools.partial(getattr(cuda, name), extension) for name in names})


def spread(kind: str, count: int, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = {
        "all-equal": lambda: torch.full((count,), rows - 1),
        "all-unique": lambda: torch.randperm(rows, generator=generator)[:count],
        "zipf": lambda: (torch.rand(count, generator=generator) ** 4 * rows).long(),
        "two": lambda: torch.arange(count) % 2 * (rows - 1),
        "blocks": lambda: torch.arange(count) // 32 % rows,  # runs that end where chunks do
    }[kind]()
    return ids.to(DEVICE)


@pytest.mark.parametrize("kind", ("all-equal", "all-unique", "zipf", "two", "blocks"))
@pytest.mark.parametrize("backend", KERNELS)
def test_runs_and_chunks(backend: str, kind: str) -> None:
    """Runs inside a chunk, across several, ending with one: exact sums of integers, dense and sparse, no row twice."""
    for count in (31, 32, 33, 100):
        ids = spread(kind, count, 101)
        dy = torch.randint(-8, 8, (count, 5), device=DEVICE).float()
        expected = torch.zeros(101, 5, device=DEVICE).index_add_(0, ids, dy)
        assert torch.equal(ops(backend).embedding_backward(dy, ids, 101, -1, False), expected)
        found, values = ops(backend).embedding_backward_sparse(dy, ids, 101, -1, False)
        assert torch.equal(found[0], ids.unique())
        assert torch.equal(values, expected[found[0]])
        counts = ids.bincount(minlength=101).clamp(min=1).unsqueeze(1)
        by_frequency = ops(backend).embedding_backward(dy, ids, 101, -1, True)
        torch.testing.assert_close(by_frequency, expected / counts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("backend", KERNELS)
def test_invalid_ids_are_skipped_and_reported(backend: str, id_dtype: torch.dtype) -> None:
    """What a GPU does, where nobody looks before the kernel runs: zeros, no gradient, an error afterwards."""
    kernels = ops(backend)
    what = _errors.code("lookup")
    weight = torch.randn(11, 5, device=DEVICE)
    ids = torch.tensor([3, 0, 11, 3, -1, 10], dtype=id_dtype, device=DEVICE)
    good = (ids >= 0) & (ids < 11)
    rows = torch.where(good[:, None], weight[ids.clamp(0, 10).long()], 0)
    for run in (
        lambda code: kernels.embedding_forward(ids, weight, code),
        lambda code: kernels.embedding_bag_forward(
            ids, weight, torch.tensor([0, 2, 3], device=DEVICE), None, "sum", False, -1, False, code
        )[0],
    ):
        out = run(what)
        expected = rows if len(out) == 6 else torch.stack([rows[:2].sum(0), rows[2], rows[3:].sum(0)])
        torch.testing.assert_close(out, expected)
        with pytest.raises(IndexError, match=r"input\[[24]\] \(counted flat\) is (11|-1), which is not in \[0, 11\)"):
            pk.check_errors()
        pk.check_errors()
        run(0)
        pk.check_errors()
    dy = torch.randint(-8, 8, (6, 5), device=DEVICE).float()
    expected = torch.zeros_like(weight).index_add_(0, ids[good].long(), dy[good])
    assert torch.equal(kernels.embedding_backward(dy, ids, 11, -1, False), expected)
    found, values = kernels.embedding_backward_sparse(dy, ids, 11, -1, False)
    assert found.tolist() == [[0, 3, 10]] and torch.equal(values, expected[found[0]])


@pytest.mark.parametrize(
    ("offsets", "position"), (([1, 2, 6], 0), ([0, 4, 2], 2), ([0, 2, 7], 2), ([0, -3, 1], 1)), ids=str
)
@pytest.mark.parametrize("backend", KERNELS)
def test_wrong_offsets_are_reported(backend: str, offsets: list[int], position: int) -> None:
    kernels = ops(backend)
    ids, weight = torch.tensor([1, 2, 3, 4, 5, 6], device=DEVICE), torch.randn(11, 5, device=DEVICE)
    starts = torch.tensor(offsets, device=DEVICE)
    for last in (False, True):
        kernels.embedding_bag_forward(ids, weight, starts, None, "sum", last, -1, False, _errors.code("bag"))
        with pytest.raises(ValueError, match=rf"offsets\[{position}\] \(counted flat\) is {offsets[position]}; .* 6,"):
            pk.check_errors()
        kernels.embedding_bag_backward(weight[: 3 - last], ids, starts, None, None, 11, "mean", last, -1, False)


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_more_than_2_31_elements_apart(backend: str) -> None:
    """The table is one page of memory mapped over and over, the gradient's address is checked through dy."""
    kernels = ops(backend)
    weight = torch.arange(4.0, device=DEVICE).expand(2**30 + 1, 4).as_strided((2**30 + 1, 4), (0, 1))
    far = torch.empty(2**31 + 70, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 70), (2**31, 1))
    far.copy_(torch.randn(2, 70))
    ids = torch.tensor([1, 0], device=DEVICE)
    assert torch.equal(
        kernels.embedding_forward(ids + 2**30 - 1, weight, 0), torch.arange(4.0, device=DEVICE).expand(2, 4)
    )
    with interpreter.checks(races=False):  # its record of writers is as large as the extent
        assert torch.equal(kernels.embedding_forward(ids, far, 0), far[ids])
        assert torch.equal(kernels.embedding_backward(far, ids, 3, -1, False)[:2], far[ids])


@pytest.mark.parametrize("backend", KERNELS)
def test_stochastic_rounding_draws_the_documented_words(backend: str) -> None:
    """The reference's bits: what is rounded is exact (multiples of 2^-10), so is the word of each element."""
    weight = (torch.randint(-64, 64, (9, 20)) / 16).bfloat16().to(DEVICE)
    dy, ids = (torch.randint(-99, 99, (50, 20)) / 512).bfloat16().to(DEVICE), torch.randint(0, 9, (50,), device=DEVICE)
    seed = torch.tensor([-77], device=DEVICE)
    expected = pk.reference.embedding_sgd_(weight.clone(), ids, dy, lr=0.5, stochastic_rounding=True, seed=seed)
    rest = (None, None, None, "none", False, -1, False, "sgd", 0.5, 0.0, 0.0, 0.0, 0.0, 1, seed, 0)
    ops(backend).embedding_update(weight, None, None, ids, dy, *rest)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("columns", (1, 64, 200, 261, 512, 516))
@pytest.mark.parametrize("backend", KERNELS)
def test_rowwise_adagrad_of_every_width(backend: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp with one, two and four vectors a lane; a run that crosses chunks, so that both kernels step rows. Wider
    rows (Triton's limit is lowered) in two passes, the second of them with the sums of squares of the first."""
    monkeypatch.setattr(_segment, "WIDEST", 512)
    for dtype, step in ((torch.float32, 1), (torch.bfloat16, 2)):
        ids = torch.cat([torch.full((70,), 1), torch.tensor([0, 3, 3])]).to(DEVICE)
        weight = torch.randn(4, columns, device=DEVICE).to(dtype)
        dy, state = torch.randn(73, columns, device=DEVICE).to(dtype), torch.rand(4, device=DEVICE)
        table, sums = weight.double(), state.double()
        pk.reference.embedding_rowwise_adagrad_(table, sums, ids, dy.double(), lr=0.1, eps=1e-3, weight_decay=0.1)
        rest = (None, None, None, "none", False, -1, False, "rowwise_adagrad", 0.1, 0.1, 1e-3, 0.0, 0.0, step, None, 0)
        ops(backend).embedding_update(weight, state, None, ids, dy, *rest)
        torch.testing.assert_close(state.double(), sums, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weight.double(), table, rtol=1e-5 if step == 1 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_ids_beyond_the_last_offset_are_in_no_bag(backend: str) -> None:
    kernels = ops(backend)
    ids, offsets = torch.tensor([1, 2, 3, 4, 5], device=DEVICE), torch.tensor([0, 2, 3], device=DEVICE)
    weight, dy = torch.randn(7, 5, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    out = kernels.embedding_bag_forward(ids, weight, offsets, None, "sum", True, -1, False, 0)[0]
    torch.testing.assert_close(out, torch.stack([weight[1] + weight[2], weight[3]]))
    dweight = kernels.embedding_bag_backward(dy, ids, offsets, None, None, 7, "sum", True, -1, False)
    assert torch.equal(dweight[1:4], dy[[0, 0, 1]]) and not dweight[[0, 4, 5, 6]].any()
    dscale = kernels.embedding_bag_backward_weights(dy, ids, weight, offsets, "sum", True, -1)
    expected = torch.cat([(dy[[0, 0, 1]] * weight[1:4]).sum(1), torch.zeros(2, device=DEVICE)])
    torch.testing.assert_close(dscale, expected)


def test_a_sample_that_fits_no_block_is_refused_by_cuda_alone() -> None:
    """Before any kernel runs, and told by explain; the others serve it."""
    for features, size, large in ((26, 1500, False), (26, 1505, True), (280, 8, True)):
        dense, sparse = torch.zeros(1, size, device=DEVICE), torch.zeros(1, features, size, device=DEVICE)
        for backend in BACKENDS:
            if large and backend in ("cuda", "emulator"):
                with pytest.raises(pk.BackendError, match="samples of more than 160 KiB"):
                    pk.explain(pk.functional.dot_interaction, dense, sparse, backend=backend)
            else:
                assert pk.explain(pk.functional.dot_interaction, dense, sparse, backend=backend).backend == backend


SPECS = {(spec.name, spec.cases[0].options.get("mode")): spec for spec in reversed(load("embedding"))}

# label -> spec, the case that must find it, the operator, its mistake
MISTAKES: dict[str, tuple[Any, str, dict[str, Any], Any]] = {
    "padding takes part": (
        SPECS["embedding_bag", "sum"], "padding", fn.embedding_bag_forward,
        lambda kernel, *a: kernel(*a[:6], -1, *a[7:]),
    ),
    "padding gets a gradient": (
        SPECS["embedding", None], "padding", fn.embedding_backward, lambda kernel, *a: kernel(*a[:3], -1, a[4])
    ),
    "mean's gradient is not divided": (
        SPECS["embedding_bag", "mean"], "offsets", fn.embedding_bag_backward,
        lambda kernel, *a: kernel(*a[:6], "sum", *a[7:]),
    ),
    "max gives every id the gradient": (
        SPECS["embedding_bag", "max"], "repeated", fn.embedding_bag_backward,
        lambda kernel, *a: kernel(*a[:6], "sum", *a[7:]),
    ),
    "a partial sum is lost": (
        SPECS["embedding", None], "repeated", fn.embedding_backward,
        lambda kernel, dy, ids, *a: kernel(dy, torch.cat([ids[:64], (ids[64:65] + 1) % 3, ids[65:]]), *a),
    ),
    "the diagonal once": (
        SPECS["dot_interaction", None], "self", interaction.dot_interaction_backward,
        lambda kernel, dy, dense, sparse, own, mask: tuple(
            dx - 1e-3 * x for dx, x in zip(kernel(dy, dense, sparse, own, mask), (dense, sparse), strict=True)
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_planted_mistake_is_found(
    backend: str, mistake: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    spec, label, table, wrong = MISTAKES[mistake]
    case = next(c for c in spec.cases if c.label == label)
    kernel = table[backend]
    assert all(c.passed for c in check_case(spec, case, backend, torch.float32, DEVICE))
    monkeypatch.setitem(table, backend, lambda *arguments: wrong(kernel, *arguments))
    assert not all(c.passed for c in check_case(spec, case, backend, torch.float32, DEVICE))
