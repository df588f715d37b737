"""The recurrent room's GPU kernels where they are hard: every way to run the time loop, ragged batches over several
tiles, rows that come and go in one direction and both, hidden sizes that fill no tile."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

from pykernels import _packed
from pykernels import reference as ref
from pykernels._cuda import recurrent as cuda
from pykernels._cuda._extension import Extension
from pykernels._triton import recurrent as triton_floor
from pykernels.reference import recurrent as reference
from pykernels.testing.compare import assert_equal

KINDS = ("lstm", "gru", "tanh", "relu")
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RAGGED = torch.tensor([18, 17, 17, 3, 1])


def floor_of(backend: str) -> Any:
    """The operators' implementations, without the registry: what is tested here is the floor itself."""
    if backend == "triton":
        return triton_floor
    extension = Extension(f"_{backend}_ext")
    assert extension.available, extension.reason
    names = [name for name in cuda.__all__ if name != "unsupported"]
    return SimpleNamespace(**{name: functools.partial(getattr(cuda, name), extension) for name in names})


# Each way of running the loop, and how a floor is brought to take it for small tensors.
CUDA_WAYS = {"loop": 1, "grid": 2, "step": 3}
PATHS = {"triton": ("loop", "step"), "cuda": tuple(CUDA_WAYS), "emulator": tuple(CUDA_WAYS)}
WAYS = [(b, way) for b in BACKENDS if b in PATHS for way in PATHS[b]]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Any:
    def taking(backend: str, way: str) -> Any:
        if backend == "triton":
            largest = 64 if way == "loop" else 0
            monkeypatch.setattr(triton_floor, "RESIDENT", dict.fromkeys(DTYPES, largest))
            small = triton_floor.Tiles(rows=16, units=16, terms=16, warps=4)
            monkeypatch.setattr(triton_floor, "step_tiles", lambda *_: small)
        else:
            monkeypatch.setattr(cuda, "WAY", CUDA_WAYS[way])
        return floor_of(backend)

    return taking


def layer(
    kind: str, sizes: Tensor | None, batch: int, hidden: int, dtype: torch.dtype, ways: int = 1, steps: int = 4,
    projected: int = 0,
) -> Any:  # fmt: skip
    """Tensors of one layer in one direction or both; rows of the batch beyond sizes[0] have no steps."""
    generator = torch.Generator().manual_seed(11)
    tokens, gated, size = steps * batch if sizes is None else int(sizes.sum()), GATES[kind] * hidden, 5

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    width, many = projected or hidden, (2,) if ways == 2 else ()
    states = [draw(*many, batch, width), draw(*many, batch, hidden)][: 2 if kind == "lstm" else 1]
    weights = [draw(*many, gated, size, scale=0.5), draw(*many, gated, width, scale=width**-0.5)]
    weights += [draw(*many, gated), draw(*many, gated)]
    if projected:  # and peepholes
        weights += [draw(*many, width, hidden, scale=hidden**-0.5), draw(*many, 3 * hidden)]
    cotangents = [draw(tokens, ways * width), *(draw(*s.shape) for s in states)]
    return SimpleNamespace(
        kind=kind, input=draw(tokens, size), states=states, weights=weights, sizes=sizes, cotangents=cotangents
    )


def truth(given: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The reference and its gradients, in float64 or in the tensors' own dtype (what `compare` calibrates on)."""
    leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in (given.input, *given.states, *given.weights)]
    x, states, weights = leaves[0], leaves[1 : 1 + len(given.states)], leaves[1 + len(given.states) :]
    found = reference.layer(given.kind, x, tuple(states), ref.recurrent.Weights(*weights), given.sizes)
    grads = torch.autograd.grad(found, leaves, [c.to(y.dtype) for c, y in zip(given.cotangents, found, strict=True)])
    return named(given, [y.detach() for y in found], grads[0], grads[1 : 1 + len(states)], grads[1 + len(states) :])


def named(given: Any, results: Any, dx: Tensor, dstates: Any, dweights: Any) -> dict[str, Tensor]:
    found = dict(zip(("output", "h_n", "c_n"), results, strict=False)) | {"dx": dx}
    found |= dict(zip(("dh0", "dc0"), dstates, strict=False))
    names = ("dw_ih", "dw_hh", "db_ih", "db_hh", "dw_hr", "dpeephole")
    return found | dict(zip(names, dweights, strict=False))


