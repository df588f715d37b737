"""Native kernels of the sampled_softmax room: threads, kept and recomputed logits, tiles, memory, instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import pykernels as pk
from pykernels.ops.sampled_softmax import _functions
from pykernels.reference.sampled_softmax import tables
from pykernels.testing.compare import assert_equal
from pykernels.testing.memory import peak_bytes

F, R = pk.functional, pk.reference
MIB = 1 << 20


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _calls(dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """Sizes of several tiles (256 rows, 480 classes), chunks and runs, none a multiple."""
    torch.manual_seed(3)
    x, w = torch.randn(600, 37).to(dtype).requires_grad_(), torch.randn(4100, 37).to(dtype).requires_grad_()
    bias = torch.randn(4100).to(dtype).requires_grad_()
    target = torch.randint(0, 4100, (600,))
    hot = torch.randint(0, 3, (600, 9))  # runs of more than a thousand
    values = F.log_uniform_candidate_sampler(target.unsqueeze(1), 1, 2000, True, 4100, seed=1)
    tree = F.HuffmanTree.from_counts(torch.arange(1, 4102))
    some = torch.where(target % 5 == 0, -100, target)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    return {
        "negative": (lambda: F.negative_sampling_loss(x, w, target, hot, "sum"), (x, w)),
        "hierarchical": (lambda: F.hierarchical_softmax_loss(x, w, target, tree, "sum"), (x, w)),
        "softmax": (lambda: F.sampled_softmax_loss(w, bias, target, x, 2000, 4100, 1, values), (x, w, bias)),
        "nce": (lambda: F.nce_loss(w, bias, target, x, 2000, 4100, 1, values), (x, w, bias)),
        "linear": (lambda: F.linear_cross_entropy(x, w, some, linear_bias=bias, **options), (x, w, bias)),
    }


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("negative", "hierarchical", "softmax", "nce", "linear"))
def test_threads_change_no_bit(name: str, dtype: torch.dtype, two_threads: None) -> None:
    function, inputs = _calls(dtype)[name]

    def run() -> list[Tensor]:
        loss = function()
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    two = run()
    torch.set_num_threads(1)
    for ours, other in zip(run(), two, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("rows", (130, 199, 300))
def test_threads_share_the_rows_of_a_batch(rows: int, dtype: torch.dtype, two_threads: None) -> None:
    x, w = torch.randn(rows, 96).to(dtype).requires_grad_(), torch.randn(1100, 96).to(dtype).requires_grad_()
    target = torch.randint(0, 1100, (rows,))

    def run() -> list[Tensor]:
        loss = F.linear_cross_entropy(x, w, target, reduction="none")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))]

    two = run()
    torch.set_num_threads(1)
    for ours, other in zip(run(), two, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("name", ("softmax", "nce"))
def test_kept_and_recomputed_logits_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = _calls(torch.float32)[name]
    kept = torch.autograd.grad(function(), inputs)
    monkeypatch.setattr(_functions, "KEPT_LOGITS", 0)
    for ours, other in zip(torch.autograd.grad(function(), inputs), kept, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("batch", (1, 255, 257))
@pytest.mark.parametrize("classes", (1, 31, 479, 480, 481, 961))
def test_edges_of_tiles(batch: int, classes: int, dtype: torch.dtype) -> None:
    """Against the reference in float64, allowed what the reference in this dtype misses by."""
    torch.manual_seed(classes)
    x, w = torch.randn(batch, 31).to(dtype), torch.randn(classes, 31).to(dtype)
    target = torch.randint(0, classes, (batch,))

    def run(function: Any, wide: bool, **options: Any) -> tuple[Tensor, ...]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (x, w)]
        loss = function(*leaves, target, reduction="sum", **options)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    truth, own = run(R.linear_cross_entropy, True), run(R.linear_cross_entropy, False)
    for name, ours, oracle, same in zip(
        ("out", "dx", "dw"), run(F.linear_cross_entropy, False, backend="cpu"), truth, own, strict=True
    ):
        assert_equal(name, ours, oracle, None if classes == 1 else same, long_sum=True)


def _linear_against_float64(x: Tensor, w: Tensor, target: Tensor, scale: float = 1.0) -> None:
    def run(function: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        loss = function(*leaves, target, reduction="none", **options)
        return (loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, scale)))

    truth, own = run(R.linear_cross_entropy, torch.float64), run(R.linear_cross_entropy, torch.float32)
    found = run(F.linear_cross_entropy, torch.float32, backend="cpu")
    for name, ours, oracle, same in zip(("out", "dx", "dw"), found, truth, own, strict=True):
        assert_equal(name, ours, oracle, same, long_sum=True)


@pytest.mark.parametrize("sizes", ((128, 64, 128), (129, 65, 479), (256, 97, 513), (257, 160, 961), (300, 131, 140)))
@pytest.mark.parametrize("magnitude", (0.3, 3.0, 1e-12, 1e15))
def test_float32_products_of_bfloat16_parts(sizes: tuple[int, int, int], magnitude: float) -> None:
    """Where processors have tile registers these sizes are multiplied there, in three parts a number: with two of them
    this fails. Around 32 rows and columns, 128 terms, 256 x 480 of a tile."""
    batch, size, classes = sizes
    torch.manual_seed(size)
    x, w = torch.randn(batch, size) / magnitude, torch.randn(classes, size) * magnitude
    _linear_against_float64(x * 2 / size**0.5, w, torch.randint(0, classes, (batch,)))


@pytest.mark.parametrize(
    ("where", "value"),
    [*product(("input", "weight"), (3.4e38, float("inf"), float("nan"))), ("dloss", 3.4e38), ("dloss", float("nan"))],
)
def test_numbers_that_have_no_parts(where: str, value: float) -> None:
    """Products of numbers that are large, infinite or NaN are made in float32."""
    torch.manual_seed(4)
    x, w = torch.rand(140, 70) * 1e-3, torch.rand(700, 70) * 1e-3
    if where != "dloss":
        (x if where == "input" else w)[130, 3] = value
    _linear_against_float64(x, w, torch.randint(0, 700, (140,)), value if where == "dloss" else 1.0)


@pytest.mark.parametrize("magnitude", (1e12, 1e20, 1e30))
def test_logits_beyond_float32(magnitude: float) -> None:
    """A class whose logit is -inf has probability 0. Products of parts would overflow to both infinities."""
    torch.manual_seed(5)
    x, w = torch.rand(140, 70) * magnitude, -torch.rand(300, 70) * magnitude
    w[0] = 0
    _linear_against_float64(x, w, torch.zeros(140, dtype=torch.long))


def test_memory_of_linear_cross_entropy() -> None:
    """512 x 20,000 logits would be 39 MiB; beyond its gradients the call takes tiles and partial sums of dx."""
    x, w = torch.randn(512, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True)
    target = torch.randint(0, 20_000, (512,))
    gradients = 4 * (x.numel() + w.numel())
    step = lambda: torch.autograd.grad(F.linear_cross_entropy(x, w, target), (x, w))
    step()
    assert peak_bytes(step) < gradients + 4 * MIB
    with torch.no_grad():
        assert peak_bytes(lambda: F.linear_cross_entropy(x, w, target)) < MIB


def test_memory_of_sampled_losses() -> None:
    """Nothing of B x K x D (64 MiB here) and, with a sparse gradient, nothing of V x D (49 MiB)."""
    x, w = torch.randn(256, 64, requires_grad=True), torch.randn(200_000, 64, requires_grad=True)
    target, negatives = torch.randint(0, 200_000, (256,)), torch.randint(0, 200_000, (1000,))
    rows = 4 * 64 * (1000 + 256)
    shared = lambda: torch.autograd.grad(F.negative_sampling_loss(x, w, target, negatives, sparse=True), (x, w))
    own = lambda: torch.autograd.grad(
        F.negative_sampling_loss(x, w, target, negatives[:40].expand(256, 40), sparse=True), (x, w)
    )
    for step, most in ((shared, 6 * rows + 4 * 256 * 1000), (own, 2 * rows)):
        step()
        assert peak_bytes(step) < most + 2 * MIB


def test_bad_ids_reach_no_memory() -> None:
    """The operators look for themselves: in a compiled graph the public function does not."""
    ops = torch.ops.pykernels
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    bad = torch.tensor([[0, 7], [1, 2]])
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 7"):
        ops.logistic_rows_forward.cpu(x, w, bad, None, False)
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 7"):
        ops.row_gradient.cpu(x[:, 0], x, bad, torch.ones(2, 2), 3)
    with pytest.raises(IndexError, match=r"labels\[0, 1\] is 7"):
        ops.sampled_rows_forward.cpu(x, w, None, bad, bad[1], None, None, "softmax", True, False)
    with pytest.raises(IndexError, match=r"sampled\[1\] is 7"):
        ops.sampled_rows_forward.cpu(x, w, None, bad[1:].T, bad[0], None, None, "softmax", True, False)
    with pytest.raises(IndexError, match=r"target\[1\] is 7"):
        ops.linear_rows_forward.cpu(x, w, None, bad[0], None, -100, 0.0, 0.0)


@pytest.mark.parametrize("kind", ("zipf", "shuffled", "equal", "fractions", "zeros", "doubling", "one", "two"))
def test_native_builders_make_the_reference_s_tables(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    zipf = (3e4 / torch.arange(1, 3001)).floor()
    counts = {
        "zipf": zipf,
        "shuffled": zipf[torch.randperm(3000, generator=generator)],
        "equal": torch.ones(37),
        "fractions": torch.rand(999, generator=generator),
        "zeros": torch.tensor([0, 5, 0, 0, 1, 5, 0]),
        "doubling": 2.0 ** torch.arange(40),  # one leaf a level
        "one": torch.tensor([3]),
        "two": torch.tensor([1, 1]),
    }[kind]
    tree, expected = F.HuffmanTree.from_counts(counts), tables.HuffmanTree.from_counts(counts)
    assert tree.depth == expected.depth
    table, filled = F.AliasTable.from_counts(counts, 0.75), tables.AliasTable.from_counts(counts, 0.75)
    for ours, theirs, names in (
        (tree, expected, ("starts", "points", "codes")),
        (table, filled, ("probability", "threshold", "alias")),
    ):
        for name in names:
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize(
    ("counts", "order", "text"),
    [
        (torch.ones(3), torch.arange(3), "float64"),
        (torch.ones(3, dtype=torch.float64), torch.arange(2), "order must be"),
        (torch.ones(3, dtype=torch.float64), torch.tensor([0, 1, 3]), "order holds 3"),
        (torch.ones(3, dtype=torch.float64), torch.tensor([0, 1, 0]), "order holds 0 twice"),
        (torch.ones(0, dtype=torch.float64), torch.arange(0), "at least one class"),
    ],
)
def test_native_builders_refuse(counts: Tensor, order: Tensor, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        torch.ops.pykernels.huffman_paths.cpu(counts, order)


def test_no_denormal_number_reaches_a_product() -> None:
    """Of a class that is e^-80 of the largest, the gradient is 0: denormal numbers made a product ten times slower."""
    x = torch.eye(2)[:1].clone()
    w = torch.tensor([[0.0, 1.0], [-60.0, 1.0], [-80.0, 1.0], [-86.0, 1.0]]).requires_grad_()
    loss = F.linear_cross_entropy(x, w, torch.tensor([1]), reduction="sum")
    (dw,) = torch.autograd.grad(loss * 1e-4, w)
    assert dw[0, 0] > 0 and dw[1, 0] < 0 and dw[2:].abs().max() == 0
    nan = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]], requires_grad=True)
    (dw,) = torch.autograd.grad(F.linear_cross_entropy(x, nan, torch.tensor([0])), nan)
    assert dw[:, 0].isnan().all()
