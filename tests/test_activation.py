"""The activation room's particulars: torch's semantics and errors, in-place forms, modules, seeds, saved memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from torch import Tensor, nn

import pykernels as pk

f = pk.functional
EVERY = ("reference", *BACKENDS)

UNARY: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sigmoid": (f.sigmoid, torch.sigmoid),
    "tanh": (f.tanh, torch.tanh),
    "relu": (f.relu, F.relu),
    "leaky_relu": (f.leaky_relu, F.leaky_relu),
    "elu": (f.elu, F.elu),
    "gelu": (f.gelu, F.gelu),
    "silu": (f.silu, F.silu),
    "rrelu": (f.rrelu, F.rrelu),
    "glu": (f.glu, F.glu),
    "prelu": (
        lambda x, **k: f.prelu(x, torch.ones(1).to(x.dtype), **k),
        lambda x: F.prelu(x, torch.ones(1).to(x.dtype)),
    ),
}


def raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_other_dtypes_do_as_torch_does(name: str, dtype: torch.dtype) -> None:
    """Integers, bool, complex: torch's result where torch has one, its exception class where it has not."""
    ours, theirs = UNARY[name]
    x = torch.tensor([[0, 1], [2, 3]]).to(dtype)
    expected = raised(theirs, x)
    if expected is None:
        torch.testing.assert_close(ours(x), theirs(x))
    else:
        error = raised(ours, x)
        assert isinstance(error, type(expected)) or (type(expected) is RuntimeError and isinstance(error, RuntimeError))
        assert "input" in str(error) and str(dtype) in str(error)


X = torch.randn(3, 5)
WRONG = [
    # (ours, torch's way to the same mistake, what the message must name)
    (lambda: f.gelu(X, approximate="fast"), lambda: F.gelu(X, approximate="fast"), "approximate"),
    (lambda: f.geglu(X, X, approximate="fast"), lambda: F.gelu(X, approximate="fast"), "approximate"),
    (lambda: f.glu(X), lambda: F.glu(X), "size 5"),
    (lambda: f.glu(X, dim=4), lambda: F.glu(X, dim=4), "dim"),
    (lambda: f.glu(torch.tensor(1.0)), lambda: F.glu(torch.tensor(1.0)), "scalar"),
    (lambda: f.swiglu(X), lambda: F.glu(X), "size 5"),
    (lambda: f.prelu(X, torch.ones(3)), lambda: F.prelu(X, torch.ones(3)), "weight"),
    (lambda: f.prelu(X, torch.ones(5, 1)), lambda: F.prelu(X, torch.ones(5, 1)), "weight"),
    (lambda: f.prelu(X, torch.ones(5).double()), lambda: F.prelu(X, torch.ones(5).double()), "weight"),
    (lambda: f.prelu(torch.ones(4), torch.ones(4)), lambda: F.prelu(torch.ones(4), torch.ones(4)), "weight"),
    (lambda: f.rrelu(X, 0.5, 0.1, True), lambda: F.rrelu(X, 0.5, 0.1, True), "lower"),
    (lambda: f.rrelu(X, math.nan, 0.1, True), lambda: F.rrelu(X, math.nan, 0.1, True), "lower"),
    (lambda: f.rrelu(X, 0.5, math.inf, True), lambda: F.rrelu(X, 0.5, math.inf, True), "upper"),
    (lambda: f.relu([1, 2]), lambda: F.relu([1, 2]), "input"),
    (lambda: f.gelu("x"), lambda: F.gelu("x"), "input"),
    (lambda: f.elu(X, alpha="x"), lambda: F.elu(X, alpha="x"), "alpha"),
    (lambda: f.swiglu(X, torch.randn(3, 4)), lambda: X * torch.randn(3, 4), "up"),
    (lambda: f.swiglu(X, X.to("meta")), lambda: torch.add(X, X.to("meta")), "up"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_bad_input_raises_torchs_class_and_names_the_argument(index: int) -> None:
    ours, theirs, named = WRONG[index]
    expected, error = raised(theirs), raised(ours)
    assert expected is not None and error is not None
    assert isinstance(error, type(expected)), (type(error), type(expected))
    assert named in str(error)


def test_numbers_are_what_torch_takes_for_numbers() -> None:
    for slope in (numpy.float32(0.25), torch.tensor(0.25), numpy.int64(1), True):
        assert torch.equal(f.leaky_relu(X, slope), F.leaky_relu(X, slope))
    with pytest.raises(TypeError, match="negative_slope"):
        f.leaky_relu(X, torch.tensor([0.25, 0.5]))


def test_bad_input_that_torch_has_no_twin_of() -> None:
    with pytest.raises(RuntimeError, match="'up' is torch.float16 but 'gate' is torch.float32"):
        f.swiglu(X, X.half())
    with pytest.raises(RuntimeError, match="'beta' has 3 elements, allowed are 1 and 5"):
        f.swish(X, torch.ones(3))
    with pytest.raises(TypeError, match="beta"):
        f.swish(X, "x")
    with pytest.raises(TypeError, match="seed must be an int"):
        f.rrelu(X, training=True, seed=1.5)
    with pytest.raises(ValueError, match="seed must hold one element, not 2"):
        f.rrelu(X, training=True, seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="backend must be one of"):
        f.gelu(X, backend="tpu")


INPLACE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (f.relu, F.relu),
    "leaky_relu": (f.leaky_relu, F.leaky_relu),
    "elu": (f.elu, F.elu),
    "silu": (f.silu, F.silu),
    "rrelu": (lambda x, **k: f.rrelu(x, **k), F.rrelu),
}


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("name", INPLACE)
def test_in_place(name: str, backend: str) -> None:
    ours, theirs = INPLACE[name]
    for layout in (lambda x: x, lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:, 1:]):
        x = torch.randn(6, 8, device=DEVICE)
        mine, other = x.clone(), x.clone()
        a, b = layout(mine), layout(other)
        version = a._version
        assert ours(a, inplace=True, backend=backend) is a and a._version > version
        theirs(b, inplace=True)
        torch.testing.assert_close(mine, other)

        start = x.clone().requires_grad_()
        y = ours(layout(start * 1), inplace=True, backend=backend)
        (grad,) = torch.autograd.grad(y, start, torch.ones_like(y))
        other_start = x.clone().requires_grad_()
        z = theirs(layout(other_start * 1), inplace=True)
        torch.testing.assert_close(grad, torch.autograd.grad(z, other_start, torch.ones_like(z))[0])