def run(floor: Any, given: Any, recompute: bool = False) -> dict[str, Tensor]:
    """Forward and backward through the floor's operators."""
    kind, x, sizes = given.kind, given.input, given.sizes
    w_ih, w_hh, _, _, *extra = given.weights
    if kind == "lstm":
        projected, extra = bool(extra), extra or [None, None]
        layer = (x, *given.states, *given.weights[:4], *extra, sizes)
        y, h, c, *kept = floor.lstm_forward(*layer, not recompute)
        kept = floor.lstm_recompute(*layer, y) if recompute else kept
        dx, dh, dc, dw_ih, dw_hh, db, *rest = floor.lstm_backward(
            *given.cotangents, x, *given.states, w_ih, w_hh, *extra, sizes, y, *kept,
            (True,) * 6 + (projected,) * 2,
        )  # fmt: skip
        return named(given, (y, h, c), dx, (dh, dc), (dw_ih, dw_hh, db, db, *(rest if projected else ())))
    layer = (x, *given.states, *given.weights, sizes)
    if kind == "gru":
        y, h, kept = floor.gru_forward(*layer, not recompute)
        kept = floor.gru_recompute(*layer, y) if recompute else kept
        dx, dh, *dweights = floor.gru_backward(
            *given.cotangents, x, *given.states, w_ih, w_hh, sizes, y, kept, (True,) * 5
        )
        return named(given, (y, h), dx, (dh,), dweights)
    y, h = floor.rnn_forward(*layer, kind)
    dx, dh, dw_ih, dw_hh, db = floor.rnn_backward(
        *given.cotangents, x, *given.states, w_ih, w_hh, sizes, y, kind, (True,) * 5
    )
    return named(given, (y, h), dx, (dh,), (dw_ih, dw_hh, db, db))


def check(floor: Any, given: Any, recompute: bool = False) -> None:
    found = run(floor, given, recompute)
    exact, own = truth(given, torch.float64), truth(given, None)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert_equal(name, value, exact[name], own[name], long_sum=name[0] == "d")


