"""pykernels.optim: steps equal those of torch's optimizer on the whole gradient, without one; and its manners."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykernels as pk
from pykernels.testing.memory import peak_bytes

V, D = 40, 6
embedding, embedding_bag = pk.functional.embedding, pk.functional.embedding_bag
ALL_ROWS = torch.arange(V)  # every row is touched: a dense optimizer's step on all of them is the same

PAIRS: list[tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = [
    (pk.optim.SGD, torch.optim.SGD, {"lr": 0.03, "weight_decay": 0.1}),
    (pk.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3}),
    (pk.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.3, "initial_accumulator_value": 0.5}),
    (pk.optim.Adam, torch.optim.Adam, {"lr": 0.3, "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-3}),
]
IDS = [type(o).__name__ if not isinstance(o, type) else o.__name__ for o, _, _ in PAIRS]


def lookups(functional: Any, weight: Tensor, step: int) -> list[Tensor]:
    """A lookup, two kinds of bags with padding and weights, each id at least once; the ids change with the step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.cat([ALL_ROWS, torch.randint(0, V, (24,), generator=generator)])
    scale = torch.rand(64, generator=generator, dtype=weight.dtype)
    offsets = torch.tensor([0, 3, 3, 20])
    return [
        functional.embedding(ids.view(8, 8), weight),
        functional.embedding_bag(ids, weight, offsets, mode="sum", per_sample_weights=scale),
        functional.embedding_bag(ids.view(16, 4), weight, mode="mean", padding_idx=3),
        functional.embedding_bag(ids, weight, offsets, mode="max"),
    ]


