"""Invalid ids, labels, lengths and offsets where nobody looks before the kernels run: on GPUs, and in graphs."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pykernels as pk
from pykernels import _errors
from pykernels import functional as F
from pykernels.ops import _ids

KERNELS = tuple(b for b in BACKENDS if b != "cpu")
B, T, V, D, K = 5, 4, 9, 6, 7

torch.manual_seed(5)
X, W = torch.randn(B, D), torch.randn(V, D)
PACKED = F.quantize_rows(W)
BIAS, CLASS_WEIGHT = torch.randn(V), torch.rand(V)
NEGATIVES, SHARED = torch.randint(0, V, (B, K)), torch.randint(0, V, (K,))
COUNTS = torch.arange(V, 0, -1)
TABLE = F.AliasTable.from_counts(COUNTS)
TREE = pk.nn.HierarchicalSoftmaxLoss(D, COUNTS).tree
SAMPLED = (torch.tensor([1, 4, V, 0]), torch.rand(B, 1) + 0.1, torch.rand(4) + 0.1)
LSTM = [torch.randn(12, D), torch.randn(12, 3), torch.randn(12), torch.randn(12)]
QKV = torch.randn(3, 8, 2, 16)
PREFIX = torch.tensor([2, 1, -3, 0, 4])
CACHE = torch.randn(B, 1, 8, D)
BLOCKS = torch.arange(4 * B, dtype=torch.int32).view(B, 4)
BLOCKS[0, 1], BLOCKS[4, 2] = 99, -5  # not needed
BAD_BLOCKS = BLOCKS.clone()
BAD_BLOCKS[1, 0], BAD_BLOCKS[3, 0] = 4 * B, -1
ADAPTIVE = pk.nn.AdaptiveLogSoftmaxWithLoss(D, V, [3, 6])


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def negative_sampling(target: Tensor, negatives: Tensor = NEGATIVES, **options: Any) -> Tensor:
    return F.negative_sampling_loss(*on(DEVICE, X, W, target, negatives), "none", **options)


def hierarchical(target: Tensor, **options: Any) -> Tensor:
    return F.hierarchical_softmax_loss(*on(DEVICE, X, W[1:], target), TREE, "none", **options)


def sampled(labels: Tensor, function: Any = F.sampled_softmax_loss, values: Any = None, **options: Any) -> Tensor:
    values = None if values is None else tuple(on(DEVICE, *values))
    w, b, y, x = on(DEVICE, W, BIAS, labels, X)
    num_true = labels.shape[1] if labels.dim() == 2 else 1
    return function(w, b, y, x, 4, V, num_true, values, reduction="none", seed=3, **options)


def linear(target: Tensor, **options: Any) -> Tensor:
    x, w, y, c = on(DEVICE, X, W, target, CLASS_WEIGHT)
    return F.linear_cross_entropy(x, w, y, weight=c, reduction="none", **options)


def adaptive(target: Tensor, **options: Any) -> Tensor:
    module = ADAPTIVE.to(DEVICE)
    module.backend, module.bounds_check = options["backend"], options.get("bounds_check", "error")
    return module(*on(DEVICE, X, target)).output


def counts(true: Tensor, **options: Any) -> Tensor:
    return F.log_uniform_candidate_sampler(true.to(DEVICE), 1, 4, True, V, seed=3, **options)[1]


def unigram_counts(true: Tensor, **options: Any) -> Tensor:
    return F.fixed_unigram_candidate_sampler(true.to(DEVICE), 1, 4, True, V, TABLE, seed=3, **options)[1]


def lstm(lengths: Tensor, **options: Any) -> Tensor:
    given = on(DEVICE, X.expand(T, B, D), lengths, *LSTM)
    return F.lstm(given[0], None, given[2:], lengths=given[1], **options)[0].transpose(0, 1)


def packed(ends: Tensor, **options: Any) -> Tensor:
    q, k, v, ends = on(DEVICE, *QKV, ends)
    return F.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=8, max_seqlen_k=8, **options)


def prefix(lengths: Tensor, **options: Any) -> Tensor:
    q = X.view(B, 1, D, 1).expand(B, 1, D, 16).contiguous().to(DEVICE)
    return F.attention(q, q, q, causal=True, prefix_length=lengths.to(DEVICE), **options)


def decode(lengths: Tensor, table: Tensor | None = None, **options: Any) -> Tensor:
    q = X.view(B, 1, 1, D).expand(B, 2, 1, D)
    cache = CACHE if table is None else CACHE.view(4 * B, 1, 2, D)
    q, cache, lengths = on(DEVICE, q, cache, lengths)
    table = None if table is None else table.to(DEVICE)
    return F.attention_decode(q, cache, cache, lengths, block_table=table, **options)


def paged(table: Tensor, **options: Any) -> Tensor:
    return decode(torch.tensor([2, 1, 8, 2, 0]), table, **options)


class Case(NamedTuple):
    """call(bad) reports `text`; beside `rows`, which are 0 or (None) anything, its result is that of call(good)."""

    call: Callable[..., Tensor]
    bad: Tensor
    good: Tensor
    text: str
    rows: tuple[int, ...] | None
    error: type[Exception] = IndexError
    options: dict[str, Any] = {}


Y = torch.tensor([3, V, 0, -1, 8])
OK = Y.clamp(0, V - 1)
TWO = torch.stack([Y, OK.flip(0)], 1)
RANGE = rf" \(counted flat\) is {V}, which is not in \[0, {V}\)"
FIRST = rf"\[1\]{RANGE}"

CASES = {
    "negative sampling": Case(negative_sampling, Y, OK, rf"negative_sampling_loss\(\).*target{FIRST}", (1, 3)),
    "shared negatives": Case(
        negative_sampling, Y, OK, rf"negative_sampling_loss\(\).*target{FIRST}", (1, 3), options={"negatives": SHARED}
    ),
    "hierarchical": Case(hierarchical, Y, OK, rf"hierarchical_softmax_loss\(\).*target{FIRST}", (1, 3)),
    "sampled softmax": Case(sampled, Y, OK, rf"sampled_softmax_loss\(\).*labels{FIRST}", (1, 3)),
    "two labels": Case(
        sampled, TWO, TWO.clamp(0, V - 1), rf"sampled_softmax_loss\(\).*labels\[2\]{RANGE}", (1, 3)
    ),
    "nce": Case(
        sampled, Y.int(), OK.int(), rf"nce_loss\(\).*labels{FIRST}", (1, 3), options={"function": F.nce_loss}
    ),
    "linear": Case(linear, Y, OK, rf"linear_cross_entropy\(\).*target{FIRST}", (1, 3)),
    "adaptive": Case(adaptive, Y, OK, rf"AdaptiveLogSoftmaxWithLoss\(\).*target{FIRST}", (1, 3)),
    "sampler": Case(counts, Y, OK, rf"log_uniform_candidate_sampler\(\).*true_classes{FIRST}", (1, 3)),
    "unigram sampler": Case(
        unigram_counts, Y, OK, rf"fixed_unigram_candidate_sampler\(\).*true_classes{FIRST}", (1, 3)
    ),
    "lengths": Case(
        lstm, torch.tensor([4, 5, 0, -1, 2]), torch.tensor([4, 4, 0, 0, 2]), r"lstm\(\).*lengths\[1\].* is 5,", (1, 3)
    ),
    "cu_seqlens": Case(
        packed, torch.tensor([0, 5, 3, 8]), torch.tensor([0, 5, 5, 8]),
        r"attention\(\).*cu_seqlens_q\[2\].* is 3; they must .* end with 8", None, ValueError,
    ),
    "cache_lengths": Case(
        decode, torch.tensor([8, 9, 3, -1, 0]), torch.tensor([8, 8, 3, 0, 0]),
        r"attention_decode\(\).*cache_lengths\[1\].* is 9, .*\[0, 9\)", (1, 3),
    ),
    "block_table": Case(
        paged, BAD_BLOCKS, BLOCKS, r"attention_decode\(\).*block_table\[4\].* is 20, .*\[0, 20\)", (1, 3)
    ),
    "prefix_length": Case(
        prefix, PREFIX, PREFIX.clamp(min=0), r"attention\(\).*prefix_length\[2\].* is -3; .* negative", (), ValueError
    ),
}  # fmt: skip


def same_but_for(case: Case, found: Tensor, expected: Tensor) -> None:
    if case.rows is None:
        return
    kept = torch.ones(len(found), dtype=torch.bool, device=found.device)
    kept[list(case.rows)] = False
    torch.testing.assert_close(found[kept], expected[kept])
    assert not found[~kept].any()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_wrong_is_left_out_and_raised_later(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no exception by the call itself, but by the next one, and by this one with "sync"."""
    case = CASES[name]
    monkeypatch.setattr(_ids, "readable", lambda ids: False)
    options = {**case.options, "backend": backend}
    expected = case.call(case.good, **options)
    same_but_for(case, case.call(case.bad, **options), expected)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(case.error, match=case.text):
        case.call(case.good, **options)
    pk.check_errors()
    with pytest.raises(case.error, match=case.text):
        case.call(case.bad, **options, bounds_check="sync")
    if case.rows is not None:  # sequences that overlap are a race where nobody puts them right
        case.call(case.bad, **options, bounds_check="none")
    pk.check_errors()
    with pytest.raises(ValueError, match="'bounds_check' must be one of error, sync, none, not 'maybe'"):
        case.call(case.good, **options, bounds_check="maybe")


