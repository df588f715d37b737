"""What is particular to row updates, bags of many tables and the interaction; invalid ids on every floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk
from pykernels import _errors
from pykernels.testing.spec import load

V, D = 12, 5
RULES = {"sgd": (), "adagrad": ((V, D),), "rowwise_adagrad": ((V,),), "adam": ((V, D), (V, D))}


def served(name: str) -> list[str]:
    """The backends beside the reference that the contract promises for a function, here."""
    found = {backend for spec in load("embedding") if spec.name == name for backend in spec.kernels}
    return [backend for backend in BACKENDS if backend in found]


def over_backends(name: str) -> Any:
    return pytest.mark.parametrize("backend", ["reference", *served(name)])


def update(rule: str, weight: Tensor, *args: Any, states: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
    """The update of `weight` itself; returns the states."""
    if states is None:
        states = [torch.full(shape, 0.5, device=weight.device) for shape in RULES[rule]]
    more = {"step": 1} if rule == "adam" else {}
    result = getattr(pk.functional, f"embedding_{rule}_")(weight, *states, *args, lr=0.1, **options, **more)
    assert result is weight
    return states


# ---- row updates


@pytest.mark.parametrize("rule", RULES)
def test_only_touched_rows_change(rule: str) -> None:
    """Ids of the padding and beyond the last offset are not touched, nor are their states, by weight decay either."""
    for backend in ("reference", *served(f"embedding_{rule}_")):
        weight = torch.randn(V, D, device=DEVICE)
        before, version = weight.clone(), weight._version
        ids, offsets = torch.tensor([3, 7, 3, 9, 1], device=DEVICE), torch.tensor([0, 2, 4], device=DEVICE)
        states = update(
            rule, weight, ids, torch.randn(2, D, device=DEVICE), mode="sum", offsets=offsets, weight_decay=0.5,
            include_last_offset=True, padding_idx=9, backend=backend,
        )  # fmt: skip
        changed = (weight != before).any(1).nonzero().flatten().tolist()
        assert changed == [3, 7], backend
        assert weight._version > version
        for state in states:
            moved = (state != 0.5).reshape(V, -1).any(1).nonzero().flatten().tolist()
            assert moved == [3, 7], backend


@pytest.mark.parametrize("rule", RULES)
def test_updates_equal_coalesce_then_step(rule: str) -> None:
    """Bit for bit: one pass over the positions is the coalesced gradient, then a step with each id once."""
    ids = (torch.rand(6000) ** 4 * V).long()
    dy = torch.randn(6000, D)
    gradient = torch.autograd.grad(
        pk.functional.embedding(ids, w := torch.randn(V, D).requires_grad_(), sparse=True), w, dy
    )[0]
    fused, stepped = w.detach().clone(), w.detach().clone()
    states = update(rule, fused, ids, dy)
    others = update(rule, stepped, gradient.indices()[0], gradient.values())
    for a, b in zip((fused, *states), (stepped, *others), strict=True):
        assert torch.equal(a, b)


def test_tables_with_strides_and_leaves() -> None:
    """Rows further apart than they are long; columns apart (served by the reference); a leaf that requires grad."""
    ids, dy = torch.tensor([1, 2, 1]), torch.randn(3, D)
    expected = torch.randn(V, D)
    wide, turned = torch.randn(V, D + 3), expected.t().contiguous().t()
    wide[:, :D] = expected
    beside = wide[:, D:].clone()
    leaf = torch.nn.Parameter(expected.clone())
    for weight in (wide[:, :D], turned, leaf):
        update("sgd", weight, ids, dy)
    update("sgd", expected, ids, dy)
    for weight in (wide[:, :D], turned, leaf):
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(wide[:, D:], beside)
    assert pk.explain(pk.functional.embedding_sgd_, turned, ids, dy, lr=0.1).backend == "reference"
    with pytest.raises(pk.BackendError, match="columns"):
        update("sgd", turned, ids, dy, backend="cpu")
    with pytest.raises(RuntimeError, match="'weight'"):
        update("sgd", torch.randn(1, D).expand(V, D), ids, dy)


def test_large_tables_by_address() -> None:
    """A row beyond 2^31 elements, in a table whose rows overlap in memory: an int offset would leave it."""
    rows = 2**30 + 1
    memory = torch.empty(rows + 2)  # 4 GiB of address space, of which a page at each end is touched
    memory[:3] = memory[-3:] = 0
    weight = memory.as_strided((rows, 3), (1, 1))
    last = torch.tensor([rows - 1])
    torch.ops.pykernels.embedding_update.cpu(
        weight, None, None, last, torch.ones(1, 3), None, None, None, "none", False, -1, False, "sgd", 1.0, 0.0, 0.0,
        0.0, 0.0, 1, None, 0,
    )  # fmt: skip
    assert torch.equal(memory[-3:], torch.full((3,), -1.0)) and not memory[:3].any()


def test_stochastic_rounding_is_replayable() -> None:
    ids, dy = torch.arange(V), torch.randn(V, D).bfloat16()
    start = torch.randn(V, D).bfloat16()

    def stepped(**options: Any) -> Tensor:
        weight = start.clone()
        pk.functional.embedding_sgd_(weight, ids, dy, lr=2e-3, stochastic_rounding=True, **options)
        return weight

    assert torch.equal(stepped(seed=3), stepped(seed=torch.tensor([3])))
    assert not torch.equal(stepped(seed=3), stepped(seed=4))
    for backend in served("embedding_sgd_"):
        assert torch.equal(stepped(seed=3, backend=backend), stepped(seed=3, backend="reference")), backend
    torch.manual_seed(0)
    first = stepped()
    assert not torch.equal(first, stepped())
    torch.manual_seed(0)
    assert torch.equal(first, stepped())
    special = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.3e38, 0.0]]).bfloat16()
    for backend in ("reference", *served("embedding_sgd_")):
        weight = special.clone()
        pk.functional.embedding_sgd_(
            weight, torch.tensor([0]), torch.zeros(1, D).bfloat16(), lr=1.0, stochastic_rounding=True, backend=backend
        )
        torch.testing.assert_close(weight, special, equal_nan=True, rtol=0, atol=0)


# ---- invalid ids and offsets


def calls(ids: Tensor, weight: Tensor, offsets: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """Every function that takes ids, by name; those that write get `weight` itself."""
    f, dy = pk.functional, torch.zeros(*ids.shape, D, device=weight.device)
    bags = dict(options, offsets=offsets) if offsets is not None else options
    pooled = torch.zeros(ids.shape[0] if offsets is None else offsets.shape[0], D, device=weight.device)
    found = {
        "embedding_bag": lambda: f.embedding_bag(ids, weight, mode="sum", **bags),
        "embedding_bag_multi": lambda: f.embedding_bag_multi(
            [ids, ids], None if offsets is None else [offsets, offsets], [weight, weight], **options
        ),
    }
    for rule in RULES:
        found[f"embedding_{rule}_"] = lambda r=rule: update(r, weight, ids, pooled, mode="max", **bags)
    if offsets is None:
        found["embedding"] = lambda: f.embedding(ids, weight, **options)
        found["embedding norm"] = lambda: f.embedding(ids, weight, max_norm=0.01, **options)
        found["embedding_sgd_ lookup"] = lambda: update("sgd", weight, ids, dy, **options)
    return found


@pytest.mark.parametrize("bad", (-1, V, -(2**31), 2**31 - 1))
@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64))
def test_bad_ids_are_named_and_nothing_is_written(bad: int, id_dtype: torch.dtype) -> None:
    weight = torch.randn(V, D)
    before = weight.clone()
    ids = torch.randint(0, V, (4, 3), dtype=id_dtype)
    ids[2, 1] = bad
    for check in ("error", "sync", "none"):  # native CPU code always looks
        for name, call in calls(ids, weight, bounds_check=check).items():
            with pytest.raises(IndexError, match=rf"\[2, 1\] is {bad}, which is not in \[0, {V}\)"):
                call()
            assert torch.equal(weight, before), name
    for name, call in calls(ids, weight, backend="reference").items():
        with pytest.raises(IndexError, match=rf"\[2, 1\] is {bad}"):
            call()
        assert torch.equal(weight, before), name


@pytest.mark.parametrize(
    ("offsets", "error", "text"),
    [
        ((1, 3), RuntimeError, r"offsets\[0\] must be 0, not 1"),
        ((0, 5, 4, 12), ValueError, r"offsets\[1\] is 5 and offsets\[2\] is 4"),
        ((0, 13), RuntimeError, r"the length 12 of the ids, but offsets\[-1\] is 13"),
    ],
)
def test_bad_offsets_are_named_and_nothing_is_written(offsets: tuple[int, ...], error: Any, text: str) -> None:
    weight = torch.randn(V, D)
    before = weight.clone()
    for backend in (None, "reference"):
        for name, call in calls(torch.randint(0, V, (12,)), weight, torch.tensor(offsets), backend=backend).items():
            with pytest.raises(error, match=text):
                call()
            assert torch.equal(weight, before), name


def test_bounds_check_is_one_of_three() -> None:
    for name, call in calls(torch.tensor([[1]]), torch.randn(V, D), bounds_check="maybe").items():
        with pytest.raises(ValueError, match="bounds_check"):
            call()
        assert name


def test_what_kernels_report_is_raised_once() -> None:
    """The host's side of the record, as a kernel would write it: raised by the next call or by check_errors()."""
    weight, ids = torch.randn(V, D), torch.tensor([1])
    record = _errors.record(torch.device("cpu"))
    assert record is _errors.record(torch.device("cpu")) and record.shape == (_errors.WORDS,)

    def report(argument: _errors.Argument, *words: int) -> None:
        record[: 2 + len(words)] = torch.tensor([_errors.WRITTEN, _errors._numbers[argument], *words])

    report(_errors.Argument("embedding", "input"), 7, V, V, 0)
    with pytest.raises(IndexError, match=rf"embedding\(\).*input\[7\].* is {V}, which is not in \[0, {V}\)"):
        pk.functional.embedding_bag(ids.view(1, 1), weight)
    pk.check_errors()
    report(_errors.Argument("embedding_bag_multi", "offsets", "offsets", many=True), 3, 99, 12, 2)
    with pytest.raises(ValueError, match=r"embedding_bag_multi\(\).*offsets\[2\]\[3\].* is 99; .* exceed 12"):
        pk.check_errors()
    report(_errors.Argument("embedding_sgd_", "indices"), 0, -1, V, 0)
    with pytest.raises(IndexError, match=r"embedding_sgd_\(\).*indices\[0\].* is -1"):
        pk.functional.embedding(ids, weight, bounds_check="sync")
    pk.functional.embedding(ids, weight, bounds_check="sync")


