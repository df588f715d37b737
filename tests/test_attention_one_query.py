"""Attention of a single query, as generation with a cache has it: the CPU kernels' own path for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pykernels as pk
from pykernels.testing.compare import assert_equal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(name: str, keys: int, heads: int, kv_heads: int, size: int, value_size: int) -> tuple[list[Tensor], dict]:
    generator = torch.Generator().manual_seed(keys * 31 + heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = normal(2, heads, 1, size), normal(2, kv_heads, keys, size), normal(2, kv_heads, keys, value_size)
    hidden = torch.rand(2, keys, generator=generator) < 0.3
    hidden[:, -1] = False
    options: dict[str, Any] = {}
    if "padding" in name:
        options["key_padding_mask"] = ~hidden
    if "mask" in name:
        options["mask"] = torch.rand(2, heads, 1, keys, generator=generator) < 0.7
    if "bias" in name:
        options["bias"] = normal(1, heads, 1, keys)
    if "alibi" in name:
        options["alibi_slopes"] = normal(heads).abs()
    if "softcap" in name:
        options["softcap"] = 1.5
    if "sinks" in name:
        options["sinks"] = normal(heads)
    if "window" in name:
        options["window"] = (keys // 2, 0)
    if "top left" in name:
        options |= {"causal": "top_left", "prefix_length": torch.tensor([3, keys])}
    if "dropout" in name:
        options |= {"dropout_p": 0.4, "seed": torch.tensor([7])}
    return [q, k, v], options


# Lengths about the tile of 128 keys; groups of heads about the 4 (2) that share registers and the 16 (8) of a tile.
CASES = [
    ("plain", 1, 3, 3, 8, 8),
    ("plain", 300, 4, 4, 64, 64),
    ("plain", 129, 34, 2, 40, 72),
    ("padding", 128, 12, 2, 64, 64),
    ("padding, alone", 257, 2, 2, 33, 17),
    ("padding, softcap, sinks, window", 200, 6, 2, 16, 16),
    ("bias, mask", 131, 6, 2, 16, 16),
    ("bias, padding, alibi", 127, 4, 2, 24, 130),
    ("dropout", 150, 6, 3, 16, 16),
    ("top left", 140, 6, 3, 16, 16),
]


@pytest.mark.parametrize("given", CASES, ids=lambda given: f"{given[0]}-{given[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_oracle(given: tuple, dtype: torch.dtype) -> None:
    inputs, options = case(*given)
    inputs = [x.to(dtype) for x in inputs]
    wide = {name: x.double() if name in ("bias", "sinks", "alibi_slopes") else x for name, x in options.items()}
    oracle = pk.reference.attention(*(x.double() for x in inputs), **wide, return_lse=True)
    same = pk.reference.attention(*inputs, **options, return_lse=True)
    ours = pk.functional.attention(*inputs, **options, return_lse=True, backend="cpu")
    for name, k, o, e in zip(("out", "lse"), ours, oracle, same, strict=True):
        assert_equal(name, k, o, e)
    again = pk.functional.attention(*inputs, **options, return_lse=True, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("kind", ["key_padding_mask", "mask", "bias"])
def test_what_is_hidden_does_not_matter(kind: str) -> None:
    (q, k, v), _ = case("plain", 200, 4, 2, 16, 16)
    seen = torch.ones(2, 200, dtype=torch.bool)
    seen[0, 50:190] = seen[1, :] = False  # a tile and more of one sequence, all of the other
    hide = {"key_padding_mask": seen, "mask": seen[:, None, None]}
    hide["bias"] = torch.zeros(2, 1, 1, 200).masked_fill(~seen[:, None, None], -torch.inf)
    clean = pk.functional.attention(q, k, v, **{kind: hide[kind]}, backend="cpu")
    assert not clean[1].any() and clean[0].any()
    for x in (k, v):
        x.masked_fill_(~seen[:, None, :, None], torch.nan)
    assert torch.equal(pk.functional.attention(q, k, v, **{kind: hide[kind]}, backend="cpu"), clean)


def test_cache_read_where_it_lies() -> None:
    """The filled part of a larger cache, heads in another order: strides, and nothing beyond is read."""
    q = torch.randn(2, 6, 1, 16)
    cache = torch.full((2, 2, 64, 3, 16), torch.nan)  # key and value, batch, length, heads
    cache[:, :, :40] = torch.randn(2, 2, 40, 3, 16)
    k, v = cache[:, :, :40].transpose(2, 3)
    assert not k.is_contiguous()
    expected = pk.functional.attention(q, k.contiguous(), v.contiguous(), backend="cpu")
    assert torch.equal(pk.functional.attention(q, k, v, backend="cpu"), expected)
    assert expected.isfinite().all()


def test_gradients_of_a_single_query() -> None:
    """Forward by this path, backward by the general one."""
    inputs, options = case("bias, sinks", 130, 4, 2, 16, 16)
    (q, k, v), extra = inputs, [options["bias"], options["sinks"]]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *extra)]
    wide = [x.double().requires_grad_() for x in (q, k, v, *extra)]
    g = torch.randn(2, 4, 1, 16)
    for found, function in ((leaves, pk.functional.attention), (wide, pk.reference.attention)):
        out = function(*found[:3], bias=found[3], sinks=found[4])
        out.backward(g.to(out.dtype))
    for one, two in zip(leaves, wide, strict=True):
        torch.testing.assert_close(one.grad, two.grad.float())


def test_gradients_of_what_is_not_there_are_refused() -> None:
    x = torch.randn(1, 2, 1, 8)
    options = (*(None,) * 9, "none", -1, -1, 0.0, 0.0, 1.0)
    out, lse, low = torch.ops.pykernels.attention_forward.cpu(x, x, x, *options)
    for mask in ((False, False, False, True, False), (False, False, False, False, True)):
        with pytest.raises(RuntimeError, match="a bias or of sinks that are not there"):
            torch.ops.pykernels.attention_backward.cpu(out, lse, x, x, x, out, lse, low, *options, mask)
