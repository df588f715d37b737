"""torch's own engines over two gloo processes give what one process gives, with our kernels inside.

One pair of processes runs everything: starting them costs more than the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import pykernels as pk

WORLD, VOCABULARY, E, HEAD, LENGTH, BATCH = 2, 22, 16, 4, 12, 4


class Block(nn.Module):
    """Grouped heads: four of queries on two of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(E), nn.LayerNorm(E)
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, E // 2), nn.Linear(E, E // 2)
        self.o, self.up, self.down = nn.Linear(E, E), nn.Linear(E, 3 * E), nn.Linear(3 * E, E)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (part(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = pk.functional.attention(q, k, v, causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        return x + self.down(self.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, E)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make() -> Decoder:
    torch.manual_seed(1)
    model = Decoder()
    assert len(pk.patch(model).patched) == 3  # the table and both activations
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    def whole(x: Any) -> Tensor:
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    return {name.removeprefix("module."): whole(p.grad).clone() for name, p in model.named_parameters()}


def alone() -> dict[str, Tensor]:
    model, (ids, labels) = make(), batch()
    loss = cross_entropy(model(ids), labels)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def mean_of_losses(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / WORLD


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (WORLD,))


def ddp(rank: int) -> dict[str, Tensor]:
    model, (ids, labels) = nn.parallel.DistributedDataParallel(make()), batch()
    loss = cross_entropy(model(ids[rank::WORLD]), labels[rank::WORLD])
    loss.backward()
    return {"loss": mean_of_losses(loss), **gradients(model)}


def fsdp(rank: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model, (ids, labels) = make(), batch()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh())
    loss = cross_entropy(model(ids[rank::WORLD]), labels[rank::WORLD])
    loss.backward()
    return {"loss": mean_of_losses(loss), **gradients(model)}


def tensor_parallel(rank: int) -> dict[str, Tensor]:
    """Heads and feed-forward by columns and rows, table and loss by vocabulary."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model, (ids, labels) = make(), batch()
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {"table": RowwiseParallel(input_layouts=Replicate(), use_local_output=True)}
    for i in range(len(model.blocks)):
        plan |= {f"blocks.{i}.{name}": columns for name in ("q", "k", "v", "up")}
        plan |= {f"blocks.{i}.{name}": rows for name in ("o", "down")}
    plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh(), plan)
    with loss_parallel():
        loss = cross_entropy(model(ids), labels)
        loss.backward()
    return {"loss": loss.full_tensor().detach(), **gradients(model)}


def dtensors(rank: int) -> dict[str, Tensor]:
    """Attention and linear cross entropy on DTensors: heads sharded, batch sharded, vocabulary sharded."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = {}
    for placement in (Shard(0), Shard(1), Replicate()):
        leaves = [distribute_tensor(x, mesh(), [placement]).requires_grad_() for x in parts()]
        extras = [distribute_tensor(x, mesh(), [Replicate()]) for x in additions()]
        out = attend(*leaves, *(x.requires_grad_() for x in extras[:2]), extras[2])
        assert out.placements == (placement,), (out.placements, placement)
        (out * out).sum().backward()
        for name, x in zip(NAMES, (out, *(leaf.grad for leaf in (*leaves, *extras[:2]))), strict=True):
            found[f"{placement} {name}"] = x.full_tensor().detach()
    hidden, weight, labels = vocabulary()
    weight_shards = distribute_tensor(weight, mesh(), [Shard(0)]).requires_grad_()
    rows = distribute_tensor(hidden, mesh(), [Replicate()]).requires_grad_()
    with torch.distributed.tensor.experimental.implicit_replication():
        loss = pk.functional.linear_cross_entropy(rows, weight_shards, labels)
        loss.backward()
    found |= {"loss": loss.full_tensor().detach(), "weight": weight_shards.grad.full_tensor()}
    return found | {"hidden": rows.grad.full_tensor()}


def parts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, heads, 2 * LENGTH, HEAD, generator=generator) for heads in (4, 2, 2)]


NAMES = ("out", "query", "key", "value", "bias", "sinks")


def additions() -> list[Tensor]:
    """A bias that sequences share, sinks, and padding."""
    generator = torch.Generator().manual_seed(5)
    bias, sinks = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2 * LENGTH, 1), (4,)))
    return [
        bias.expand(1, 4, 2 * LENGTH, 2 * LENGTH).contiguous(),
        sinks,
        torch.rand(2, 2 * LENGTH, generator=generator) < 0.8,
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, padding: Tensor) -> Tensor:
    options = {"bias": bias, "sinks": sinks, "key_padding_mask": padding}
    return pk.functional.attention(q, k, v, causal=True, softcap=3.0, **options)


