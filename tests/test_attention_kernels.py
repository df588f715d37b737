"""Attention kernels on Triton: loops over full tiles with every mask, hidden keys, packed ends that lie, tf32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import pykernels.functional as pk
from pykernels import BackendError, explain, reference
from pykernels._triton import _attention_launch as launching
from pykernels._triton import _lib
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


@pytest.fixture
def capability(request: pytest.FixtureRequest) -> Iterator[int]:
    """The tiles of another GPU: from 90 on calls with masks by position read by tensor descriptors."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] * 10 < request.param:
        pytest.skip(f"this GPU has no instructions of capability {request.param}")
    with _lib.override_device_properties(_lib.DeviceProperties(request.param, 4)):
        yield request.param


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


HALF_CASES: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in ("causal", "window", "prefix", "softcap-alibi")},
    "long-query": {"causal": "top_left", "lengths": (200, 70)},
    "wide": {"size": 128, "lengths": (130, 130)},
    "ragged": {"size": 24, "causal": True},
    "sinks": {"sinks": True, "lengths": (20, 40)},
}


@pytest.mark.parametrize("options", HALF_CASES.values(), ids=HALF_CASES)
@pytest.mark.parametrize("capability", (90,), indirect=True)
def test_descriptors_equal_pointers(options: dict[str, Any], capability: int, monkeypatch: Any) -> None:
    """The same tiles by either way of reading: the same bits, forward and backward; heads in the projections' order."""
    options = dict(options)
    size, lengths = options.pop("size", 16), options.pop("lengths", LENGTHS)
    leaves = [x.detach().bfloat16() for x in tensors(lengths, size=size)]
    leaves = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(2, device=DEVICE)
    made, described = [], launching.described
    monkeypatch.setattr(launching, "described", lambda *given: made.append(given) or described(*given))
    found = []
    for pointers in (False, True):
        if pointers:
            monkeypatch.setattr(launching, "descriptors", lambda tiles, shared: dict.fromkeys(
                f"{name}_desc" for name in ("q", "k", "v", "dout") if name in shared))  # fmt: skip
        out, lse = pk.attention(*leaves, return_lse=True, backend="triton", **options)
        found.append((out, lse, *torch.autograd.grad(out.float().tanh().sum() + lse.sum(), leaves)))
        assert len(made) == 11  # q, k, v; twice dout too
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    truth = reference.attention(*(x.detach().double() for x in leaves), **options)
    torch.testing.assert_close(found[0][0].double(), truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("capability", (90,), indirect=True)
def test_calls_that_descriptors_cannot_serve(capability: int) -> None:
    q, k, v = (x.detach().bfloat16() for x in tensors((40, 70)))

    def copied(options: tuple[Any, ...], *changed: Tensor, **masks: Tensor) -> bool:
        x = changed or (q, k, v)
        names = ("mask", "key_padding_mask", "prefix", "slopes", "cu_q", "cu_k", "seed")
        size = launching.sizes(x[0], x[1], masks.get("cu_q"), masks.get("cu_k"))
        given = tuple(masks.get(name) for name in names)
        shared = launching.shared_arguments(*x, masks.get("bias"), given, (*options, 0.0, 0.0, 0.25), size)
        return launching.tiles_for("forward", shared).copied

    assert copied(("none", -1, -1)) and copied(("bottom_right", -1, -1)) and copied(("bottom_right", 30, -1))
    assert copied(("none", -1, 30)) and copied(("top_left", -1, -1), k, q, q)
    assert not copied(("bottom_right", 29, -1)), "the first key is hidden"
    assert not copied(("top_left", -1, -1)), "the last keys are hidden"
    assert not copied(("top_left", -1, 30), prefix=torch.tensor([70])), "the last keys may be hidden"
    assert copied(("bottom_right", -1, -1), prefix=torch.tensor([0]))
    assert not copied(("none", -1, -1), key_padding_mask=torch.ones(1, 70, dtype=torch.bool))
    assert not copied(("none", -1, -1), q, k.expand(3, -1, -1, -1), v), "no stride along the batch"
    assert not copied(("none", -1, -1), q[..., :12], k[..., :12], v), "rows of 24 bytes"
    assert not copied(("none", -1, -1), q.float(), k.float(), v.float()), "no such tiles"
    packed = {"cu_q": torch.tensor([0, 40]), "cu_k": torch.tensor([0, 70])}
    assert not copied(("none", -1, -1), *(x[0].transpose(0, 1) for x in (q, k, v)), **packed)


def test_other_devices_take_the_tiles_of_ampere() -> None:
    for capability, expected in ((75, 75), (89, 89), (90, 90), (100, 100), (103, 103), (120, 80), (121, 80)):
        with _lib.override_device_properties(_lib.DeviceProperties(capability, 4)):
            assert launching.architecture(torch.empty(0)) == expected


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


@pytest.mark.parametrize("capability", (80, 90, 100), indirect=True)
def test_wide_heads(capability: int) -> None:
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
