"""Sampled softmax, NCE, hierarchical softmax and linear cross entropy: identities, and what bad arguments give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from conftest import BACKENDS as EXECUTED
from conftest import DEVICE

import pykernels as pk

F = pk.functional
B, D, V, K, T = 6, 5, 9, 4, 2
X, W, BIAS = torch.randn(B, D), torch.randn(V, D), torch.randn(V)
LABELS, SAMPLED = torch.randint(0, V, (B, T)), torch.randint(0, V, (K,))
VALUES = (SAMPLED, torch.rand(B, T) + 0.1, torch.rand(K) + 0.1)
BACKENDS = pytest.mark.parametrize("backend", (None, "reference"))
FLOORS = pytest.mark.parametrize("backend", (None, "reference", *(EXECUTED if DEVICE == "cpu" else ())))
TREE = F.HuffmanTree.from_counts([30, 1, 12, 5, 4, 4, 2, 2, 1])


@FLOORS
def test_all_classes_sampled_is_the_full_cross_entropy(backend: str | None) -> None:
    """Every class in the sample with expected count 1, its own copy of the label removed."""
    x, w, bias = (t.clone().requires_grad_() for t in (X, W, BIAS))
    everything = (torch.arange(V), torch.ones(B, 1), torch.ones(V))
    label = LABELS[:, :1]
    loss = F.sampled_softmax_loss(w, bias, label, x, V, V, 1, everything, reduction="none", backend=backend)
    full = TF.cross_entropy(TF.linear(x, w, bias), label[:, 0], reduction="none")
    torch.testing.assert_close(loss, full)
    linear = F.linear_cross_entropy(x, w, label[:, 0], linear_bias=bias, reduction="none", backend=backend)
    torch.testing.assert_close(linear, full)
    expected = torch.autograd.grad(full.square().sum(), (x, w, bias))
    for ours in (loss, linear):
        torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), (x, w, bias)), expected)


@FLOORS
def test_hierarchical_probabilities_sum_to_one(backend: str | None) -> None:
    nodes = torch.randn(V - 1, D)
    for x in X:
        every = x.expand(V, D)
        loss = F.hierarchical_softmax_loss(every, nodes, torch.arange(V), TREE, "none", backend=backend)
        assert math.isclose(float(loss.neg().exp().sum()), 1.0, rel_tol=1e-5)


def test_huffman_codes_are_optimal() -> None:
    """The mean path of a tree of powers of two is the entropy; frequent classes are never deeper than rarer ones."""
    tree = F.HuffmanTree.from_counts([8, 4, 2, 1, 1])
    assert tree.starts.diff().tolist() == [1, 2, 3, 4, 4] and tree.depth == 4 and tree.classes == 5
    counts = torch.randint(1, 10_000, (3000,))
    lengths = F.HuffmanTree.from_counts(counts).starts.diff()
    ordered = lengths[counts.argsort(descending=True, stable=True)]
    assert bool((ordered.diff() >= 0).all())
    share = counts / counts.sum()
    mean, entropy = float((share * lengths).sum()), float(-(share * share.log2()).sum())
    assert entropy <= mean < entropy + 1
    assert abs(float((0.5 ** lengths.double()).sum()) - 1) < 1e-12  # Kraft: no leaf is missing


def test_nce_is_logistic_regression_on_corrected_logits() -> None:
    true = (X.unsqueeze(1) * W[LABELS]).sum(2) + BIAS[LABELS] - VALUES[1].log()
    other = X @ W[SAMPLED].T + BIAS[SAMPLED] - VALUES[2].log()
    bce = TF.binary_cross_entropy_with_logits
    expected = bce(true, torch.full_like(true, 1 / T), reduction="none").sum(1)
    expected = expected + bce(other, torch.zeros_like(other), reduction="none").sum(1)
    torch.testing.assert_close(F.nce_loss(W, BIAS, LABELS, X, K, V, T, VALUES, reduction="none"), expected)


@FLOORS
def test_every_copy_of_a_hit_is_removed(backend: str | None) -> None:
    """The label three times in the sample: nothing of it is left beside the true logit."""
    sampled = torch.tensor([4, 4, 2, 4])
    values = (sampled, torch.ones(1, 1), torch.ones(4))
    loss = F.sampled_softmax_loss(W, BIAS, torch.tensor([[4]]), X[:1], 4, V, 1, values, backend=backend)
    logits = TF.linear(X[:1], W, BIAS)[:, [4, 2]]
    torch.testing.assert_close(loss, TF.cross_entropy(logits, torch.tensor([0])))


@FLOORS
def test_all_hits(backend: str | None) -> None:
    """Nothing of the sample is left: the softmax of one class has loss 0 and gradient 0."""
    w = W.clone().requires_grad_()
    values = (torch.tensor([4, 4]), torch.ones(1, 1), torch.ones(2))
    loss = F.sampled_softmax_loss(w, None, torch.tensor([[4]]), X[:1], 2, V, 1, values, backend=backend)
    assert loss.item() == 0 and not torch.autograd.grad(loss, w)[0].any()


@BACKENDS
def test_default_sampler_and_seed(backend: str | None) -> None:
    values = F.log_uniform_candidate_sampler(LABELS, T, K, True, V, seed=7)
    for function in (F.sampled_softmax_loss, F.nce_loss):
        drawn = function(W, BIAS, LABELS, X, K, V, T, seed=7, backend=backend)
        torch.testing.assert_close(drawn, function(W, BIAS, LABELS, X, K, V, T, values, backend=backend))
    one = F.sampled_softmax_loss(W, BIAS, LABELS[:, 0], X, K, V, seed=7, backend=backend)
    torch.testing.assert_close(one, F.sampled_softmax_loss(W, BIAS, LABELS[:, :1], X, K, V, seed=7, backend=backend))


SPARSE = {
    "negative": lambda w, **more: F.negative_sampling_loss(X, w, LABELS[:, 0], SAMPLED.expand(B, K), **more),
    "shared": lambda w, **more: F.negative_sampling_loss(X, w, LABELS[:, 0], SAMPLED, **more),
    "hierarchical": lambda w, **more: F.hierarchical_softmax_loss(X, w, LABELS[:, 0] % 8, TREE8, **more),
    "softmax": lambda w, **more: F.sampled_softmax_loss(w, None, LABELS, X, K, V, T, VALUES, **more),
    "nce": lambda w, **more: F.nce_loss(w, None, LABELS, X, K, V, T, VALUES, **more),
}
TREE8 = F.HuffmanTree.from_counts([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradient(name: str) -> None:
    w = torch.randn(V, D, requires_grad=True)
    (dense,) = torch.autograd.grad(SPARSE[name](w), w)
    for backend in (None, "reference"):
        loss = SPARSE[name](w, sparse=True, backend=backend)
        (rows,) = torch.autograd.grad(loss, w, create_graph=False)
        assert rows.is_sparse
        torch.testing.assert_close(rows.to_dense(), dense)
    twice = torch.autograd.grad(SPARSE[name](w, sparse=True), w, create_graph=True)[0]
    torch.testing.assert_close(twice.to_dense(), dense)


@BACKENDS
def test_linear_cross_entropy_serves_what_torch_serves(backend: str | None) -> None:
    """Probabilities, unbatched inputs, K-dimensional losses; no row that counts gives NaN."""
    if not hasattr(TF, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy to compare with")
    chances = torch.rand(B, V).softmax(1)
    wide, many = torch.randn(V, 3, D), torch.randint(0, V, (B, 3))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X, W, chances), {"label_smoothing": 0.1, "weight": BIAS.abs()}),
        ((X[0], W, torch.tensor(3)), {"linear_bias": BIAS}),
        ((X[0], W, chances[0]), {}),
        ((X, wide, many), {"reduction": "none", "ignore_index": 2}),
        ((X, W, LABELS[:, 0]), {"weight": BIAS.abs(), "label_smoothing": 0.3, "ignore_index": 1}),
        ((X, W, torch.full((B,), -100)), {}),
    ]
    for arguments, options in calls:
        named = {} if backend is None else {"backend": backend}
        ours = F.linear_cross_entropy(*arguments, **options, **named)
        theirs = TF.linear_cross_entropy(*arguments, **options)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_z_loss_is_the_mean_square_of_the_log_denominator() -> None:
    lse = torch.logsumexp(X @ W.T, 1)
    for target in (LABELS[:, 0], torch.rand(B, V).softmax(1)):
        plain = F.linear_cross_entropy(X, W, target)
        torch.testing.assert_close(F.linear_cross_entropy(X, W, target, z_loss=0.5) - plain, 0.5 * lse.square().mean())


@FLOORS
def test_no_gradient_reaches_ignored_rows(backend: str | None) -> None:
    x = X.clone().requires_grad_()
    target = torch.tensor([1, -100, 2, -100, -100, 0])
    loss = F.linear_cross_entropy(x, W, target, label_smoothing=0.1, z_loss=0.1, backend=backend)
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.any(1).tolist() == [True, False, True, False, False, True]


GOOD: dict[str, Any] = {
    "weights": W, "biases": BIAS, "labels": LABELS, "inputs": X, "num_sampled": K, "num_classes": V, "num_true": T,
    "sampled_values": VALUES,
}  # fmt: skip


@pytest.mark.parametrize("name", ("sampled_softmax_loss", "nce_loss"))
@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"weights": None}, TypeError, "'weights'"),
        ({"weights": W.double()}, RuntimeError, "'weights'"),
        ({"weights": W[:, 1:]}, ValueError, "'weights'"),
        ({"num_classes": V + 1}, ValueError, "'weights'"),
        ({"biases": BIAS[1:]}, ValueError, "'biases'"),
        ({"biases": BIAS.double()}, RuntimeError, "'biases'"),
        ({"inputs": X.long()}, NotImplementedError, "'inputs'"),
        ({"labels": LABELS[1:]}, ValueError, "'labels'"),
        ({"labels": LABELS.float()}, RuntimeError, "'labels'"),
        ({"labels": LABELS + V}, IndexError, r"labels\[0, 0\] is"),
        ({"num_true": 3}, ValueError, "'labels'"),
        ({"sampled_values": SAMPLED}, TypeError, "'sampled_values'"),
        ({"sampled_values": (SAMPLED + V, *VALUES[1:])}, IndexError, "sampled_values"),
        ({"sampled_values": (SAMPLED, VALUES[1] * 0, VALUES[2])}, ValueError, "expected counts must be above 0"),
        ({"sampled_values": (SAMPLED, VALUES[1], VALUES[2][1:])}, ValueError, "sampled_values"),
        ({"sampled_values": None, "num_sampled": V + 1}, ValueError, "'num_sampled' must be at most num_classes = 9"),
        ({"sampled_values": None, "num_sampled": -1}, ValueError, "'num_sampled'"),
        ({"reduction": "max"}, ValueError, "'reduction'"),
        ({"backend": "cuda"}, pk.BackendError, "cuda"),
    ],
)
def test_errors(name: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(F, name)(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"tree": [1, 2]}, TypeError, "'tree'"),
        ({"weight": W}, ValueError, "'weight'"),
        ({"target": LABELS}, ValueError, "'target'"),
        ({"target": LABELS[:, 0] + V}, IndexError, r"target\[0\] is"),
        ({"reduction": "max"}, ValueError, "'reduction'"),
    ],
)
def test_hierarchical_errors(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"input": X, "weight": W[1:], "target": LABELS[:, 0], "tree": TREE}
    with pytest.raises(error, match=text):
        F.hierarchical_softmax_loss(**{**good, **changed})


@pytest.mark.parametrize("counts", ([], [[1]], [1, -1], [float("nan")]))
def test_tree_errors(counts: list[Any]) -> None:
    with pytest.raises(ValueError, match="counts"):
        F.HuffmanTree.from_counts(counts)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"input": 1}, TypeError, "'input'"),
        ({"linear_weight": W.double()}, RuntimeError, "'linear_weight'"),
        ({"linear_weight": W[:, 1:]}, RuntimeError, "'linear_weight'"),
        ({"linear_bias": BIAS[1:]}, RuntimeError, "'linear_bias'"),
        ({"weight": BIAS[1:]}, ValueError, "'weight'"),
        ({"target": LABELS}, ValueError, "'target'"),
        ({"target": LABELS[:, 0] * 0 + V}, IndexError, r"target\[0\] is 9"),
        ({"target": LABELS[:, 0] * 0 - 1}, IndexError, r"target\[0\] is -1"),
        ({"target": torch.rand(B, V), "ignore_index": 0}, RuntimeError, "'ignore_index'"),
        ({"label_smoothing": 1.5}, ValueError, "'label_smoothing'"),
        ({"reduction": "max"}, ValueError, "'reduction'"),
        ({"backend": "cuda"}, pk.BackendError, "cuda"),
    ],
)
def test_linear_errors(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        F.linear_cross_entropy(**{"input": X, "linear_weight": W, "target": LABELS[:, 0], **changed})


def test_autocast_computes_in_float32() -> None:
    x, w = X.bfloat16(), W.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear_cross_entropy(x, w, LABELS[:, 0]).dtype == torch.float32
        assert F.sampled_softmax_loss(w, BIAS.bfloat16(), LABELS, x, K, V, T, VALUES).dtype == torch.float32
    assert F.linear_cross_entropy(x, w, LABELS[:, 0]).dtype == torch.bfloat16


def test_explain() -> None:
    assert pk.explain(F.linear_cross_entropy, X, W, LABELS[:, 0]).room == "sampled_softmax"
    chances = torch.rand(B, V)
    assert pk.explain(F.linear_cross_entropy, X, W, chances).backend == "reference"


@pytest.mark.parametrize("name", SPARSE)
def test_row_optimizers_step_the_same(name: str) -> None:
    """pykernels.optim steps the rows that a loss used, without a gradient; two backward passes count together."""
    start = torch.randn(V, D)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    fused, dense = pk.optim.SGD([ours], 0.5), torch.optim.SGD([theirs], 0.5)
    for backwards in (1, 2):
        for w, optimizer in ((ours, fused), (theirs, dense)):
            for _ in range(backwards):
                SPARSE[name](w).backward()
            optimizer.step()
            assert (w.grad is None) == (w is ours)
            optimizer.zero_grad()
        torch.testing.assert_close(ours, theirs)
