"""Candidate samplers: the stream of pykernels/reference/sampled_softmax/samplers.py, bit for bit.

Sums and products of doubles must not be fused, which would round otherwise than that file does: these kernels are
compiled without contraction.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lib

DRAWS = 1024  #: of a program, and of one turn of the unique sampler
NEVER = tl.constexpr(1 << 62)


@triton.jit
def exp53(x):
    """exp(x), 0 <= x < 45: 2**n times a polynomial of degree 13 in x - n log 2."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = tl.full(x.shape, 1.0 / 6227020800, tl.float64)
    p = p * r + 1.0 / 479001600
    p = p * r + 1.0 / 39916800
    p = p * r + 1.0 / 3628800
    p = p * r + 1.0 / 362880
    p = p * r + 1.0 / 40320
    p = p * r + 1.0 / 5040
    p = p * r + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * (tl.full(x.shape, 1, tl.int64) << n.to(tl.int64)).to(tl.float64)


@triton.jit
def draw(seed, t, log_ptr, threshold_ptr, alias_ptr, classes, KIND: tl.constexpr):
    """The classes of draws t, int64. log_ptr: log(classes + 1), a double."""
    high = _lib.philox_word(seed, 2 * t).to(tl.int64)
    low = _lib.philox_word(seed, 2 * t + 1).to(tl.int64)
    u = ((high << 21) | (low >> 11)).to(tl.float64) * 1.1102230246251565e-16
    if KIND == "log_uniform":
        id = tl.floor(exp53(u * tl.load(log_ptr))).to(tl.int64) - 1
        return tl.minimum(tl.maximum(id, 0), classes - 1)
    else:
        scaled = u * classes.to(tl.float64)
        bucket = tl.minimum(tl.floor(scaled).to(tl.int64), classes - 1)
        if KIND == "alias":
            other = tl.load(alias_ptr + bucket).to(tl.int64)
            bucket = tl.where(scaled - bucket.to(tl.float64) < tl.load(threshold_ptr + bucket), bucket, other)
        return bucket


@triton.jit
def draw_kernel(
    seed_ptr, log_ptr, threshold_ptr, alias_ptr, ids_ptr, count, classes, KIND: tl.constexpr, DRAWS: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    id = draw(tl.load(seed_ptr), t, log_ptr, threshold_ptr, alias_ptr, tl.cast(classes, tl.int64), KIND)
    tl.store(ids_ptr + t, id, mask=t < count)


@triton.jit
def draw_unique_kernel(
    seed_ptr, log_ptr, threshold_ptr, alias_ptr, slots_ptr, ids_ptr, tries_ptr, count, classes, mask,
    KIND: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """The first `count` different classes in the order of their first draws, by one program.

    slots: (mask + 1, 2), open addressing: a class, -1 where there is none, and its first draw. Which lane comes first
    to a slot does not matter: it keeps the smallest draw.
    """
    seed = tl.load(seed_ptr)
    found = tl.zeros((), tl.int64)
    base = tl.zeros((), tl.int64)
    while (found < count) & (base < (1 << 40)):
        t = base + tl.arange(0, DRAWS)
        id = draw(seed, t, log_ptr, threshold_ptr, alias_ptr, tl.cast(classes, tl.int64), KIND)
        slot = ((id.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 20).to(tl.int64) & mask
        pending = id >= 0
        while tl.max(pending.to(tl.int32), 0) > 0:
            empty = tl.where(pending, -1, -2).to(tl.int64)  # no slot ever holds -2: who is done changes nothing
            was = tl.atomic_cas(slots_ptr + 2 * slot, empty, id)
            pending = pending & (was != -1) & (was != id)
            slot = tl.where(pending, (slot + 1) & mask, slot)
        first_ptr = slots_ptr + 2 * slot + 1
        tl.atomic_min(first_ptr, t)
        tl.debug_barrier()
        new = (tl.load(first_ptr, volatile=True) == t).to(tl.int64)
        rank = found + tl.cumsum(new, 0) - new
        kept = (new > 0) & (rank < count)
        tl.store(ids_ptr + rank, id, mask=kept)
        tl.store(tries_ptr + tl.zeros_like(t), t + 1, mask=kept & (rank == count - 1))
        found += tl.sum(new, 0)
        base += DRAWS
        tl.debug_barrier()  # the slots are read before the next draws come


def sample(
    seed: Tensor,
    threshold: Tensor | None,
    alias: Tensor | None,
    kind: str,
    num_sampled: int,
    range_max: int,
    unique: bool,
) -> tuple[Tensor, Tensor]:
    """Nothing is asked of the device: with `unique` the kernel itself draws until it has found enough."""
    ids, tries = seed.new_full((num_sampled,), -1), seed.new_full((), num_sampled)
    if num_sampled == 0:
        return ids, tries
    log = torch.full((1,), math.log(range_max + 1), dtype=torch.float64, device=seed.device)
    tables = (None if x is None else x.contiguous() for x in (threshold, alias))
    constants = {"KIND": kind, "DRAWS": DRAWS, "enable_fp_fusion": False, "num_warps": 8}
    if not unique:
        grid = (triton.cdiv(num_sampled, DRAWS),)
        _lib.launch(draw_kernel, grid, seed, seed, log, *tables, ids, num_sampled, range_max, **constants)
        return ids, tries
    size = triton.next_power_of_2(2 * (num_sampled + DRAWS))
    slots = seed.new_full((size, 2), -1)
    slots[:, 1] = NEVER.value
    _lib.launch(
        draw_unique_kernel, (1,), seed, seed, log, *tables, slots, ids, tries, num_sampled, range_max, size - 1,
        **constants,
    )  # fmt: skip
    return ids, tries
