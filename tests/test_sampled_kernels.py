"""What is particular to the Triton kernels of the sampled_softmax room: chunks, parts, refusals, sparse gradients."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import pykernels as pk
from pykernels import functional as F

B, D, V, K = 9, 20, 150, 70
GENERATOR = torch.Generator().manual_seed(5)
X, W = (torch.randn(n, D, generator=GENERATOR) for n in (B, V))
BIAS = torch.randn(V, generator=GENERATOR)
TARGET = torch.randint(V, (B,), generator=GENERATOR)
SAMPLED = torch.cat([TARGET[:3], TARGET[:3], torch.randint(V, (K - 6,), generator=GENERATOR)])  # hits, twice each
EXPECTED = (SAMPLED, torch.full((B, 1), 0.3), torch.linspace(0.1, 2, K))


def sampled(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.sampled_softmax_loss(w, bias, TARGET[:, None], x, K, V, sampled_values=EXPECTED, **options)


def nce(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.nce_loss(w, bias, TARGET[:, None], x, K, V, sampled_values=EXPECTED, **options)


def linear(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    more = {"weight": (torch.arange(V) % 3 + 0.5).to(x.dtype), "label_smoothing": 0.2, "z_loss": 0.01}
    return F.linear_cross_entropy(x, w, TARGET, linear_bias=bias, **more, **options)


def gradients(function: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.to(dtype).requires_grad_() for t in (X, W, BIAS)]
    return torch.autograd.grad(function(*leaves, **options), leaves)


@pytest.mark.parametrize("function", (sampled, nce, linear))
def test_chunks_of_classes(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in several chunks, the last one short, give what one chunk gives."""
    tiles = import_module("pykernels._triton._sampled_softmax_tiles")
    launched = []
    product = tiles.product
    monkeypatch.setattr(tiles, "product", lambda *args: launched.append(1) or product(*args))
    whole = gradients(function, torch.float32, backend="triton")
    once = len(launched)
    monkeypatch.setattr(tiles, "CHUNK", 1)
    pieces = gradients(function, torch.float32, backend="triton")
    assert len(launched) - once > once, "one chunk"
    for a, b, oracle in zip(whole, pieces, gradients(function, torch.float64, backend="reference"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", (sampled, nce))
def test_sparse_gradient(function: Any) -> None:
    dense, compact = (gradients(function, torch.float32, backend="triton", sparse=s)[1] for s in (False, True))
    assert compact.is_sparse and compact.is_coalesced()
    assert compact.indices()[0].tolist() == sorted({*TARGET.tolist(), *SAMPLED.tolist()})
    assert torch.equal(compact.to_dense(), dense)


def test_sparse_gradient_of_own_classes() -> None:
    negatives = SAMPLED[: 4 * B].reshape(B, 4)
    found = []
    for sparse in (False, True):
        w = W.clone().requires_grad_()
        loss = F.negative_sampling_loss(X, w, TARGET, negatives, sparse=sparse, backend="triton")
        found += torch.autograd.grad(loss, w)
    assert found[1].is_coalesced() and torch.equal(found[1].to_dense(), found[0])


def test_classes_outside_add_nothing() -> None:
    """Where ids are not checked beforehand (on a GPU they are not), the kernels leave out what does not exist."""
    operators = import_module("pykernels._triton.sampled_softmax")
    ids = torch.tensor([[1, 5, V], [2, -1, 2**40]])
    loss, coefficient, _ = operators.logistic_rows_forward(X[:2], W, ids, None, True)
    z = torch.stack([X[0] @ W[1], -(X[0] @ W[5])])
    torch.testing.assert_close(loss[0], -torch.nn.functional.logsigmoid(z).sum())
    assert coefficient[ids.ge(V) | ids.lt(0)].eq(0).all()
    dw = operators.row_gradient(torch.ones(2), X[:2], ids, coefficient, V)
    assert sorted(dw.abs().sum(1).nonzero().flatten().tolist()) == [1, 2, 5]


def test_what_is_refused() -> None:
    with pytest.raises(pk.BackendError, match="samplers have no Triton kernels"):
        F.log_uniform_candidate_sampler(TARGET[:, None], 1, 5, True, V, backend="triton")
    with pytest.raises(pk.BackendError, match="float64"):
        F.linear_cross_entropy(X.double(), W.double(), TARGET, backend="triton")
    with pytest.raises(pk.BackendError, match="K-dimensional"):
        F.linear_cross_entropy(X[0], W, TARGET[0], backend="triton")
