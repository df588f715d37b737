"""Attention kernels of csrc/cuda: each instantiation over several tiles, hidden keys, packed ends that lie, tf32,
planted mistakes. On the emulator; on a GPU the same tests run there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import pykernels.functional as pk
from pykernels import BackendError, explain, reference
from pykernels._cuda import attention as floor
from pykernels._cuda._extension import Extension
from pykernels.ops.attention import _functions as fn
from pykernels.testing.run import check_case
from pykernels.testing.spec import OpSpec, load

BACKEND = "cuda" if DEVICE == "cuda" else "emulator"
extension = Extension(f"_{BACKEND}_ext")
pytestmark = pytest.mark.skipif(not extension.available, reason=str(extension.reason))

ATTENTION = next(spec for spec in load("attention") if spec.name == "attention")
LENGTHS = (150, 140)  # two tiles of queries, three to nine of keys, and their edges
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(
    lengths: tuple[int, int] = LENGTHS,
    size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    heads: tuple[int, int] = (2, 1),
    value_size: int | None = None,
) -> list[Tensor]:
    shapes = [(1, heads[0], lengths[0], size), *((1, heads[1], lengths[1], d) for d in (size, value_size or size))]
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]


def assert_close(inputs: list[Tensor], **options: Any) -> None:
    """Output, lse and all gradients against the reference in float64."""
    tolerance = TOLERANCE[inputs[0].dtype]
    leaves = [x for x in (*inputs, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    ours = pk.attention(*inputs, return_lse=True, backend=BACKEND, **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    of = {id(x): w for x, w in zip(leaves, wide, strict=True)}
    of |= {id(x): x.double() for x in inputs if not x.requires_grad}
    given = {n: of.get(id(x), x) if isinstance(x, Tensor) else x for n, x in options.items()}
    truth = reference.attention(*(of[id(x)] for x in inputs), return_lse=True, **given)
    found, expected = (
        torch.autograd.grad([a.double().tanh().sum() for a in y], x) if x else ()
        for y, x in ((ours, leaves), (truth, wide))
    )
    for a, b in zip((*ours, *found), (*truth, *expected), strict=True):
        most = float(b.detach().abs().nan_to_num(0, 0, 0).max())
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * most + 1e-6)


POSITIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "top-left": {"causal": "top_left"},
    "window": {"window": (70, 30)},
    "causal-window": {"causal": True, "window": (40, -1)},
    "prefix": {"causal": True, "prefix_length": 100},
}


@pytest.mark.parametrize("options", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("size", (64, 128))
def test_masks_by_position(size: int, options: dict[str, Any]) -> None:
    """The instantiations that know no other masks: whole and ragged tiles, tiles that are not visited."""
    assert_close(tensors(size=size), **options)


@pytest.mark.parametrize("lengths", ((150, 20), (40, 150), (129, 33)), ids=str)
def test_lengths_that_differ(lengths: tuple[int, int]) -> None:
    """Also tiles of queries, and of keys, that see nothing."""
    for causal in (True, "top_left"):
        assert_close(tensors(lengths, dtype=torch.float16), causal=causal)


def test_sinks_and_packed_without_other_masks() -> None:
    q, k, v = (x[0].detach().transpose(0, 1).contiguous().requires_grad_() for x in tensors(size=64))
    ends = [torch.tensor([0, a, a, a + 20, n], device=DEVICE) for a, n in ((70, 150), (40, 140))]
    sinks = torch.randn(2, device=DEVICE).requires_grad_()
    for causal in (False, True):
        assert_close([q, k, v], cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], causal=causal, sinks=sinks)


def test_many_packed_sequences() -> None:
    """More than one warp's worth of ends is searched."""
    ends = torch.arange(0, 2 * 41, 2, device=DEVICE)
    q, k, v = (torch.randn(80, 1, 16, device=DEVICE).requires_grad_() for _ in range(3))
    seed = torch.tensor([5], device=DEVICE)
    assert_close([q, k, v], cu_seqlens_q=ends, cu_seqlens_k=ends, dropout_p=0.25, seed=seed)


