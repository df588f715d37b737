"""What is particular to the sampled losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels as pk

B, D, V, K = 6, 5, 9, 4
X, W = torch.randn(B, D), torch.randn(V, D)
TARGET, NEGATIVES = torch.randint(0, V, (B,)), torch.randint(0, V, (B, K))
loss = pk.functional.negative_sampling_loss


def test_is_k_plus_one_logistic_regressions() -> None:
    """The same loss from torch's binary cross entropy over [target, negatives] with labels [1, 0, ..., 0]."""
    ids = torch.cat([TARGET.unsqueeze(1), NEGATIVES], 1)
    logits = torch.einsum("bd,bkd->bk", X.double(), W.double()[ids])
    labels = torch.zeros(B, K + 1, dtype=torch.double)
    labels[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    x, w = X.double(), W.double()
    torch.testing.assert_close(loss(x, w, TARGET, NEGATIVES, "none"), expected)
    torch.testing.assert_close(loss(x, w, TARGET, NEGATIVES), expected.mean())
    torch.testing.assert_close(loss(x, w, TARGET.int(), NEGATIVES.int(), "sum"), expected.sum())


def test_shared_negatives_are_the_same_for_each_row() -> None:
    shared = NEGATIVES[0]
    torch.testing.assert_close(loss(X, W, TARGET, shared), loss(X, W, TARGET, shared.expand(B, K)))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    x, w = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    right = loss(x, w, torch.tensor([0]), torch.tensor([[1]]))
    wrong = loss(x, w, torch.tensor([1]), torch.tensor([[0]]))
    assert right.item() == 0.0 and wrong.item() == 400.0
    assert torch.autograd.grad(wrong, w)[0].tolist() == [[200.0], [-200.0]]


def test_no_rows() -> None:
    x, target, negatives = X[:0], TARGET[:0], NEGATIVES[:0]
    assert loss(x, W, target, negatives).isnan()
    assert loss(x, W, target, negatives, "sum").item() == 0
    assert loss(x, W, target, negatives, "none").shape == (0,)


def test_half_gradients_round_once() -> None:
    """4096 rows pull one class; in bfloat16 steps its gradient would stop growing."""
    x = torch.ones(4096, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss(x, w, torch.zeros(4096).long(), torch.ones(1).long(), "sum").backward()
    assert w.grad.tolist() == [[-2048.0], [2048.0]]


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"input": [1.0]}, TypeError, "'input'"),
        ({"input": X[0]}, ValueError, "'input'"),
        ({"input": X.long()}, NotImplementedError, "'input'"),
        ({"input": X.double()}, RuntimeError, "'weight'"),
        ({"weight": W[:, 1:]}, ValueError, "'weight'"),
        ({"target": TARGET[1:]}, ValueError, "'target'"),
        ({"target": TARGET.float()}, RuntimeError, "'target'"),
        ({"target": TARGET * 0 + V}, IndexError, r"target\[0\] is 9"),
        ({"negatives": NEGATIVES[1:]}, ValueError, "'negatives'"),
        ({"negatives": NEGATIVES.bool()}, RuntimeError, "'negatives'"),
        ({"negatives": NEGATIVES * 0 - 1}, IndexError, r"negatives\[0, 0\] is -1"),
        ({"reduction": "median"}, ValueError, "'reduction'"),
        ({"input": X.to("meta")}, RuntimeError, "meta"),
        ({"backend": "cuda"}, pk.BackendError, "cuda"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"input": X, "weight": W, "target": TARGET, "negatives": NEGATIVES}
    with pytest.raises(error, match=text):
        loss(**{**arguments, **changed})


def test_autocast_computes_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(X.bfloat16(), W, TARGET, NEGATIVES).dtype == torch.float32
    assert loss(X.bfloat16(), W.bfloat16(), TARGET, NEGATIVES).dtype == torch.bfloat16


@pytest.mark.parametrize("negatives", (NEGATIVES, NEGATIVES[0]), ids=("per-row", "shared"))
def test_derivatives_transforms_and_compile(negatives: Tensor) -> None:
    x, w = X.double().requires_grad_(), W.double().requires_grad_()

    def call(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, w, TARGET, negatives)

    assert torch.autograd.gradcheck(call, (x, w)) and torch.autograd.gradgradcheck(call, (x, w))
    expected = torch.autograd.grad(call(x, w), (x, w))
    torch.testing.assert_close(torch.func.grad(call, (0, 1))(x, w), expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, w), (x, w)), expected)


def test_module_and_explain() -> None:
    module = pk.nn.NegativeSamplingLoss("sum")
    assert repr(module) == "NegativeSamplingLoss(reduction='sum')" and not module.state_dict()
    torch.testing.assert_close(module(X, W, TARGET, NEGATIVES), loss(X, W, TARGET, NEGATIVES, "sum"))
    assert pk.explain(module, X, W, TARGET, NEGATIVES).backend == "cpu"


@pytest.mark.parametrize("backend", (None, "reference"))
def test_negative_ids_are_errors_in_graphs_too(backend: str | None) -> None:
    compiled = torch.compile(lambda t, n: loss(X, W, t, n, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TARGET, NEGATIVES), loss(X, W, TARGET, NEGATIVES))
    for target, negatives in ((TARGET - TARGET - 1, NEGATIVES), (TARGET, NEGATIVES - NEGATIVES - 1)):
        with pytest.raises(IndexError):
            compiled(target, negatives)
