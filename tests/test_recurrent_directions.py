"""Both directions of a recurrent layer in one call, and sequences of any length inside compiled graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils.rnn import PackedSequence

import pykernels as pk
from pykernels._cuda._extension import Extension
from pykernels._triton import _lib as triton_lib
from pykernels.ops.recurrent import _layout

I, H, T, B = 3, 20, 7, 5  # noqa: E741
MODES = ("rnn", "lstm", "gru")
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
LENGTHS = torch.tensor([3, 7, 0, 5, 1])
KERNELS = [b for b in BACKENDS if b != "reference"]


def flat(name: str, ways: int = 2, layers: int = 1, proj_size: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    gated, width = GATES[name] * H, proj_size or H
    found = []
    for layer in range(layers):
        for _ in range(ways):
            found += [torch.randn(gated, ways * width if layer else I), torch.randn(gated, width)]
            found += [torch.randn(gated), torch.randn(gated)] + [torch.randn(proj_size, H)] * (proj_size > 0)
    return [(w * 0.3).to(DEVICE, dtype).requires_grad_() for w in found]


def states(name: str, rows: int, proj_size: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    widths = (proj_size or H, H)[: 2 if name == "lstm" else 1]
    return tuple(torch.randn(rows, B, n).to(DEVICE, dtype).requires_grad_() for n in widths)


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(y for part in result for y in tensors(part))


def call(name: str, x: Tensor, hx: tuple[Tensor, ...], weights: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    given = hx[0] if len(hx) == 1 else hx or None
    return tensors(getattr(pk.functional, name)(x, given, weights, **options))


def gradients(found: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    loss = sum((y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in found)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def against_time(x: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence of x (T, B, ...) from its end to its beginning."""
    out = x.clone()
    for b, n in enumerate(lengths.tolist()):
        out[:n, b] = x[:n, b].flip(0)
    return out


