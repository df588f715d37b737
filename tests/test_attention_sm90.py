"""Attention's kernels for sm_90a: contract, rings that wrap, blocks that take several tiles, hidden keys, refusals.
On the emulator, which checks every barrier, copy and product; on a GPU of capability 9.0 the same tests run there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from test_attention_cuda import ATTENTION, BACKEND, assert_close, extension, tensors
from torch import Tensor

import pykernels.functional as pk
from pykernels import reference, sm90_kernels
from pykernels._cuda import _sm90
from pykernels.testing.run import check_case
from pykernels.testing.spec import Case

if DEVICE == "cuda":
    MISSING = _sm90.unavailable(extension, torch.device("cuda"))
else:
    MISSING = extension.reason
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
EMULATED = pytest.mark.skipif(DEVICE == "cuda", reason="the emulator's to choose")


def resident(blocks: int) -> None:
    if DEVICE == "cpu":
        assert extension.module is not None
        extension.module.set_resident_blocks(blocks)


@pytest.fixture(autouse=True)
def _always() -> Iterator[None]:
    """These kernels, on a machine of three multiprocessors: a block takes several tiles."""
    resident(3)
    with sm90_kernels("always"):
        yield
    resident(132)


@pytest.mark.parametrize("case", ATTENTION.cases, ids=lambda case: case.label)
def test_contract(case: Case, poisoned: None) -> None:
    failed = [str(c) for c in check_case(ATTENTION, case, BACKEND, torch.float16, DEVICE) if not c.passed]
    assert not failed, failed


def assert_forward(inputs: list[Tensor], **options: Any) -> None:
    assert_close([x.detach() for x in inputs], **options)


POSITIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (170, 30)},
    "prefix": {"causal": "top_left", "prefix_length": 300},
}


@pytest.mark.parametrize(
    "size, position",
    [*((64, position) for position in POSITIONS), (128, "full"), (128, "causal")],
)
def test_masks_by_position(size: int, position: str) -> None:
    """Several tiles of queries a block, several turns of each ring, ragged ends."""
    assert_forward(tensors((330, 530), size=size), **POSITIONS[position])


@pytest.mark.parametrize(
    "size, position",
    [*((size, position) for size in (64, 128) for position in POSITIONS), (256, "window"), (256, "prefix")],
)
def test_gradients(size: int, position: str) -> None:
    """Two query heads on a key head: both rings turn more than once."""
    assert_close(tensors((170, 330 if size == 64 else 210), size), **POSITIONS[position])


def test_queries_that_see_nothing() -> None:
    """Whole tiles of them, between tiles that see keys; and keys that nobody sees."""
    for size in (64, 128, 256):
        assert_close(tensors((450 if size < 256 else 150, 70), size, torch.float16), causal=True)
        assert_forward(tensors((130, 333), size, torch.float16), window=(0, 0), causal="top_left")


def test_sizes_that_are_not_the_instantiations() -> None:
    assert_close(tensors((70, 150), 40, torch.float16, value_size=24), causal=True)
    assert_close(tensors((70, 150), 80, torch.bfloat16, value_size=136))
    assert_close(tensors((70, 90), 200, torch.float16, value_size=72))


FEATURES: dict[str, dict[str, Any]] = {
    "softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.5], device=DEVICE), "causal": True},
    "negative-scale": {"scale": -0.2, "window": (70, 30)},
    "mask": {"mask": torch.arange(150 * 190, device=DEVICE).view(150, 190) % 3 > 0},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("size", (64, 128, 256))
def test_features_over_tiles(size: int, options: dict[str, Any]) -> None:
    """Of two query heads on a key head."""
    assert_close(tensors((150, 190), size), **options)


@pytest.mark.parametrize("shape", ((1, 2, 150, 190), (1, 190), (2, 150, 1)), ids=str)
def test_bias_over_tiles(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, device=DEVICE)
    bias[..., :1, :1] = -torch.inf
    keys = torch.rand(1, 190, device=DEVICE) > 0.3
    assert_close(tensors((150, 190)), bias=bias.requires_grad_(), key_padding_mask=keys)


def test_masks_that_show_each_head_of_a_group_other_keys() -> None:
    """Tiles of keys that only the second head sees, and keys that neither does."""
    keys = torch.arange(300, device=DEVICE)
    mask = torch.stack((keys < 40, (keys >= 150) & (keys < 270)))[:, None]
    assert_close(tensors((70, 300)), mask=mask)


@pytest.mark.parametrize("size", (64, 128))
def test_packed_sequences_do_not_see_each_other(size: int) -> None:
    """Not even NaN: tiles at the end of one hold keys of the next."""
    ends = [torch.tensor([0, a, a, a + 20, n], device=DEVICE) for a, n in ((150, 230), (40, 400))]
    q, k, v = (x[0].detach().transpose(0, 1).contiguous() for x in tensors((230, 400), size))
    sinks = torch.randn(2, device=DEVICE)
    packed = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "causal": True, "sinks": sinks}
    assert_close([x.requires_grad_() for x in (q, k, v)], **packed)
    dout = torch.randn_like(q)
    results = []
    for filling in (0.0, torch.nan):
        given = [x.detach().clone() for x in (q, k, v, dout)]
        for x, first in zip(given, (170, 60, 60, 170), strict=True):
            x[first:] = filling
        leaves = [x.requires_grad_() for x in given[:3]]
        out = pk.attention(*leaves, backend=BACKEND, **packed)
        dq, dk, dv = torch.autograd.grad(out, leaves, given[3])
        results.append((out[:170], dq[:170], dk[:60], dv[:60]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_many_packed_sequences() -> None:
    ends = torch.arange(0, 3 * 35, 3, device=DEVICE)
    q, k, v = (torch.randn(102, 1, 64, device=DEVICE).half().requires_grad_() for _ in range(3))
    assert_close([q, k, v], cu_seqlens_q=ends, cu_seqlens_k=ends)


@pytest.mark.parametrize("hidden", ("padding", "window", "top_left", "bias"))
def test_hidden_keys_may_hold_anything(hidden: str) -> None:
    q, k, v = (x.detach() for x in tensors((20, 170), 64))
    keys = torch.arange(170, device=DEVICE)
    seen = keys < 20 if hidden in ("top_left", "window") else (keys < 133) & (keys % 9 > 0)
    bias = torch.zeros(170, device=DEVICE).masked_fill(~seen, -torch.inf)
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
        out = pk.attention(*leaves, backend=BACKEND, **options)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_in_a_key_that_is_seen_shows() -> None:
    """Wherever it is: exponentials made by the polynomial hand it on too."""
    q, k, v = (x.detach() for x in tensors((20, 128), 64))
    for j in range(8):
        k[:, :, max(j - 1, 0)], k[:, :, j] = 0, torch.nan
        assert pk.attention(q, k, v, backend=BACKEND).isnan().all()


def test_lse_to_the_rounding_of_float32() -> None:
    q, k, v = (x.detach() for x in tensors((100, 300)))
    lse = pk.attention(q, k, v, return_lse=True, backend=BACKEND)[1]
    truth = reference.attention(*(x.double() for x in (q, k, v)), return_lse=True)[1]
    assert float((lse.double() - truth).abs().max()) < 1.5e-6


def test_expanded_inputs() -> None:
    q, k, v = (x.detach() for x in tensors((70, 90)))
    whole = pk.attention(q, k.expand(1, 2, 90, 64).contiguous(), v.expand(1, 2, 90, 64).contiguous(), backend=BACKEND)
    assert torch.equal(pk.attention(q, k.expand(1, 2, 90, 64), v.expand(1, 2, 90, 64), backend=BACKEND), whole)


def test_only_what_is_wanted_is_written() -> None:
    inputs = tensors((40, 70))
    everything = torch.autograd.grad(pk.attention(*inputs, backend=BACKEND).sin().sum(), inputs)
    for n, x in enumerate(inputs):
        out = pk.attention(*(y if m == n else y.detach() for m, y in enumerate(inputs)), backend=BACKEND)
        assert torch.equal(torch.autograd.grad(out.sin().sum(), x)[0], everything[n])


@EMULATED
def test_any_order_of_threads_and_any_number_of_blocks() -> None:
    inputs = tensors((200, 150))
    assert extension.module is not None

    def results() -> list[Tensor]:
        out = pk.attention(*inputs, window=(100, 90), backend=BACKEND)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    first = results()
    for order, blocks in ((1, 132), (7, 1)):
        extension.module.set_order(order)
        resident(blocks)
        try:
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
        finally:
            extension.module.set_order(0)
