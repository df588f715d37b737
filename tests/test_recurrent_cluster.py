"""Recurrent loops in clusters (csrc/cuda/recurrent_cluster_*_sm90.cu): against the reference over ragged batches, both
directions, clusters of every size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from test_recurrent_kernels import CUDA, RAGGED, check, floor_of, layer, run
from torch import Tensor

from pykernels import sm90_kernels
from pykernels._cuda import recurrent as cuda
from pykernels._cuda._extension import Extension

HOPPER = DEVICE != "cuda" or torch.cuda.get_device_capability() == (9, 0)
needs_clusters = pytest.mark.skipif(not HOPPER, reason="clusters are for sm_90")
on_emulator = pytest.mark.skipif("emulator" not in BACKENDS, reason="how many blocks a GPU holds is not ours to set")


@pytest.fixture(autouse=True)
def _in_clusters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every loop; none that is served in another way in silence."""
    planned = cuda._planned

    def checked(*args: Any) -> Any:
        plan, reason = planned(*args)
        assert plan[0] == cuda.CLUSTERS and reason is None, reason
        return plan, reason

    monkeypatch.setattr(cuda, "_planned", checked)
    with sm90_kernels("always"):
        yield


@pytest.fixture(params=CUDA)
def floor(request: pytest.FixtureRequest) -> Any:
    return floor_of(request.param)


@pytest.fixture
def emulator() -> Iterator[Any]:
    module: Any = Extension("_emulator_ext").module
    yield module
    module.set_resident_blocks(132)
    module.set_order(0)


@needs_clusters
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("kind", ("lstm", "gru"))
def test_ragged_over_tiles(floor: Any, kind: str, dtype: torch.dtype, poisoned: None) -> None:
    """Two tiles of rows, of which the second empties; one row without any step; blocks without units."""
    check(floor, layer(kind, RAGGED, 19, 40, dtype, 1 + (dtype == torch.float16)))


@needs_clusters
@pytest.mark.parametrize("kind", ("lstm", "gru"))
def test_even_and_recomputed(floor: Any, kind: str, poisoned: None) -> None:
    check(floor, layer(kind, None, 3, 40, torch.bfloat16, 2, steps=7), recompute=True)


@on_emulator
@pytest.mark.parametrize(
    ("held", "kind", "hidden"), ((8, "lstm", 56), (4, "gru", 48), (2, "lstm", 72)), ids=("4", "2", "2-in-turns")
)
def test_clusters_by_what_fits(emulator: Any, held: int, kind: str, hidden: int, poisoned: None) -> None:
    """Fewer and larger blocks where the device does not hold more at once."""
    emulator.set_resident_blocks(held)
    check(floor_of("emulator"), layer(kind, RAGGED, 19, hidden, torch.bfloat16))


@on_emulator
def test_more_terms_than_registers_hold(emulator: Any, poisoned: None) -> None:
    """Forward from hidden size 257 on; backward with more than 128 rows of W_hh in a block."""
    check(floor_of("emulator"), layer("lstm", None, 2, 296, torch.float16, steps=3))
    emulator.set_resident_blocks(2)
    check(floor_of("emulator"), layer("gru", None, 2, 104, torch.bfloat16, steps=3))


@on_emulator
@pytest.mark.parametrize("order", (1, 7), ids=("reversed", "random"))
def test_any_order_of_threads(emulator: Any, order: int, poisoned: None) -> None:
    given = layer("lstm", RAGGED, 19, 40, torch.bfloat16, 2)
    first = run(floor_of("emulator"), given)
    emulator.set_order(order)
    second = run(floor_of("emulator"), given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@needs_clusters
@pytest.mark.parametrize("kind", ("lstm", "gru"))
def test_peepholes_projections_and_saved_tensors_anywhere(floor: Any, kind: str, poisoned: None) -> None:
    """What was saved may come back as a view at an odd address."""
    given = layer(kind, RAGGED, 19, 24, torch.bfloat16, projected=13 if kind == "lstm" else 0)
    check(floor, given)
    x, sizes, (w_ih, w_hh, *rest) = given.input, given.sizes, given.weights
    y, *states = getattr(floor, f"{kind}_forward")(x, *given.states, *given.weights, sizes, True)
    kept = states[len(given.states) :]

    def moved(t: Tensor) -> Tensor:
        return torch.cat((t.new_empty(1), t.flatten()))[1:].view(t.shape)

    more = rest[2:] if kind == "lstm" else []
    found = []
    for saved in ((y, *kept), tuple(map(moved, (y, *kept)))):
        mask = (True,) * (8 if kind == "lstm" else 5)
        backward = getattr(floor, f"{kind}_backward")
        found.append(backward(*given.cotangents, x, *given.states, w_ih, w_hh, *more, sizes, *saved, mask))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_clusters
def test_sizes(floor: Any) -> None:
    """H <= 512 for both cells, forward and backward."""
    module: Any = floor.lstm_forward.args[0].module
    where = torch.empty(1, device=DEVICE)
    for cell in (0, 1):
        for backward in (False, True):
            plans = [
                module.recurrent_plan(where.data_ptr(), cell, backward, hidden, 16, 1, 4, 1)
                for hidden in (8, 128, 512, 520)
            ]
            assert [p[0] for p in plans] == [4, 4, 4, 0]
            assert plans[2][1:3] == (8, 8)
