"""Attention kernels on Triton: loops over full tiles with every mask, hidden keys, packed ends that lie, tf32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import pykernels.functional as pk
from pykernels import BackendError, explain, reference
from pykernels._triton import attention as floor

LENGTHS = (200, 144)  # a full tile and an edge, whichever of the tile sizes is taken


def tensors(lengths: tuple[int, int] = LENGTHS, heads: tuple[int, int] = (2, 1), size: int = 16) -> list[Tensor]:
    shapes = ((1, heads[0], lengths[0], size), (1, heads[1], lengths[1], size), (1, heads[1], lengths[1], size))
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]


def assert_close(inputs: list[Tensor], rtol: float = 1e-5, **options: Any) -> None:
    """Output, lse and all gradients against the reference in float64."""
    leaves = [x for x in (*inputs, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    ours = pk.attention(*inputs, return_lse=True, backend="triton", **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    of = {id(x): w for x, w in zip(leaves, wide, strict=True)}
    given = {n: of.get(id(x), x) if isinstance(x, Tensor) else x for n, x in options.items()}
    truth = reference.attention(*(of[id(x)] for x in inputs), return_lse=True, **given)
    found, expected = (torch.autograd.grad([a.tanh().sum() for a in y], x) for y, x in ((ours, leaves), (truth, wide)))
    for a, b in zip((*ours, *found), (*truth, *expected), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * float(b.detach().abs().max()) + 1e-6)


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "top-left": {"causal": "top_left"},
    "window": {"window": (70, 30)},
    "prefix": {"causal": True, "prefix_length": 100},
    "softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.5], device=DEVICE)},
    "dropout": {"dropout_p": 0.25, "seed": 3, "causal": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_full_and_masked_tiles(options: dict[str, Any]) -> None:
    seed = {"seed": torch.tensor([options["seed"]], device=DEVICE)} if "seed" in options else {}
    assert_close(tensors(), **{**options, **seed})


@pytest.mark.parametrize("shape", ((1, 2, *LENGTHS), (1, LENGTHS[1]), (2, LENGTHS[0], 1)), ids=str)
def test_bias_in_full_tiles(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, device=DEVICE)
    bias[..., :1, :1] = -torch.inf
    keys = torch.rand(1, LENGTHS[1], device=DEVICE) > 0.3
    assert_close(tensors(), bias=bias.requires_grad_(), key_padding_mask=keys)


def test_mask_in_full_tiles() -> None:
    mask = torch.rand(2, *LENGTHS, device=DEVICE) > 0.5
    mask[:, 3] = False
    assert_close(tensors(), mask=mask, sinks=torch.randn(2, device=DEVICE).requires_grad_())


def test_tf32_where_torch_allows_it() -> None:
    inputs = tensors((40, 40))
    exact = pk.attention(*inputs, backend="triton")
    torch.set_float32_matmul_precision("high")
    try:
        rounded = pk.attention(*inputs, backend="triton")
        assert_close(inputs, rtol=1e-2)
    finally:
        torch.set_float32_matmul_precision("highest")
    error = float((rounded - exact).detach().abs().max())
    assert 1e-6 < error < 1e-2, error


@pytest.mark.parametrize("hidden", ("padding", "window", "top_left", "bias"))
def test_hidden_keys_may_hold_anything(hidden: str) -> None:
    q, k, v = (x.detach() for x in tensors((20, 70)))
    seen = torch.arange(70, device=DEVICE) < (20 if hidden in ("top_left", "window") else 33)
    bias = torch.zeros(70, device=DEVICE).masked_fill(~seen, -torch.inf)
    options: dict[str, Any] = {
        "padding": {"key_padding_mask": seen[None]},
        "window": {"causal": "top_left", "window": (30, -1)},
        "top_left": {"causal": "top_left"},
        "bias": {"bias": bias},
    }[hidden]
    results = []
    for filling in (0.0, torch.nan, torch.inf):
        leaves = [x.masked_fill(~seen[:, None], filling) if n else x for n, x in enumerate((q, k, v))]
        leaves = [x.requires_grad_() for x in leaves]
        out = pk.attention(*leaves, backend="triton", **options)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("ends", ([0, 90, 40], [-7, 20, 30], [50, 10, 2**40]), ids=str)
def test_packed_ends_that_lie_stay_inside(ends: list[int]) -> None:
    """On a GPU nobody reads the ends before the launch; the interpreter reports every access outside a tensor."""
    q, k, v = (torch.randn(30, 2, 16, device=DEVICE) for _ in range(3))
    cu = torch.tensor(ends, device=DEVICE)
    keys = torch.ones(2, 25, dtype=torch.bool, device=DEVICE)
    masks = (None, keys, None, None, cu, cu, None)
    options = ("bottom_right", -1, -1, 0.0, 0.0, 0.25)
    result = floor.attention_forward(q, k, v, None, None, *masks, *options)
    floor.attention_backward(
        q, result[1], q, k, v, *result, None, None, *masks, *options, (True, True, True, False, False)
    )


def test_only_what_is_wanted_is_written() -> None:
    inputs = tensors((20, 33))
    for n, x in enumerate(inputs):
        out = pk.attention(*(y if m == n else y.detach() for m, y in enumerate(inputs)), backend="triton")
        alone = torch.autograd.grad(out.sin().sum(), x)[0]
        out = pk.attention(*inputs, backend="triton")
        assert torch.equal(alone, torch.autograd.grad(out.sin().sum(), inputs)[n])


def test_wide_heads() -> None:
    """dk and dv in a launch each."""
    assert_close(tensors((33, 40), size=136), causal=True)


def test_wide_heads_are_refused_with_the_reason() -> None:
    """A named backend says why; `auto` takes one that serves them."""
    q = torch.randn(1, 1, 5, 300, device=DEVICE)
    for function in (pk.attention, pk.scaled_dot_product_attention):
        for size in (257, 300):
            x = q[..., :size]
            with pytest.raises(BackendError, match="head sizes above 256"):
                function(x, x, x, backend="triton")
        assert explain(function, q, q, q).backend == ("reference" if DEVICE == "cuda" else "cpu")
