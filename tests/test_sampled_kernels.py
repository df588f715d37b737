"""What is particular to the Triton kernels of the sampled_softmax room: chunks, parts, refusals, sparse gradients."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import pykernels as pk
from pykernels import functional as F
from pykernels.testing.run import check_case
from pykernels.testing.spec import load

B, D, V, K = 9, 20, 150, 70
GENERATOR = torch.Generator().manual_seed(5)
X, W = (torch.randn(n, D, generator=GENERATOR).to(DEVICE) for n in (B, V))
BIAS = torch.randn(V, generator=GENERATOR).to(DEVICE)
TARGET = torch.randint(V, (B,), generator=GENERATOR).to(DEVICE)
SAMPLED = torch.cat(
    [TARGET[:3], TARGET[:3], torch.randint(V, (K - 6,), generator=GENERATOR).to(DEVICE)]
)  # hits, twice each
EXPECTED = (SAMPLED, torch.full((B, 1), 0.3, device=DEVICE), torch.linspace(0.1, 2, K, device=DEVICE))


def sampled(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.sampled_softmax_loss(w, bias, TARGET[:, None], x, K, V, sampled_values=EXPECTED, **options)


def nce(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.nce_loss(w, bias, TARGET[:, None], x, K, V, sampled_values=EXPECTED, **options)


def linear(x: Tensor, w: Tensor, bias: Tensor, **options: Any) -> Tensor:
    more = {"weight": (torch.arange(V, device=DEVICE) % 3 + 0.5).to(x.dtype), "label_smoothing": 0.2, "z_loss": 0.01}
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
    ids = torch.tensor([[1, 5, V], [2, -1, 2**40]], device=DEVICE)
    loss, coefficient, _ = operators.logistic_rows_forward(X[:2], W, ids, None, True)
    z = torch.stack([X[0] @ W[1], -(X[0] @ W[5])])
    torch.testing.assert_close(loss[0], -torch.nn.functional.logsigmoid(z).sum())
    assert coefficient[ids.ge(V) | ids.lt(0)].eq(0).all()
    dw = operators.row_gradient(torch.ones(2, device=DEVICE), X[:2], ids, coefficient, V)
    assert sorted(dw.abs().sum(1).nonzero().flatten().tolist()) == [1, 2, 5]


def test_what_is_refused() -> None:
    with pytest.raises(pk.BackendError, match="samplers have no Triton kernels"):
        F.log_uniform_candidate_sampler(TARGET[:, None], 1, 5, True, V, backend="triton")
    with pytest.raises(pk.BackendError, match="float64"):
        F.linear_cross_entropy(X.double(), W.double(), TARGET, backend="triton")
    with pytest.raises(pk.BackendError, match="K-dimensional"):
        F.linear_cross_entropy(X[0], W, TARGET[0], backend="triton")


FLOOR, TILES = "sampled_softmax", "_sampled_softmax_tiles"

#: mistake -> (operator, case, module and function that is replaced, by what)
MISTAKES: dict[str, tuple[str, str, str, str, Any]] = {
    "hits stay in the sum": (
        "sampled_softmax_loss", "hits-removed", FLOOR, "_sample", lambda right, *a: right(*a[:-1], False),
    ),
    "hits removed that should stay": (
        "nce_loss", "hits-kept", FLOOR, "_sample", lambda right, *a: right(*a[:-1], True),
    ),
    "one part of the classes forgotten": (
        "linear_cross_entropy", "tiles", TILES, "forward", lambda right, *a: right(*a)[:-1],
    ),
    "parts joined without their maximum": (
        "sampled_softmax_loss", "tiles", TILES, "forward",
        lambda right, *a: right(*a) + torch.tensor([1.0, 0, 0, 0], device=DEVICE)[:, None],
    ),
    "smoothing that forgets a part": (
        "linear_cross_entropy", "smooth", FLOOR + ".tiles", "weights_of_parts", lambda right, *a: right(*a) * 0.9,
    ),
    "slopes left out of the table's gradient": (
        "negative_sampling_loss", "sample", FLOOR, "_by_class",
        lambda right, values, source, ids, factor, rows: right(values, source, ids, None, rows),
    ),
    "labels left out of the input's gradient": (
        "nce_loss", "labels", FLOOR + ".gather", "add_weighted_rows", lambda right, *a: None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, label, module, function, wrong = MISTAKES[mistake]
    spec = next(s for s in load("sampled_softmax") if s.name == operator)
    case = next(c for c in spec.cases if c.label == label)
    name, *inner = module.split(".")
    place = import_module(f"pykernels._triton.{name}")
    for part in inner:
        place = getattr(place, part)
    right = getattr(place, function)
    assert all(c.passed for c in check_case(spec, case, "triton", torch.float32, DEVICE))
    monkeypatch.setattr(place, function, lambda *arguments: wrong(right, *arguments))
    assert not all(c.passed for c in check_case(spec, case, "triton", torch.float32, DEVICE))
