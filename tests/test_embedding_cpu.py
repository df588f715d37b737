"""Native CPU kernels of the embedding room: every instruction set, threads, long runs, layouts, sparse rows, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels as pk
from pykernels.testing.memory import peak_bytes

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
embedding, embedding_bag = pk.functional.embedding, pk.functional.embedding_bag


def gradients(function: Callable[..., Tensor], *leaves: Tensor, dy: Tensor | None = None) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    out = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    if dy is None:
        dy = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, dy)


@pytest.mark.parametrize("columns", (1, 3, 7, 8, 15, 16, 17, 63, 64, 65, 128, 129, 200, 257))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_width_equals_the_reference(dtype: torch.dtype, columns: int) -> None:
    """Whole vectors, groups of 8, 4, 2, 1 of them and what is left, on every path of the loops."""
    weight = torch.randn(37, columns, dtype=torch.float64).to(dtype)
    ids, scale = torch.randint(0, 37, (300,)), torch.randn(300, dtype=torch.float64).to(dtype)
    offsets = torch.tensor([0, 1, 1, 40, 100, 290])
    for mode, weighted in ((None, 0), ("sum", 0), ("mean", 0), ("max", 0), ("sum", 1), ("mean", 1)):

        def call(w: Tensor, s: Tensor | None, backend: str, m: str | None = mode) -> Tensor:
            if m is None:
                return embedding(ids, w, 4, backend=backend)
            return embedding_bag(ids, w, offsets, mode=m, per_sample_weights=s, padding_idx=4, backend=backend)

        leaves = (weight, scale) if weighted else (weight,)
        wide = tuple(x.double() for x in leaves)
        ours = gradients(lambda w, s=None, f=call: f(w, s, "cpu"), *leaves)
        theirs = gradients(lambda w, s=None, f=call: f(w, s, "reference"), *wide, dy=_dy(call(weight, None, "cpu")))
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def _dy(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).double()


@pytest.mark.parametrize("name", ("all-equal", "all-unique", "zipf", "two", "few"))
@pytest.mark.parametrize("rows", (70_000, 5_000_000_000))
def test_sorting(name: str, rows: int) -> None:
    """One, two and three digits of the sort, long runs in pieces, ids above 2^32: exact sums of integers."""
    count = {"few": 100}.get(name, 60_000)
    ids = {
        "all-equal": torch.full((count,), 3),
        "all-unique": torch.randperm(count),
        "zipf": (torch.rand(count) ** 6 * 60_000).long(),
        "two": torch.arange(count) % 2 * (rows - 1),
        "few": torch.randint(0, rows, (count,)),
    }[name]
    dy = torch.randint(-8, 8, (count, 5)).float()
    indices, values = torch.ops.pykernels.embedding_backward_sparse.cpu(dy, ids, rows, -1, False)
    unique, inverse = ids.unique(return_inverse=True)
    assert torch.equal(indices[0], unique)
    assert torch.equal(values, torch.zeros(len(unique), 5).index_add_(0, inverse, dy))


def test_long_runs_lose_no_digits() -> None:
    """A million equal ids: summed one after the other in float32 the error would be a hundred times as large."""
    count = 1_000_000
    dy = torch.rand(count, 3)
    ids = torch.ones(count, dtype=torch.int32)
    for padding, expected in ((-1, dy.double().sum(0)), (1, torch.zeros(3, dtype=torch.double))):
        dweight = torch.ops.pykernels.embedding_backward.cpu(dy, ids, 2, padding, False)
        torch.testing.assert_close(dweight[1].double(), expected, rtol=1e-6, atol=0)
        assert not dweight[0].any()


_CODE = """
import hashlib, sys, torch, torch.nn.functional as F, pykernels as pk
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
ids = (torch.rand(70_000) ** 5 * 3000).long()
ids[:30_000] = 7
weight = torch.randn(3000, 33, requires_grad=True)
scale = torch.randn(70_000, requires_grad=True)
offsets = torch.cat([torch.tensor([0]), (torch.rand(4000) * 70_000).long().sort().values])
digest = hashlib.sha256()
def add(*tensors):
    for x in tensors:
        digest.update(x.detach().numpy().tobytes())
y = pk.functional.embedding(ids, weight, 5)
add(y, *torch.autograd.grad(y, weight, torch.sin(y.detach())))
for mode in ("sum", "mean", "max"):
    more = {} if mode == "max" else {"per_sample_weights": scale}
    y = pk.functional.embedding_bag(ids, weight, offsets, mode=mode, padding_idx=5, **more)
    add(y, *torch.autograd.grad(y, [weight, *more.values()], torch.sin(y.detach())))
