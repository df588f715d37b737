"""What is particular to the recurrent room: modules, packed and padded sequences, dropout, errors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pykernels as pk
from pykernels.reference._random import philox_words

I, H, T, B = 4, 5, 4, 3  # noqa: E741
LENGTHS = torch.tensor([2, 4, 1])


def configurations() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, layers, bias, both in itertools.product(("RNN", "LSTM", "GRU"), (1, 2), (True, False), (False, True)):
        options = {"num_layers": layers, "bias": bias, "bidirectional": both, "batch_first": bias != both}
        yield name, options
        if name == "LSTM":
            yield name, {**options, "proj_size": 3}
        if name == "RNN":
            yield name, {**options, "nonlinearity": "relu"}


def pair(name: str, *size: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, from the same seed."""
    torch.manual_seed(7)
    ours = getattr(pk.nn, name)(*size, **options)
    torch.manual_seed(7)
    return ours, getattr(nn, name)(*size, **options)


def tensors(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, PackedSequence):
        return (result.data,)
    return (result,) if isinstance(result, Tensor) else tuple(y for part in result for y in tensors(part))


def outcome(module: nn.Module, kind: str, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, final states and the gradients of everything."""
    x, state = x.clone().requires_grad_(), tuple(s.clone().requires_grad_() for s in state)
    hx = None if not state else state if len(state) == 2 else state[0]
    given: Any = x
    if kind == "packed":
        given = pack_padded_sequence(x, LENGTHS, batch_first=module.batch_first, enforce_sorted=False)
    found = tensors(module(given, hx))
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in found)
    return *found, *torch.autograd.grad(loss, (x, *state, *module.parameters()))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", ("padded", "unbatched", "packed"))
@pytest.mark.parametrize(("name", "options"), tuple(configurations()))
def test_modules_equal_torch(name: str, options: dict[str, Any], kind: str) -> None:
    for dtype, given in ((torch.float64, True), (torch.float32, False)):
        ours, theirs = pair(name, I, H, **options, dtype=dtype)
        assert repr(ours) == repr(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
        shape, batch = (B, T, I) if options["batch_first"] else (T, B, I), (B,)
        if kind == "unbatched":
            shape, batch = (T, I), ()
        state: tuple[Tensor, ...] = ()
        if given:
            state = (torch.randn(rows, *batch, options.get("proj_size", H), dtype=dtype),)
            state += (torch.randn(rows, *batch, H, dtype=dtype),) if name == "LSTM" else ()
        x = torch.randn(shape, dtype=dtype)
        torch.testing.assert_close(outcome(ours, kind, x, state), outcome(theirs, kind, x, state))


@pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU"))
def test_state_dict_both_ways_and_from_torch(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True, **({"proj_size": 2} if name == "LSTM" else {})}
    ours, theirs = getattr(pk.nn, name)(I, H, **options), getattr(nn, name)(I, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(tensors(ours(x)), tensors(theirs(x)))
    theirs.load_state_dict(getattr(pk.nn, name)(I, H, **options).state_dict())
    shared = type(ours).from_torch(theirs.eval())
    assert all(a is b for a, b in zip(shared.parameters(), theirs.parameters(), strict=True))
    assert repr(shared) == repr(theirs) and not shared.training
    torch.testing.assert_close(tensors(shared(x)), tensors(theirs(x)))
    torch.testing.assert_close(tensors(copy.deepcopy(shared)(x)), tensors(theirs(x)))


def test_from_torch_keeps_what_is_tied_and_refuses_parametrizations() -> None:
    tied, cell = nn.LSTM(H, H, 2), nn.GRUCell(H, H)
    tied.weight_hh_l1, cell.weight_hh = tied.weight_hh_l0, cell.weight_ih
    x = torch.randn(T, B, H)
    torch.testing.assert_close(tensors(pk.nn.LSTM.from_torch(tied)(x)), tensors(tied(x)))
    torch.testing.assert_close(pk.nn.GRUCell.from_torch(cell)(x[0]), cell(x[0]))
    for name, module in (("LSTM", nn.LSTM(I, H)), ("GRUCell", nn.GRUCell(I, H))):
        weight = "weight_hh_l0" if name == "LSTM" else "weight_hh"
        with pytest.raises(ValueError, match="parametrizations"):
            getattr(pk.nn, name).from_torch(nn.utils.parametrizations.weight_norm(module, weight))


@pytest.mark.parametrize("name", ("RNNCell", "LSTMCell", "GRUCell"))
@pytest.mark.parametrize("bias", (True, False))
def test_cells_equal_torch(name: str, bias: bool) -> None:
    options: list[dict[str, Any]] = [{}] if name != "RNNCell" else [{}, {"nonlinearity": "relu"}]
    for option, batch, given in itertools.product(options, ((), (B,)), (True, False)):
        ours, theirs = pair(name, I, H, bias=bias, dtype=torch.float64, **option)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict())
        shared = type(ours).from_torch(theirs)
        assert shared.weight_hh is theirs.weight_hh and (shared.bias_ih is theirs.bias_ih)
        x, h, c = (torch.randn(*batch, n, dtype=torch.float64, requires_grad=True) for n in (I, H, H))
        state = () if not given else ((h, c),) if name == "LSTMCell" else (h,)
        leaves = (x, *((h, c) if name == "LSTMCell" else (h,))) if given else (x,)

        def outcome(cell: nn.Module, x=x, state=state, leaves=leaves) -> tuple[Tensor, ...]:
            found = tensors(cell(x, *state))
            loss = sum(y.square().sum() * (i + 1) for i, y in enumerate(found))
            return *found, *torch.autograd.grad(loss, (*leaves, *cell.parameters()))

        torch.testing.assert_close(outcome(ours), outcome(theirs))
        torch.testing.assert_close(outcome(shared), outcome(theirs))


def test_cells_take_one_bias_alone() -> None:
    x, h, b = torch.randn(B, I), torch.randn(B, H), torch.randn(3 * H)
    weights = torch.randn(3 * H, I), torch.randn(3 * H, H)
    for biases in ((b, None), (None, b), (None, None)):
        found, expected = (f(x, h, *weights, *biases) for f in (pk.functional.gru_cell, torch.gru_cell))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("both", (False, True))
@pytest.mark.parametrize("name", ("RNN", "LSTM", "GRU"))
def test_lengths_equal_packing(name: str, both: bool) -> None:
    """In any order, garbage beyond the lengths included; a sequence of length 0 keeps its state and gives 0."""
    ours, theirs = pair(name, I, H, num_layers=2, bidirectional=both, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, I, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        x[b, length:] = torch.nan
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, state = theirs(packed)
    expected, _ = pad_packed_sequence(expected, batch_first=True)
    found = ours(x, lengths=LENGTHS)
    torch.testing.assert_close(tensors(found), (expected, *tensors(state)))
    grads = (torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((found[0], ours), (expected, theirs)))
    torch.testing.assert_close(*grads)
    h0 = torch.randn(4 if both else 2, B, H, dtype=torch.float64)
    out, state = ours(x, (h0, h0) if name == "LSTM" else h0, lengths=LENGTHS * torch.tensor([1, 1, 0]))
    assert out[2].abs().sum() == 0
    assert all(torch.equal(s[:, 2], h0[:, 2]) for s in tensors(state))


def test_gradient_of_the_state_alone() -> None:
    ours, theirs = pair("LSTM", I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    for which in (0, 1):
        torch.testing.assert_close(*(torch.autograd.grad(m(x)[1][which].sum(), x) for m in (ours, theirs)))


def test_saturated_and_long() -> None:
    """tanh by exponentials overflows beyond 44; an orthogonal recurrence neither decays nor explodes."""
    ours, theirs = pair("RNN", I, 8)
    nn.init.orthogonal_(theirs.weight_hh_l0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(512, 2, I)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    lstm, reference = pair("LSTM", I, H)
    torch.testing.assert_close(lstm(x[:8] * 1e4), reference(x[:8] * 1e4))


def test_no_steps_and_no_rows() -> None:
    lstm = pk.nn.LSTM(I, H, num_layers=2, bidirectional=True)
    h0 = torch.randn(4, B, H)
    output, (h, c) = lstm(torch.randn(0, B, I), (h0, h0))
    assert output.shape == (0, B, 2 * H) and torch.equal(h, h0) and torch.equal(c, h0)
    output, (h, _) = lstm(torch.randn(T, 0, I))
    assert output.shape == (T, 0, 2 * H) and h.shape == (4, 0, H)


def test_dropout_is_addressed_by_element() -> None:
    """Layer 1 reads layer 0's output through the mask of Philox words at (layer, t, b, h), scaled by 1 / (1 - p)."""
    p, seed = 0.4, torch.tensor([12345])
    lstm = pk.nn.LSTM(I, H, num_layers=2, dropout=p, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    flat = list(lstm.parameters())
    found = pk.functional.lstm(x, None, flat, num_layers=2, dropout=p, training=True, seed=12345)
    first, _ = pk.functional.lstm(x, None, flat[:4])
    keep = (philox_words(seed, torch.arange(first.numel())) >= round(p * 2**32)).view(first.shape)
    second, _ = pk.functional.lstm(torch.where(keep, first / (1 - p), 0), None, flat[4:])
    torch.testing.assert_close(found[0], second)
    # Nothing is drawn in evaluation; in training the same torch seed gives the same mask, and the next call another.
    state = torch.get_rng_state()
    lstm.eval()(x)
    assert torch.equal(state, torch.get_rng_state())
    lstm.train()
    torch.manual_seed(1)
    a, b = lstm(x)[0], lstm(x)[0]
    torch.manual_seed(1)
    assert torch.equal(lstm(x)[0], a) and not torch.equal(a, b)
    zero = pk.functional.lstm(x, None, flat, num_layers=2, dropout=1.0, training=True)[0]
    torch.testing.assert_close(zero, pk.functional.lstm(torch.zeros_like(first), None, flat[4:])[0])


@pytest.mark.parametrize("options", ({}, {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3}))
def test_dropout_replays_in_a_checkpoint(options: dict[str, Any]) -> None:
    lstm = pk.nn.LSTM(I, H, num_layers=2, dropout=0.5, **options)
    x = torch.randn(T, B, I)
    grads = []
    for checkpointed in (False, True):
        lstm.zero_grad()
        torch.manual_seed(2)
        call = torch.utils.checkpoint.checkpoint(lstm, x, use_reentrant=False) if checkpointed else lstm(x)
        call[0].sum().backward()
        grads.append([p.grad.clone() for p in lstm.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", ("rnn", "lstm", "gru"))
def test_derivatives_transforms_and_compile(name: str) -> None:
    module = getattr(pk.nn, name.upper())(2, 2, bidirectional=True, dtype=torch.float64)
    weights = tuple(module.parameters())
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tensors(getattr(pk.functional, name)(x, None, weights, bidirectional=True, lengths=torch.tensor([3, 2])))

    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights), fast_mode=True)
    each = torch.func.vmap(lambda x: module(x)[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each[1], module(2 * x)[0])
    scaled = {name: 2 * p for name, p in module.named_parameters()}
    found = torch.func.functional_call(module, scaled, (x,))[0]
    torch.testing.assert_close(found, call_with(module, list(scaled.values()), x))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tensors(compiled(x)), tensors(module(x)))
    grads = [torch.autograd.grad(f(x)[0].square().sum(), weights) for f in (compiled, module)]
    torch.testing.assert_close(*grads)


def call_with(module: nn.Module, weights: list[Tensor], x: Tensor) -> Tensor:
    return getattr(pk.functional, type(module).__name__.lower())(x, None, weights, bidirectional=True)[0]


def test_autocast_lowers_and_gradients_come_back_in_float32() -> None:
    for name in ("RNN", "LSTM", "GRU", "LSTMCell"):
        module = getattr(pk.nn, name)(I, H)
        x = torch.randn(B, I) if name == "LSTMCell" else torch.randn(T, B, I)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = tensors(module(x))
        assert {y.dtype for y in found} == {torch.bfloat16}
        found[0].sum().backward()
        assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_half_keeps_c_in_float32() -> None:
    """c grows by 2**-9 a step from 1: below bfloat16's resolution, so a c rounded at each step would stay at 1."""
    one, step = 20.0, 2.0**-9
    weights = [torch.zeros(4, 1), torch.zeros(4, 1), torch.tensor([one, one, torch.atanh(torch.tensor(step)), one])]
    weights = [w.bfloat16() for w in (*weights, torch.zeros(4))]
    x, h, c = torch.zeros(128, 1, 1).bfloat16(), torch.zeros(1, 1, 1).bfloat16(), torch.ones(1, 1, 1).bfloat16()
    assert pk.functional.lstm(x, (h, c), weights)[1][1].item() == 1.25


X, H0 = torch.randn(T, B, I), torch.randn(1, B, H)
FLAT = [torch.randn(s) for s in ((4 * H, I), (4 * H, H), (4 * H,), (4 * H,))]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (([1.0], (H0, H0), FLAT), {}, TypeError, "'input'"),
        ((X.long(), None, FLAT), {}, NotImplementedError, "'input'"),
        ((X[0], None, FLAT), {}, RuntimeError, "'input'"),
        ((X, (H0,), FLAT), {}, RuntimeError, "'hx'"),
        ((X, (H0[:, :1], H0), FLAT), {}, RuntimeError, r"'hx\[0\]'"),
        ((X, (H0, H0.double()), FLAT), {}, RuntimeError, r"'hx\[1\]'"),
        ((X.double(), None, FLAT), {}, RuntimeError, r"'weights\[0\]'"),
        ((X[..., 1:], None, FLAT), {}, RuntimeError, r"'weights\[0\]'"),
        ((X, None, FLAT[:3]), {}, RuntimeError, "'weights'"),
        ((X, None, FLAT), {"num_layers": 3}, RuntimeError, "'weights'"),
        ((X, None, FLAT), {"num_layers": 0}, ValueError, "'num_layers'"),
        ((X, None, [*FLAT[:3], FLAT[3][1:]]), {}, RuntimeError, r"'weights\[3\]'"),
        ((X, None, [FLAT[0][1:], *FLAT[1:]]), {}, RuntimeError, r"'weights\[0\]'"),
        ((X, None, FLAT), {"dropout": 1.5}, RuntimeError, "'dropout'"),
        ((X, None, FLAT), {"lengths": LENGTHS[1:]}, RuntimeError, "'lengths'"),
        ((X, None, FLAT), {"lengths": LENGTHS.float()}, RuntimeError, "'lengths'"),
        ((X, None, FLAT), {"lengths": torch.tensor([1, 5, 2])}, IndexError, r"lengths\[1\] is 5"),
        ((X, None, FLAT), {"lengths": LENGTHS, "batch_sizes": LENGTHS}, ValueError, "'batch_sizes'"),
        ((X[0], None, FLAT), {"batch_sizes": torch.tensor([1, 2])}, RuntimeError, "'batch_sizes'"),
        ((X[0], None, FLAT), {"batch_sizes": torch.tensor([3, 1])}, RuntimeError, "'input'"),
        ((X, None, FLAT), {"backend": "cuda"}, pk.BackendError, "lstm"),
    ],
)
def test_sequence_errors(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        pk.functional.lstm(*arguments, **options)


def test_cell_errors_are_torchs() -> None:
    x, h, weights = torch.randn(B, I), torch.randn(B, H), tuple(FLAT)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x, (h,), *weights), "'hx'"),
        ((x, (h[:1], h[:1]), *weights), r"'hx\[0\]'"),
        ((x, (h, h[:, 1:]), *weights), r"'hx\[1\]'"),
        ((x[:, 1:], (h, h), *weights), "'w_ih'"),
        ((x, (h, h), weights[0][1:], *weights[1:]), "'w_ih'"),
        ((x, (h, h), weights[0], weights[1][1:], *weights[2:]), "'w_hh'"),
        ((x, (h, h), *weights[:2], weights[2][1:], weights[3]), "'b_ih'"),
        ((x.double(), (h, h), *weights), r"'hx\[0\]'"),
    ]
    for arguments, text in wrong:
        with pytest.raises(RuntimeError, match=text):
            pk.functional.lstm_cell(*arguments)
        with pytest.raises(RuntimeError):
            torch.lstm_cell(*arguments)
    for i, key in enumerate(("w_ih", "w_hh", "b_ih", "b_hh")):  # a meta tensor takes the call to the meta kernel
        without = [w.to("meta") if i == k else w for k, w in enumerate(weights)]
        with pytest.raises(RuntimeError, match=f"'{key}' is on meta"):
            pk.functional.lstm_cell(x, (h, h), *without)
    with pytest.raises(ValueError, match="'nonlinearity'"):
        pk.functional.rnn(X, None, FLAT, nonlinearity="gelu")


