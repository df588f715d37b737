"""patch and unpatch: equal outputs and gradients, and everything that hangs on a module stays on it."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pykernels as pk
from pykernels.patching import Rule, register, registry
from pykernels.testing.compare import assert_equal
from pykernels.testing.run import outputs_of

E, H, B, L = 16, 2, 3, 7


def floats(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def ids() -> tuple[Tensor, ...]:
    return (torch.randint(9, (B, L)),)


def pair() -> tuple[Tensor, ...]:
    return torch.randn(B, L, E), torch.randn(B, L + 2, E)


def qkv() -> tuple[Tensor, ...]:
    return (torch.randn(L, B, E), *(torch.randn(L + 2, B, E) for _ in range(2)))


def labelled() -> tuple[Tensor, ...]:
    return torch.randn(B * L, E), torch.randint(20, (B * L,))


def unbatched_state() -> tuple[Any, ...]:
    return torch.randn(B, E), (torch.randn(B, 8), torch.randn(B, 8))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "sigmoid": (nn.Sigmoid, floats(B, E)),
    "tanh": (nn.Tanh, floats(B, E)),
    "relu": (nn.ReLU, floats(B, E)),
    "relu-inplace": (lambda: nn.Sequential(nn.Linear(E, E), nn.ReLU(True)), floats(B, E)),
    "leaky-relu": (lambda: nn.LeakyReLU(0.2), floats(B, E)),
    "prelu": (lambda: nn.PReLU(E), floats(B, E)),
    "rrelu": (lambda: nn.RReLU(0.2, 0.2), floats(B, E)),
    "elu": (lambda: nn.ELU(0.7), floats(B, E)),
    "gelu": (nn.GELU, floats(B, E)),
    "gelu-tanh": (lambda: nn.GELU("tanh"), floats(B, E)),
    "silu": (nn.SiLU, floats(B, E)),
    "glu": (lambda: nn.GLU(1), floats(B, E, 2)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5).eval()), floats(B, E)),
    "embedding": (lambda: nn.Embedding(9, E, padding_idx=2, scale_grad_by_freq=True), ids),
    "embedding-sparse": (lambda: nn.Embedding(9, E, max_norm=1.0, sparse=True), ids),
    "bag": (lambda: nn.EmbeddingBag(9, E, mode="max", padding_idx=0), ids),
    "rnn": (lambda: nn.RNN(E, 8, nonlinearity="relu", bidirectional=True), floats(L, B, E)),
    "lstm": (lambda: nn.LSTM(E, 8, 2, batch_first=True, proj_size=5), floats(B, L, E)),
    "gru": (lambda: nn.GRU(E, 8, bias=False), floats(L, B, E)),
    "rnn-cell": (lambda: nn.RNNCell(E, 8), floats(B, E)),
    "lstm-cell": (lambda: nn.LSTMCell(E, 8), unbatched_state),
    "gru-cell": (lambda: nn.GRUCell(E, 8), floats(B, E)),
    "attention": (lambda: nn.MultiheadAttention(E, H, add_bias_kv=True), qkv),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(E, H, 24, 0.0, "gelu", batch_first=True), floats(B, L, E)),
    "decoder-layer": (lambda: nn.TransformerDecoderLayer(E, H, 24, 0.0, batch_first=True, norm_first=True), pair),
    "transformer": (lambda: nn.Transformer(E, H, 1, 2, 24, 0.0, nn.SiLU(), batch_first=True), pair),
    "adaptive": (lambda: nn.AdaptiveLogSoftmaxWithLoss(E, 20, [4, 11], head_bias=True), labelled),
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    CASES["linear-loss"] = (lambda: nn.LinearCrossEntropyLoss(E, 20, bias=True), labelled)


def run(model: nn.Module, args: tuple[Any, ...], **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of every parameter and floating-point argument."""

    def leaf(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(leaf(y) for y in x)
        return x.clone().requires_grad_() if x.is_floating_point() else x

    args = leaf(args)
    outputs = outputs_of(model(*args, **options))
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs).backward()
    leaves = [x for x in (*args, *(args[-1] if isinstance(args[-1], tuple) else ())) if isinstance(x, Tensor)]
    found = {f"out{i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"dx{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: g.to_dense() if g.is_sparse else g for name, g in grads.items()}


def wide(x: Any) -> Any:
    return tuple(wide(y) for y in x) if isinstance(x, tuple) else x.double() if x.is_floating_point() else x


def assert_equal_after(stock: nn.Module, args: tuple[Any, ...], **options: Any) -> nn.Module:
    """Patches a copy, judges it against the stock model in float64, and returns it."""
    oracle, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    assert pk.patch(ours).patched
    doubled = {name: wide(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    truth, mine, peer = run(oracle, wide(args), **doubled), run(ours, args, **options), run(stock, args, **options)
    assert mine.keys() == truth.keys()
    for name, expected in truth.items():
        assert_equal(name, mine[name], expected, peer[name], long_sum=name[:3] not in ("out", "dx0", "dx1"))
    return ours


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_stay_equal(case: str) -> None:
    make, inputs = CASES[case]
    assert_equal_after(make(), inputs())


@pytest.mark.parametrize("case", CASES)
def test_unpatched_it_is_what_it_was(case: str) -> None:
    make, inputs = CASES[case]
    model = make()
    other = copy.deepcopy(model)
    pk.patch(other)
    state, expected = other.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in expected)
    other.load_state_dict(expected, strict=True)
    pk.unpatch(other)
    for mine, theirs in zip(other.modules(), model.modules(), strict=True):
        assert type(mine) is type(theirs) and vars(mine).keys() == vars(theirs).keys()
    args = inputs()
    for mine, theirs in zip(outputs_of(other(*args)), outputs_of(model(*args)), strict=True):
        assert torch.equal(mine, theirs)


class WrongTail(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input, approximate="tanh")


@pytest.mark.parametrize("wrong", (WrongTail, nn.SiLU))
def test_a_wrong_rule_is_found(wrong: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry, "_rules", {nn.GELU: Rule(nn.GELU, wrong, attributes=lambda module: {"inplace": False})}
    )
    with pytest.raises(AssertionError, match="error"):
        assert_equal_after(nn.GELU(), (torch.randn(B, E),))


def test_every_rule_has_a_case() -> None:
    seen = {type(m) for make, _ in CASES.values() for m in make().modules()}
    assert {kind for kind in registry._rules if kind.__module__.startswith("torch.nn")} <= seen


class Model(nn.Module):
    """Tied, shared and hooked parts, and some that must stay."""

    class Own(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(9, E)
        self.rnn = nn.LSTM(E, E, batch_first=True)
        self.first = nn.Sequential(nn.Linear(E, E), nn.GELU())
        self.act = self.first[1]
        self.own = Model.Own()
        self.softplus = nn.Softplus()
        self.head = nn.Linear(E, 9, bias=False)
        self.head.weight = self.token.weight
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.softplus(self.own(self.act(self.first(self.rnn(self.token(tokens))[0]))))
        return self.loss(self.head(x).flatten(0, 1), tokens.flatten())


def test_identity_survives() -> None:
    model = Model().eval()
    model.rnn.weight_hh_l0.requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pk.patch(model)
    assert all(a is b for a, b in zip(dict(model.named_modules()).values(), modules.values(), strict=True))
    assert all(a is b for a, b in zip(dict(model.named_parameters()).values(), parameters.values(), strict=True))
    assert model.head.weight is model.token.weight and model.act is model.first[1]
    assert not model.training and not model.rnn.training and not model.rnn.weight_hh_l0.requires_grad
    before = model.token.weight.detach().clone()
    model(*ids()).backward()
    optimizer.step()
    assert not torch.equal(before, model.token.weight) and model.rnn.weight_hh_l0.grad is None


def test_the_report_says_what_became_of_every_module() -> None:
    model = Model()
    report = pk.patch(model)
    assert report.patched == ["token", "rnn", "first.1"]
    assert {entry.name for entry in report.entries} == {name for name, _ in model.named_modules()}
    assert report.left["own"] == "a subclass of GELU, which may compute something else"
    assert report.left["softplus"] == "no kernel for this kind"
    assert "LinearCrossEntropyLoss" in report.left["loss"] and "container" in report.left["first"]
    assert "3 of 10 modules swapped" in str(report) and "pykernels LSTM" in str(report)
    assert report.as_dict()[1] == {"name": "token", "kind": "Embedding", "status": "patched",
                                   "detail": "pykernels Embedding"}  # fmt: skip
    again = pk.patch(model)
    assert not again.patched and {e.status for e in again.entries if e.name in report.patched} == {"already"}
    pk.unpatch(model)
    pk.unpatch(model)
    assert type(model.rnn) is nn.LSTM and pk.patch(model).patched == report.patched


def test_ours_from_the_start_stay_ours() -> None:
    model = nn.Sequential(pk.nn.GELU(), pk.nn.SwiGLU())
    assert [entry.status for entry in pk.patch(model).entries] == ["left", "already", "already"]
    pk.unpatch(model)
    assert type(model[0]) is pk.nn.GELU


def test_the_model_itself_may_be_swapped() -> None:
    model = nn.LSTM(E, 8)
    held = [model]
    assert pk.patch(model).patched == [""]
    assert type(held[0]) is pk.nn.LSTM


def test_hooks_survive_and_are_heard() -> None:
    model = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True)
    heard: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: heard.append(f"pre {name}"))
        module.register_forward_hook(lambda m, args, out, name=name: heard.append(f"forward {name}"))
        module.register_full_backward_hook(lambda m, dx, dy, name=name: heard.append(f"backward {name}"))
        module.register_state_dict_post_hook(lambda m, d, prefix, meta, name=name: heard.append(f"state {name}"))
    x = torch.randn(B, L, E, requires_grad=True)

    def listen() -> list[str]:
        heard.clear()
        model(x).sum().backward()
        model.state_dict()
        return heard.copy()

    before = listen()
    pk.patch(model)
    assert listen() == before and len(before) > 20
    with torch.no_grad():
        heard.clear()
        model.eval()(x)
        assert "forward linear2" in heard and "pre norm1" in heard


@pytest.mark.parametrize("old", (False, True), ids=("parametrized", "hooked"))
def test_weight_norm_survives(old: bool) -> None:
    model = nn.LSTM(E, 8)
    norm = nn.utils.weight_norm if old else nn.utils.parametrizations.weight_norm
    norm(model, "weight_hh_l0")
    pk.patch(model)
    names = set(dict(model.named_parameters()))
    x = torch.randn(L, B, E)
    out = model(x)[0]
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and len(names) == 5
    pk.unpatch(model)
    torch.testing.assert_close(model(x)[0], out)
    pk.patch(model)
    if old:
        nn.utils.remove_weight_norm(model, "weight_hh_l0")
    else:
        nn.utils.parametrize.remove_parametrizations(model, "weight_hh_l0")
    assert type(model) is pk.nn.LSTM
    torch.testing.assert_close(model(x)[0], out)
    norm(model, "weight_ih_l0")
    torch.testing.assert_close(model(x)[0], out)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_dtype_and_device_survive(dtype: torch.dtype) -> None:
    model = Model().to(dtype)
    report = pk.patch(model)
    assert model(*ids()).dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    meta = Model().to("meta")
    assert pk.patch(meta).patched == report.patched
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_copies_and_pickles_are_patched_and_can_be_unpatched() -> None:
    model = nn.Sequential(nn.Embedding(9, E), nn.GRU(E, 8), nn.Identity())
    pk.patch(model)
    tokens, buffer = ids()[0], io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert type(other[1]) is pk.nn.GRU
        assert torch.equal(other(tokens)[0], model(tokens)[0])
        pk.unpatch(other)
        assert type(other[1]) is nn.GRU and type(model[1]) is pk.nn.GRU


def test_what_kernels_cannot_serve_is_left() -> None:
    class Quantized(Tensor):
        pass

    table = nn.Embedding(9, E)
    table.weight = nn.Parameter(torch.zeros(9, E).as_subclass(Quantized))
    replaced = nn.GELU()
    replaced.forward = lambda input: input
    left = pk.patch(nn.ModuleList([table, replaced, torch.jit.script(nn.GELU())])).left
    assert "Quantized" in left["0"] and "forward was replaced" in left["1"] and left["2"] == "no kernel for this kind"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"only": "first"}, ["first.1"]),
        ({"only": "act"}, ["first.1"]),
        ({"only": ["tok*", nn.LSTM]}, ["token", "rnn"]),
        ({"only": lambda name, module: "r" in name}, ["rnn", "first.1"]),
        ({"exclude": "first.*"}, ["token", "rnn"]),
        ({"exclude": ""}, []),
        ({"exclude": (nn.GELU, nn.RNNBase)}, ["token"]),
        ({"only": nn.Embedding, "exclude": "token"}, []),
    ],
)
def test_only_and_exclude(options: dict[str, Any], expected: list[str]) -> None:
    assert pk.patch(Model(), **options).patched == expected