@pytest.mark.parametrize(("backend", "way"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", (1, 2), ids=("forward", "both-ways"))
def test_ragged_over_tiles(take: Any, backend: str, way: str, kind: str, ways: int, poisoned: None) -> None:
    """Two tiles of rows, of which the second empties; one row without any step; hidden units that fill no tile."""
    check(take(backend, way), layer(kind, RAGGED, 19, 35, torch.float32, ways))


@pytest.mark.parametrize(("backend", "way"), WAYS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("kind", ("lstm", "gru", "tanh"))
def test_sixteen_bits(take: Any, backend: str, way: str, kind: str, dtype: torch.dtype, poisoned: None) -> None:
    check(take(backend, way), layer(kind, RAGGED, 19, 35, dtype, 1 + (dtype == torch.float16)))
    check(take(backend, way), layer(kind, None, 17, 40, dtype, 1 + (dtype == torch.bfloat16)))


@pytest.mark.parametrize(("backend", "way"), WAYS)
@pytest.mark.parametrize("kind", ("lstm", "gru"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_recompute(take: Any, backend: str, way: str, kind: str, dtype: torch.dtype, poisoned: None) -> None:
    """What is made again from the output alone: the same bound as what was kept; hidden units over two tiles."""
    check(take(backend, way), layer(kind, RAGGED, 19, 70, dtype, 1 + (dtype == torch.bfloat16)), recompute=True)


CUDA = tuple(b for b in BACKENDS if b in ("cuda", "emulator"))


@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("way", ("grid", "step"))
def test_more_terms_than_shared_memory_holds(take: Any, backend: str, way: str, poisoned: None) -> None:
    """The state is loaded in pieces of 1024: of the gates' gradient from hidden size 257 on, of h from 1025 on."""
    check(take(backend, way), layer("lstm", None, 2, 264, torch.float32, steps=2))
    check(take(backend, way), layer("tanh", None, 1, 1032, torch.bfloat16, steps=2))


@pytest.mark.skipif("emulator" not in BACKENDS, reason="how many blocks a GPU holds at once is not ours to set")
@pytest.mark.parametrize(("held", "kind"), ((6, "gru"), (3, "lstm"), (2, "lstm"), (1, "tanh")))
def test_fewer_blocks_than_work(take: Any, held: int, kind: str, poisoned: None) -> None:
    """Blocks take 1 to 16 blocks of units (and share out terms of the sum, or not), tiles of rows take turns."""
    module: Any = Extension("_emulator_ext").module
    module.set_resident_blocks(held)
    try:
        check(take("emulator", "grid"), layer(kind, RAGGED, 19, 44, torch.float32, 1 + (held % 2 == 0)))
    finally:
        module.set_resident_blocks(132)


@pytest.mark.parametrize("backend", CUDA)
def test_way_of_running_by_size(backend: str) -> None:
    """One block while its shared memory holds W_hh, then a grid; a wish that does not fit is refused."""
    module: Any = Extension(f"_{backend}_ext").module
    where = torch.empty(1, device=DEVICE)

    def way(kind: int, hidden: int, backward: bool = False, batch: int = 16, wish: int = 0, dtype: int = 1) -> int:
        return module.recurrent_plan(where.data_ptr(), kind, backward, hidden, batch, 1, wish, dtype)[0]

    assert way(0, 64) == way(0, 64, backward=True) == way(2, 128) == 1
    assert way(0, 512) == way(0, 512, backward=True) == 2
    assert way(0, 512, wish=1) == 0 and way(0, 512, wish=3) == 3
    assert way(0, 1 << 20, wish=2) == 0 and way(0, 1 << 20) == 3


@pytest.mark.parametrize(("backend", "way"), WAYS)
@pytest.mark.parametrize("ways", (1, 2), ids=("forward", "both-ways"))
def test_projections_and_peepholes(take: Any, backend: str, way: str, ways: int, poisoned: None) -> None:
    given = layer("lstm", RAGGED, 19, 35, torch.float32, ways, projected=13)
    check(take(backend, way), given, recompute=ways == 2)


@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("kind", ("lstm", "gru", "tanh"))
def test_long_with_orthogonal_recurrence(take: Any, backend: str, kind: str) -> None:
    """Spectral radius 1: what one step gets wrong, of products made of bfloat16 parts, is not damped in the others."""
    given = layer(kind, None, 2, 33, torch.float32, steps=256)
    for block in given.weights[1].split(33):
        block.copy_(torch.linalg.qr(block)[0])
    check(take(backend, "loop"), given)


@pytest.mark.parametrize(("backend", "way"), WAYS)
def test_final_states_without_gradients(take: Any, backend: str, way: str) -> None:
    """No gradient of h_n or c_n is a gradient of zeros."""
    floor, given = take(backend, way), layer("lstm", RAGGED, 19, 20, torch.float32)
    found = []
    for cotangents in ([given.cotangents[0], None, None], [given.cotangents[0], *map(torch.zeros_like, given.states)]):
        found.append(run(floor, SimpleNamespace(**{**vars(given), "cotangents": cotangents})))
    assert all(torch.equal(a, found[1][name]) for name, a in found[0].items())


@pytest.mark.parametrize("backend", sorted({b for b, _ in WAYS}))
def test_operators_refuse_what_would_read_outside(backend: str) -> None:
    """Operators may be called on their own (a saved graph); they check what guards memory."""
    floor, given = floor_of(backend), layer("lstm", None, 2, 4, torch.float32)
    x, (h, c), (w_ih, w_hh, b, _) = given.input, given.states, given.weights
    wrong = {
        "w_ih": (x, h, c, w_ih[:8], w_hh, b, b), "w_hh": (x, h, c, w_ih, w_hh[:8], b, b),
        "c0": (x, h, c[:1], w_ih, w_hh, b, b), "b_hh": (x, h, c, w_ih, w_hh, b, b[1:]),
    }  # fmt: skip
    for name, layer_ in wrong.items():
        with pytest.raises(RuntimeError, match=name):
            floor.lstm_forward(*layer_, None, None, None, True)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        floor.lstm_forward(x, h, c, w_ih, w_hh, b, b, None, None, torch.tensor([1, 2, 5]), True)
    y, _, _, gates, cells = floor.lstm_forward(x, h, c, w_ih, w_hh, b, b, None, None, None, True)
    for name, saved in {"output": (y[1:], gates, cells), "gates": (y, gates[1:], cells)}.items():
        with pytest.raises(RuntimeError, match=name):
            floor.lstm_backward(y, h, c, x, h, c, w_ih, w_hh, None, None, None, *saved, (True,) * 8)


def _forget(name: str) -> Callable[[Any], None]:
    def forgetting(given: Any) -> None:
        getattr(given, name).zero_()

    return forgetting


def _as_time_goes(f: Any) -> None:
    """The second direction finds the steps' sizes, but not where they are, as the first one does."""
    sizes, visits = f.steps.sizes, f.steps.visits
    f.steps.visits = lambda reverse: visits(False)
    f.steps.offsets = [0, *torch.tensor(sizes[::-1]).cumsum(0).tolist()]


def _another_order(b: Any) -> None:
    b.dgates.copy_(b.dgates.roll(b.h0.shape[1], 1))


#: (which loop, whether before or after it, what goes wrong)
MISTAKES: dict[str, tuple[str, str, Callable[[Any], None]]] = {
    "the right one": ("forward", "before", lambda f: None),
    "initial h lost": ("forward", "before", lambda f: setattr(f, "h0", torch.zeros_like(f.h0))),
    "initial c lost": ("forward", "before", _forget("c_n")),
    "bias left out": ("forward", "before", lambda f: setattr(f, "bias", None)),
    "gates of the other direction": ("forward", "before", lambda f: f.gates.copy_(f.gates.flip(0))),
    "weights of the other direction": ("backward", "before", lambda b: setattr(b, "w_hh", b.w_hh.flip(0))),
    "dy of the other direction": ("backward", "before", lambda b: setattr(b, "dy", b.dy.flip(0))),
    "second direction in the order of time": ("forward", "before", _as_time_goes),
    "gradient of h_n lost": ("backward", "before", _forget("dh")),
    "gradient of c_n lost": ("backward", "before", _forget("carry")),
    "W_hh of other units": ("backward", "before", lambda b: setattr(b, "w_hh", b.w_hh.roll(1, 1))),
    "gates in another order": ("backward", "after", _another_order),
    "a gradient that is a little off": ("backward", "after", lambda b: b.dgates.mul_(1.001)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake: str, take: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, (direction, when, plant) = WAYS[-1][0], MISTAKES[mistake]
    owner = triton_floor._Floor if backend == "triton" else cuda._Floor
    loop = getattr(owner, direction)

    def planted(floor: Any, given: Any) -> Any:
        if when == "before":
            plant(given)
        found = loop(floor, given)
        if when == "after":
            plant(given)
        return found

    monkeypatch.setattr(owner, direction, planted)
    given = layer("lstm", RAGGED, 19, 35, torch.float32, 2)
    with contextlib.nullcontext() if mistake == "the right one" else pytest.raises(AssertionError):
        check(take(backend, WAYS[-1][1]), given)


@pytest.mark.parametrize("sizes", (None, torch.tensor([4, 4, 2, 1]), torch.tensor([4, 4, 2, 1, 0])), ids=str)
def test_steps(sizes: Tensor | None) -> None:
    """The bookkeeping of packed tokens, against a walk over rows, in either direction; two tokens of padding."""
    batch = 3 if sizes is None else 5
    steps = _packed.Steps(12 if sizes is None else 13, batch, sizes)
    counts = [3] * 4 if sizes is None else [4, 4, 2, 1]
    starts = [sum(counts[:t]) for t in range(len(counts))]
    h0 = torch.arange(100.0, 100 + 2 * batch).view(2, batch, 1)
    output = torch.arange(2.0 * sum(counts)).view(2, -1, 1)
    for flipped in (False, True):
        before, first = torch.full_like(output, -1), ({}, {})
        for d, row in itertools.product(range(2), range(batch)):
            times = [t for t, n in enumerate(counts) if n > row]
            state = h0[d, row]
            for t in reversed(times) if (d == 1) != flipped else times:
                token = starts[t] + row
                before[d, token], state = state, output[d, token]
                first[d].setdefault(row, token)
        assert torch.equal(steps.before(output, h0, flipped), before)
        for d in range(2):
            rows = torch.arange(steps.tokens)[steps.first((d == 1) != flipped)]
            assert rows.tolist() == [first[d][row] for row in sorted(first[d])]
    assert steps.tile_steps(2, output.device).tolist() == [sum(n > r for n in counts) for r in range(0, batch, 2)]
    assert steps.offsets_on(output.device).tolist() == [*starts, sum(counts)]


@pytest.mark.parametrize("sizes", ([3, 3], [2, 2, 2, 1], [1, 2, 3], [2, 0, 2], [2, -1], [6]))
def test_steps_refuse_what_would_read_outside(sizes: list[int]) -> None:
    with pytest.raises(RuntimeError, match="batch_sizes"):
        _packed.Steps(6, 2, torch.tensor(sizes))
    with pytest.raises(RuntimeError, match="multiple"):
        _packed.Steps(7, 2, None)
