"""What torch.nn's layers have not: resets, peepholes, layer normalisation, zoneout, DropConnect, recompute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import pykernels as pk
from pykernels.reference._random import philox_words
from pykernels.testing.memory import peak_bytes, saved_bytes

I, H, T, B = 3, 5, 7, 4  # noqa: E741
MODES = ("rnn", "lstm", "gru")
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
GOLDEN = 0x9E3779B97F4A7C15


def flat(name: str, layers: int = 1, directions: int = 1, extra: tuple[int, ...] = ()) -> list[Tensor]:
    """Weights of a function; `extra` are the sizes of the vectors that follow the biases."""
    gated = GATES[name] * H
    found = []
    for layer in range(layers):
        for _ in range(directions):
            found += [torch.randn(gated, directions * H if layer else I), torch.randn(gated, H)]
            found += [torch.randn(size) for size in (gated, gated, *extra)]
    return [(w.double() * 0.5).requires_grad_() for w in found]


def tensors(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, PackedSequence):
        return (result.data,)
    return (result,) if isinstance(result, Tensor) else tuple(y for part in result for y in tensors(part))


def outcome(name: str, x: Tensor, hx: Any, weights: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Outputs, final states and all gradients."""
    found = tensors(getattr(pk.functional, name)(x, hx, weights, **options))
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in found)
    leaves = [t for t in (x, *(() if hx is None else tensors(hx)), *weights) if t.requires_grad]
    return *found, *torch.autograd.grad(loss, leaves)


def masks(seed: int, use: int, count: int, shape: tuple[int, ...], p: float) -> Tensor:
    """Kept elements of `count` tensors of this shape, from the words' definition."""
    key = torch.tensor([(seed + use * GOLDEN + 2**63) % 2**64 - 2**63])
    words = philox_words(key, torch.arange(count * torch.Size(shape).numel()))
    return (words >= round(p * 2**32)).view(count, *shape)


def lstm_by_hand(x: Tensor, w: list[Tensor], after: Any = lambda t, before, new: new, norm: Any = None) -> Tensor:
    """An LSTM as a loop over rows of gates, with what the options add in between."""
    w_ih, w_hh, b_ih, b_hh, *extra = w
    h = c = x.new_zeros(x.shape[1], H)
    p_i, p_f, p_o = extra[0].chunk(3) if len(extra) == 1 else (0.0, 0.0, 0.0)
    outputs = []
    for t in range(x.shape[0]):
        if norm is None:
            gates = x[t] @ w_ih.T + h @ w_hh.T
        else:
            gates = norm(x[t] @ w_ih.T) * extra[0] + norm(h @ w_hh.T) * extra[1]
        i, f, g, o = (gates + b_ih + b_hh).chunk(4, -1)
        new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
        inner = new if norm is None else norm(new) * extra[2] + extra[3]
        h, c = after(t, (h, c), (torch.sigmoid(o + p_o * new) * torch.tanh(inner), new))
        outputs.append(h)
    return torch.stack(outputs)


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_the_references_options_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, B, I, dtype=torch.float64)
    weights = flat("lstm", extra=(3 * H,))
    torch.testing.assert_close(pk.reference.lstm(x, None, weights, peephole=True)[0], lstm_by_hand(x, weights))
    weights = flat("lstm", extra=(4 * H, 4 * H, H, H))
    found = pk.reference.lstm(x, None, weights, layer_norm=True)[0]
    torch.testing.assert_close(found, lstm_by_hand(x, weights, norm=normalised))

    weights, seed, zone = flat("lstm"), 77, (0.3, 0.6)
    kept = [masks(seed, 2 + i, 1, (T, B, H), z)[0] for i, z in enumerate(zone)]

    def train(t: int, before: Any, new: Any) -> Any:
        return [torch.where(k[t], n, b) for k, n, b in zip(kept, new, before, strict=True)]

    def evaluate(t: int, before: Any, new: Any) -> Any:
        return [z * b + (1 - z) * n for z, n, b in zip(zone, new, before, strict=True)]

    for training, expected in ((True, train), (False, evaluate)):
        found = pk.functional.lstm(x, None, weights, zoneout=zone, training=training, seed=seed)[0]
        torch.testing.assert_close(found, lstm_by_hand(x, weights, expected))

    keep = masks(seed, 1, 1, (4 * H, H), 0.4)[0]
    dropped = [weights[0], torch.where(keep, weights[1] / 0.6, 0), *weights[2:]]
    found = pk.functional.lstm(x, None, weights, recurrent_dropout=0.4, training=True, seed=seed)[0]
    torch.testing.assert_close(found, lstm_by_hand(x, dropped))
    found = pk.functional.lstm(x, None, weights, recurrent_dropout=0.4)[0]
    torch.testing.assert_close(found, lstm_by_hand(x, weights))


