"""The Transformer's parts (Vaswani et al., 2017), over the attention function that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """PE(p, 2i) = sin(p / 10000^(2i/width)), PE(p, 2i+1) = cos of the same; (length, width)."""
    rate = 10000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Attention(nn.Module):
    """Multi-head attention; keys and values come from `memory` where it is given (cross-attention)."""

    def __init__(self, functions: Any, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attention = heads, functions.attention
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, memory: Tensor | None = None, **mask: Any) -> Tensor:
        key, value = self.key_value(x if memory is None else memory).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(x), key, value))
        return self.out(self.attention(q, k, v, **mask).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Self-attention, cross-attention where asked for, and a feed-forward network, each with a residual and a norm.

    The norm follows the sum as in the paper, `norm(x + f(x))`, or with `pre_norm` precedes the sublayer,
    `x + f(norm(x))`, as in GPT-2.
    """

    def __init__(
        self,
        functions: Any,
        width: int,
        heads: int,
        activation: str = "GELU",
        cross: bool = False,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(functions, width, heads)
        self.cross = Attention(functions, width, heads) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), getattr(nn, activation)(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))

    def forward(
        self, x: Tensor, memory: Tensor | None = None, memory_real: Tensor | None = None, **mask: Any
    ) -> Tensor:
        """`mask` is for the self-attention; `memory_real` (B, S) says which places of `memory` are not padding."""
        sublayers = [lambda y: self.attention(y, **mask), self.mlp]
        if self.cross is not None:
            sublayers.insert(1, lambda y: self.cross(y, memory, key_padding_mask=memory_real))
        for norm, sublayer in zip(self.norms, sublayers, strict=True):
            x = x + sublayer(norm(x)) if self.pre_norm else norm(x + sublayer(x))
        return x