def reset_against_time(resets: Tensor, lengths: Tensor) -> Tensor:
    """A cut before step t of n lies before step n - t of the sequence told backwards; one before its end is none."""
    out = torch.zeros_like(resets)
    for b, n in enumerate(lengths.tolist()):
        for t in range(1, n):
            out[n - t, b] = resets[t, b]
    return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize(
    ("name", "layout"),
    [*itertools.product(MODES, ("padded", "lengths", "resets")), ("lstm", "proj_size")],
)
def test_both_directions_equal_two_runs(name: str, layout: str, dtype: torch.dtype) -> None:
    """The second direction is the first one over sequences told backwards: the same bits of outputs and final states,
    and gradients up to the order of their sums."""
    torch.manual_seed(0)
    proj_size = 6 if layout == "proj_size" else 0
    weights, hx = flat(name, 2, 1, proj_size, dtype), states(name, 2, proj_size, dtype)
    x = torch.randn(T, B, I).to(DEVICE, dtype).requires_grad_()
    whole = torch.full((B,), T)
    lengths = LENGTHS if layout in ("lengths", "resets") else whole
    options: dict[str, Any] = {"backend": KERNELS[0]} | ({"proj_size": proj_size} if proj_size else {})
    options |= {"lengths": lengths.to(DEVICE)} if lengths is LENGTHS else {}
    resets = torch.rand(T, B) < 0.3
    one, other = ({"resets": r.to(DEVICE)} for r in (resets, reset_against_time(resets, lengths)))
    if layout != "resets":
        one, other = {}, {}
    found = call(name, x, hx, weights, bidirectional=True, **one, **options)

    each = len(weights) // 2
    first = call(name, x, tuple(s[:1] for s in hx), weights[:each], **one, **options)
    back = against_time(x, lengths)
    second = call(name, back, tuple(s[1:] for s in hx), weights[each:], **other, **options)
    expected = [torch.cat((first[0], against_time(second[0], lengths)), -1)]
    expected += [torch.cat(pair) for pair in zip(first[1:], second[1:], strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    leaves, bound = [x, *hx, *weights], 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(gradients(found, leaves), gradients(tuple(expected), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", MODES)
def test_threads_share_out_directions(name: str, dtype: torch.dtype) -> None:
    """Few rows: a direction for each thread. No sum depends on how the work is shared out."""
    torch.manual_seed(0)
    x, weights, results = torch.randn(40, 3, I).to(dtype).requires_grad_(), flat(name, dtype=dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found = call(name, x, (), weights, bidirectional=True, backend="cpu")
            results.append((*found, *gradients(found, [x, *weights])))
        finally:
            torch.set_num_threads(1)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("hidden", (H, 40), ids=("loop", "step"))
@pytest.mark.parametrize("backend", [b for b in KERNELS if b != "cpu"])
def test_both_directions_take_the_launches_of_one(backend: str, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    owner, name = (triton_lib, "launch") if backend == "triton" else (Extension, "call")
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        launches.append(str(args[0] if backend == "triton" else args[1]))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    counts = []
    for both in (False, True):
        module = pk.nn.LSTM(4, hidden, bidirectional=both, backend=backend, device=DEVICE)
        launches.clear()
        module(torch.randn(3, 2, 4, device=DEVICE))[0].sum().backward()
        counts.append(len(launches))
    assert counts[0] == counts[1] == (6 if backend == "triton" and hidden == 40 else 2)


def outcome(function: Any, x: Tensor, hx: Any, weights: list[Tensor], given: dict[str, Any]) -> tuple[Tensor, ...]:
    found = function(x, hx, weights, given)
    return *found, *(g for g in gradients(found, [x, *weights]) if g is not None)


# Compiling is slow, and what is in question is the layout, not the cell: the CPU takes every kind, other floors one.
COMPILED = [(b, "lstm", g) for b in KERNELS if b == "cpu" for g in ("lengths", "resets", "packed", "packed-resets")]
COMPILED += [(b, *case) for b in KERNELS for case in (("gru", "both"), ("rnn", "packed"))[: 2 if b == "cpu" else 1]]


@pytest.mark.parametrize(("backend", "name", "given"), COMPILED)
def test_any_length_in_a_compiled_graph(backend: str, name: str, given: str) -> None:
    """One graph with the kernels in it, whatever the lengths are: none of a graph's sizes is data."""
    torch.manual_seed(0)
    layers = 2 if given == "lengths" else 1
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": True, "dropout": 0.3, "training": True, "seed": 5}
    weights, graphs = flat(name, 2, layers), []
    if name == "lstm":
        options["recompute"] = given == "resets"

    def run(x: Tensor, hx: Any, weights: list[Tensor], data: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return call(name, x, hx, weights, **data, **options, backend=backend)

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    aot = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(run, fullgraph=True, backend=aot)
    for again in range(2 if backend == "cpu" else 1):
        data = {}
        if given in ("lengths", "both"):
            data["lengths"] = LENGTHS.roll(again).to(DEVICE)
        if given.startswith("packed"):
            data["batch_sizes"] = torch.tensor(((5, 5, 4, 3, 1), (5, 4, 4, 3, 2))[again])
        shape = (18,) if given.startswith("packed") else (T, B)
        if given not in ("lengths", "packed"):
            data["resets"] = (torch.rand(shape) < 0.3).to(DEVICE)
        hx = states(name, 2 * layers) if again else ()
        x = torch.randn(*shape, I, device=DEVICE).requires_grad_()
        with torch.no_grad():
            if "lengths" in data:  # what lies beyond is not read
                x[torch.arange(T)[:, None] >= LENGTHS.roll(again)] = float("nan")
        eager, whole = (outcome(function, x, hx, weights, data) for function in (run, compiled))
        for a, b in zip(whole, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))
    operators = set().union(*graphs)
    assert {f"pykernels.{name}_forward.{backend}", f"pykernels.{name}_backward.{backend}"} <= operators


def test_rows_in_a_compiled_graph() -> None:
    """Layer normalisation and zoneout, whose operators take padding too."""
    torch.manual_seed(0)
    module = pk.nn.LSTM(I, H, bidirectional=True, layer_norm=True, zoneout=0.2, backend="cpu").eval()
    x, resets = torch.randn(T, B, I, requires_grad=True), torch.rand(T, B) < 0.3

    def run(x: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, ...]:
        return tensors(module(x, lengths=lengths, resets=resets))

    torch._dynamo.reset()
    whole, eager = (f(x, LENGTHS, resets) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run))
    leaves = [x, *module.parameters()]
    for a, b in zip((*whole, *gradients(whole, leaves)), (*eager, *gradients(eager, leaves)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpu" not in KERNELS, reason="needs the native CPU kernels")
def test_modules_in_a_compiled_graph_of_dynamic_sizes() -> None:
    """PackedSequence and lengths where numbers of steps, sequences and tokens are symbols."""
    torch.manual_seed(0)
    module = pk.nn.LSTM(I, H, bidirectional=True, backend="cpu")

    def run(x: Tensor, lengths: Tensor, packed: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        padded, _ = module(x, lengths=lengths)
        return padded, module(PackedSequence(packed, sizes))[0].data

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, sizes in ((6, [3, 2, 2]), (9, [4, 1])):
        args = torch.randn(steps, B, I), LENGTHS.clamp(max=steps), torch.randn(sum(sizes), I), torch.tensor(sizes)
        with torch.no_grad():
            for a, b in zip(compiled(*args), run(*args), strict=True):
                torch.testing.assert_close(a, b)
    with pytest.raises(IndexError, match="lengths"):
        compiled(args[0], LENGTHS + 5, *args[2:])


@pytest.mark.parametrize("resets", (False, True), ids=("lengths", "resets"))
def test_order_of_a_graph(resets: bool) -> None:
    """The operator that makes it, against its fake; every token once."""
    cut = torch.rand(T, B) < 0.4 if resets else None
    arguments = LENGTHS, cut, None, T, B, torch.empty(0)
    torch.library.opcheck(torch.ops.pykernels.recurrent_order.default, arguments)
    tokens, sizes, owner, _, begins = _layout._padded_order(*arguments)
    exact = _layout._order_of(*arguments)
    assert sorted(tokens.tolist()) == list(range(T * B)) and sizes.sum() == LENGTHS.sum() == exact.tokens.numel()
    assert torch.equal(tokens[: exact.tokens.numel()], exact.tokens) and not begins[:, exact.owner.numel() :].any()
    assert owner.numel() == (T * B + B if resets else B)
