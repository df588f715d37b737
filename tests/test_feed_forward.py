"""bias_activation_dropout and the feed-forward blocks: errors, masks, saved memory, recompute, weights of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from torch import Tensor, nn

import pykernels as pk
from pykernels.ops.activation import _functions
from pykernels.testing.memory import saved_bytes

f = pk.functional
X = torch.randn(3, 5)
W1, B1, W2, B2 = torch.randn(8, 5), torch.randn(8), torch.randn(5, 8), torch.randn(5)

WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: f.bias_activation_dropout([1.0]), TypeError, "argument 'input' must be Tensor"),
    (lambda: f.bias_activation_dropout(X, [1.0]), TypeError, "argument 'bias' must be Tensor"),
    (lambda: f.bias_activation_dropout(X.int()), NotImplementedError, "'input' of dtype torch.int32"),
    (lambda: f.bias_activation_dropout(X, p=1.0), ValueError, r"'p' has to be in \[0, 1\), but got 1.0"),
    (lambda: f.bias_activation_dropout(X, p=-0.1), ValueError, "'p' has to be"),
    (lambda: f.bias_activation_dropout(X, p=float("nan")), ValueError, "'p' has to be"),
    (lambda: f.bias_activation_dropout(X, p="x"), TypeError, "argument 'p' must be Number"),
    (lambda: f.bias_activation_dropout(X, torch.ones(4)), RuntimeError, r"'bias' must have shape \(5,\).*got \(4,\)"),
    (lambda: f.bias_activation_dropout(X, torch.ones(1, 5)), RuntimeError, r"'bias' must have shape \(5,\)"),
    (lambda: f.bias_activation_dropout(torch.tensor(1.0), torch.ones(1)), RuntimeError, "'bias' must have shape"),
    (lambda: f.bias_activation_dropout(X, torch.ones(5).half()), RuntimeError, "'bias' is torch.float16"),
    (lambda: f.bias_activation_dropout(X, activation="swiglu"), RuntimeError, "even for 'swiglu'.* 'input' is size 5"),
    (lambda: f.bias_activation_dropout(torch.tensor(1.0), activation="glu"), RuntimeError, "'input' must not be a sc"),
    (lambda: f.bias_activation_dropout(X, activation="mish"), RuntimeError, "activation must be one of .*not 'mish'"),
    (lambda: f.bias_activation_dropout(X, activation=F.gelu), TypeError, "argument 'activation' must be str"),
    (lambda: f.bias_activation_dropout(X, alpha=2.0), ValueError, "'alpha' is for leaky_relu, elu, swish"),
    (lambda: f.bias_activation_dropout(X, p=0.5, seed=1.5), TypeError, "seed must be an int"),
    (lambda: f.bias_activation_dropout(X, p=0.5, seed=torch.tensor([1, 2])), ValueError, "seed must hold one"),
    (lambda: f.mlp(X, W1[:, :4], B1, W2, B2), RuntimeError, r"'w1' must have shape \(H, 5\)"),
    (lambda: f.mlp(X, W1, B1[:4], W2, B2), RuntimeError, r"'b1' must have shape \(8,\)"),
    (lambda: f.mlp(X, W1, B1, W2[:, :4], B2), RuntimeError, r"'w2' must have shape \(O, 8\)"),
    (lambda: f.mlp(X, W1, B1, W2, B2[:4]), RuntimeError, r"'b2' must have shape \(5,\)"),
    (lambda: f.mlp(X, W1[:7], None, W2, B2, "swiglu"), RuntimeError, "'swiglu' needs an even number of rows in 'w1'"),
    (lambda: f.mlp(X, W1.double(), B1, W2, B2), RuntimeError, "'w1' is torch.float64 but 'x' is torch.float32"),
    (lambda: f.mlp(X, None, B1, W2, B2), TypeError, "argument 'w1' must be Tensor"),
    (lambda: f.mlp(X, W1, B1, W2, B2, save="nothing"), ValueError, "'save' must be 'preactivation' or 'input'"),
    (lambda: pk.nn.MLP(4, 8, activation="swiglu"), ValueError, "MLP.*not 'swiglu'"),
    (lambda: pk.nn.GatedMLP(4, 8, activation="gelu"), ValueError, "GatedMLP.*not 'gelu'"),
    (lambda: pk.nn.MLP(4, 8, dropout=1.5), ValueError, "'p' has to be"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_bad_input_names_the_argument(index: int) -> None:
    call, error, message = WRONG[index]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_the_same_on_every_backend(backend: str) -> None:
    """By position in the output: whatever the dtype, the strides, the activation, and in backward too."""
    x = torch.ones(5, 2 * 531, device=DEVICE)
    kept = f.bias_activation_dropout(x, None, "identity", 0.4, seed=-7, backend="reference") != 0
    half = f.bias_activation_dropout(x, None, "bilinear", 0.4, seed=-7, backend="reference") != 0
    assert abs(float(kept.float().mean()) - 0.6) < 0.03
    for dtype in (torch.float32, torch.bfloat16):
        for values in (x, x.T.contiguous().T, x.new_ones(5, 1100)[:, :1062]):
            leaf = values.to(dtype).requires_grad_()
            y = f.bias_activation_dropout(leaf, None, "silu", 0.4, seed=-7, backend=backend)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            assert torch.equal(y != 0, kept) and torch.equal(grad != 0, kept)
        y = f.bias_activation_dropout(x.to(dtype), None, "bilinear", 0.4, seed=-7, backend=backend)
        assert torch.equal(y != 0, half)


def test_dropout_draws_from_torchs_generator_and_replays() -> None:
    x = torch.ones(4000)
    torch.manual_seed(5)
    a, b = (f.bias_activation_dropout(x, None, "identity", 0.25) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(a, f.bias_activation_dropout(x, None, "identity", 0.25)) and not torch.equal(a, b)
    assert set(a.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(float(a.mean()) - 1) < 5 * (0.25 / 0.75 / 4000) ** 0.5
    assert torch.equal(f.bias_activation_dropout(x, None, "gelu", 0.25, training=False), f.gelu(x))
    start = torch.randn(50, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda v: f.bias_activation_dropout(v.sin(), None, "identity", 0.5), start, use_reentrant=False
    )
    (grad,) = torch.autograd.grad(y.sum(), start)
    torch.testing.assert_close(grad, (y.detach() != 0) * 2.0 * start.detach().cos())


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_saved_is_the_input_and_the_seed(name: str) -> None:
    x, bias = torch.randn(64, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    assert saved_bytes(lambda: f.bias_activation_dropout(x, bias, name, 0.1), [x, bias]) == 8
    assert saved_bytes(lambda: f.bias_activation_dropout(x, bias, name), [x, bias]) == 0


def block(gated: bool, hidden: int = 256, width: int = 64) -> list[Tensor]:
    first = 2 * hidden if gated else hidden
    shapes = ((32, width), (first, width), (first,), (width, hidden), (width,))
    return [torch.randn(shape, device=DEVICE).mul_(0.3).requires_grad_() for shape in shapes]


def eager_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gated: bool, p: float) -> Tensor:
    hidden = F.linear(x, w1, b1)
    if gated:
        gate, up = hidden.chunk(2, -1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden)
    return F.linear(F.dropout(hidden, p) if p else hidden, w2, b2)


@pytest.mark.parametrize(
    ("gated", "p", "save", "share"),
    [
        (True, 0.0, "preactivation", 1 / 2),
        (True, 0.1, "preactivation", 1 / 2),
        (False, 0.0, "preactivation", 1 / 2),
        (False, 0.1, "preactivation", 1 / 3),
        (True, 0.1, "input", 0),
        (False, 0.1, "input", 0),
    ],
)
def test_blocks_save_a_share_of_what_eager_saves(gated: bool, p: float, save: str, share: float) -> None:
    leaves, name = block(gated), "swiglu" if gated else "gelu"
    ours = saved_bytes(lambda: f.mlp(*leaves, name, save, p=p), leaves)
    theirs = saved_bytes(lambda: eager_block(*leaves, gated=gated, p=p), leaves)
    assert ours <= share * theirs + 8, (ours, theirs)  # 8: the seed
    assert ours == (leaves[1].shape[0] * 32 * 4 if save == "preactivation" else 0) + (8 if p else 0)


@pytest.mark.parametrize("gated", [False, True])
def test_recompute_gives_the_same_bits(gated: bool) -> None:
    leaves, name = block(gated), "geglu" if gated else "elu"
    found = []
    for save in ("preactivation", "input"):
        y = f.mlp(*leaves, name, save, p=0.3, seed=11)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_activated_values_are_made_once_more_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward is one kernel: gradient, bias gradient and activated values together."""
    calls = []
    for name in ("fused_forward", "fused_backward"):
        table = getattr(_functions, name)
        kernel = table["cpu"]
        monkeypatch.setitem(table, "cpu", lambda *a, name=name, kernel=kernel: (calls.append(name), kernel(*a))[1])
    leaves = block(True)
    f.mlp(*leaves, "swiglu", p=0.1, backend="cpu").sum().backward()
    assert calls == ["fused_forward", "fused_backward"]


