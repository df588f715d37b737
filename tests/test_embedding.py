"""What is particular to embedding lookup and bags: options, in-place norms, sparse gradients, strictness."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels as pk

V, D = 11, 5
OFFSETS = torch.tensor([0, 0, 5, 5, 9, 20])
DTYPES = (torch.float32, torch.float64)


def run(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients for a fixed incoming gradient. The function may write to its arguments."""
    leaves = tuple(x.clone().requires_grad_() for x in leaves)
    out = function(*(x * 1 for x in leaves))
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_options_equal_torch(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(V, D, dtype=dtype), torch.randint(0, V, (4, 7))
    for options in itertools.product((None, 3, -1), (None, 1.5), (2.0, 1.0, torch.inf), (False, True)):
        ours = run(lambda w, o=options: pk.functional.embedding(ids, w, *o), weight)
        theirs = run(lambda w, o=options: F.embedding(ids, w, *o), weight)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ("sum", "mean", "max"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bag_options_equal_torch(dtype: torch.dtype, mode: str) -> None:
    weight, ids, scale = torch.randn(V, D, dtype=dtype), torch.randint(0, V, (20,)), torch.randn(20, dtype=dtype)
    for padding, norm, last, weighted in itertools.product((None, 3, -1), (None, 1.5), (False, True), (False, True)):
        if weighted and mode != "sum":
            continue

        def call(f: Callable[..., Tensor], w: Tensor, s: Tensor | None = None, p=padding, n=norm, e=last) -> Tensor:
            return f(ids, w, OFFSETS, n, mode=mode, per_sample_weights=s, include_last_offset=e, padding_idx=p)

        leaves = (weight, scale) if weighted else (weight,)
        ours = run(lambda *x, c=call: c(pk.functional.embedding_bag, *x), *leaves)
        torch.testing.assert_close(ours, run(lambda *x, c=call: c(F.embedding_bag, *x), *leaves))


def test_max_norm_writes_what_torch_writes() -> None:
    ids = torch.tensor([1, 4, 4, 1, 0])
    for ours, theirs, more in ((pk.functional.embedding, F.embedding, ()), (
        pk.functional.embedding_bag, F.embedding_bag, (torch.tensor([0, 3]),)
    )):  # fmt: skip
        weight = torch.randn(V, D)
        expected = weight.clone()
        version = weight._version
        ours(ids, weight, *more, max_norm=0.5)
        theirs(ids, expected, *more, max_norm=0.5)
        torch.testing.assert_close(weight, expected)
        assert weight._version > version
        assert torch.equal(weight[2], expected[2])


@pytest.mark.parametrize("padding", (None, 2))
def test_sparse_gradient(padding: int | None) -> None:
    ids = torch.tensor([[1, 2, 2], [5, 2, 1]])
    ours, theirs = torch.randn(V, D).requires_grad_(), torch.empty(V, D).requires_grad_()
    theirs.data.copy_(ours)
    pk.functional.embedding(ids, ours, padding, sparse=True).square().sum().backward()
    F.embedding(ids, theirs, padding, sparse=True).square().sum().backward()
    assert ours.grad.is_sparse
    assert torch.equal(ours.grad._indices(), theirs.grad.coalesce().indices())  # sorted, each id once
    torch.testing.assert_close(ours.grad.coalesce(), theirs.grad.coalesce())
    ours.grad = theirs.grad = None
    pk.functional.embedding_bag(ids, ours, sparse=True, padding_idx=padding).square().sum().backward()
    F.embedding_bag(ids, theirs, sparse=True, padding_idx=padding).square().sum().backward()
    torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())
    assert ours.grad.is_sparse


def test_frequency_of_each_row() -> None:
    """By its definition, with sparse gradients too; torch's CPU bag divides by another id's count."""
    ids = torch.tensor([5, 5, 5, 7, 9, 9])
    for call in (
        lambda w: pk.functional.embedding(ids, w, scale_grad_by_freq=True),
        lambda w: pk.functional.embedding(ids, w, scale_grad_by_freq=True, sparse=True),
        lambda w: pk.functional.embedding_bag(
            ids, w, torch.tensor([0]), scale_grad_by_freq=True, mode="sum", sparse=True
        ),
        lambda w: pk.functional.embedding_bag(ids, w, torch.tensor([0]), scale_grad_by_freq=True, mode="sum"),
    ):
        weight = torch.randn(V, D, requires_grad=True)
        call(weight).sum().backward()
        expected = torch.zeros(V, D)
        expected[[5, 7, 9]] = 1.0
        torch.testing.assert_close(weight.grad.to_dense(), expected)


def test_not_finite_rows() -> None:
    weight = torch.tensor([[torch.inf, 1.0], [torch.nan, 2.0], [3.0, -torch.inf]])
    ids = torch.tensor([0, 1, 2, 2])
    expected = weight[ids]
    for options in ({}, {"scale_grad_by_freq": True}, {"padding_idx": 0}):
        torch.testing.assert_close(pk.functional.embedding(ids, weight, **options), expected, equal_nan=True)
    # Padding does not leak into its bag, not even through 0 * NaN.
    bag = pk.functional.embedding_bag(ids, weight, torch.tensor([0, 2]), mode="sum", padding_idx=1)
    torch.testing.assert_close(bag, torch.tensor([[torch.inf, 1.0], [6.0, -torch.inf]]))
    for order in ([0, 1], [1, 0]):
        bag = pk.functional.embedding_bag(torch.tensor(order), weight, torch.tensor([0]), mode="max")
        torch.testing.assert_close(bag, torch.tensor([[torch.nan, 2.0]]), equal_nan=True)


def test_empty_and_padding_bags_are_zero() -> None:
    weight = torch.randn(V, D) - 5
    for mode in ("sum", "mean", "max"):
        out = pk.functional.embedding_bag(
            torch.full((3,), 4), weight, torch.tensor([0, 0, 3]), mode=mode, padding_idx=4
        )
        assert torch.equal(out, torch.zeros(3, D))
        assert pk.functional.embedding_bag(torch.empty(3, 0).long(), weight, mode=mode).equal(torch.zeros(3, D))
        empty = torch.empty(0).long()
        assert pk.functional.embedding_bag(empty, weight, empty, mode=mode).shape == (0, D)


def test_ties_give_the_first_id_the_gradient() -> None:
    weight = torch.ones(4, 2, requires_grad=True)
    pk.functional.embedding_bag(torch.tensor([[3, 1, 3]]), weight, mode="max").sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[0.0, 0], [0, 0], [0, 0], [1, 1]]))


