"""Decoding over a cache: what the contract's cases do not show."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels.ops.attention import decode
from pykernels.testing.run import check_case
from pykernels.testing.spec import load
from pykernels.testing.specs._attention_decode import case, gathered

attention_decode = pk.functional.attention_decode
(SPEC,) = (spec for spec in load("attention") if spec.name == "attention_decode")
over_backends = pytest.mark.parametrize("backend", [b for b in SPEC.kernels if b in BACKENDS])
LENGTHS = torch.tensor([37, 0, 64, 1], dtype=torch.int32, device=DEVICE)


def dense_cache(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query (4, 4, 2, 16), key and value (4, 2, 64, 16)."""
    shapes = (4, 4, 2, 16), (4, 2, 64, 16), (4, 2, 64, 16)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def in_blocks(cache: Tensor, table: Tensor, blocks: int, fill: float) -> Tensor:
    """The other way round than `gathered`."""
    size = cache.shape[2] // table.shape[1]
    found = cache.new_full((blocks, cache.shape[1], size, cache.shape[3]), fill)
    found[table.long()] = cache.unflatten(2, (-1, size)).transpose(1, 2)
    return found


@over_backends
def test_is_attention_of_each_sequence(backend: str) -> None:
    q, k, v = dense_cache()
    sinks, slopes = torch.randn(4, device=DEVICE), torch.rand(4, device=DEVICE)
    for options in ({}, {"window": (11, -1)}, {"softcap": 2.0, "sinks": sinks, "alibi_slopes": slopes, "scale": 0.3}):
        out, lse = attention_decode(q, k, v, LENGTHS, return_lse=True, backend=backend, **options)
        for b, n in enumerate(LENGTHS.tolist()):
            one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            expected = pk.reference.attention(*one, causal=True, return_lse=True, **options)
            torch.testing.assert_close(out[b : b + 1], expected[0])
            torch.testing.assert_close(lse[b : b + 1], expected[1])
    assert not attention_decode(q, k, v, LENGTHS, backend=backend)[1].any(), "an empty cache gives 0"
    full = attention_decode(q, k, v, LENGTHS.clamp(64), backend=backend)
    assert torch.equal(attention_decode(q, k, v, None, backend=backend), full)