def test_mlp_under_autocast() -> None:
    leaves = block(True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = f.mlp(*leaves, "swiglu")
        expected = eager_block(*leaves, gated=True, p=0.0)
        z = f.bias_activation_dropout(leaves[0].bfloat16(), torch.ones(64, device=DEVICE), "gelu")
    assert y.dtype == expected.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.detach().abs().max()))
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.shape == x.shape for g, x in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("save", ("preactivation", "input"))
def test_mlp_backward_under_the_callers_autocast(save: str) -> None:
    leaves = block(True)
    expected = torch.autograd.grad(f.mlp(*leaves, "swiglu", save).sum(), leaves)
    y = f.mlp(*leaves, "swiglu", save)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = torch.autograd.grad(y.sum(), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("width", "hidden", "out"), ((0, 6, 4), (3, 0, 4), (3, 6, 0)))
@pytest.mark.parametrize("save", ("preactivation", "input"))
def test_mlp_of_no_width(width: int, hidden: int, out: int, save: str) -> None:
    shapes = ((2, 5, width), (2 * hidden, width), (2 * hidden,), (out, hidden), (out,))
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    y = f.mlp(*leaves, "swiglu", save)
    torch.testing.assert_close(y, eager_block(*leaves, gated=True, p=0.0))
    expected = torch.autograd.grad(eager_block(*leaves, gated=True, p=0.0).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), expected)