for rule, states in (("sgd", 0), ("adagrad", 1), ("rowwise_adagrad", 1), ("adam", 2)):
    table = weight.detach().clone()
    held = [torch.zeros(3000) if "row" in rule else torch.zeros(3000, 33) for _ in range(states)]
    more = {"step": 1} if rule == "adam" else {}
    dy = torch.cos(torch.arange(70_000 * 33.0)).view(-1, 33)
    add(getattr(pk.functional, f"embedding_{rule}_")(table, *held, ids, dy, lr=0.1, **more), *held)
dense, sparse = torch.randn(300, 33, requires_grad=True), torch.randn(300, 9, 33, requires_grad=True)
y = pk.functional.dot_interaction(dense, sparse)
add(y, *torch.autograd.grad(y, (dense, sparse), torch.sin(y.detach())))  # interaction
from pykernels._cpu.activation import ISA
print(ISA, digest.hexdigest())
"""


def test_no_thread_count_changes_a_bit() -> None:
    found = {subprocess.check_output([sys.executable, "-c", _CODE, threads], text=True) for threads in "13"}
    assert len(found) == 1, found


def test_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 and AVX-512 add in the same order; dot products (scales, mean squares, interaction) are left out."""
    code = _CODE.replace("[weight, *more.values()]", "[weight]").replace('("rowwise_adagrad", 1), ', "")
    code = "\n".join(line for line in code.splitlines() if not line.endswith("# interaction"))
    found = {}
    for capability in ("avx2", "avx512"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        isa, digest = subprocess.check_output([sys.executable, "-c", code, "1"], text=True).split()
        found[isa] = digest
    if set(found) != {"avx2", "avx512"}:
        pytest.skip(f"this processor has {', '.join(found)} only")
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
def test_ids_are_checked_before_anything_is_written(id_dtype: torch.dtype) -> None:
    weight = torch.randn(11, 4)
    for bad in (-1, 11, -(2**31), 2**31 - 1):
        ids = torch.zeros(3, 1000, dtype=id_dtype)
        ids[1, 7] = bad
        with pytest.raises(IndexError, match=rf"input\[1, 7\] is {bad}, which is not in \[0, 11\)"):
            embedding(ids, weight)
        with pytest.raises(IndexError, match=rf"input\[1, 7\] is {bad}"):
            embedding_bag(ids, weight, mode="sum")
        with pytest.raises(IndexError, match=rf"input\[1, 7\] is {bad}"):
            torch.ops.pykernels.embedding_backward.cpu(torch.zeros(3, 1000, 4), ids, 11, -1, False)
    with pytest.raises(IndexError, match=r"not in \[0, 0\)"):
        embedding(torch.zeros(1, dtype=id_dtype), torch.empty(0, 3))
    with pytest.raises(IndexError):  # an opaque operator in a graph still looks
        torch.compile(embedding, backend="eager")(torch.tensor([11]), weight)


def test_large_tables_by_address() -> None:
    """A row beyond 2^31 elements: an int offset would wrap. The table is one page of memory mapped over and over."""
    weight = torch.arange(4, dtype=torch.float32).expand(2**30 + 1, 4)
    ids = torch.tensor([0, 2**30])
    assert torch.equal(embedding(ids, weight), torch.arange(4.0).expand(2, 4))
    assert torch.equal(embedding_bag(ids.unsqueeze(0), weight, mode="sum"), 2 * torch.arange(4.0).view(1, 4))


def test_sparse_gradients_and_memory() -> None:
    """Coalesced, sorted, and nothing of the table's size: 256 MB would be the dense gradient."""
    weight = torch.zeros(1_000_000, 64, requires_grad=True)
    ids = torch.randint(0, 1_000_000, (2048,))
    offsets, scale = torch.arange(0, 2048, 16), torch.rand(2048)
    calls = (
        lambda: embedding(ids, weight, sparse=True),
        lambda: embedding_bag(ids, weight, offsets, mode="mean", sparse=True),
        lambda: embedding_bag(ids, weight, offsets, mode="sum", sparse=True, per_sample_weights=scale),
    )
    for call in calls:
        found: list[Tensor] = []

        def step(c: Callable[[], Tensor] = call, found: list[Tensor] = found) -> None:
            found[:] = torch.autograd.grad(c().sum(), weight)

        assert peak_bytes(step) < 8 * 2048 * 64 * 4
        assert found[0].is_coalesced() and torch.equal(found[0].indices()[0], ids.unique())
    assert peak_bytes(lambda: torch.autograd.grad(embedding(ids, weight).sum(), weight)) > 1_000_000 * 64 * 4
    dense = torch.autograd.grad(embedding(ids, weight).sum(), weight)[0]
    assert torch.equal(dense.sum(), torch.tensor(2048.0 * 64)) and dense.is_contiguous()


def test_nothing_but_ids_is_kept() -> None:
    weight = torch.randn(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (6, 4))
    scale = torch.randn(6, 4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        embedding(ids, weight), embedding_bag(ids, weight), embedding_bag(ids, weight, mode="max")
        embedding_bag(ids, weight, mode="sum", per_sample_weights=scale)
    assert {(tuple(x.shape), x.dtype) for x in kept} == {
        ((6, 4), torch.int64), ((6, 8), torch.int32), ((6, 4), torch.float32)
    }  # fmt: skip
    out = embedding(ids, weight)
    with torch.no_grad():
        weight.mul_(2)  # allowed between forward and backward, as with torch
    out.sum().backward()


@pytest.mark.parametrize("mode", (None, "sum", "mean", "max"))
@pytest.mark.parametrize("sparse", (False, True))
def test_second_derivatives(mode: str | None, sparse: bool) -> None:
    if sparse and mode == "max":
        with pytest.raises(ValueError, match="sparse"):
            embedding_bag(torch.ones(1, 1).long(), torch.ones(2, 2), mode="max", sparse=True)
        return
    ids, offsets = torch.tensor([1, 2, 1, 0, 2, 2, 3]), torch.tensor([0, 3, 3, 6])
    weight = torch.randn(4, 3, dtype=torch.double, requires_grad=True)

    def call(w: Tensor, backend: str, by_frequency: bool) -> Tensor:
        options = {"padding_idx": 0, "scale_grad_by_freq": by_frequency, "backend": backend}
        if mode is None:
            return embedding(ids, w, sparse=sparse and backend == "cpu", **options)
        if mode == "max":
            options.pop("scale_grad_by_freq")
        return embedding_bag(ids, w, offsets, mode=mode, sparse=sparse and backend == "cpu", **options)

    for by_frequency in (False, True):

        def twice(backend: str, f: bool = by_frequency) -> Tensor:
            (first,) = torch.autograd.grad(call(weight, backend, f).square().sum(), weight, create_graph=True)
            return torch.autograd.grad(first.to_dense().pow(3).sum(), weight)[0].to_dense()

        torch.testing.assert_close(twice("cpu"), twice("reference"))


@pytest.mark.parametrize("trained", ("weight", "scale", "both"))
def test_second_derivatives_with_weights(trained: str) -> None:
    ids = torch.tensor([[1, 2, 1], [0, 2, 2]])
    weight = torch.randn(4, 3, dtype=torch.double, requires_grad=trained != "scale")
    scale = torch.randn(2, 3, dtype=torch.double, requires_grad=trained != "weight")
    for mode in ("sum", "mean"):

        def call(*given: Tensor, m: str = mode) -> Tensor:
            given_iter = iter(given)
            w = next(given_iter) if weight.requires_grad else weight
            s = next(given_iter) if scale.requires_grad else scale
            return embedding_bag(ids, w, mode=m, per_sample_weights=s, padding_idx=0, backend="cpu")

        leaves = [x for x in (weight, scale) if x.requires_grad]
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_operators_check() -> None:
    """The sparse ones, whose output sizes depend on values; the others are in the contract."""
    ids, dy = torch.randint(0, 9, (4, 3)), torch.randn(4, 3, 5)
    ops = torch.ops.pykernels
    for op, arguments in (
        (ops.embedding_backward_sparse.cpu, (dy, ids, 9, 2, False)),
        (ops.embedding_bag_backward_sparse.cpu, (dy[:, 0], ids, None, None, None, 9, "mean", False, -1, True)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_odd_gradients_and_tables() -> None:
    """Stride-0 gradients (sum().backward()), transposed ones, tables with columns apart."""
    ids = torch.tensor([[3, 1], [1, 0]])
    table = torch.randn(6, 4)
    for weight in (table, table.t().contiguous().t(), table.expand(6, 4), torch.randn(1, 4).expand(6, 4)):
        for mode in ("sum", "mean", "max"):
            ours = embedding_bag(ids, weight, mode=mode)
            torch.testing.assert_close(ours, F.embedding_bag(ids, weight.contiguous(), mode=mode))
        assert torch.equal(embedding(ids, weight), weight[ids])
    spread = torch.ones(()).expand(2, 2, 4), torch.randn(2, 1, 4).expand(2, 2, 4)
    for dy in (*spread, torch.randn(4, 2, 2).permute(1, 2, 0)):
        ours = gradients(lambda w: embedding(ids, w), table, dy=dy)
        theirs = gradients(lambda w: F.embedding(ids, w), table, dy=dy)
        torch.testing.assert_close(ours, theirs)


def test_large_results_are_fresh_zeros() -> None:
    """From 32 MiB on a dense gradient is mapped: zero without being written, and given back when it is dropped."""
    ids = torch.tensor([5, 99_999, 5])
    for _ in range(3):
        weight = torch.empty(100_000, 128, requires_grad=True)
        embedding(ids, weight).sum().backward()
        expected = {5: 2.0, 99_999: 1.0}
        assert weight.grad.sum().item() == 3 * 128
        for row, value in expected.items():
            assert torch.equal(weight.grad[row], torch.full((128,), value))
        weight.grad.add_(1)
        copy = weight.grad.clone()
        weight.grad = None
        assert copy.min().item() == 1.0