@over_backends
def test_what_is_not_seen_is_not_read(backend: str) -> None:
    """NaN beyond the lengths and before the windows, blocks that no table names, entries that mean nothing."""
    q, k, v = dense_cache()
    clean = attention_decode(q, k, v, LENGTHS, window=(20, -1), return_lse=True, backend=backend)
    place = torch.arange(64, device=DEVICE)
    hidden = (place >= LENGTHS[:, None]) | (place < LENGTHS[:, None] - 22)
    for x in (k, v):
        x.masked_fill_(hidden[:, None, :, None], torch.nan)
    table = torch.randperm(40, device=DEVICE)[:32].view(4, 8).to(torch.int32)
    paged = [in_blocks(x, table, 40, torch.nan) for x in (k, v)]
    table[1], table[3, 1:], table[2, :5] = -1, 12345, 99
    for cache, options in (((k, v), {}), (paged, {"block_table": table})):
        found = attention_decode(q, *cache, LENGTHS, window=(20, -1), return_lse=True, backend=backend, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@over_backends
def test_parts_and_layouts(backend: str) -> None:
    """The same numbers however the keys are cut and wherever they lie: heads and positions in any order, tables and
    lengths with strides, 64-bit lengths."""
    q, k, v = dense_cache()
    expected = attention_decode(q, k, v, LENGTHS, num_splits=1, backend=backend)
    for splits in (2, 5, 256 if backend == "cpu" else 9):
        torch.testing.assert_close(attention_decode(q, k, v, LENGTHS, num_splits=splits, backend=backend), expected)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided = torch.stack((LENGTHS.long(), LENGTHS.long() + 99), 1)[:, 0]
    out = attention_decode(*other, strided, num_splits=1, backend=backend)
    assert torch.equal(out, expected) and out.transpose(1, 2).is_contiguous()
    table = torch.randperm(32, device=DEVICE).view(8, 4).to(torch.int32).t()
    paged = [in_blocks(x, table, 32, torch.nan) for x in (k, v)]
    assert all(torch.equal(gathered(x, table), y) for x, y in zip(paged, (k, v), strict=True))
    out = attention_decode(q, *paged, LENGTHS, block_table=table, num_splits=1, backend=backend)
    assert torch.equal(out, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of the native kernels")
@pytest.mark.parametrize("splits", [None, 3])
def test_threads_change_no_bit(splits: int | None) -> None:
    q, k, v = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 2, 4096, 16)
    lengths = torch.tensor([4001])
    one = attention_decode(q, k, v, lengths, num_splits=splits, backend="cpu")
    torch.set_num_threads(2)
    try:
        two = attention_decode(q, k, v, lengths, num_splits=splits, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@over_backends
def test_many_keys(backend: str) -> None:
    """Parts of several tiles each, ragged; also as the backend itself cuts them."""
    q, k, v = torch.randn(2, 4, 1, 64, device=DEVICE), *torch.randn(2, 2, 1, 1100, 64, device=DEVICE)
    lengths = torch.tensor([1037, 700], device=DEVICE)
    expected = pk.reference.attention_decode(q, k, v, lengths)
    for splits in (None, 2):
        torch.testing.assert_close(attention_decode(q, k, v, lengths, num_splits=splits, backend=backend), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="tiles of the native kernels")
@pytest.mark.parametrize("columns", [1, 4, 5, 8, 12, 16, 17, 40])
def test_columns_fill_tiles(columns: int) -> None:
    """As many query heads on a key head, and sizes of every kind of tile; 600 keys: see decode_kernels."""
    for size in (24, 64, 96, 128, 160):
        one = case("columns", (1, columns, 1, size), (1, 1, 600, size), num_splits=2, return_lse=True)
        for dtype in (torch.bfloat16, torch.float32):
            assert all(found.passed for found in check_case(SPEC, one, "cpu", dtype))


@pytest.mark.skipif(DEVICE != "cpu", reason="of the native kernels, whose work is shared out by bytes of a row")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_heads_of_no_elements(dtype: torch.dtype) -> None:
    """All scores are 0: a mean of the values, where there are any."""
    for size, value_size in ((0, 0), (0, 32), (32, 0)):
        shapes = (1, 2, 3, size), (1, 1, 600, size), (1, 1, 600, value_size)
        q, k, v = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
        found = attention_decode(q, k, v, None, return_lse=True, scale=1.0, backend="cpu")
        expected = pk.reference.attention_decode(q, k, v, None, return_lse=True, scale=1.0)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the native kernels; products of several parts turn infinities to NaN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_infinities_stay_where_they_are(dtype: torch.dtype) -> None:
    """In their own element and head, as does what is NaN: tiles read two elements of a value together."""
    shapes = (1, 12, 1, 64), (1, 2, 70, 64), (1, 2, 70, 64)
    q, k, v = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    v[0, 0, 5, 7], v[0, 0, 69, 40], v[0, 1, 20, 0] = torch.inf, -torch.inf, torch.nan
    out = attention_decode(q, k, v, None, backend="cpu")
    expected = pk.reference.attention_decode(q.double(), k.double(), v.double(), None)
    assert expected.isinf().sum() == 12 and expected.isnan().sum() == 6
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=1e-2, equal_nan=True)


Bad = tuple[Callable[[], Any], type[Exception], str]


def bad_calls() -> dict[str, Bad]:
    q, k, v = dense_cache()
    table = torch.zeros(4, 8, dtype=torch.int32, device=DEVICE)
    f, n = attention_decode, LENGTHS
    return {
        "query": (lambda: f([1], k, v, n), TypeError, "'query' must be Tensor, not list"),
        "integers": (lambda: f(q.long(), k, v, n), NotImplementedError, "'query' of dtype torch.int64"),
        "dtype": (lambda: f(q, k.half(), v, n), RuntimeError, "'key_cache' is torch.float16 but 'query'"),
        "dimensions": (lambda: f(q[0], k, v, n), RuntimeError, "'query' must have the dimensions (batch, heads"),
        "head size": (lambda: f(q, k[..., :8], v, n), RuntimeError, "head size 16, not 8"),
        "value": (lambda: f(q, k, v[:, :, :9], n), RuntimeError, "'value_cache' must have key_cache's shape"),
        "heads": (lambda: f(q[:, :3], k, v, n), RuntimeError, "divides query's 3, not 2"),
        "batch": (lambda: f(q, k[:3], v[:3], n), RuntimeError, "query's batch size 4, not 3"),
        "lengths": (lambda: f(q, k, v, n[:3]), RuntimeError, "'cache_lengths' must have the shape (4,), not (3,)"),
        "floats": (lambda: f(q, k, v, n.float()), RuntimeError, "'cache_lengths' must be int32 or int64"),
        "table": (lambda: f(q, k, v, n, block_table=table.long()), RuntimeError, "'block_table' must be int32"),
        "rows": (lambda: f(q, k, v, n, block_table=table[:2]), RuntimeError, "the shape (4, max_blocks), not (2, 8)"),
        "sinks": (lambda: f(q, k, v, n, sinks=q[0, 0, 0]), RuntimeError, "'sinks' must have the shape (4,)"),
        "window": (lambda: f(q, k, v, n, window=(-2, 0)), ValueError, "'window' must hold numbers >= -1"),
        "wide window": (lambda: f(q, k, v, n, window=(2**63, 0)), ValueError, "'window' must hold numbers below 2^63"),
        "softcap": (lambda: f(q, k, v, n, softcap=0.0), ValueError, "'softcap' must be positive, not 0.0"),
        "splits": (lambda: f(q, k, v, n, num_splits=0), ValueError, "'num_splits' must be in [1, 256], not 0"),
        "check": (lambda: f(q, k, v, n, bounds_check="no"), ValueError, "error, sync, none, not 'no'"),
        "gradient": (lambda: f(q, k, v.requires_grad_(), n), RuntimeError, "'value_cache' requires grad"),
    }


@pytest.mark.parametrize("mistake", bad_calls())
def test_bad_arguments(mistake: str) -> None:
    call, error, message = bad_calls()[mistake]
    with pytest.raises(error, match=re.escape(message)):
        call()


BAD_VALUES = {
    "long": ("cache_lengths[2] is 65, which is not in [0, 65)", {"lengths": (2, 65)}),
    "negative": ("cache_lengths[0] is -1, which is not in [0, 65)", {"lengths": (0, -1)}),
    "block": ("block_table[2, 7] is 8, which is not in [0, 8)", {"table": ((2, 7), 8)}),
    "negative block": ("block_table[0, 4] is -3, which is not in [0, 8)", {"table": ((0, 4), -3)}),
}


def with_bad_values(change: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    q, (k, v) = dense_cache()[0], torch.randn(2, 8, 2, 8, 16, device=DEVICE)
    lengths, table = LENGTHS.clone(), torch.arange(32, dtype=torch.int32, device=DEVICE).view(4, 8) % 8
    if "lengths" in change:
        lengths[change["lengths"][0]] = change["lengths"][1]
    else:
        table[change["table"][0]] = change["table"][1]
    return [q, k, v, lengths], {"block_table": table}


@pytest.mark.skipif(DEVICE != "cpu", reason="what eager mode on the CPU raises; GPUs report")
@pytest.mark.parametrize("mistake", BAD_VALUES)
@pytest.mark.parametrize("backend", ["reference", *SPEC.kernels[:1]])
def test_values_out_of_range_on_the_cpu(backend: str, mistake: str) -> None:
    message, change = BAD_VALUES[mistake]
    inputs, options = with_bad_values(change)
    with pytest.raises(IndexError, match=re.escape(message)):
        attention_decode(*inputs, **options, backend=backend)


@pytest.mark.skipif(DEVICE != "cpu", reason="what eager mode on the CPU raises; GPUs report")
@pytest.mark.parametrize("backend", ["reference", *SPEC.kernels[:1]])
def test_the_widest_window_hides_no_wrong_block(backend: str) -> None:
    """More queries than keys: the place of the first minus the window is below the least int64."""
    q, (k, v) = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 2, 4, 8)
    table = torch.tensor([[99999, 1]], dtype=torch.int32)
    with pytest.raises(IndexError, match=re.escape("block_table[0, 0] is 99999, which is not in [0, 4)")):
        attention_decode(q, k, v, torch.tensor([1]), block_table=table, window=(2**63 - 1, 0), backend=backend)


@pytest.mark.parametrize("backend", [b for b in SPEC.kernels[1:] if b in BACKENDS])
def test_more_keys_than_kernels_can_count_are_refused(backend: str) -> None:
    """Of a cache that shares memory, say; places of keys are int32 there. `auto` takes a backend that serves them."""
    q, x = torch.randn(1, 2, 1, 8, device=DEVICE), torch.randn(1, 1, 1, 8, device=DEVICE)
    many, table = x.expand(1, 1, 2**31 + 1, 8), torch.zeros(1, 1, dtype=torch.int32, device=DEVICE).expand(1, 2**31)
    for cache, options in ((many, {}), (x, {"block_table": table}), (many, {"softcap": 1.0})):
        given = (q, cache, cache, LENGTHS[-1:])
        with pytest.raises(pk.BackendError, match=r"do not serve: more than 2\^30 keys a sequence"):
            attention_decode(*given, backend=backend, bounds_check="none", **options)
        chosen = pk.explain(attention_decode, *given, bounds_check="none", **options)
        assert chosen.backend == ("cpu" if DEVICE == "cpu" else "reference")
    if DEVICE == "cpu":
        out = attention_decode(q, many, many, LENGTHS[-1:])
        torch.testing.assert_close(out, x.expand(1, 2, 1, 8))


@pytest.mark.parametrize("backend", [b for b in SPEC.kernels[1:] if b in BACKENDS])
@pytest.mark.parametrize("mistake", BAD_VALUES)
def test_values_out_of_range_are_reported_by_kernels(backend: str, mistake: str) -> None:
    """As on a GPU: such a sequence has no keys, such a block is not seen, and the host is told."""
    message, change = BAD_VALUES[mistake]
    (q, k, v, lengths), options = with_bad_values(change)
    given = (q, k, v, lengths, options["block_table"], None, None, -1, 0.0, 0.25, 2)
    kernel = decode.attention_decode_forward[backend]
    out, _ = kernel(*given, decode._LENGTHS)
    where, value, bound = re.match(r"(.*\]) is (-?\d+), which is not in \[0, (\d+)\)", message).groups()
    b, *slot = map(int, re.findall(r"\d+", where))
    flat = b * 8 + slot[0] if slot else b
    with pytest.raises(IndexError, match=rf"\[{flat}\] \(counted flat\) is {value}, which is not in \[0, {bound}\)"):
        pk.check_errors()
    pk.check_errors()
    assert torch.equal(kernel(*given, 0)[0], out)
    pk.check_errors()
    lengths, table = lengths.clone(), options["block_table"].clone()
    if not slot:
        lengths[b] = 0
        expected = pk.reference.attention_decode(q, k, v, lengths, block_table=table, scale=0.25)
        torch.testing.assert_close(out, expected)
    others = torch.arange(4, device=DEVICE) != b
    clean = with_bad_values({"table": ((0, 0), 0)})
    expected = pk.reference.attention_decode(q, k, v, clean[0][3], **clean[1], scale=0.25)
    torch.testing.assert_close(out[others], expected[others])
    assert out.isfinite().all()


def test_graphs_check_values_too() -> None:
    """On the CPU: the native kernel looks, and so does the reference, in a compiled graph as in eager mode."""
    for backend in ("reference", "cpu") if DEVICE == "cpu" else ("triton",):
        torch._dynamo.reset()
        compiled = torch.compile(attention_decode, fullgraph=True, backend="aot_eager")
        for mistake in ("long", "block"):
            inputs, options = with_bad_values(BAD_VALUES[mistake][1])
            with pytest.raises(IndexError, match="which is not in"):
                compiled(*inputs, **options, backend=backend)
                pk.check_errors()


def test_autocast_and_tracing() -> None:
    q, k, v = dense_cache(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention_decode(q.float(), k, v, LENGTHS)
    assert torch.equal(out, attention_decode(q, k, v, LENGTHS))
    assert pk.explain(attention_decode, q, k, v, LENGTHS).backend == ("cpu" if DEVICE == "cpu" else "triton")
    wide = [torch.cat([x] * 20, -1).double() for x in (q, k, v)]
    assert pk.explain(attention_decode, *wide, LENGTHS).backend == "reference"
    assert attention_decode(*wide, LENGTHS).shape == (4, 4, 2, 320)


MISTAKES: dict[str, Callable[..., Any]] = {
    "a length too short": lambda k, q, key, value, n, *a: k(q, key, value, (n - 1).clamp(min=0), *a),
    "without its window": lambda k, *a: k(*a[:7], -1, *a[8:]),
    "without sinks": lambda k, *a: k(*a[:5], None, *a[6:]),
    "slopes of the wrong sign": lambda k, *a: k(*a[:6], None if a[6] is None else -a[6], *a[7:]),
    "the table's rows in another order": lambda k, *a: k(*a[:4], None if a[4] is None else a[4].flip(0), *a[5:]),
    "queries in another order": lambda k, q, *a: (lambda out, lse: (out.flip(2), lse))(*k(q, *a)),
    "lse in powers of two": lambda k, *a: (lambda out, lse: (out, lse * 1.4427))(*k(*a)),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="plants in the native kernel")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = decode.attention_decode_forward["cpu"]
    wrong = {"cpu": lambda *arguments: MISTAKES[mistake](kernel, *arguments)}
    monkeypatch.setattr(decode, "attention_decode_forward", wrong)
    assert not all(c.passed for case in SPEC.cases for c in check_case(SPEC, case, "cpu", torch.float32))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_paged_cache_without_blocks_serves_empty_sequences(backend: str) -> None:
    q, cache = torch.randn(2, 4, 1, 16, device=DEVICE), torch.randn(0, 2, 8, 16, device=DEVICE)
    table, lengths = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in ((2, 3), 2))
    assert not pk.functional.attention_decode(q, cache, cache, lengths, block_table=table, backend=backend).any()


def test_the_reference_sees_no_block_that_is_none() -> None:
    """As the kernels: not another block in its place."""
    q, cache, lengths = torch.randn(1, 2, 1, 8), torch.randn(3, 2, 4, 8), torch.tensor([8])
    options = {"backend": "reference", "bounds_check": "none"}
    found = pk.functional.attention_decode(
        q, cache, cache, lengths, block_table=torch.tensor([[9, 1]], dtype=torch.int32), **options
    )
    expected = pk.functional.attention_decode(q, cache[1:2], cache[1:2], None, **options)
    torch.testing.assert_close(found, expected)