# ---- bags of many tables, interaction, modules


def test_collection_and_interaction_train_like_dlrm() -> None:
    """Forward and every gradient of collection and interaction against torch's modules and DLRM's own formula."""
    torch.manual_seed(0)
    bags = [torch.nn.EmbeddingBag(V, D, mode="sum") for _ in range(4)]
    ours = pk.nn.EmbeddingBagCollection.from_torch(bags)
    assert all(a is b.weight for a, b in zip(ours.weights, bags, strict=True))
    dense = torch.randn(6, D, requires_grad=True)
    ids = [torch.randint(0, V, (6, length)) for length in (1, 4, 2, 3)]
    found = pk.nn.DotInteraction()(dense, ours(ids))
    rows = torch.stack([dense, *(bag(i) for bag, i in zip(bags, ids, strict=True))], 1)
    i, j = torch.tril_indices(5, 5, -1)
    expected = torch.cat([dense, (rows @ rows.mT)[:, i, j]], 1)
    torch.testing.assert_close(found, expected)
    leaves = [dense, *ours.weights]
    dy = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.nn.DotInteraction(self_interaction=True)(dense, ours(ids)).dtype == torch.bfloat16
    again = pk.nn.EmbeddingBagCollection([V] * 4, D)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(ids), ours(ids)) and "(12, 5)" in repr(again)
    mixed = pk.nn.EmbeddingBagCollection([3, 4], [2, 6], "max", dtype=torch.float64)
    assert mixed([torch.zeros(2, 1).long()] * 2).shape == (2, 8)


