"""Philox4x32-10 in plain torch: the random numbers of every backend, addressed by element.

key = the 64-bit seed (low word, high word); counter = (low word, high word of the element's offset, 0, 0); the first
output word is used. The offset is the row-major index of the element. Source: Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def seed_on(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A seed as one int64 on this device; None draws one from torch's generator."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).reshape(1)
    if not -(2**63) <= seed < 2**63:  # apart: in a graph the seed may be symbolic, and 2**64 is too large for inductor
        seed = (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b; the int64 product wraps, its bits are those of the unsigned one."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox_words(seed: Tensor, offsets: Tensor) -> Tensor:
    """First output word (0 .. 2**32 - 1, as int64) for each int64 offset; seed: one int64."""
    k0, k1 = seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW
    c0, c1 = offsets & _LOW, (offsets >> 32) & _LOW
    c2 = c3 = torch.zeros_like(offsets)
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def element_words(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """One word for each element of a tensor of this shape, in row-major order."""
    offsets = torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device)
    return philox_words(seed, offsets).reshape(tuple(shape))


def uniform(seed: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 uniforms in [0, 1), 24 bits each: (word >> 8) * 2**-24."""
    return (element_words(seed, shape) >> 8).to(torch.float32) * 2.0**-24


def keep_mask(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Dropout's decision for each element: True = keep, iff word >= round(p * 2**32)."""
    return element_words(seed, shape) >= round(p * 2.0**32)