def test_modules_and_their_state() -> None:
    x = torch.randn(2, 3, 8)
    plain = pk.nn.MLP(8, 12, activation="swish", alpha=1.5, dropout=0.5).eval()
    torch.testing.assert_close(plain(x), plain.fc2((h := plain.fc1(x)) * torch.sigmoid(1.5 * h)))
    assert list(plain.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert "activation='swish', dropout=0.5, save='preactivation'" in repr(plain)
    gated = pk.nn.GatedMLP(8, 12, 6)
    gate, up = gated.fc1(x).chunk(2, -1)
    torch.testing.assert_close(gated(x), gated.fc2(F.silu(gate) * up))
    assert list(gated.state_dict()) == ["fc1.weight", "fc2.weight"] and gated(x).shape == (2, 3, 6)
    train = pk.nn.MLP(8, 12, dropout=0.5)
    assert not torch.equal(train(x), train(x)) and torch.equal(train.eval()(x), train(x))


def test_weights_of_other_blocks() -> None:
    x = torch.randn(4, 6)
    layer = nn.TransformerEncoderLayer(6, 2, 10, activation="gelu", dropout=0.0)
    ours = pk.nn.MLP.from_weights(layer.state_dict())
    torch.testing.assert_close(ours(x), layer.linear2(F.gelu(layer.linear1(x))))

    gpt2 = {"h.0.mlp.c_fc.weight": torch.randn(6, 10), "h.0.mlp.c_fc.bias": torch.randn(10)}
    gpt2 |= {"h.0.mlp.c_proj.weight": torch.randn(10, 6), "h.0.mlp.c_proj.bias": torch.randn(6)}
    first, bias1, second, bias2 = gpt2.values()
    for transposed in (None, True):
        ours = pk.nn.MLP.from_weights(gpt2, "h.0.mlp.", activation="gelu_tanh", transposed=transposed)
        expected = F.gelu(x @ first + bias1, approximate="tanh") @ second + bias2
        torch.testing.assert_close(ours(x), expected)
        assert ours.fc1.weight.is_contiguous()

    llama = {f"mlp.{name}.weight": torch.randn(shape) for name, shape in
             {"gate_proj": (10, 6), "up_proj": (10, 6), "down_proj": (6, 10)}.items()}  # fmt: skip
    gate, up, down = llama.values()
    expected = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    torch.testing.assert_close(pk.nn.GatedMLP.from_weights(llama, "mlp.")(x), expected)
    phi3 = {"gate_up_proj.weight": torch.cat((gate, up)), "down_proj.weight": down}
    torch.testing.assert_close(pk.nn.GatedMLP.from_weights(phi3)(x), expected)
    t5 = {"wi_0.weight": gate, "wi_1.weight": up, "wo.weight": down}
    for name, function in (("geglu_tanh", lambda v: F.gelu(v, approximate="tanh")), ("glu", torch.sigmoid)):
        expected = F.linear(function(F.linear(x, gate)) * F.linear(x, up), down)
        torch.testing.assert_close(pk.nn.GatedMLP.from_weights(t5, activation=name)(x), expected)

    with pytest.raises(ValueError, match="one of mlp.gate_proj and mlp.up_proj has no bias"):
        pk.nn.GatedMLP.from_weights({**llama, "mlp.gate_proj.bias": torch.randn(10)}, "mlp.")
    with pytest.raises(ValueError, match="a gated block's"):
        pk.nn.MLP.from_weights({"w1.weight": gate, "w3.weight": up, "w2.weight": down})
    with pytest.raises(KeyError, match="gate_proj/up_proj/down_proj"):
        pk.nn.GatedMLP.from_weights(gpt2, "h.0.mlp.")
    with pytest.raises(ValueError, match="square; say whether it is `transposed`"):
        pk.nn.MLP.from_weights({k: v[:6, :6] if v.dim() == 2 else v[:6] for k, v in gpt2.items()}, "h.0.mlp.")
    with pytest.raises(ValueError, match="are not those of one block"):
        pk.nn.MLP.from_weights({"fc1.weight": gate, "fc2.weight": gate})


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_gradient_sums_in_stages(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs a column, and the same bits every time."""
    from pykernels._triton import _fused

    monkeypatch.setattr(_fused, "PROGRAMS", 2)
    x, bias = torch.randn(700, 6, device=DEVICE), torch.randn(6, device=DEVICE).requires_grad_()
    runs = [
        torch.autograd.grad(
            f.bias_activation_dropout(x, bias, name, 0.2, seed=3, backend=backend).sum(), bias
        )[0]
        for name in ("gelu", "swiglu") for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[2], runs[3])
    for name, run in (("gelu", runs[0]), ("swiglu", runs[2])):
        wide = bias.detach().double().requires_grad_()
        y = pk.reference.bias_activation_dropout(x.double(), wide, name, 0.2, True, torch.tensor([3], device=DEVICE))
        torch.testing.assert_close(run.double(), torch.autograd.grad(y.sum(), wide)[0], rtol=1e-5, atol=1e-4)