@pytest.mark.parametrize("argument", ("only", "exclude"))
def test_a_wrong_selector_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"'{argument}': the model has no module named 'rnm'"):
        pk.patch(Model(), **{argument: "rnm"})
    for wrong in (3, int, [None], nn.GELU(), [nn.GELU()]):
        with pytest.raises(TypeError, match=f"'{argument}' must be names"):
            pk.patch(Model(), **{argument: wrong})


def test_no_module_is_refused() -> None:
    for function in (pk.patch, pk.unpatch):
        with pytest.raises(TypeError, match="must be a torch.nn.Module, not list"):
            function([nn.GELU()])


@pytest.mark.parametrize("function", (pk.patch, pk.unpatch))
def test_refused_inside_a_running_forward(function: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(E, E), nn.GELU())
    model[0].register_forward_hook(lambda *_: function(model))
    with pytest.raises(RuntimeError, match="a forward of the model is running"):
        model(torch.randn(B, E))
    model[0]._forward_hooks.clear()
    go, stop = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        go.set()
        stop.wait(30)

    model[0].register_forward_hook(wait)
    thread = threading.Thread(target=model, args=(torch.randn(B, E),))
    thread.start()
    assert go.wait(30)
    with pytest.raises(RuntimeError, match="a forward of the model is running"):
        function(model)
    function(nn.GELU())
    stop.set()
    thread.join()
    function(model)


