"""Layer normalisation, zoneout and dropout masks by the recurrent room's kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels._packed import rows as packed_rows
from pykernels.ops.recurrent._rows import drop
from pykernels.reference.recurrent import dropped, keep
from pykernels.testing import compare
from pykernels.testing.memory import saved_bytes

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
I, T, B = 3, 6, 5  # noqa: E741
LENGTHS, SIZES = torch.tensor([3, 6, 0, 5, 1]), torch.tensor([5, 4, 4, 2, 1, 1])


def weights(name: str, hidden: int, layers: int, ways: int, options: dict[str, Any], size: int = I) -> list[Tensor]:
    gated, width = GATES[name] * hidden, options.get("proj_size") or hidden
    found = []
    for layer, _ in itertools.product(range(layers), range(ways)):
        shapes: list[tuple[int, ...]] = [(gated, ways * width if layer else size), (gated, width), (gated,), (gated,)]
        shapes += [(width, hidden)] * bool(options.get("proj_size")) + [(3 * hidden,)] * bool(options.get("peephole"))
        if options.get("layer_norm"):
            shapes += [(gated,)] * 2 + [(hidden,)] * (2 * (name == "lstm"))
        found += [torch.randn(shape) * 0.5 for shape in shapes]
    return found


def outcome(
    name: str, dtype: torch.dtype, backend: str, x: Tensor, hx: tuple[Tensor, ...], flat: list[Tensor], **options: Any
) -> list[Tensor]:
    """Output, final states and the gradients of everything."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *hx, *flat)]
    state = tuple(leaves[1 : 1 + len(hx)]) if name == "lstm" else leaves[1]
    y, final = getattr(pk.functional, name)(leaves[0], state, leaves[1 + len(hx) :], backend=backend, **options)
    found = [y, *(final if isinstance(final, tuple) else (final,))]
    loss = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)).sum() for t in found
    )
    return [*found, *torch.autograd.grad(loss, leaves)]


def drawn(name: str, hidden: int, options: dict[str, Any], batch: int = B) -> tuple[Any, Any, Any]:
    flat = weights(name, hidden, options.get("num_layers", 1), 2 if options.get("bidirectional") else 1, options)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = [torch.randn(rows, batch, n) for n in (options.get("proj_size") or hidden, hidden)]
    return torch.randn(T, batch, I), tuple(hx[: 2 if name == "lstm" else 1]), flat


@pytest.mark.parametrize("layout", ("lengths", "resets", "packed"))
@pytest.mark.parametrize(
    ("name", "extra"), (("rnn", {}), ("gru", {}), ("lstm", {"peephole": True}), ("lstm", {"proj_size": 7}))
)
def test_every_option_in_every_layout(name: str, extra: dict[str, Any], layout: str) -> None:
    """Two layers both ways, with dropout between them and in W_hh: the masks are where the reference has them."""
    for norm, zone, training in itertools.product((True, False), (0.0, 0.3), (True, False)):
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "layer_norm": norm, "training": training}
        options |= {"zoneout": zone, "recurrent_dropout": 0.3, "dropout": 0.2, "seed": 7, **extra}
        if name == "rnn":
            options["nonlinearity"] = "relu" if training else "tanh"
        x, hx, flat = drawn(name, 33, options)
        if layout == "packed":
            x, options["batch_sizes"] = torch.randn(int(SIZES.sum()), I), SIZES
        else:
            options["lengths"] = LENGTHS
        if layout == "resets":
            options["resets"] = torch.rand(T, B) < 0.3
        assert pk.explain(getattr(pk.functional, name), x, None, flat, **options).backend == "cpu"
        found = outcome(name, torch.float32, "cpu", x, hx, flat, **options)
        truth = outcome(name, torch.float64, "reference", x, hx, flat, **options)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-4 * float(b.detach().abs().max()) + 1e-6)


FLOORS = tuple(backend for backend in BACKENDS if backend != "cpu")