def test_collection_takes_offsets_and_weights() -> None:
    tables = [torch.randn(V, size) for size in (3, 8)]
    ids = [torch.randint(0, V, (9,)), torch.randint(0, V, (5,), dtype=torch.int32)]
    offsets = [torch.tensor([0, 4, 9]), torch.tensor([0, 0, 3])]
    scale = [torch.randn(9), torch.randn(5)]
    module = pk.nn.EmbeddingBagCollection([V, V], [3, 8], include_last_offset=True)
    for parameter, table in zip(module.weights, tables, strict=True):
        parameter.data.copy_(table)
    expected = [
        F.embedding_bag(i.long(), t, o, mode="sum", per_sample_weights=s, include_last_offset=True)
        for i, t, o, s in zip(ids, tables, offsets, scale, strict=True)
    ]
    torch.testing.assert_close(module(ids, offsets, scale), torch.cat(expected, 1))


IDS, TABLE, DY = torch.tensor([[1, 2]]), torch.randn(V, D), torch.randn(1, 2, D)
SGD = ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 0.1})


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "text"),
    [
        ("embedding_sgd_", (TABLE, [1], DY), {"lr": 0.1}, TypeError, "'indices'"),
        ("embedding_sgd_", (TABLE, IDS.float(), DY), {"lr": 0.1}, RuntimeError, "'indices'"),
        ("embedding_sgd_", (TABLE[0], IDS, DY), {"lr": 0.1}, ValueError, "'weight'"),
        ("embedding_sgd_", (TABLE.long(), IDS, DY), {"lr": 0.1}, NotImplementedError, "'weight'"),
        ("embedding_sgd_", (TABLE, IDS, DY[0]), {"lr": 0.1}, ValueError, "'grad_output'"),
        ("embedding_sgd_", (TABLE, IDS, DY.double()), {"lr": 0.1}, RuntimeError, "'grad_output'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": -0.1}, ValueError, "'lr'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": "0.1"}, TypeError, "'lr'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "offsets": IDS[0]}, ValueError, "'offsets'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "per_sample_weights": DY}, ValueError, "'per_sample_weights'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "mode": "min"}, ValueError, "'mode'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "stochastic_rounding": True}, ValueError, "stochastic"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "seed": 3}, ValueError, "'seed'"),
        ("embedding_sgd_", (TABLE, IDS, DY), {"lr": 1.0, "padding_idx": V}, RuntimeError, "'padding_idx'"),
        ("embedding_sgd_", (TABLE, IDS.to("meta"), DY), {"lr": 1.0}, RuntimeError, "'indices' is on meta"),
        ("embedding_adagrad_", (TABLE, TABLE[0], IDS, DY), {"lr": 1.0}, ValueError, "'state_sum'"),
        ("embedding_adagrad_", (TABLE, TABLE.double(), IDS, DY), {"lr": 1.0}, ValueError, "'state_sum'"),
        ("embedding_adagrad_", (TABLE, torch.ones(D, V).t(), IDS, DY), {"lr": 1.0}, ValueError, "contiguous"),
        ("embedding_rowwise_adagrad_", (TABLE, TABLE, IDS, DY), {"lr": 1.0}, ValueError, "'state_sum'"),
        ("embedding_adam_", (TABLE, TABLE, TABLE, IDS, DY), {"lr": 1.0, "step": 0}, ValueError, "'step'"),
        (
            "embedding_adam_",
            (TABLE, TABLE, TABLE, IDS, DY),
            {"lr": 1.0, "step": 1, "betas": (1, 0)},
            ValueError,
            "betas",
        ),
        ("embedding_bag_multi", ([], None, []), {}, ValueError, "'weights'"),
        ("embedding_bag_multi", ([IDS], None, [TABLE, TABLE]), {}, ValueError, "'indices'"),
        ("embedding_bag_multi", (IDS, None, [TABLE, TABLE]), {}, ValueError, r"'indices'.*ids\.split\(1, dim=1\)"),
        ("embedding_bag_multi", ([IDS, IDS.t()], None, [TABLE, TABLE]), {}, ValueError, "table 1 has 2 bags"),
        ("embedding_bag_multi", ([IDS, IDS], None, [TABLE, TABLE.double()]), {}, RuntimeError, "'weights'"),
        ("embedding_bag_multi", ([IDS], None, [TABLE.to("meta")]), {}, RuntimeError, "meta"),
        ("embedding_bag_multi", ([IDS[0]], None, [TABLE]), {}, ValueError, "'offsets'"),
        ("dot_interaction", (TABLE, TABLE), {}, ValueError, "'sparse'"),
        ("dot_interaction", (TABLE[0], TABLE.unsqueeze(1)), {}, ValueError, "'dense'"),
        ("dot_interaction", (TABLE, TABLE.unsqueeze(1).double()), {}, RuntimeError, "'sparse'"),
        ("dot_interaction", (TABLE, TABLE[1:].unsqueeze(1)), {}, ValueError, "'sparse'"),
        ("dot_interaction", (TABLE.long(), TABLE.unsqueeze(1)), {}, NotImplementedError, "'dense'"),
    ],
)
def test_errors(name: str, arguments: tuple[Any, ...], options: dict[str, Any], error: Any, text: str) -> None:
    before = TABLE.clone()
    with pytest.raises(error, match=text):
        getattr(pk.functional, name)(*arguments, **options)
    assert torch.equal(TABLE, before)
