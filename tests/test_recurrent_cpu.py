"""The recurrent room's native kernels where they are hard: long sequences, saturation, odd sizes, ragged batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import pykernels as pk
from pykernels.testing.compare import assert_equal

MODES = ("LSTM", "GRU", "RNN")
available = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU machine's suite is about CUDA; this file runs wherever there is none"
)
pytestmark = available


def run(module: nn.Module, given: Any, leaves: list[Tensor], outputs: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    """The outputs that `outputs` names (output, h_n, c_n) and the gradients they alone cause."""
    state = leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
    y, final = module(given, state)
    found = (y.data if isinstance(y, PackedSequence) else y, *(final if isinstance(final, tuple) else (final,)))
    used = [found[i] for i in outputs if i < len(found)]
    generator = torch.Generator().manual_seed(5)
    dy = [torch.randn(u.shape, generator=generator, dtype=torch.float64).bfloat16().to(u.dtype) for u in used]
    wanted = [*leaves, *module.parameters()]
    names = ["dx", "dh0", "dc0"][: len(leaves)] + ["d" + name for name, _ in module.named_parameters()]
    grads = torch.autograd.grad(used, wanted, dy, allow_unused=True)
    named = {f"out{i}": u.detach() for i, u in enumerate(used)}
    return named | {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def check(
    name: str,
    steps: int,
    batch: int,
    size: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    batch_sizes: Tensor | None = None,
    orthogonal: bool = False,
    scale: float = 1.0,
    outputs: tuple[int, ...] = (0, 1, 2),
    **options: Any,
) -> None:
    torch.manual_seed(3)
    theirs = getattr(nn, name)(size, hidden, **options).to(dtype)
    if orthogonal:
        for key, weight in theirs.named_parameters():
            if key.startswith("weight_hh"):
                for block in weight.data.split(hidden):
                    block.copy_(torch.linalg.qr(torch.randn(hidden, hidden))[0])
    ours = getattr(pk.nn, name).from_torch(theirs, backend="cpu")
    directions = 2 if options.get("bidirectional") else 1
    tokens = (steps, batch) if batch_sizes is None else (int(batch_sizes.sum()),)
    x = (torch.randn(*tokens, size) * scale).to(dtype)
    states = [torch.randn(directions, batch, hidden).to(dtype) for _ in range(2 if name == "LSTM" else 1)]

    def of(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, *states)]
        given = leaves[0] if batch_sizes is None else PackedSequence(leaves[0], batch_sizes)
        return run(module, given, leaves, outputs)

    found, own, truth = of(ours, dtype), of(theirs, dtype), of(copy.deepcopy(theirs).double(), torch.float64)
    assert found.keys() == truth.keys()
    # With one unit a tensor is a number or a few, made by a rounding a step; torch's own error of it is luck.
    rounding = 4.0 if hidden == 1 else 1.0
    for key, value in found.items():
        assert_equal(key, value, truth[key], own[key], long_sum=key.startswith("d"), rounding=rounding)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("hidden", (1, 33, 100, 192, 193))
@pytest.mark.parametrize("batch", (1, 3, 17, 130))
def test_sizes(name: str, hidden: int, batch: int) -> None:
    """Every remainder of rows and of units against the blocks of either instruction set."""
    check(name, 4, batch, 19, hidden)


@pytest.mark.parametrize("name", MODES)
def test_large_hidden_size(name: str) -> None:
    check(name, 2, 3, 40, 768)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize(("batch", "hidden"), ((17, 33), (40, 100), (33, 193)))
def test_sizes_in_16_bits(dtype: torch.dtype, batch: int, hidden: int) -> None:
    check("LSTM", 6, batch, 35, hidden, dtype)
    check("LSTM", 6, batch, 35, hidden, dtype, bidirectional=True)


@pytest.mark.parametrize(
    ("steps", "batch", "size", "hidden"),
    ((70, 33, 100, 40), (3, 5, 700, 520), (2, 33, 33, 300)),
    ids=("in-the-loop", "outside", "odd-panels"),
)
def test_bfloat16_products(steps: int, batch: int, size: int, hidden: int) -> None:
    """Products with the input inside the loop and outside; sums over more tokens and columns than a block's."""
    check("LSTM", steps, batch, size, hidden, torch.bfloat16)


@pytest.mark.parametrize("name", MODES)
def test_long_with_orthogonal_recurrence(name: str) -> None:
    """Spectral radius 1: what the loop gets wrong in one step is not damped in the next 1023."""
    check(name, 1024, 3, 8, 33, orthogonal=True)