def on_floor(name: str, backend: str, norm: bool, training: bool, hidden: int = 20) -> None:
    """Ragged, both ways, more units than one warp has: against the reference in float64 and float32."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"bidirectional": True, "layer_norm": norm, "training": training, "seed": 7}
    options |= {"zoneout": 0.3, **({"peephole": True} if name == "lstm" else {})}
    if name == "rnn":
        options["nonlinearity"] = "relu" if norm else "tanh"
    x, hx, flat = (t if isinstance(t, Tensor) else [u.to(DEVICE) for u in t] for t in drawn(name, hidden, options, 4))
    options |= {"lengths": torch.tensor([2, 3, 0, 1]).to(DEVICE)}
    given = (x[:3].to(DEVICE), tuple(hx), flat)
    found = outcome(name, torch.float32, backend, *given, **options)
    own = outcome(name, torch.float32, "reference", *given, **options)
    truth = outcome(name, torch.float64, "reference", *given, **options)
    for i, (a, b, c) in enumerate(zip(found, truth, own, strict=True)):
        compare.assert_equal(f"result {i}", a, b, c, long_sum=i > 1)


@pytest.mark.parametrize("backend", FLOORS)
@pytest.mark.parametrize(("norm", "training"), ((True, True), (False, True), (True, False)))
@pytest.mark.parametrize("name", ("rnn", "gru", "lstm"))
def test_gpu_floors(name: str, norm: bool, training: bool, backend: str, poisoned: None) -> None:
    on_floor(name, backend, norm, training)


@pytest.mark.parametrize("mistake", ("mask", "carry", "statistics"))
@pytest.mark.parametrize("backend", FLOORS)
def test_planted_mistakes_are_seen(mistake: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mistake == "mask":
        zone = packed_rows.Zone  # the masks of h begin one element late
        late = lambda modes, shares, firsts, *rest: zone(modes, shares, (firsts[0] + 1, firsts[1]), *rest)
        monkeypatch.setattr(packed_rows, "Zone", late)
    else:
        made, name = packed_rows.RowsBackward, {"carry": "carry_h", "statistics": "stats"}[mistake]

        def planted(*arguments: Any) -> Any:
            r = made(*arguments)
            setattr(r, name, getattr(r, name) + 1e-3)
            return r

        monkeypatch.setattr(packed_rows, "RowsBackward", planted)
    with pytest.raises(AssertionError, match="result"):
        on_floor("lstm", backend, True, True)


@pytest.mark.parametrize("backend", FLOORS)
def test_floors_refuse_projections_here(backend: str) -> None:
    options: dict[str, Any] = {"proj_size": 2, "zoneout": 0.1}
    x, _, flat = drawn("lstm", 4, options)
    with pytest.raises(pk.BackendError, match="proj_size together with zoneout"):
        pk.functional.lstm(x.to(DEVICE), None, [w.to(DEVICE) for w in flat], backend=backend, **options)


@pytest.mark.parametrize("name", ("rnn", "gru", "lstm"))
def test_recompute_threads_and_repetition_give_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    options = {"layer_norm": True, "zoneout": 0.2, "training": True, "seed": 3}
    x, hx, flat = drawn(name, 40, options, 19)
    first = outcome(name, torch.float32, "cpu", x, hx, flat, **options)
    threads = torch.get_num_threads()
    try:
        for count, recompute in ((1, True), (2, False)):
            torch.set_num_threads(count)
            again = outcome(name, torch.float32, "cpu", x, hx, flat, recompute=recompute, **options)
            assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2], strict=True))
            for a, b in zip(first, again, strict=True):  # sums over tokens are torch's, which may split them
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.detach().abs().max()))
    finally:
        torch.set_num_threads(threads)


def test_recompute_keeps_gates_from_the_input_only() -> None:
    """Of a token x, y, x W_ih^T with its biases and (for the normalisation) without; without `recompute` also the
    products of the state, four gates and c."""
    steps, batch, size = 40, 16, 32
    for recompute, kept in ((True, 2 + 4 + 4), (False, 2 + 4 + 4 + 4 + 4 + 1)):
        module = pk.nn.LSTM(size, size, recompute=recompute, layer_norm=True, backend="cpu")
        held = saved_bytes(lambda m=module: m(torch.randn(steps, batch, size)))
        others = 4 * (sum(p.numel() for p in module.parameters()) + 8 * batch * size + 8 * steps * batch)
        assert abs(held - 4 * kept * steps * batch * size) <= 2 * others, (held, kept)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_masks_are_the_references(dtype: torch.dtype) -> None:
    seed = torch.tensor([-5])
    for tokens, columns, index, p in (
        (1, 1, 0, 0.5),
        (7, 33, 2, 0.3),
        (65, 16, 1, 0.9),
        (3, 5, 3, 1.0),
        (0, 4, 0, 0.5),
    ):
        x = torch.randn(tokens, columns).to(dtype).requires_grad_()
        expected = dropped(x, seed, 1, index, p)
        found = drop("cpu", x, seed, 1, index, tokens, p)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)))
    places, x = torch.tensor([4, 1, 8]), torch.randn(3, 21)
    mask = keep(seed, 0, 2, (9, 21), 0.4, x.device)[places]
    assert torch.equal(drop("cpu", x, seed, 0, 2, 9, 0.4, places), torch.where(mask, x * (1 / 0.6), 0))


def test_rows_operators_refuse_what_would_read_outside() -> None:
    x, h, w = torch.randn(6, 16), torch.randn(2, 4), torch.randn(16, 4)
    forward = torch.ops.pykernels.rows_forward.cpu
    options = ("lstm", torch.float32, (0.5, 0.5), (0, 0), True, False, True)

    def call(x: Tensor = x, w: Tensor = w, norm: Any = None, seed: Any = None, places: Any = None) -> Any:
        return forward(x, h, h, w, None, None, None, norm, None, None, None, seed, places, *options)

    seed = torch.tensor([1])
    assert call(seed=seed)[0].shape == (6, 4)
    for wrong in ({"x": x[:, 1:]}, {"w": w[1:]}, {"norm": x[0, 1:]}, {"places": torch.arange(5)}, {"seed": None}):
        with pytest.raises(RuntimeError):
            call(**{"seed": seed, **wrong})
    for lists in (((), (0, 0)), ((0.5, 0.5), (0,))):
        with pytest.raises(RuntimeError, match="zones and firsts must have two elements"):
            forward(x, h, h, w, *(None,) * 9, "lstm", torch.float32, *lists, True, False, True)
    w, projection = torch.randn(12, 1), torch.randn(1, 4)  # a GRU's loop reads h in rows of the hidden size
    with pytest.raises(RuntimeError, match="w_hr, peephole and norm_c are an LSTM's"):
        forward(x[:, :12], h[:, :1], None, w, projection, *(None,) * 8, "gru", torch.float32, *options[2:])