@pytest.mark.parametrize("backend", ("reference", *BACKENDS) if DEVICE == "cpu" else BACKENDS)
def test_graphs_look_too(backend: str) -> None:
    """Native code and the reference raise, kernels report; the other rows are as they should be."""
    for name in ("negative sampling", "sampled softmax", "linear", "unigram sampler", "lengths", "prefix_length"):
        case = CASES[name]
        torch._dynamo.reset()
        call = functools.partial(case.call, backend=backend, **case.options)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        expected = compiled(case.good)
        if backend in ("cpu", "reference"):
            with pytest.raises(case.error, match=case.text):
                compiled(case.bad)
            continue
        same_but_for(case, compiled(case.bad), expected)
        with pytest.raises(case.error, match=case.text):
            pk.check_errors()


@pytest.mark.parametrize("backend", KERNELS)
def test_wrong_rows_have_no_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mean too, with expected counts that are NaN, infinite or 0; sampled classes are left out."""
    monkeypatch.setattr(_ids, "readable", lambda ids: False)
    bad_counts = torch.tensor([[1.0], [torch.nan], [2.0], [-torch.inf], [0.5]])
    values = (SAMPLED[0], bad_counts, SAMPLED[2])
    rest = (torch.tensor([1, 4, 0]), bad_counts[[0, 2, 4]], SAMPLED[2][[0, 1, 3]])
    for function in (F.sampled_softmax_loss, F.nce_loss):
        x, w, y = (t.to(DEVICE, copy=True) for t in (X, W, Y))
        x.requires_grad_(), w.requires_grad_()
        given = tuple(on(DEVICE, *values))
        loss = function(w, None, y, x, 4, V, 1, given, True, "sum", backend=backend, sparse=True)
        found = torch.autograd.grad(loss, (x, w))
        with pytest.raises(IndexError, match=rf"labels{FIRST}"):
            pk.check_errors()
        right = torch.tensor([0, 2, 4], device=DEVICE)
        good = tuple(on(DEVICE, *rest))
        other = function(w, None, y[right], x[right], 3, V, 1, good, True, "sum", backend=backend, sparse=True)
        dx, dw = torch.autograd.grad(other, (x, w))
        torch.testing.assert_close(loss, other)
        torch.testing.assert_close(found[0], dx)
        torch.testing.assert_close(found[1].to_dense(), dw.to_dense())
        assert found[1].coalesce().indices().max() < V
    x.grad = None
    loss = linear_mean(x, w, y, backend)
    found = torch.autograd.grad(loss, (x, w))
    with pytest.raises(IndexError, match=rf"target{FIRST}"):
        pk.check_errors()
    torch.testing.assert_close(found, torch.autograd.grad(linear_mean(x, w, torch.where((y < 0) | (y >= V), -100, y),
                                                                      backend), (x, w)))  # fmt: skip


def linear_mean(x: Tensor, w: Tensor, y: Tensor, backend: str) -> Tensor:
    return F.linear_cross_entropy(x, w, y, weight=CLASS_WEIGHT.to(DEVICE), label_smoothing=0.1, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_first_is_reported_whatever_the_order(backend: str) -> None:
    """Later blocks give way to earlier ones; a report that was not raised yet stays; ids become `fill`."""
    check = _ids._CHECKS[backend]
    for dtype in (torch.int32, torch.int64):
        ids = torch.arange(3000, dtype=dtype, device=DEVICE).remainder(50)
        ids[[2999, 2100, 1300]] = torch.tensor([-7, 50, -2], dtype=dtype, device=DEVICE)
        out = check(ids.view(2, 1500).T, "f", "ids", "ids", 50, -2, False)  # position in the order of the argument
        position = ids.view(2, 1500).T.flatten().tolist().index(50)
        assert torch.equal(out, torch.where((ids < 0) | (ids >= 50), -2, ids).view(2, 1500).T)
        check(ids[:1], "g", "ids", "ids", 0, -2, False)
        with pytest.raises(IndexError, match=rf"f\(\).* ids\[{position}\] \(counted flat\) is 50, .*\[0, 50\)"):
            pk.check_errors()
        check(ids, "f", "ids", "ids", 50, -2, True)
        with pytest.raises(IndexError, match=r"ids\[2100\]"):
            pk.check_errors()
        ends = torch.arange(600, dtype=dtype, device=DEVICE)
        for at, value in ((599, 600), (300, 3), (0, 1), (0, -1), (70, 601)):
            wrong = ends.clone()
            wrong[at] = value
            found = check(wrong, "f", "ends", "ends", 599, 0, False)
            right = wrong.clamp(0, 599)
            right[0], right[-1] = 0, 599
            assert torch.equal(found, right.cummax(0).values)
            with pytest.raises(ValueError, match=rf"ends\[{at}\] \(counted flat\) is {value}; .* end with 599"):
                pk.check_errors()
        check(ends, "f", "ends", "ends", 599, 0, False)
        check(ids[:0], "f", "ids", "ids", 0, -2, False)
        pk.check_errors()


@pytest.mark.skipif(DEVICE != "cpu", reason="on GPUs the reference has torch's own assertions")
@pytest.mark.parametrize("function", [F.embedding_bag, F.embedding_bag_quantized, F.embedding_bag_multi])
def test_the_reference_takes_no_wrong_offsets_in_graphs(function: Any) -> None:
    """Eager calls look themselves; in a graph wrong bags came without a word."""
    ids, right = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
    given = {
        F.embedding_bag: lambda offsets: F.embedding_bag(ids, W, offsets, mode="sum", backend="reference"),
        F.embedding_bag_quantized: lambda offsets: F.embedding_bag_quantized(PACKED, ids, offsets, backend="reference"),
        F.embedding_bag_multi: lambda offsets: F.embedding_bag_multi([ids], [offsets], [W], backend="reference"),
    }[function]
    torch._dynamo.reset()
    compiled = torch.compile(given, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(right), given(right))
    for wrong in ([0, 2, 1], [1, 2, 3], [0, 2, 9]):
        with pytest.raises(ValueError, match="argument 'offsets'.*must begin with 0, not decrease, and not exceed 3"):
            compiled(torch.tensor(wrong))


def test_records_are_read_beside_the_modes_of_torch() -> None:
    """Once kernels have asked for a record, checked calls on fake tensors must not hand it to the mode."""
    _errors.record(torch.device(DEVICE))
    with FakeTensorMode():
        ids, weight = torch.zeros(3, dtype=torch.long, device=DEVICE), torch.randn(5, 4, device=DEVICE)
        assert F.embedding(ids, weight).shape == (3, 4)
        assert F.negative_sampling_loss(weight[:3], weight, ids, ids[:, None]).dim() == 0


@pytest.mark.parametrize("backend", ("reference", *BACKENDS) if DEVICE == "cpu" else BACKENDS)
def test_opcheck(backend: str) -> None:
    ids = torch.tensor([[0, 3, -100], [2, 1, 3]], device=DEVICE)
    for arguments in (("ids", 4, -100, True), ("counts", 2**63 - 1, 0, False)):
        torch.library.opcheck(_ids._CHECKS[backend], (ids.abs() if arguments[1] > 4 else ids, "f", "a", *arguments))


@pytest.fixture
def no_records() -> Iterator[None]:
    pk.check_errors()
    kept = dict(_errors._records)
    _errors._records.clear()
    yield
    _errors._records.clear()
    _errors._records.update(kept)


@pytest.mark.parametrize("mode", [torch.inference_mode, functools.partial(torch.device, "meta")])
def test_a_record_made_in_any_mode_is_raised_once_outside(mode: Any, no_records: None) -> None:
    """A server's first call is in inference mode; its record must be emptied by whoever finds it."""
    with mode():
        found = _errors.record(torch.device(DEVICE))
    assert found.device.type == "cpu" and not found.is_inference()
    found[:4] = torch.tensor([_errors.WRITTEN, _errors._numbers[_errors.Argument("embedding", "input")], 3, 11])
    with pytest.raises(IndexError, match=r"embedding\(\): argument 'input'.* is 11"):
        pk.check_errors()
    pk.check_errors()