def loss_of(outputs: list[Tensor]) -> Tensor:
    return sum((torch.sin(y * 3) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS, ids=IDS)
@pytest.mark.parametrize("lookup", (0, 1, 2, None))
def test_steps_equal_torch(ours: Any, theirs: Any, options: dict[str, Any], lookup: int | None) -> None:
    """One lookup of each kind; and all of them at once with two backward passes a step. Float64, ten steps."""
    start = torch.randn(V, D, dtype=torch.float64)
    tables = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [ours([tables[0]], **options), theirs([tables[1]], **options)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    for step in range(10):
        for table, optimizer, scheduler, functional in zip(
            tables, optimizers, schedulers, (pk.functional, F), strict=True
        ):
            for repeat in range(2 if lookup is None else 1):
                outputs = lookups(functional, table, step + 100 * repeat)
                loss_of(outputs if lookup is None else [outputs[lookup]]).backward()
            if optimizer is optimizers[0]:
                assert table.grad is None
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    if lookup == 2:  # the row of the padding is not touched: no weight decay there
        rows = ALL_ROWS != 3
        assert torch.equal(tables[0][3], start[3])
    else:
        rows = slice(None)
    torch.testing.assert_close(tables[0][rows], tables[1][rows], rtol=1e-9, atol=1e-9)


def test_rowwise_adagrad_by_its_definition() -> None:
    weight = torch.nn.Parameter(torch.randn(V, D, dtype=torch.float64))
    expected, state = weight.detach().clone(), torch.full((V,), 0.25, dtype=torch.float64)
    optimizer = pk.optim.RowWiseAdagrad([weight], lr=0.2, weight_decay=0.05, eps=1e-4, initial_accumulator_value=0.25)
    for step in range(4):
        ids = torch.randint(0, V, (30,), generator=torch.Generator().manual_seed(step))
        dy = torch.randn(30, D, dtype=torch.float64)
        embedding(ids, weight).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        g = torch.zeros(V, D, dtype=torch.float64).index_add_(0, ids, dy)
        touched = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
        g = g + 0.05 * expected
        state = torch.where(touched, state + g.square().mean(1), state)
        step_size = 0.2 * g / (state.sqrt() + 1e-4).unsqueeze(1)
        expected = torch.where(touched.unsqueeze(1), expected - step_size, expected)
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(optimizer.state[weight]["sum"], state)


@pytest.mark.parametrize("make", (pk.optim.SGD, pk.optim.Adagrad, pk.optim.RowWiseAdagrad, pk.optim.Adam))
def test_rows_that_were_not_looked_up_stay(make: Callable[..., Any]) -> None:
    weight = torch.nn.Parameter(torch.randn(V, D))
    before = weight.detach().clone()
    optimizer = make([weight], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        embedding(torch.tensor([3, 7, 3]), weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    rest = [i for i in range(V) if i not in (3, 7)]
    assert torch.equal(weight[rest], before[rest])
    assert not torch.equal(weight[3], before[3])
    for name, state in optimizer.state[weight].items():
        if name != "step":
            assert not state[rest].any() and state[[3, 7]].all()
    version = weight._version
    optimizer.step()  # nothing was looked up since
    assert weight._version == version


def test_steps_keep_until_zero_grad() -> None:
    """As with .grad: a second step takes the same gradient again, zero_grad forgets it."""
    weight = torch.nn.Parameter(torch.zeros(V, D))
    optimizer = pk.optim.SGD([weight], lr=1.0)
    embedding(torch.tensor([1, 1]), weight).sum().backward()
    optimizer.step()
    optimizer.step()
    assert torch.equal(weight[1], torch.full((D,), -4.0))
    embedding(torch.tensor([2]), weight).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert not weight[2].any()


def test_gradients_that_arrive_in_grad_are_stepped_too() -> None:
    """A dense one (tied weights), a sparse one (a lookup before the optimizer was made), and one with create_graph."""
    start = torch.randn(V, D)
    tables = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    early = [
        embedding(torch.tensor([5, 6, 5]), tables[0], sparse=True),
        F.embedding(torch.tensor([5, 6, 5]), tables[1]),
    ]
    optimizers = [pk.optim.Adagrad([tables[0]], lr=0.1), torch.optim.Adagrad([tables[1]], lr=0.1)]
    for i, function in enumerate((embedding, F.embedding)):
        early[i].square().sum().backward()
        assert tables[i].grad is not None and tables[i].grad.is_sparse == (i == 0)
        function(torch.tensor([1, 2, 5]), tables[i]).exp().sum().backward()
        optimizers[i].step()
        optimizers[i].zero_grad()
        (function(torch.tensor([1, 2]), tables[i]) @ tables[i].t()).square().sum().backward()
        function(torch.tensor([4]), tables[i]).pow(3).sum().backward(create_graph=True)
        optimizers[i].step()
        optimizers[i].zero_grad()
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


def test_modules_train_alike() -> None:
    """Embedding, EmbeddingBag and bags of many tables, one of them twice, beside an ordinary optimizer."""
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        kit = pk.nn if ours else torch.nn
        word, bag, other = (
            kit.Embedding(V, D),
            kit.EmbeddingBag(V, D, mode="sum"),
            torch.nn.Parameter(torch.randn(V, 3)),
        )
        head = torch.nn.Linear(2 * D + 9, 1)
        tables = [word.weight, bag.weight, other]
        sparse = pk.optim.Adam(tables, lr=0.01) if ours else torch.optim.SparseAdam(tables, lr=0.01, eps=1e-12)
        if ours:
            sparse.param_groups[0]["eps"] = 1e-12  # SparseAdam adds eps elsewhere; where it does not matter they agree
        dense = torch.optim.SGD(head.parameters(), lr=0.1)
        for step in range(5):
            ids = torch.randint(0, V, (3, 8, 4), generator=torch.Generator().manual_seed(step))
            if ours:
                many = pk.functional.embedding_bag_multi(list(ids), None, [other] * 3)
            else:
                many = torch.cat([F.embedding_bag(i, other, mode="sum", sparse=True) for i in ids], 1)
                word.sparse = bag.sparse = True
            x = torch.cat([word(ids[0, :, 0]), bag(ids[1]), many], 1)
            F.softplus(head(x)).mean().backward()
            for optimizer in (sparse, dense):
                optimizer.step()
                optimizer.zero_grad()
        results.append([*tables, *head.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_tables_size_is_allocated() -> None:
    """Backward and step of 2,048 ids in a table of 256 MB: no row of a gradient."""
    weight = torch.nn.Parameter(torch.zeros(1_000_000, 64))
    ids = torch.randint(0, 1_000_000, (2048,))
    offsets = torch.arange(0, 2048, 16)
    for make in (pk.optim.SGD, pk.optim.RowWiseAdagrad):
        optimizer = make([weight], lr=0.1)
        embedding(ids, weight).sum().backward()
        optimizer.step()  # states are made at the first one
        optimizer.zero_grad()
        for out in (embedding(ids, weight), embedding_bag(ids, weight, offsets, mode="mean")):
            dy = torch.ones_like(out)
            # The rows of a gradient would have 512 KiB; one float and one place for each id is what bags need.
            assert peak_bytes(lambda o=out, d=dy: o.backward(d)) < 1024
            assert peak_bytes(optimizer.step) <= 8 * 2048 + 1024
            optimizer.zero_grad()
        del optimizer


def test_half_tables_round_once_and_keep_float32_states() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.nn.Parameter(torch.randn(V, D).to(dtype))
        expected = weight.detach().float()
        optimizer = pk.optim.Adam([weight], lr=0.1)
        dy = torch.randn(3, D).to(dtype)
        embedding(torch.tensor([1, 2, 1]), weight).backward(dy)
        optimizer.step()
        g = torch.zeros(V, D).index_add_(0, torch.tensor([1, 2, 1]), dy.float())
        expected[1:3] -= 0.1 * (g / (g.abs() + 1e-8))[1:3]
        torch.testing.assert_close(weight.detach(), expected.to(dtype))
        assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
        other = pk.optim.Adam([torch.nn.Parameter(weight.detach().clone())])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        (state,) = other.state.values()
        assert torch.equal(state["exp_avg_sq"], optimizer.state[weight]["exp_avg_sq"])
        assert state["exp_avg_sq"].dtype == torch.float32
        del optimizer


def test_stochastic_rounding_keeps_small_steps() -> None:
    """1,000 steps of a thousandth of a unit in the last place: lost when rounded to nearest, right in the mean here."""
    means = []
    for stochastic in (False, True):
        weight = torch.nn.Parameter(torch.ones(V, 64, dtype=torch.bfloat16))
        optimizer = pk.optim.SGD([weight], lr=2**-17, stochastic_rounding=stochastic)
        for _ in range(1000):
            embedding(ALL_ROWS, weight).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        means.append(float(weight.detach().float().mean()))
    assert means[0] == 1.0
    assert abs(means[1] - (1 - 1000 * 2**-17)) < 3e-4, means  # sigma is below 1e-4


def test_states_save_and_load_and_torchs_load_too() -> None:
    weight = torch.nn.Parameter(torch.randn(V, D))
    optimizer = pk.optim.Adagrad([weight], lr=0.1)
    theirs = torch.optim.Adagrad([torch.nn.Parameter(weight.detach().clone())], lr=0.1)
    table = theirs.param_groups[0]["params"][0]

    def train(o: Any, w: Tensor, function: Any, steps: range) -> None:
        for step in steps:
            ids = torch.cat([ALL_ROWS, torch.tensor([step, step])])
            function(ids, w).square().sum().backward()
            o.step()
            o.zero_grad()

    train(optimizer, weight, embedding, range(3))
    train(theirs, table, F.embedding, range(3))
    again = torch.nn.Parameter(weight.detach().clone())
    loaded = pk.optim.Adagrad([again], lr=99.0)
    loaded.load_state_dict(pickle.loads(pickle.dumps(theirs.state_dict())))
    assert loaded.param_groups[0]["lr"] == 0.1
    train(optimizer, weight, embedding, range(3, 6))
    train(loaded, again, embedding, range(3, 6))
    torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-6)
    copied = copy.deepcopy(loaded)
    clone = copied.param_groups[0]["params"][0]
    assert clone is not again
    train(copied, clone, embedding, range(6, 8))
    train(loaded, again, embedding, range(6, 8))
    assert torch.equal(clone, again)


def test_in_place_writes_before_the_step_are_seen() -> None:
    weight = torch.nn.Parameter(torch.randn(V, D))
    optimizer = pk.optim.SGD([weight], lr=0.1)
    ids = torch.tensor([1, 2])
    embedding(ids, weight).sum().backward()
    before = weight.detach().clone()
    ids += 1
    with pytest.raises(RuntimeError, match="in-place"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_gradient_scaling() -> None:
    tables = [torch.nn.Parameter(torch.randn(V, D)) for _ in range(2)]
    tables[1].data.copy_(tables[0])
    heads = [torch.nn.Linear(D, 1) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers = [pk.optim.SGD([tables[0]], lr=0.1), torch.optim.SGD([tables[1]], lr=0.1)]
    dense = [torch.optim.SGD(head.parameters(), lr=0.1) for head in heads]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for factor in (1.0, float("inf"), 1.0):
        for i, function in enumerate((embedding, F.embedding)):
            loss = heads[i](function(torch.tensor([1, 2, 1]), tables[i])).square().sum() * factor
            scalers[i].scale(loss).backward()
            before = tables[i].detach().clone()
            for optimizer in (optimizers[i], dense[i]):
                scalers[i].step(optimizer)
            scalers[i].update()
            assert torch.equal(tables[i], before) == (factor != 1.0)
            optimizers[i].zero_grad(), dense[i].zero_grad()
    torch.testing.assert_close(*tables)
    assert scalers[0].get_scale() == 512.0
    scalers[0].scale(heads[0](embedding(torch.tensor([1]), tables[0])).sum()).backward()
    scalers[0].unscale_(optimizers[0])
    with pytest.raises(RuntimeError, match="unscale_"):
        scalers[0].step(optimizers[0])


def test_compiled_lookups_leave_the_graph() -> None:
    weight = torch.nn.Parameter(torch.zeros(V, D))
    optimizer = pk.optim.SGD([weight], lr=1.0)

    def model(ids: Tensor) -> Tensor:
        return (embedding(ids, weight) * 2 + embedding_bag(ids.view(-1, 1), weight, mode="sum")).sum()

    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(torch.tensor([1, 1])).backward()
    assert weight.grad is None
    optimizer.step()
    assert torch.equal(weight[1], torch.full((D,), -6.0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.tensor([1, 1]))


def test_compiled_lookups_of_other_tables_stay_in_the_graph() -> None:
    """What an optimizer holds is nothing to the rest of the process; graphs made before or after are compiled anew."""
    held, other = (torch.nn.Parameter(torch.ones(V, D)) for _ in range(2))

    def model(ids: Tensor, table: Tensor) -> Tensor:
        return embedding(ids, table).sum() + embedding_bag(ids.view(-1, 1), table, mode="sum").sum()

    torch._dynamo.reset()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole(torch.tensor([1, 1]), held).backward()
    assert held.grad is not None and held.grad[1, 0] == 4
    optimizer = pk.optim.SGD([held], lr=1.0)
    whole(torch.tensor([2]), other).backward()
    assert other.grad is not None and other.grad[2, 0] == 2
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(torch.tensor([1, 1]), held)
    del optimizer
    gc.collect()
    held.grad = None
    whole(torch.tensor([1]), held).backward()
    assert held.grad is not None and held.grad[1, 0] == 2


def test_one_optimizer_a_table_and_its_end() -> None:
    weight = torch.nn.Parameter(torch.randn(V, D))
    optimizer = pk.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="another"):
        pk.optim.Adam([weight])
    del optimizer
    embedding(torch.tensor([1]), weight).sum().backward()  # nobody is left to step it: an ordinary gradient
    assert weight.grad is not None
    pk.optim.Adam([weight])


@pytest.mark.parametrize(
    ("parameter", "options", "text"),
    [
        (torch.zeros(3), {}, "2-D"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 2), {"lr": -1.0}, "lr"),
        (torch.zeros(3, 2), {"weight_decay": -1.0}, "weight_decay"),
        (torch.zeros(3, 2), {"stochastic_rounding": True}, "bfloat16"),
    ],
)
def test_errors(parameter: Tensor, options: dict[str, Any], text: str) -> None:
    for make in (pk.optim.SGD, pk.optim.Adagrad, pk.optim.RowWiseAdagrad, pk.optim.Adam):
        with pytest.raises(ValueError, match=text):
            make([torch.nn.Parameter(parameter, requires_grad=False)], **options)
    with pytest.raises(ValueError, match="betas"):
        pk.optim.Adam([torch.nn.Parameter(torch.zeros(2, 2))], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps"):
        pk.optim.Adam([torch.nn.Parameter(torch.zeros(2, 2))], eps=-1.0)