@pytest.mark.parametrize("name", MODES)
def test_seventy_thousand_steps(name: str) -> None:
    """One call gives what two calls of half the steps give, the second from the first one's final state."""
    module = getattr(pk.nn, name)(2, 3, backend="cpu")
    x = torch.randn(70_000, 1, 2, requires_grad=True)
    whole, final = module(x)
    first, state = module(x[:35_000])
    second, last = module(x[35_000:], state)
    halves = torch.cat([first, second])
    assert torch.equal(whole, halves) and all(torch.equal(a, b) for a, b in zip(final, last, strict=True))
    (dx,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (whole, halves))
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_saturated(name: str, dtype: torch.dtype) -> None:
    check(name, 9, 5, 7, 40, dtype, scale=60.0)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("both", (False, True), ids=("one-way", "both-ways"))
def test_ragged(name: str, dtype: torch.dtype, both: bool) -> None:
    """Lengths with ones, in either direction; rows come and go inside blocks and inside chunks of steps."""
    sizes = torch.tensor([70, 41, 41, 40, 33, 32, 17, 16, 9, 5, 2, 2, 1, 1, 1, 1])
    check(name, 16, 70, 21, 50, dtype, sizes, bidirectional=both)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("outputs", ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)), ids=str)
def test_gradients_of_some_outputs(name: str, outputs: tuple[int, ...]) -> None:
    if outputs == (2,) and name != "LSTM":
        outputs = (1,)
    check(name, 7, 5, 6, 20, outputs=outputs)