def test_threads_raise_a_record_once(no_records: None) -> None:
    """Who comes second finds it empty, and does not make an error of nothing."""
    found, gate, raised = _errors.record(torch.device(DEVICE)), threading.Barrier(4), []

    def look() -> None:
        for _ in range(50):
            if gate.wait(60) == 0:
                found[2:6] = 7
                found[0] = _errors.WRITTEN
            gate.wait(60)
            try:
                _errors.raise_recorded()
            except IndexError as error:
                raised.append(str(error))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 50 and all("is 7" in text for text in raised)


def test_modules_that_take_such_values_have_bounds_check() -> None:
    words = ("ids", "indices", "target", "lengths", "cu_seqlens", "prefix_length", "offsets", "negatives")
    found = 0
    for name in pk.nn.__all__:
        made = getattr(pk.nn, name)
        if isinstance(made, type) and any(w in inspect.signature(made.forward).parameters for w in words):
            assert any("bounds_check" in inspect.signature(kind.__init__).parameters for kind in made.__mro__), name
            found += 1
    assert found > 8
    with pytest.raises(ValueError, match="'bounds_check' must be one of error, sync, none, not 'x'"):
        pk.nn.CausalSelfAttention(4, 2, bounds_check="x")(torch.zeros(1, 3, 4), prefix_length=1)
