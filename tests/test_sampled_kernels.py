"""What is particular to the Triton and CUDA kernels of the sampled_softmax room: chunks, parts, wide rows, refusals."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels import functional as F
from pykernels.testing.run import check_case
from pykernels.testing.spec import load

FLOORS = pytest.mark.parametrize("floor", [name for name in BACKENDS if name != "cpu"])
PACKAGES = {"triton": "pykernels._triton", "cuda": "pykernels._cuda", "emulator": "pykernels._cuda"}
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


@FLOORS
@pytest.mark.parametrize("function", (sampled, nce, linear))
def test_chunks_of_classes(function: Any, floor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in several chunks, the last one short, give what one chunk gives."""
    tiles = import_module(f"{PACKAGES[floor]}._sampled_softmax_tiles")
    name = "product" if floor == "triton" else "_product"
    launched = []
    product = getattr(tiles, name)
    monkeypatch.setattr(tiles, name, lambda *args: launched.append(1) or product(*args))
    whole = gradients(function, torch.float32, backend=floor)
    once = len(launched)
    monkeypatch.setattr(tiles, "CHUNK", 1)
    pieces = gradients(function, torch.float32, backend=floor)
    assert len(launched) - once > once, "one chunk"
    for a, b, oracle in zip(whole, pieces, gradients(function, torch.float64, backend="reference"), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b.double(), oracle, rtol=1e-5, atol=1e-6)


@FLOORS
@pytest.mark.parametrize("function", (sampled, nce))
def test_sparse_gradient(function: Any, floor: str) -> None:
    dense, compact = (gradients(function, torch.float32, backend=floor, sparse=s)[1] for s in (False, True))
    assert compact.is_sparse and compact.is_coalesced()
    assert compact.indices()[0].tolist() == sorted({*TARGET.tolist(), *SAMPLED.tolist()})
    assert torch.equal(compact.to_dense(), dense)


@FLOORS
def test_sparse_gradient_of_own_classes(floor: str) -> None:
    negatives = SAMPLED[: 4 * B].reshape(B, 4)
    found = []
    for sparse in (False, True):
        w = W.clone().requires_grad_()
        loss = F.negative_sampling_loss(X, w, TARGET, negatives, sparse=sparse, backend=floor)
        found += torch.autograd.grad(loss, w)
    assert found[1].is_coalesced() and torch.equal(found[1].to_dense(), found[0])


@FLOORS
def test_classes_outside_add_nothing(floor: str) -> None:
    """Where ids are not checked beforehand (on a GPU they are not), the kernels leave out what does not exist."""
    operators = torch.ops.pykernels
    ids = torch.tensor([[1, 5, V], [2, -1, 2**40]], device=DEVICE)
    loss, coefficient, _ = getattr(operators.logistic_rows_forward, floor)(X[:2], W, ids, None, True)
    z = torch.stack([X[0] @ W[1], -(X[0] @ W[5])])
    torch.testing.assert_close(loss[0], -torch.nn.functional.logsigmoid(z).sum())
    assert coefficient[ids.ge(V) | ids.lt(0)].eq(0).all()
    dw = getattr(operators.row_gradient, floor)(torch.ones(2, device=DEVICE), X[:2], ids, coefficient, V)
    assert sorted(dw.abs().sum(1).nonzero().flatten().tolist()) == [1, 2, 5]


