"""Sharding rules, so that DTensor can run our operators on shards.

An elementwise operator may be sharded along any dimension, all its tensors alike, or be replicated; attention along
the batch or the heads. Registered on the first DTensor that reaches a pykernels function: importing
torch.distributed.tensor costs half a second.
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
    for backend in BACKENDS:
        register_sharding(getattr(torch.ops.pykernels.attention_forward, backend))(_attention_forward)
        register_sharding(getattr(torch.ops.pykernels.attention_backward, backend))(_attention_backward)
    _done = True


BATCH, HEADS = 0, 1


def _shardable(query: Any, key: Any, masks: tuple[Any, ...], options: tuple[Any, ...]) -> list[int]:
    """Along which dimensions a call may be split. Packed sequences have no batch, and dropout decides by the element's
    place in the whole, which a shard does not know. A shard's key heads must serve its query heads."""
    packed, dropout_p = masks[4] is not None, options[4]
    if packed or dropout_p > 0:
        return []
    return [BATCH, HEADS] if key.shape[HEADS] % query.mesh.size() == 0 else [BATCH]


def _extras(dim: int, bias: Any, sinks: Any, masks: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Placements of bias and sinks, and of the masks, where query is sharded along `dim`."""
    from torch.distributed.tensor import Replicate, Shard

    def plane(x: Any) -> Any:  # (B or 1, H or 1, Lq or 1, Lk or 1)
        return None if x is None else Shard(dim) if x.shape[dim] > 1 else Replicate()

    def of(x: Any, dims: tuple[int, ...]) -> Any:  # whose dimensions are the batch and the heads as named
        return None if x is None else Shard(dims.index(dim)) if dim in dims else Replicate()

    mask, padding, prefix, slopes, _, _, seed = masks
    by_head = (HEADS,) if slopes is None or slopes.ndim == 1 else (BATCH, HEADS)
    rest = [plane(mask), of(padding, (BATCH,)), of(prefix, (BATCH,)), of(slopes, by_head), None, None, of(seed, ())]
    return [plane(bias), of(sinks, (HEADS,))], rest


def _replicated(arguments: tuple[Any, ...]) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [Replicate() if hasattr(x, "mesh") else None for x in arguments]


def _attention_forward(query: Any, key: Any, value: Any, bias: Any, sinks: Any, *rest: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    masks, options = rest[:7], rest[7:]
    found = [([Replicate()] * 3, _replicated((query, key, value, bias, sinks, *rest)))]
    for dim in _shardable(query, key, masks, options):
        additive, hiding = _extras(dim, bias, sinks, masks)
        found.append(([Shard(dim)] * 3, [Shard(dim)] * 3 + additive + hiding + [None] * len(options)))
    return found


def _attention_backward(*arguments: Any) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    query, key, bias, sinks = *arguments[2:4], *arguments[8:10]
    masks, options, wanted = arguments[10:17], arguments[17:-1], arguments[-1]
    found = [([Replicate()] * 5, _replicated(arguments))]
    for dim in _shardable(query, key, masks, options):
        additive, hiding = _extras(dim, bias, sinks, masks)
        # What every shard has alike gets a part of its gradient from each; an unwanted gradient is empty everywhere.
        grads = [Partial() if isinstance(x, Replicate) else x for x in additive]
        grads = [g if m else Replicate() for g, m in zip([*[Shard(dim)] * 3, *grads], wanted, strict=True)]
        found.append((grads, [Shard(dim)] * 8 + additive + hiding + [None] * (len(options) + 1)))
    return found