@pytest.mark.parametrize("function", (pk.patch, pk.unpatch))
def test_refused_under_compile(function: Callable[[nn.Module], Any]) -> None:
    model = nn.GELU()

    def step(x: Tensor) -> Tensor:
        function(model)
        return model(x)

    with pytest.raises(Exception, match="must be called before torch.compile"):
        torch.compile(step, backend="eager", fullgraph=True)(torch.ones(3))
    assert type(model) is nn.GELU


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: nn.Module) -> None:
        raise KeyError("no")

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    register(Rule(nn.Softplus, None, apply=fail))
    model = Model()
    with pytest.raises(KeyError):
        pk.patch(model)
    assert type(model.token) is nn.Embedding and type(model.rnn) is nn.LSTM

    class Wider(nn.Softplus):
        __slots__ = ("more",)  # no instance of Softplus can become one

    register(Rule(nn.Softplus, Wider, attributes=lambda module: {"added": 1}))
    before = vars(softplus := nn.Softplus()).copy()
    for _ in range(2):
        with pytest.raises(TypeError, match="layout differs"):
            pk.patch(softplus)
        assert vars(softplus) == before


def test_dropout_drops_its_share_and_its_gradient_the_same() -> None:
    model = nn.Sequential(nn.Dropout(0.3))
    pk.patch(model)
    x = torch.rand(400, 500).add_(1).requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    assert abs(float(kept.float().mean()) - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    torch.testing.assert_close(y, torch.where(kept, x / 0.7, 0.0))
    torch.testing.assert_close(dx, kept / 0.7)
    torch.manual_seed(3)
    one = model(x)
    torch.manual_seed(3)
    assert torch.equal(one, model(x)) and not torch.equal(one, model(x)) and torch.equal(model.eval()(x), x)
    model[0].p = 1.0
    assert not model.train()(x).any()
    model[0].p, model[0].inplace = 0.5, True
    z = x.detach().clone()
    assert model(z) is z and bool((z == 0).any())


class Doubled(nn.Softplus):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


def test_an_integration_adds_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    register(
        Rule(
            nn.Softplus,
            Doubled,
            why_not=lambda module: "beta is not 1" if module.beta != 1 else None,
            attributes=lambda module: {"factor": 2.0},
        ),
        Rule(
            nn.modules.batchnorm._BatchNorm,
            None,
            apply=lambda module: (module.eps, setattr(module, "eps", 1.0))[0],
            restore=lambda module, saved: setattr(module, "eps", saved),
            subclasses=True,
        ),
    )
    model = nn.Sequential(nn.Softplus(), nn.Softplus(2.0), nn.BatchNorm1d(3))
    report = pk.patch(model)
    assert report.patched == ["0", "2"] and report.left["1"] == "beta is not 1" and model[2].eps == 1.0
    x = torch.randn(B, 3)
    torch.testing.assert_close(model[0](x), 2 * nn.functional.softplus(x))
    pk.unpatch(model)
    assert type(model[0]) is nn.Softplus and not hasattr(model[0], "factor") and model[2].eps == 1e-5


def test_a_package_of_the_wrong_version_is_left_with_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Block", (nn.Module,), {"__module__": "strange_package.models"})
    monkeypatch.setitem(registry.PROVIDERS, "strange_package", "pykernels.no_such_integration")
    monkeypatch.setattr(registry, "_provided", {})
    assert "no_such_integration" in pk.patch(kind()).left[""]


def test_what_the_benchmark_measures_runs() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "patched.py"
    spec = importlib.util.spec_from_file_location("patched", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for model, batch in script.toys().values():
        assert pk.patch(model).patched
        script.step_of(model, batch)()
    assert script.patching()["modules"] == 201


def test_two_hundred_modules_in_fifty_milliseconds() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LSTM(4, 4)) for _ in range(50)))
    pk.patch(copy.deepcopy(model))
    seconds = []
    for _ in range(3):
        other = copy.deepcopy(model)
        start = time.thread_time()
        report = pk.patch(other)
        seconds.append(time.thread_time() - start)
    assert len(report.entries) == 201 and len(report.patched) == 100
    assert min(seconds) < 0.05, seconds