@FLOORS
@pytest.mark.parametrize("size", (1032, 515))
def test_wide_rows(size: int, floor: str) -> None:
    """More columns than a warp of the CUDA kernels holds; rows that 16-byte copies serve, and rows they do not."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, size, generator=generator).to(DEVICE) / 8 for n in (3, 7))
    target, own, shared = torch.tensor([6, 0, 3]), torch.tensor([[1, 2, 3, 4, 5]] * 3), torch.tensor([1, 3, 3])
    for negatives in (own.to(DEVICE), shared.to(DEVICE)):
        found = []
        for dtype, backend in ((torch.float32, floor), (torch.float64, "reference")):
            leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
            loss = F.negative_sampling_loss(*leaves, target.to(DEVICE), negatives, "sum", backend=backend)
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for ours, oracle in zip(*found, strict=True):
            torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-6)


@FLOORS
def test_what_is_refused(floor: str) -> None:
    with pytest.raises(pk.BackendError, match="float64"):
        F.linear_cross_entropy(X.double(), W.double(), TARGET, backend=floor)
    with pytest.raises(pk.BackendError, match="K-dimensional"):
        F.linear_cross_entropy(X[0], W, TARGET[0], backend=floor)


FLOOR, TILES, BOTH = "sampled_softmax", "_sampled_softmax_tiles", "pykernels._sampled"

#: mistake -> (operator, case, module and function that is replaced, by what)
MISTAKES: dict[str, tuple[str, str, str, str, Any]] = {
    "hits stay in the sum": (
        "sampled_softmax_loss", "hits-removed", BOTH, "_sample", lambda right, *a: right(*a[:-1], False),
    ),
    "hits removed that should stay": (
        "nce_loss", "hits-kept", BOTH, "_sample", lambda right, *a: right(*a[:-1], True),
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
        "negative_sampling_loss", "sample", BOTH, "by_row",
        lambda right, ids, source, factor, rows: right(ids, source, None, rows),
    ),
    "labels left out of the input's gradient": (
        "nce_loss", "labels", FLOOR + ".gather", "add_weighted_rows", lambda right, *a: None,
    ),
}  # fmt: skip


def _without(launcher: str) -> Any:
    return lambda right, ext, name, *a, **k: None if name == launcher else right(ext, name, *a, **k)


CUDA_MISTAKES: dict[str, tuple[str, str, str, str, Any]] = {
    "hits stay in the sum": (
        "sampled_softmax_loss", "hits-removed", BOTH, "_sample", lambda right, *a: right(*a[:-1], False),
    ),
    "one part of the classes forgotten": (
        "linear_cross_entropy", "smooth", TILES, "forward", lambda right, *a: right(*a)[:-1],
    ),
    "parts joined without their maximum": (
        "sampled_softmax_loss", "tiles", TILES, "forward",
        lambda right, *a: right(*a) + torch.tensor([1.0, 0, 0, 0, 0], device=DEVICE)[:, None],
    ),
    "class weights that a part forgets": (
        "linear_cross_entropy", "smooth", TILES, "forward",
        lambda right, *a: right(*a) * torch.tensor([1.0, 1, 1, 1, 0.9], device=DEVICE)[:, None],
    ),
    "slopes left out of the table's gradient": (
        "negative_sampling_loss", "sample", BOTH, "by_row",
        lambda right, ids, source, factor, rows: right(ids, source, None, rows),
    ),
    "labels left out of the input's gradient": (
        "nce_loss", "labels", "_extension.Extension", "call", _without("sampled_softmax_add_rows"),
    ),
    "the last classes left out of a product": (
        "linear_cross_entropy", "smooth", TILES, "_product",
        lambda right, ext, a, depth, *rest: right(ext, a, min(depth, 128), *rest),
    ),
}  # fmt: skip

PLANTED = [("triton", name) for name in MISTAKES]
PLANTED += [(floor, name) for floor in BACKENDS if floor in ("cuda", "emulator") for name in CUDA_MISTAKES]


@pytest.mark.parametrize(("floor", "mistake"), PLANTED)
def test_a_planted_mistake_is_found(floor: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, label, module, function, wrong = (MISTAKES if floor == "triton" else CUDA_MISTAKES)[mistake]
    spec = next(s for s in load("sampled_softmax") if s.name == operator)
    case = next(c for c in spec.cases if c.label == label)
    name, *inner = [module] if module == BOTH else module.split(".")
    place = import_module(name if module == BOTH else f"{PACKAGES[floor]}.{name}")
    for part in inner:
        place = getattr(place, part)
    right = getattr(place, function)
    assert all(c.passed for c in check_case(spec, case, floor, torch.float32, DEVICE))
    monkeypatch.setattr(place, function, lambda *arguments, **options: wrong(right, *arguments, **options))
    assert not all(c.passed for c in check_case(spec, case, floor, torch.float32, DEVICE))