@pytest.mark.parametrize("backend", EVERY)
def test_in_place_refuses_what_autograd_forbids_before_writing(backend: str) -> None:
    leaf = torch.randn(5, requires_grad=True, device=DEVICE)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        f.relu(leaf, inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        f.silu(torch.randn(1, 4, device=DEVICE).expand(3, 4), inplace=True, backend=backend)
    for view in (leaf[1:3], (leaf * 1).chunk(2)[0], (leaf * 1).view(5, 1).unbind()[0]):
        whole = view._base.detach().clone()
        with pytest.raises(RuntimeError, match="a view of a leaf Variable|is a view and is being modified inplace"):
            f.relu(view, inplace=True, backend=backend)
        assert torch.equal(view._base.detach(), whole)
    with torch.inference_mode():
        frozen = torch.randn(4, device=DEVICE)
        assert f.silu(frozen, inplace=True, backend=backend) is frozen
    before = frozen.clone()
    with pytest.raises(RuntimeError, match="inference tensor 'input' outside InferenceMode"):
        f.silu(frozen, inplace=True, backend=backend)
    assert torch.equal(frozen, before)
    x = torch.randn(5, requires_grad=True, device=DEVICE)
    saved_by_exp = x.exp()
    f.silu(saved_by_exp, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved_by_exp.sum().backward()


@pytest.mark.parametrize("backend", EVERY)
def test_in_place_second_derivative_and_compile(backend: str) -> None:
    x = torch.randn(7, dtype=torch.float32, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(f.silu(x * 1, inplace=True, backend=backend).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(F.silu(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), x), torch.autograd.grad(h.sum(), x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v: f.relu(v * 1, inplace=True, backend=backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], (x > 0).float())


def test_in_place_leaky_relu_of_negative_slope() -> None:
    """torch refuses this backward; ours keeps a copy of the input."""
    x = torch.randn(9, requires_grad=True)
    (g,) = torch.autograd.grad(f.leaky_relu(x * 1, -0.3, inplace=True).sum(), x)
    torch.testing.assert_close(g, torch.where(x > 0, 1.0, -0.3))


MODULES = [
    (pk.nn.Sigmoid(), nn.Sigmoid()),
    (pk.nn.Tanh(), nn.Tanh()),
    (pk.nn.ReLU(True), nn.ReLU(True)),
    (pk.nn.LeakyReLU(0.2), nn.LeakyReLU(0.2)),
    (pk.nn.PReLU(4, 0.1), nn.PReLU(4, 0.1)),
    (pk.nn.RReLU(0.1, 0.2).eval(), nn.RReLU(0.1, 0.2).eval()),
    (pk.nn.ELU(1.3), nn.ELU(1.3)),
    (pk.nn.GELU("tanh"), nn.GELU("tanh")),
    (pk.nn.SiLU(), nn.SiLU()),
    (pk.nn.GLU(1), nn.GLU(1)),
]


@pytest.mark.parametrize(("ours", "theirs"), MODULES, ids=[type(m[1]).__name__ for m in MODULES])
def test_modules_are_torchs(ours: nn.Module, theirs: nn.Module) -> None:
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))


def test_gated_modules_and_swish() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    both = torch.cat((gate, up), -1)
    for module, act in (
        (pk.nn.SwiGLU(), F.silu),
        (pk.nn.ReGLU(), F.relu),
        (pk.nn.GEGLU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (pk.nn.Bilinear(), lambda x: x),
    ):
        torch.testing.assert_close(module(gate, up), act(gate) * up)
        torch.testing.assert_close(module(both), act(gate) * up)
    swish = pk.nn.Swish(1.5, learnable=True, num_parameters=8)
    assert list(swish.state_dict()) == ["beta"]
    torch.testing.assert_close(swish(gate), gate * torch.sigmoid(1.5 * gate))
    assert pk.nn.Swish(0.5)(gate).equal(f.swish(gate, 0.5)) and not list(pk.nn.Swish().parameters())
    with pytest.raises(ValueError, match="num_parameters"):
        pk.nn.Swish(num_parameters=3)


def test_rrelu_draws_from_torchs_generator_and_replays() -> None:
    x = torch.randn(1000)
    torch.manual_seed(3)
    a, b = f.rrelu(x, training=True), f.rrelu(x, training=True)
    torch.manual_seed(3)
    assert torch.equal(a, f.rrelu(x, training=True)) and not torch.equal(a, b)
    slopes = (a / x)[x < 0]
    assert slopes.min() >= 1 / 8 - 1e-6 and slopes.max() <= 1 / 3 + 1e-6
    assert abs(float(slopes.mean()) - (1 / 8 + 1 / 3) / 2) < 5 * (1 / 3 - 1 / 8) / math.sqrt(12 * slopes.numel())
    start = torch.randn(50, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda v: f.rrelu(v.sin(), training=True), start, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.sum(), start)
    torch.testing.assert_close(grad, y.detach() / start.detach().sin() * start.detach().cos(), rtol=1e-4, atol=1e-5)


def test_rrelu_keeps_vmaps_rules_of_randomness() -> None:
    x = -torch.ones(3, 50)

    def draw(randomness: str) -> Tensor:
        return torch.vmap(lambda row: f.rrelu(row, training=True), randomness=randomness)(x)

    with pytest.raises(RuntimeError, match="randomness"):
        draw("error")
    same, different = draw("same"), draw("different")
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rrelu_is_the_same_on_every_backend(backend: str) -> None:
    """The same draws and the same rounding; at 0 the gradient is the slope and at NaN it is 1, as torch has it."""
    x = torch.randn(3, 700, device=DEVICE)
    x[0, :3] = torch.tensor([0.0, -0.0, math.nan])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = []
        for served in (backend, "reference"):
            leaf = x.to(dtype).requires_grad_()
            y = f.rrelu(leaf, training=True, seed=-5, backend=served)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        slopes = found[0][1][0, :3].tolist()
        assert 1 / 8 <= slopes[0] < 1 / 3 and 1 / 8 <= slopes[1] < 1 / 3 and slopes[2] == 1


def _saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(x)
    return sum(storages.values())


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu", "glu"])
def test_gated_units_save_the_preactivation_alone(name: str) -> None:
    """Half of what eager keeps, or less: gate and up (one tensor here), and nothing of the size of the output."""
    x = torch.randn(64, 512, requires_grad=True)
    function = getattr(f, name)

    def eager(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        act = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu, "glu": torch.sigmoid}[name]
        return act(first) * second

    ours = _saved_bytes(function, x)
    assert ours == x.numel() * 4
    assert ours <= _saved_bytes(eager, x) * (1 if name == "glu" else 2 / 3)


def test_the_plot_of_the_docs_shows_every_activation() -> None:
    """docs/activation_curves.svg, drawn by benchmarks/curves.py: two lines a panel, every name of the family."""
    plot = (Path(__file__).parents[1] / "docs" / "activation_curves.svg").read_text()
    names = re.findall(r'<text class="value"[^>]*>([^<]*)</text>', plot)
    assert len(re.findall("<polyline", plot)) == 2 * len(names)
    family = (
        "sigmoid",
        "tanh",
        "relu",
        "leaky_relu",
        "prelu",
        "rrelu",
        "elu",
        "gelu",
        "silu",
        "swish",
        "reglu",
        "geglu",
    )
    assert not [name for name in (*family, "swiglu") if name not in " ".join(names)]