def test_module_errors_are_torchs() -> None:
    calls: list[tuple[type[Exception], Any]] = [
        (ValueError, lambda m: m.LSTM(I, H)(torch.randn(1, T, B, I))),
        (ValueError, lambda m: m.LSTM(I, H)(X.double())),
        (RuntimeError, lambda m: m.LSTM(I, H)(X[..., 1:])),
        (RuntimeError, lambda m: m.GRU(I, H)(X[:, 0], H0)),
        (RuntimeError, lambda m: m.GRU(I, H)(X, H0[0])),
        (RuntimeError, lambda m: m.RNN(I, H)(X, H0[:, :1])),
        (ValueError, lambda m: m.RNN(I, H, nonlinearity="gelu")),
        (ValueError, lambda m: m.GRU(I, H, proj_size=2)),
        (ValueError, lambda m: m.LSTM(I, H, dropout=2)),
        (ValueError, lambda m: m.GRUCell(I, H)(X)),
        (ValueError, lambda m: m.LSTMCell(I, H)(X[0], (H0, H0))),
        (RuntimeError, lambda m: m.RNNCell(I, H, nonlinearity="gelu")(X[0])),
    ]
    for error, call in calls:
        for module in (pk.nn, nn):
            with pytest.raises(error):
                call(module)
    with pytest.raises(ValueError, match="lengths"):
        pk.nn.LSTM(I, H)(pack_padded_sequence(X, torch.tensor([4, 2, 1])), lengths=LENGTHS)


def test_explain() -> None:
    assert pk.explain(pk.nn.GRU(I, H), X).function == "gru"
    assert pk.explain(pk.functional.lstm_cell, X[0], (H0[0], H0[0]), *FLAT).backend == "cpu"
    assert pk.explain(pk.nn.LSTM(I, H).double(), X.double()).refused["cpu"].endswith("not torch.float64")
