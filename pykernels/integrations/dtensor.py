"""Sharding rules, so that DTensor can run our operators on shards.

An elementwise operator may be sharded along any dimension, all its tensors alike, or be replicated. Registered on the
first DTensor that reaches a pykernels function: importing torch.distributed.tensor costs half a second.
"""

from __future__ import annotations

from typing import Any

import torch

_done = False


def register() -> None:
    """Registers the rules of every operator, once."""
    global _done
    if _done:
        return
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    from .._backends import BACKENDS
    from ..ops._library import DEFINED

    def rule(tensors: int, outputs: int) -> Any:
        def sharding(first: Any, *rest: Any) -> Any:
            placements = [*(Shard(dim) for dim in range(first.ndim)), Replicate()]
            options = [None] * (1 + len(rest) - tensors)
            return [([p] * outputs, [p] * tensors + options) for p in placements]

        return sharding

    for name, tensors in DEFINED.items():
        for backend in BACKENDS:
            handle = getattr(getattr(torch.ops.pykernels, name), backend)
            register_sharding(handle)(rule(len(tensors), len(handle._schema.returns)))
    _done = True