def test_weighted_mean_divides_by_the_count() -> None:
    weight, scale = torch.randn(V, D), torch.randn(2, 3)
    ids = torch.tensor([[1, 2, 3], [4, 4, 0]])
    out = pk.functional.embedding_bag(ids, weight, mode="mean", per_sample_weights=scale, padding_idx=0)
    rows = scale.unsqueeze(2) * weight[ids]
    torch.testing.assert_close(out, torch.stack([rows[0].sum(0) / 3, rows[1, :2].sum(0) / 2]))


def test_ids_beyond_the_last_offset_are_in_no_bag() -> None:
    weight = torch.randn(V, D, requires_grad=True)
    offsets = torch.tensor([0, 2, 3])
    out = pk.functional.embedding_bag(
        torch.tensor([1, 2, 3, 4, 5]), weight, offsets, mode="sum", include_last_offset=True, padding_idx=0
    )
    torch.testing.assert_close(out, torch.stack([weight[1] + weight[2], weight[3]]))
    out.sum().backward()
    assert weight.grad[4:].abs().sum() == 0


def test_half_gradients_round_once() -> None:
    """One id 4099 times: summed in bfloat16 the gradient would stop growing at 256."""
    for call in (
        pk.functional.embedding,
        lambda i, w: pk.functional.embedding_bag(i, w, torch.tensor([0]), mode="sum"),
    ):
        weight = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
        call(torch.ones(4099, dtype=torch.int32), weight).sum().backward()
        assert torch.equal(weight.grad, torch.tensor([[0.0] * 3, [4099.0] * 3]).bfloat16())


