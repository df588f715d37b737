"""Tables split over two gloo processes, by table and by row, train as in one process (see docs/embedding.md)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.nn.functional import all_reduce, all_to_all_single

import pykernels as pk

WORLD, TABLES, ROWS, D, BATCH, LENGTH, STEPS = 2, 4, 13, 6, 8, 3, 3
OPTIMIZERS = {"rowwise": pk.optim.RowWiseAdagrad, "adam": pk.optim.Adam}


def start() -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(7)
    tables = [torch.randn(ROWS, D, generator=generator) for _ in range(TABLES)]
    return tables, torch.randn(TABLES * D, generator=generator)


def batch(step: int) -> list[Tensor]:
    """The ids of the whole batch, table by table."""
    generator = torch.Generator().manual_seed(step)
    return list(torch.randint(0, ROWS, (TABLES, BATCH, LENGTH), generator=generator))


def loss(bags: Tensor, head: Tensor) -> Tensor:
    return torch.tanh(bags * head).sum()  # a sum over samples, so that the parts of a batch add up


def one_process(name: str) -> list[Tensor]:
    tables, head = start()
    weights = [torch.nn.Parameter(table) for table in tables]
    optimizer = OPTIMIZERS[name](weights, lr=0.1)
    for step in range(STEPS):
        loss(pk.functional.embedding_bag_multi(batch(step), None, weights), head).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in weights]


def table_wise(rank: int, name: str) -> list[Tensor]:
    """Each process owns whole tables. Ids go to the owners, pooled rows come back, and gradients the other way."""
    tables, head = start()
    owned = TABLES // WORLD
    weights = [torch.nn.Parameter(table) for table in tables[rank * owned : (rank + 1) * owned]]
    optimizer = OPTIMIZERS[name](weights, lr=0.1)
    share = BATCH // WORLD
    for step in range(STEPS):
        mine = torch.stack(batch(step))[:, rank * share : (rank + 1) * share].contiguous()  # my samples, all tables
        asked = torch.empty(WORLD, owned, share, LENGTH, dtype=torch.int64)  # all samples, my tables
        dist.all_to_all_single(asked, mine)
        ids = list(asked.transpose(0, 1).reshape(owned, BATCH, LENGTH))
        bags = pk.functional.embedding_bag_multi(ids, None, weights)  # (BATCH, owned * D)
        # Owner by owner, which are the columns in order: (WORLD, share, owned * D) -> (share, TABLES * D).
        back = all_to_all_single(torch.empty(BATCH, owned * D), bags).view(WORLD, share, owned * D)
        loss(back.transpose(0, 1).reshape(share, TABLES * D), head).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in weights]


def row_wise(rank: int, name: str) -> list[Tensor]:
    """Each process owns a range of rows of every table and one row of padding, which stands for ids of the others."""
    tables, head = start()
    low, high = rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD
    padding = high - low
    weights = [torch.nn.Parameter(torch.cat([table[low:high], torch.zeros(1, D)])) for table in tables]
    optimizer = OPTIMIZERS[name](weights, lr=0.1)
    share = BATCH // WORLD
    for step in range(STEPS):
        bags = []
        for ids, weight in zip(batch(step), weights, strict=True):  # the whole batch's ids (from an all_gather)
            local = torch.where((ids >= low) & (ids < high), ids - low, padding)
            bags.append(pk.functional.embedding_bag(local, weight, mode="sum", padding_idx=padding))
        pooled = all_reduce(torch.cat(bags, 1))  # sums of the parts
        loss(pooled[rank * share : (rank + 1) * share], head).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach() for weight in weights]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {(f.__name__, name): f(rank, name) for f in (table_wise, row_wise) for name in OPTIMIZERS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes over gloo")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    before = start()[0]
    for name in OPTIMIZERS:
        expected = one_process(name)
        assert not torch.equal(expected[0], before[0])
        by_table = [table for part in found for table in part["table_wise", name]]
        by_row = [torch.cat([part["row_wise", name][table][:-1] for part in found]) for table in range(TABLES)]
        for kind, tables in (("table", by_table), ("row", by_row)):
            for a, b in zip(tables, expected, strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, k=kind, n=name: f"{n}, split by {k}: {text}")
        for part in found:
            assert all(not weight[-1].any() for weight in part["row_wise", name]), "the row of padding was stepped"
