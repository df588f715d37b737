"""Attention over sequences that are split among processes (context parallelism), by `attention` and `merge_attention`.

Everything else needs nothing of ours: DDP, FSDP2, tensor parallel plans and pipeline schedules of torch take models
with our modules as they take torch's (docs/integrations.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..ops.attention import attention, merge_attention

__all__ = ["ring_attention"]


class _Pass(Function):
    """Every process hands its tensors to the next of the ring; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> Any:
        ctx.group = group
        return _shift(tensors, group, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_shift(grads, ctx.group, -1)


class _Keep(Function):
    """`out`, with keys and values that it does not use: they get zeros, so that every process has the same passes in
    its backward pass and none waits for a gradient that nobody sends."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return dout, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def _shift(tensors: Any, group: Any, by: int) -> tuple[Tensor, ...]:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    to, source = ((rank + step) % size for step in (by, -by))
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    sent = [x.contiguous() for x in tensors]
    received = tuple(torch.empty_like(x) for x in sent)
    work = [dist.P2POp(dist.isend, x, ranks[to], group) for x in sent]
    work += [dist.P2POp(dist.irecv, x, ranks[source], group) for x in received]
    for request in dist.batch_isend_irecv(work):
        request.wait()
    return received


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Any = None,
    causal: bool = False,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a sequence whose equal parts lie, in the order of ranks, on the processes of `group`.

    Keys and values go round the ring; each process attends with its queries to the part it holds, and the parts are
    merged by their log-sum-exps. No process needs more than one part of the keys to attend, nor any matrix of scores
    (in training all parts that came by are kept for backward). With `causal` a process of rank r has r + 1 parts to
    attend to: the last one sets the pace.

    Args:
        query: this process's Tensor[B, H, L / n, D].
        key, value: Tensor[B, Hkv, L / n, D or Dv].
        group: a process group with point-to-point messages; None: the default group.
        causal: a position sees those up to itself, of the whole sequence.
        softcap, scale, backend: as in `attention`.

    Returns:
        this process's Tensor[B, H, L / n, Dv]. Differentiable once.

    Raises:
        RuntimeError: parts of different lengths; and what `attention` raises.

    Source: Liu et al., "Ring attention" (arXiv 2310.01889).
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"ring_attention(): argument 'key' must have query's length {query.shape[2]}, not {key.shape[2]}"
        )
    options: dict[str, Any] = {"softcap": softcap, "scale": scale, "backend": backend, "return_lse": True}
    outs, lses = [], []
    for step in range(size):
        if step:
            key, value = _Pass.apply(group, key, value)
        if causal and step > rank:
            continue  # of a later process
        out, lse = attention(query, key, value, causal=causal and step == 0, **options)
        outs.append(out)
        lses.append(lse)
    out = merge_attention(outs, lses)[0]
    return _Keep.apply(out, key, value) if causal else out