FEATURES: dict[str, dict[str, Any]] = {
    "softcap-alibi": {"softcap": 2.0, "alibi_slopes": torch.tensor([0.1, 0.5], device=DEVICE), "causal": True},
    "dropout": {"dropout_p": 0.25, "seed": torch.tensor([3], device=DEVICE), "window": (70, 30)},
    "negative-scale": {"scale": -0.2, "causal": True},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_features_over_tiles(dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_close(tensors((100, 90), 16, dtype), **options)


@pytest.mark.parametrize("size", (80, 136))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
def test_wide_heads(dtype: torch.dtype, size: int) -> None:
    """Up to 128, and beyond it where dk and dv are made in a launch each; not the whole padded size."""
    assert_close(tensors((70, 40), size, dtype, value_size=size - 5), causal=True)


@pytest.mark.parametrize("shape", ((1, 2, 100, 90), (1, 90), (2, 100, 1), (1, 2, 1, 90)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bias_over_tiles(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, device=DEVICE).to(dtype)
    bias[..., :1, :1] = -torch.inf
    keys = torch.rand(1, 90, device=DEVICE) > 0.3
    assert_close(tensors((100, 90), 16, dtype), bias=bias.requires_grad_(), key_padding_mask=keys)


def test_a_float_bias_beside_half_precision() -> None:
    bias = torch.randn(100, 90, device=DEVICE).requires_grad_()
    assert_close(tensors((100, 90), 16), bias=bias)


def test_mask_over_tiles() -> None:
    mask = torch.rand(2, 100, 90, device=DEVICE) > 0.5
    mask[:, 3] = False
    sinks = torch.randn(2, device=DEVICE).requires_grad_()
    assert_close(tensors((100, 90), 16, torch.float16), mask=mask, sinks=sinks)


def test_tf32_where_torch_allows_it() -> None:
    inputs = tensors((40, 40), 16, torch.float32)
    exact = pk.attention(*inputs, backend=BACKEND)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = pk.attention(*inputs, backend=BACKEND)
        grads = torch.autograd.grad(rounded.sin().sum(), inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-6 < float((rounded - exact).detach().abs().max()) < 1e-2
    for ours, truth in zip(grads, torch.autograd.grad(exact.sin().sum(), inputs), strict=True):
        assert 1e-6 < float((ours - truth).abs().max()) < 1e-2 * float(truth.abs().max())


@pytest.mark.parametrize("hidden", ("padding", "window", "top_left", "bias"))
@pytest.mark.parametrize("size", (16, 64))
def test_hidden_keys_may_hold_anything(size: int, hidden: str) -> None:
    q, k, v = (x.detach() for x in tensors((20, 70), size))
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
        out = pk.attention(*leaves, backend=BACKEND, **options)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("ends", ([0, 90, 40], [-7, 20, 30], [50, 10, 2**40]), ids=str)
def test_packed_ends_that_lie_stay_inside(ends: list[int]) -> None:
    """On a GPU nobody reads the ends before the launch; the emulator reports every access outside a tensor."""
    q, k, v = (torch.randn(30, 2, 16, device=DEVICE) for _ in range(3))
    cu = torch.tensor(ends, device=DEVICE)
    keys = torch.ones(2, 25, dtype=torch.bool, device=DEVICE)
    masks = (None, keys, None, None, cu, cu, None)
    options = ("bottom_right", -1, -1, 0.0, 0.0, 0.25)
    result = floor.attention_forward(extension, q, k, v, None, None, *masks, *options)
    floor.attention_backward(
        extension, q, result[1], q, k, v, *result, None, None, *masks, *options, (True, True, True, False, False)
    )


@pytest.mark.parametrize("size", (16, 136))
def test_only_what_is_wanted_is_written(size: int) -> None:
    inputs = tensors((20, 33), size)
    for n, x in enumerate(inputs):
        out = pk.attention(*(y if m == n else y.detach() for m, y in enumerate(inputs)), backend=BACKEND)
        alone = torch.autograd.grad(out.sin().sum(), x)[0]
        out = pk.attention(*inputs, backend=BACKEND)
        assert torch.equal(alone, torch.autograd.grad(out.sin().sum(), inputs)[n])


@pytest.mark.skipif(DEVICE == "cuda", reason="the order of threads is the emulator's to choose")
@pytest.mark.parametrize("order", (1, 7), ids=("reversed", "random"))
@pytest.mark.parametrize("size", (64, 24))
def test_any_order_of_threads(size: int, order: int) -> None:
    inputs = tensors((90, 70), size)

    def results() -> list[Tensor]:
        out = pk.attention(*inputs, causal=True, backend=BACKEND)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    assert extension.module is not None
    first = results()
    extension.module.set_order(order)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        extension.module.set_order(0)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the emulator")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=("float32", "float16"))
def test_no_bank_conflicts(dtype: torch.dtype) -> None:
    assert extension.module is not None
    extension.module.stats()
    inputs = tensors((40, 40), 64, dtype)
    pk.attention(*inputs, backend=BACKEND).sin().sum().backward()
    stats = extension.module.stats()
    assert stats["ldmatrix_phases"] > 0 and stats["ldmatrix_conflicts"] == 0


def test_wide_heads_are_refused_with_the_reason() -> None:
    q = torch.randn(1, 1, 5, 300, device=DEVICE)
    with pytest.raises(BackendError, match="head sizes above 256"):
        pk.attention(q, q, q, backend=BACKEND)
    assert "emulator" in explain(pk.attention, q, q, q).refused


def _caught(spec: OpSpec, *labels: str) -> bool:
    cases = [case for case in spec.cases if case.label in labels]
    assert len(cases) == len(labels)
    return not all(c.passed for case in cases for c in check_case(spec, case, BACKEND, torch.float16, DEVICE))


def _changed(place: int, value: Any) -> Callable[..., Any]:
    return lambda kernel, *a: kernel(*a[:place], value, *a[place + 1 :])


def _result(place: int, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def wrong(kernel: Callable[..., Any], *a: Any) -> Any:
        made = list(kernel(*a))
        made[place] = change(made[place])
        return tuple(made)

    return wrong


# the case that must find it, the operator, what becomes of its arguments or results
MISTAKES: dict[str, tuple[str, dict[str, Any], Callable[..., Any]]] = {
    "dq of the wrong sign": ("plain", fn.attention_backward, _result(0, torch.neg)),
    "dk without the scale": ("plain", fn.attention_backward, _result(1, lambda x: x * 8**0.5)),
    "dv of the next head": ("gqa", fn.attention_backward, _result(2, lambda x: x.roll(1, 1))),
    "lse in powers of two": ("lse", fn.attention_forward, _result(1, lambda x: x * 1.4427)),
    "lse whose gradient is dropped": ("lse", fn.attention_backward, lambda k, y, z, *a: k(y, torch.zeros_like(z), *a)),
    "the other alignment": ("long-key", fn.attention_forward, _changed(12, "top_left")),
    "a window one too wide": ("window", fn.attention_backward, _changed(18, 11)),
    "a prefix that is not seen": ("prefix", fn.attention_forward, _changed(7, None)),
    "a padding mask that is dropped": ("padding", fn.attention_backward, _changed(11, None)),
    "ALiBi without the slopes": ("alibi", fn.attention_backward, _changed(13, None)),
    "a cap without its slope": ("softcap-saturated", fn.attention_backward, _changed(20, 0.0)),
    "a sink without gradient": ("sinks", fn.attention_backward, _result(4, torch.zeros_like)),
    "a bias gradient of one batch": ("bias-heads", fn.attention_backward, _result(3, lambda x: x / 2)),
    "another dropout mask backward": ("dropout", fn.attention_backward, _changed(16, torch.tensor([1], device=DEVICE))),
    "a sequence that is one longer": ("packed", fn.attention_backward, lambda k, *a: k(*a[:14], a[14] + 1, *a[15:])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    label, table, wrong = MISTAKES[mistake]
    assert not _caught(ATTENTION, label)
    kernel = table[BACKEND]
    monkeypatch.setitem(table, BACKEND, lambda *arguments: wrong(kernel, *arguments))
    assert _caught(ATTENTION, label)