W, IDS = torch.randn(V, D), torch.tensor([1, 2])
ZERO = torch.tensor([0])


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "text"),
    [
        ("embedding", ([1], W), {}, TypeError, "'input'"),
        ("embedding", (IDS.float(), W), {}, RuntimeError, "'input'"),
        ("embedding", (IDS.bool(), W), {}, RuntimeError, "'input'"),
        ("embedding", (IDS, W[0]), {}, RuntimeError, "'weight'"),
        ("embedding", (IDS, W), {"padding_idx": V}, AssertionError, "'padding_idx'"),
        ("embedding", (IDS, W), {"padding_idx": -V - 1}, AssertionError, "'padding_idx'"),
        ("embedding", (IDS, W), {"padding_idx": 1.5}, TypeError, "'padding_idx'"),
        ("embedding", (torch.tensor([[1, 2], [V, 0]]), W), {}, IndexError, r"input\[1, 0\] is 11"),
        ("embedding", (torch.tensor(-1), W), {}, IndexError, "input is -1"),
        ("embedding", (IDS, W), {"backend": "vulkan"}, ValueError, "backend"),
        ("embedding_bag", (IDS.float(), W, ZERO), {}, RuntimeError, "'input'"),
        ("embedding_bag", (IDS[None, None], W), {}, ValueError, "'input'"),
        ("embedding_bag", (IDS, W[0], ZERO), {}, ValueError, "'weight'"),
        ("embedding_bag", (IDS, W.long(), ZERO), {}, RuntimeError, "'weight'"),
        ("embedding_bag", (IDS, W), {}, ValueError, "'offsets'"),
        ("embedding_bag", (IDS[None], W, ZERO), {}, ValueError, "'offsets'"),
        ("embedding_bag", (IDS, W, ZERO[None]), {}, ValueError, "'offsets'"),
        ("embedding_bag", (IDS, W, ZERO.float()), {}, RuntimeError, "'offsets'"),
        ("embedding_bag", (IDS, W, ZERO + 1), {}, RuntimeError, "'offsets'"),
        ("embedding_bag", (IDS, W, torch.tensor([0, 3])), {}, RuntimeError, "'offsets'"),
        ("embedding_bag", (IDS, W, ZERO[:0]), {"include_last_offset": True}, RuntimeError, "'offsets'"),
        ("embedding_bag", (IDS, W, ZERO), {"mode": "min"}, ValueError, "'mode'"),
        ("embedding_bag", (IDS, W, ZERO), {"mode": "max", "sparse": True}, ValueError, "'sparse'"),
        (
            "embedding_bag",
            (IDS, W, ZERO),
            {"mode": "max", "scale_grad_by_freq": True},
            ValueError,
            "'scale_grad_by_freq'",
        ),
        (
            "embedding_bag",
            (IDS, W, ZERO),
            {"mode": "sum", "per_sample_weights": W[0]},
            ValueError,
            "'per_sample_weights'",
        ),
        (
            "embedding_bag",
            (IDS, W, ZERO),
            {"mode": "sum", "per_sample_weights": W[0, :2].double()},
            RuntimeError,
            "'per_sample_weights'",
        ),
        (
            "embedding_bag",
            (IDS, W, ZERO),
            {"mode": "max", "per_sample_weights": W[0, :2]},
            NotImplementedError,
            "'per_sample_weights'",
        ),
        ("embedding_bag", (IDS, W, ZERO), {"padding_idx": V}, RuntimeError, "'padding_idx'"),
    ],
)
def test_errors(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """torch raises the same class, and ours names the argument."""
    with pytest.raises(error, match=text):
        getattr(pk.functional, name)(*arguments, **options)
    if "backend" not in options and not (name == "embedding_bag" and options.get("include_last_offset")):
        with pytest.raises(error):
            getattr(F, name)(*arguments, **options)


def test_errors_that_torch_lacks() -> None:
    weight = torch.randn(V, D)
    before = weight.clone()
    with pytest.raises(ValueError, match=r"offsets\[1\] is 2 and offsets\[2\] is 1"):
        pk.functional.embedding_bag(torch.tensor([1, 2, 3]), weight, torch.tensor([0, 2, 1]))
    for call in (
        lambda: pk.functional.embedding(torch.tensor([1, -1]), weight, max_norm=0.1),
        lambda: pk.functional.embedding_bag(torch.tensor([1, V]), weight, ZERO, max_norm=0.1),
    ):
        with pytest.raises(IndexError, match=r"input\[1\]"):
            call()
        assert torch.equal(weight, before), "written before the ids were checked"
    with pytest.raises(pk.BackendError, match="embedding"):
        pk.functional.embedding(IDS, weight.long(), backend="cpu")


@pytest.mark.parametrize("mode", (None, "sum", "mean", "max"))
def test_derivatives_vmap_and_compile(mode: str | None) -> None:
    ids = torch.tensor([[1, 2, 1], [0, 2, 2]])
    weight = torch.randn(4, 3, dtype=torch.double, requires_grad=True)

    def call(ids: Tensor, w: Tensor) -> Tensor:
        if mode is None:
            return pk.functional.embedding(ids, w, 0)
        return pk.functional.embedding_bag(ids, w, mode=mode, padding_idx=0)

    assert torch.autograd.gradgradcheck(lambda w: call(ids, w), weight)
    each = torch.func.vmap(call, (0, None))(ids.unsqueeze(1), weight)
    torch.testing.assert_close(each.reshape(call(ids, weight).shape), call(ids, weight))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, weight), call(ids, weight))
    grads = [torch.autograd.grad(f(ids, weight).square().sum(), weight)[0] for f in (compiled, call)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Embedding", {}),
        ("Embedding", {"padding_idx": -2, "max_norm": 1.0, "scale_grad_by_freq": True}),
        ("EmbeddingBag", {}),
        ("EmbeddingBag", {"mode": "sum", "padding_idx": 3, "include_last_offset": True, "max_norm": 2.0}),
    ],
)
def test_modules_equal_torch(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(V, D, **options)
    torch.manual_seed(3)
    ours = getattr(pk.nn, name)(V, D, **options)
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    shared = type(ours).from_torch(theirs)
    assert shared.weight is theirs.weight and repr(shared) == repr(theirs)
    arguments = (torch.randint(0, V, (20,)), *((OFFSETS,) if name == "EmbeddingBag" else ()))
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    torch.testing.assert_close(shared(*arguments), theirs(*arguments))
    table = torch.randn(6, 2)
    assert torch.equal(getattr(pk.nn, name).from_pretrained(table).weight, table)


def test_explain() -> None:
    found = pk.explain(pk.nn.Embedding(V, D, max_norm=0.1), IDS)
    assert (found.function, found.room, found.backend) == ("embedding", "embedding", "cpu")
    assert set(found.refused) == {"triton", "cuda", "emulator"}
    found = pk.explain(pk.functional.embedding, IDS, W.long())
    assert found.backend == "reference" and "float32" in found.refused["cpu"]


def test_autocast_leaves_the_table_as_given() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.functional.embedding(IDS, W).dtype == torch.float32
        assert pk.functional.embedding_bag(IDS, W, ZERO).dtype == torch.float32
