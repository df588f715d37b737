"""A patched GPT over characters, sharded by FSDP2 over the processes of torchrun, each with its share of a batch.

    torchrun --nproc-per-node 2 examples/torchrun_gpt.py

The losses are those of `python examples/torchrun_gpt.py`, one process with the whole batch.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import pykernels as pk
from _common import functions, windows
from pykernels.testing.models.gpt import GPT
from pykernels.testing.text import Text, default_text

BATCH, LENGTH = 8, 64


def prose() -> Text:
    """Enough for a few steps; every process reads it."""
    whole = default_text()
    return Text(whole.source, whole.content[:100_000])


def train(text: Text, steps: int) -> list[float]:
    """The losses of the steps, of the whole batch."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else 0)
    device = device if torch.cuda.is_available() else torch.device("cpu")
    characters = text.characters()
    torch.manual_seed(0)
    model = GPT(functions("pykernels"), len(characters.vocabulary), 64, 4, 2, LENGTH).to(device)
    pk.patch(model)
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for tokens, targets in windows(characters.ids, BATCH, LENGTH)(steps):
        loss = model(tokens[rank::world].to(device), targets[rank::world].to(device)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if world > 1:
            dist.all_reduce(whole)
        losses.append(whole.item() / world)
    return losses


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = train(prose(), int(os.environ.get("STEPS", 10)))
    if os.environ.get("RANK", "0") == "0":
        print(" ".join(f"{loss:.4f}" for loss in found))
    if dist.is_initialized():
        dist.destroy_process_group()