@pytest.mark.parametrize("name", MODES)
def test_two_threads_give_the_same_bits(name: str) -> None:
    """Rows are shared out among threads; no sum depends on how."""
    module = getattr(pk.nn, name)(24, 40, backend="cpu")
    sizes = torch.tensor([37, 37, 30, 12, 12, 3])
    x = torch.randn(int(sizes.sum()), 24, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, _ = module(PackedSequence(x, sizes))
            results.append((y.data, *torch.autograd.grad(y.data.square().sum(), x)))
        finally:
            torch.set_num_threads(1)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("recompute", (False, True), ids=("saved", "recomputed"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", MODES)
def test_two_backwards_give_the_same_bits(name: str, dtype: torch.dtype, recompute: bool) -> None:
    """Nothing that autograd saved is written to."""
    module = getattr(pk.nn, name)(9, 40, bidirectional=True, recompute=recompute, dtype=dtype, backend="cpu")
    y, _ = module(PackedSequence(torch.randn(37, 9).to(dtype), torch.tensor([17, 12, 6, 2])))
    once, twice = (torch.autograd.grad(y.data.sum(), module.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("size", "hidden", "both"), ((17, 33, True), (100, 512, False), (33, 300, True)))
def test_nan_stays_in_its_sequence(size: int, hidden: int, both: bool) -> None:
    """And what lies between rows is not looked at: torch's bfloat16 product alone (oneDNN's, on tile registers) spreads
    NaN to the row before where a row does not fill its tiles."""
    torch.manual_seed(6)
    module = pk.nn.LSTM(size, hidden, bidirectional=both, dtype=torch.bfloat16, backend="cpu")
    x = torch.full((9, 37, size + 6), torch.nan, dtype=torch.bfloat16)[..., :size]
    x.copy_(torch.randn(9, 37, size))
    x[2, 5, 3] = torch.nan
    x, h0, c0 = x.requires_grad_(), *(torch.zeros(1 + both, 37, hidden).bfloat16().requires_grad_() for _ in range(2))
    y, states = module(x, (h0, c0))
    for found in (y, *states, *torch.autograd.grad(y.sum(), (x, h0, c0))):
        assert found[:, 5].isnan().any() and not found[:, torch.arange(37) != 5].isnan().any()


@pytest.mark.parametrize("name", MODES)
def test_inference_keeps_nothing(name: str) -> None:
    """Without gradients the same numbers come from a loop that saves no activations, over several chunks of tokens."""
    module = getattr(pk.nn, name)(5, 12, backend="cpu")
    x = torch.randn(300, 7, 5)
    with torch.no_grad():
        silent = module(x)
    kept = module(x)
    for a, b in zip((silent[0], *silent[1]), (kept[0], *kept[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODES)
def test_lengths_of_zero(name: str) -> None:
    """A sequence of no steps hands its state, and the state's gradient, through."""
    module = getattr(pk.nn, name)(3, 4, bidirectional=True, backend="cpu")
    x, h = torch.randn(5, 3, 3), torch.randn(2, 3, 4, requires_grad=True)
    hx = (h, h * 2) if name == "LSTM" else h
    y, state = module(x, hx, lengths=torch.tensor([2, 0, 5]))
    h_n = state[0] if name == "LSTM" else state
    assert torch.equal(h_n[:, 1], h[:, 1]) and not y[:, 1].any() and not y[2:, 0].any()
    (dh,) = torch.autograd.grad(h_n[:, 1].sum(), h)
    assert torch.equal(dh, torch.zeros_like(dh).index_fill(1, torch.tensor([1]), 1.0))


@pytest.mark.parametrize("name", MODES)
def test_input_of_no_columns(name: str) -> None:
    """Layers without inputs run on their biases and states, forward and backward, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = getattr(pk.nn, name)(1, 8, bidirectional=True, backend="cpu").to(dtype)
        call = getattr(pk.functional, name.lower())
        found = []
        for backend, kind in (("cpu", dtype), ("reference", torch.float64)):
            weights = [w.detach().to(kind) for w in module.parameters()]
            weights = [(w[:, :0] if w.shape[-1] == 1 else w).requires_grad_() for w in weights]
            y = call(torch.empty(5, 3, 0, dtype=kind), None, weights, bidirectional=True, backend=backend)[0]
            found.append([y, *torch.autograd.grad(y.sum(), weights)])
        tolerance = 30 * torch.finfo(dtype).eps
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_cell_refuses_another_dtype_and_reads_strided_cells() -> None:
    x, w = torch.randn(3, 4).bfloat16(), torch.randn(16, 4).bfloat16()
    y, _, *saved = torch.ops.pykernels.cell_forward.cpu(x, x, x, w, w, None, None, "lstm", True)
    for dh, output in ((y.double(), y), (y, y.double()), (None, y.float())):
        with pytest.raises(RuntimeError, match="dh and output must be BFloat16"):
            torch.ops.pykernels.cell_backward.cpu(dh, None, x, x, x, w, w, output, *saved, "lstm", (True,) * 7)
    gates, cells = saved
    apart = torch.stack((cells, torch.full_like(cells, torch.nan)), 2)[..., 0]
    for kept in (cells, apart):
        found = torch.ops.pykernels.cell_backward.cpu(y, None, x, x, x, w, w, y, gates, kept, "lstm", (True,) * 7)
        assert all(g.isfinite().all() for g in found)


def test_operators_refuse_what_would_read_outside() -> None:
    """Operators may be called on their own (a saved graph); they check what guards memory."""
    x, h, w_ih, w_hh = torch.randn(6, 3), torch.randn(2, 4), torch.randn(16, 3), torch.randn(16, 4)
    forward = torch.ops.pykernels.lstm_forward.cpu
    for sizes in ([3, 3], [2, 2, 2, 1], [1, 2, 3], [2, 0, 2], [2, -1]):
        with pytest.raises(RuntimeError, match="batch_sizes"):
            forward(x, h, h, w_ih, w_hh, None, None, None, None, torch.tensor(sizes), True)
    with pytest.raises(RuntimeError, match="w_ih"):
        forward(x, h, h, w_ih[:8], w_hh, None, None, None, None, None, True)
    with pytest.raises(NotImplementedError, match="float32"):
        forward(x.double(), h, h, w_ih, w_hh, None, None, None, None, None, True)


@pytest.mark.parametrize(
    "options", ({"proj_size": 20}, {"peephole": True}, {"proj_size": 70, "peephole": True}), ids=str
)
@pytest.mark.parametrize("batch", (3, 17))
def test_projections_and_peepholes(options: dict[str, Any], batch: int) -> None:
    """Ragged, both ways, sizes that fill no block, in chunks: against the reference in float64 and float32."""
    torch.manual_seed(2)
    module = pk.nn.LSTM(19, 100, bidirectional=True, backend="cpu", **options)
    sizes = torch.tensor([batch] * 40 + [2] * 7 + [1])
    x = torch.randn(int(sizes.sum()), 19)
    rows = [torch.randn(2, batch, n) for n in (options.get("proj_size", 100), 100)]
    found = {}
    for kind, dtype, backend in (("k", torch.float32, "cpu"), ("own", torch.float32, "reference"),
                                 ("o", torch.float64, "reference")):  # fmt: skip
        m = copy.deepcopy(module).to(dtype)
        m.backend = backend
        leaves = [t.to(dtype).requires_grad_() for t in (x, *rows)]
        found[kind] = run(m, PackedSequence(leaves[0], sizes), leaves)
    for key, value in found["k"].items():
        assert_equal(key, value, found["o"][key], found["own"][key], long_sum=key.startswith("d"))


@pytest.mark.parametrize("name", ("rnn_relu_cell", "lstm_cell", "gru_cell"))
def test_cells_read_any_layout(name: str) -> None:
    """Rows apart, rows that are one, a single row of stride 0, transposed weights, no input columns, many rows (the
    weights' gradients in partial sums), of an LSTM one of the two results alone: as torch has it."""
    torch.manual_seed(0)
    gates, states = {"r": 1, "l": 4, "g": 3}[name[0]], 2 if name[0] == "l" else 1
    ours, theirs = getattr(pk.functional, name), getattr(torch, name)
    size, hidden = 5, 7
    wide = torch.randn(6, 2 * size)
    layouts = (wide[:, size:], torch.randn(size).expand(6, size), torch.randn(size).expand(1, size), wide[:, ::2])
    for x in (*layouts, torch.randn(300, size), torch.randn(6, 0)):
        w_ih, w_hh = torch.randn(x.shape[1], gates * hidden).t(), torch.randn(hidden, gates * hidden).t()
        hx = [torch.randn(hidden, x.shape[0]).t() for _ in range(states)]
        given = [t.detach().double().requires_grad_() for t in (x, *hx, w_ih, w_hh, torch.randn(gates * hidden))]
        leaves = [t.detach().requires_grad_() for t in (x, *hx, w_ih, w_hh, given[-1].float())]

        def call(function: Any, leaves: list[Tensor], which: int) -> tuple[Tensor, ...]:
            state = leaves[1] if states == 1 else tuple(leaves[1:3])
            y = function(leaves[0], state, *leaves[1 + states :], leaves[-1])
            y = y if states == 1 else y[which]
            dy = torch.linspace(-1, 1, hidden).to(y.dtype).expand(y.shape)
            return y, *torch.autograd.grad(y, leaves, dy, allow_unused=True)

        for which in range(states):
            for a, b in zip(call(ours, leaves, which), call(theirs, given, which), strict=True):
                expected = torch.zeros_like(a) if b is None else b.float()
                torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-4)


# Products of all tokens that are large enough for tile registers, whose edges (32 and 128 deep, 1024 rows) they cross.
@pytest.mark.parametrize(
    ("name", "steps", "batch", "size", "hidden", "options"),
    (
        ("LSTM", 9, 29, 129, 161, {}),
        ("GRU", 41, 26, 130, 128, {"bidirectional": True}),
        ("RNN", 11, 24, 257, 159, {"nonlinearity": "relu"}),
    ),
    ids=("LSTM", "GRU", "RNN"),
)
def test_products_of_all_tokens(
    name: str, steps: int, batch: int, size: int, hidden: int, options: dict[str, Any]
) -> None:
    check(name, steps, batch, size, hidden, **options)
    torch.manual_seed(3)
    module = getattr(pk.nn, name)(size, hidden, backend="cpu", **options)
    x = torch.randn(steps, batch, size)

    def found(threads: int) -> list[Tensor]:
        given, before = x.clone().requires_grad_(), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = module(given)[0]
            return [y, *torch.autograd.grad(y.square().sum(), [given, *module.parameters()])]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(found(1), found(3), strict=True))


def test_products_of_all_tokens_keep_every_bit() -> None:
    """Products with a matrix of one 1 a row are exact: all 24 bits of a number are in its three parts."""
    torch.manual_seed(3)
    size, hidden, tokens = 256, 512, 384  # not small enough for the loop to take the input's product along
    module = pk.nn.RNN(size, hidden, backend="cpu", nonlinearity="relu", bias=False)
    weight, units, among = module.weight_ih_l0, torch.arange(hidden), torch.arange(hidden) % size
    module.weight_hh_l0.data.zero_()
    dy = torch.randn(tokens, hidden)

    weight.data.zero_()[units, among] = 1
    x = (torch.rand(tokens, size) + 0.1).requires_grad_()
    y = module(x[:, None])[0][:, 0]
    assert torch.equal(y, x[:, among])
    dy_of_some = dy * (units < size)
    assert torch.equal(torch.autograd.grad(y, x, dy_of_some)[0], dy[:, :size])

    weight.data.uniform_(0.1, 1)
    y = module(torch.eye(tokens, size)[:, None])[0][:, 0]
    assert torch.equal(y[:size], weight.T)
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], dy[:size].T)


@pytest.mark.parametrize("value", (float("inf"), float("nan"), 3.4e38, 1e30), ids=str)
def test_products_of_what_is_not_finite(value: float) -> None:
    """Where parts of a number would overflow, products are torch's, with its infinities and NaN."""
    torch.manual_seed(3)
    theirs = nn.RNN(160, 512, nonlinearity="relu")
    theirs.weight_hh_l0.data.zero_()
    theirs.weight_ih_l0.data.clamp_(min=0.01).mul_(1e10)
    ours = pk.nn.RNN.from_torch(theirs, backend="cpu")
    x = torch.rand(8, 20, 160)
    x[3, 7, 5] = value

    def of(module: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = module(given)[0]
        return [y, *torch.autograd.grad(y, [given, module.weight_ih_l0], torch.ones_like(y))]

    for found, expected in zip(of(ours), of(theirs), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, equal_nan=True)