def test_layer_norm_of_gru_and_rnn_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for name in ("gru", "rnn"):
        w_ih, w_hh, b_ih, b_hh, a_ih, a_hh = weights = flat(name, extra=(GATES[name] * H,) * 2)
        h = x.new_zeros(B, H)
        for step in x:
            left, right = normalised(step @ w_ih.T) * a_ih + b_ih, normalised(h @ w_hh.T) * a_hh + b_hh
            if name == "rnn":
                h = torch.tanh(left + right)
            else:
                (r, z, n), (r_h, z_h, n_h) = left.chunk(3, -1), right.chunk(3, -1)
                n, z = torch.tanh(n + torch.sigmoid(r + r_h) * n_h), torch.sigmoid(z + z_h)
                h = (1 - z) * n + z * h
        found = getattr(pk.functional, name)(x, None, weights, layer_norm=True)[1]
        torch.testing.assert_close(found[0], h)


def states(name: str, rows: int, batch: int = B) -> Any:
    h, c = (torch.randn(rows, batch, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return (h, c) if name == "lstm" else h


@pytest.mark.parametrize("name", MODES)
def test_a_reset_cuts_a_sequence_in_two(name: str) -> None:
    """Both directions: the parts know nothing of each other; the first has the state given, the other zeros."""
    torch.manual_seed(0)
    weights, x, hx = flat(name, 1, 2), torch.randn(T, 1, I, dtype=torch.float64), states(name, 2, 1)
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[3] = True
    function = getattr(pk.functional, name)
    y, final = function(x, hx, weights, bidirectional=True, resets=resets)
    cut = tensors(hx)
    left = [torch.stack([s[0], torch.zeros_like(s[1])]) for s in cut]  # the second direction comes from the right part
    right = [torch.stack([torch.zeros_like(s[0]), s[1]]) for s in cut]
    pack = (lambda s: tuple(s)) if name == "lstm" else (lambda s: s[0])
    y0, f0 = function(x[:3], pack(left), weights, bidirectional=True)
    y1, f1 = function(x[3:], pack(right), weights, bidirectional=True)
    torch.testing.assert_close(y, torch.cat([y0, y1]))
    for whole, first, second in zip(tensors(final), tensors(f0), tensors(f1), strict=True):
        torch.testing.assert_close(whole, torch.stack([second[0], first[1]]))
    resets[0] = True  # the state given is not read by the first direction
    again = function(x, hx, weights, bidirectional=True, resets=resets)[0]
    zeros = [torch.zeros_like(s) for s in cut]
    torch.testing.assert_close(again[:3], function(x[:3], pack(zeros), weights, bidirectional=True)[0])


@pytest.mark.parametrize("layout", ("padded", "batch_first", "lengths", "packed"))
@pytest.mark.parametrize("name", MODES)
def test_kernels_reset_as_the_reference_does(name: str, layout: str) -> None:
    """The kernels run segments side by side; the reference zeroes the state in its loop."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    weights, hx = flat(name, 2, 2), states(name, 4)
    shape: tuple[int, ...] = (T, B)
    if layout == "batch_first":
        shape, options["batch_first"] = (B, T), True
    elif layout == "lengths":
        options["lengths"] = torch.tensor([3, 7, 0, 5])
    elif layout == "packed":
        options["batch_sizes"] = torch.tensor([4, 4, 3, 3, 2, 1, 1])
        shape = (18,)
    x = torch.randn(*shape, I, dtype=torch.float64, requires_grad=True)
    for share in (0.0, 0.3, 1.0):
        options["resets"] = torch.rand(shape) < share
        truth = outcome(name, x, hx, weights, **options, backend="reference")
        narrow = [t.detach().float().requires_grad_() for t in (x, *tensors(hx), *weights)]
        given = tuple(narrow[1:3]) if name == "lstm" else narrow[1]
        found = outcome(name, narrow[0], given, narrow[-len(weights) :], **options, backend="cpu")
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODES)
def test_options_together_with_gradients(name: str) -> None:
    """gradcheck of everything at once."""
    torch.manual_seed(0)
    gated = GATES[name] * H
    extra = (3 * H, gated, gated, H, H) if name == "lstm" else (gated, gated)
    weights, hx = flat(name, 1, 2, extra), states(name, 2, 2)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"peephole": True} if name == "lstm" else {}
    options |= {"bidirectional": True, "layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3, "training": True}
    options |= {"resets": torch.tensor([[0, 1], [1, 0], [0, 0]]).bool(), "lengths": torch.tensor([2, 3]), "seed": 5}

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given = rest[:2] if name == "lstm" else rest[0]
        return tensors(getattr(pk.functional, name)(x, given, rest[-len(weights) :], **options))

    assert torch.autograd.gradcheck(call, (x, *tensors(hx), *weights), fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", MODES)
def test_recompute_gives_the_same(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = getattr(pk.nn, name.upper())(9, 33, num_layers=2, bidirectional=True, dtype=dtype, backend="cpu")
    again = copy.deepcopy(module)
    again.recompute = True
    x = torch.randn(20, 5, 9).to(dtype).requires_grad_()
    packed = PackedSequence(torch.randn(30, 9).to(dtype).requires_grad_(), torch.tensor([9, 9, 7, 3, 1, 1]))
    for given in (x, packed):
        leaf = given.data if isinstance(given, PackedSequence) else given
        found = []
        for m in (module, again):
            y = tensors(m(given))[0]
            found.append((y, *torch.autograd.grad(y.float().square().sum(), (leaf, *m.parameters()))))
        for a, b in zip(*found, strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.detach().abs().max()))
            else:
                torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * float(a.detach().abs().max()))
    # Derivatives of the gradient come from the reference; what was made again must reach it.
    y = tensors(again(x.detach().requires_grad_()))[0]
    grads = torch.autograd.grad(y.float().square().sum(), list(again.parameters()), create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.float().sum() for g in grads), again.parameters()))


@pytest.mark.parametrize(("name", "kept"), (("lstm", 20), ("gru", 16)))
def test_recompute_keeps_input_output_and_initial_states_only(name: str, kept: int) -> None:
    """Bytes held between forward and backward: x and y, and with `recompute` nothing else of the tokens' size."""
    steps, batch, size = 50, 16, 32
    tokens = steps * batch
    for recompute in (False, True):
        module = getattr(pk.nn, name.upper())(size, size, recompute=recompute, backend="cpu")
        x = torch.randn(steps, batch, size)
        parameters = sum(p.numel() for p in module.parameters())
        floats = 2 * tokens * size + parameters + 2 * batch * size
        held = saved_bytes(lambda m=module, x=x: m(x))
        expected = 4 * floats + (0 if recompute else kept * size * tokens)
        assert abs(held - expected) <= 4 * (parameters + 4 * batch * size), (held, expected)
    assert peak_bytes(lambda: module(x)) < 4 * (tokens * size * 8)


def test_modules_have_the_options() -> None:
    torch.manual_seed(0)
    lstm = pk.nn.LSTM(I, H, 2, bidirectional=True, proj_size=2, layer_norm=True, peephole=True, zoneout=0.1)
    assert "layer_norm=True" in repr(lstm) and "recompute" not in repr(lstm)
    names = [n for n, _ in lstm.named_parameters()]
    assert names[:20] == [n for n, _ in nn.LSTM(I, H, 2, bidirectional=True, proj_size=2).named_parameters()]
    assert "weight_peephole_l1_reverse" in names and "bias_norm_c_l0" in names
    assert torch.equal(lstm.weight_norm_hh_l1, torch.ones(4 * H)) and not lstm.bias_norm_c_l1.any()
    assert lstm.weight_peephole_l0.abs().max() <= H**-0.5 and lstm.weight_peephole_l0.any()
    other = pk.nn.LSTM(I, H, 2, bidirectional=True, proj_size=2, layer_norm=True, peephole=True)
    other.load_state_dict(lstm.state_dict())
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    lstm.zoneout = 0.0
    torch.testing.assert_close(tensors(other(x, resets=resets)), tensors(lstm(x, resets=resets)))
    one = other(x[:, 0], resets=resets[:, 0])[0]
    torch.testing.assert_close(one, other(x[:, :1], resets=resets[:, :1])[0][:, 0])
    for name in ("RNN", "GRU"):
        assert getattr(pk.nn, name)(I, H, layer_norm=True, zoneout=0.2)(x)[0].isfinite().all()
        with pytest.raises(ValueError, match="peephole"):
            getattr(pk.nn, name)(I, H, peephole=True)
        for wrong in ({"zoneout": 1.5}, {"zoneout": (0.1, 0.1)}, {"recurrent_dropout": -0.1}, {"zoneout": "a"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                getattr(pk.nn, name)(I, H, **wrong)
    shared = pk.nn.GRU.from_torch(nn.GRU(I, H), recompute=True, zoneout=0.5)
    assert shared.recompute and shared.zoneout == 0.5
    for cls, module in ((pk.nn.LSTM, nn.GRU(I, H)), (pk.nn.LSTMCell, nn.LSTM(I, H)), (pk.nn.RNN, torch.randn(2))):
        with pytest.raises(TypeError, match="from_torch"):
            cls.from_torch(module)


def test_random_options_draw_one_seed_a_call() -> None:
    torch.manual_seed(0)
    x = torch.randn(T, B, I)
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}):
        module = pk.nn.LSTM(I, H, **options)
        torch.manual_seed(1)
        a, b = module(x)[0], module(x)[0]
        torch.manual_seed(1)
        assert torch.equal(module(x)[0], a) and not torch.equal(a, b)
        before = torch.get_rng_state()
        module.eval()(x)
        assert torch.equal(before, torch.get_rng_state())


X, FLAT = torch.randn(T, B, I), [w.detach().float() for w in flat("lstm")]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"resets": [True]}, TypeError, "'resets'"),
        ({"resets": torch.zeros(T, B)}, RuntimeError, "'resets'"),
        ({"resets": torch.zeros(B, T, dtype=torch.bool)}, RuntimeError, "'resets'"),
        ({"peephole": True}, RuntimeError, "'weights'"),
        ({"layer_norm": True}, RuntimeError, "'weights'"),
        ({"zoneout": -0.1}, RuntimeError, "'zoneout'"),
        ({"zoneout": (0.1, 2.0)}, RuntimeError, "'zoneout'"),
        ({"zoneout": (0.1,)}, RuntimeError, "'zoneout'"),
        ({"zoneout": "0.1"}, TypeError, "'zoneout'"),
        ({"recurrent_dropout": 1.5}, RuntimeError, "'recurrent_dropout'"),
        ({"proj_size": -1}, ValueError, "'proj_size'"),
        ({"lengths": torch.tensor([1, -1, 1, 1])}, IndexError, r"lengths\[1\] is -1"),
        ({"seed": "a", "zoneout": 0.1, "training": True}, TypeError, "seed"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pk.functional.lstm(X, None, FLAT, **options)
    if "peephole" in options:
        weights = [*FLAT, torch.randn(2 * H)]
        with pytest.raises(RuntimeError, match=r"'weights\[4\]'"):
            pk.functional.lstm(X, None, weights, **options)


def test_what_is_no_tensor_is_told_before_its_shape() -> None:
    module = pk.nn.GRU(I, H)
    with pytest.raises(TypeError, match="input must be Tensor or PackedSequence, not ndarray"):
        module(X.numpy())
    state = torch.zeros(1, H)
    with pytest.raises(TypeError, match="hx must be made of Tensor, not tuple"):
        module(X[0], (state, state))