def vocabulary() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(0, VOCABULARY, (9,), generator=generator)
    return torch.randn(9, E, generator=generator), torch.randn(VOCABULARY, E, generator=generator), labels


def dtensors_alone() -> dict[str, Tensor]:
    from torch.distributed.tensor import Replicate, Shard

    bias, sinks, padding = additions()
    leaves = [x.requires_grad_() for x in (*parts(), bias, sinks)]
    out = attend(*leaves, padding)
    (out * out).sum().backward()
    each = dict(zip(NAMES, (out.detach(), *(x.grad for x in leaves)), strict=True))
    found = {f"{placement} {name}": x for placement in (Shard(0), Shard(1), Replicate()) for name, x in each.items()}
    hidden, weight, labels = vocabulary()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = pk.functional.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    return found | {"loss": loss.detach(), "weight": weight.grad, "hidden": hidden.grad}


def pipeline(rank: int) -> dict[str, Tensor]:
    """A stage each, two microbatches, one forward one backward."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model, (ids, labels) = make(), batch()
    stages = [nn.Sequential(model.table, model.blocks[0]), nn.Sequential(model.blocks[1], model.head)]
    mine = stages[rank]
    schedule = Schedule1F1B(PipelineStage(mine, rank, WORLD, torch.device("cpu")), 2, loss_fn=cross_entropy)
    losses: list[Tensor] = []
    schedule.step(*([ids] if rank == 0 else []), **({"target": labels, "losses": losses} if rank else {}))
    names = {id(p): name for name, p in model.named_parameters()}
    grads = {names[id(p)]: p.grad for p in mine.parameters()}
    return {**grads, **({"loss": torch.stack(losses).mean().detach()} if rank else {})}


def ring(rank: int) -> dict[str, Tensor]:
    """Each process holds half of the sequence."""
    found = {}
    for causal in (False, True):
        leaves = [x.chunk(WORLD, 2)[rank].clone().requires_grad_() for x in parts()]
        out = pk.integrations.distributed.ring_attention(*leaves, causal=causal, softcap=3.0)
        (out * out).sum().backward()
        for name, x in (("out", out.detach()), *zip("qkv", (leaf.grad for leaf in leaves), strict=True)):
            found[f"{causal} {name}"] = x
    return found


def ring_alone() -> dict[str, Tensor]:
    found = {}
    for causal in (False, True):
        leaves = [x.requires_grad_() for x in parts()]
        out = pk.functional.attention(*leaves, causal=causal, softcap=3.0)
        (out * out).sum().backward()
        each = (out.detach(), *(x.grad for x in leaves))
        found |= {f"{causal} {name}": x for name, x in zip(("out", *"qkv"), each, strict=True)}
    return found


CASES: dict[str, tuple[Callable[[int], dict[str, Tensor]], Callable[[], dict[str, Tensor]]]] = {
    "ddp": (ddp, alone),
    "fsdp": (fsdp, alone),
    "tensor parallel": (tensor_parallel, alone),
    "dtensors": (dtensors, dtensors_alone),
    "pipeline": (pipeline, alone),
    "ring": (ring, ring_alone),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, (function, _) in CASES.items():
        try:
            found: Any = function(rank)
        except Exception as error:
            import traceback

            found = "".join(traceback.format_exception(error))[-3000:]
        torch.save(found, f"{folder}/{name}.{rank}.pt")
        if isinstance(found, str):
            break  # the processes are out of step now
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(work, (str(folder),), nprocs=WORLD)

    def read(name: str) -> list[dict[str, Tensor]]:
        given = [
            torch.load(folder / f"{name}.{rank}.pt") for rank in range(WORLD) if (folder / f"{name}.{rank}.pt").exists()
        ]
        assert len(given) == WORLD, "an earlier case failed"
        assert not any(isinstance(x, str) for x in given), given
        return given

    return read


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes over gloo")
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_as_one(found: Callable[[str], list[dict[str, Tensor]]], name: str) -> None:
    results, expected = found(name), CASES[name][1]()
    if name == "ring":
        results = [{key: torch.cat([part[key] for part in results], 2) for key in results[0]}]
    if name == "pipeline":
        results = [results[0] | results[1]]
    for result in results:
        assert result.keys() == expected.keys()
        for key, x in result.items():
            torch.testing.assert_close(x, expected[key], msg=lambda text, k=key: f"{name}, {k}: {text}")
