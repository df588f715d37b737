"""Layers for the `kernels` library's mappings: without state and constructor, `forward` is all that is taken of them.

The names are those under which Transformers and the kernels of the Hub know them.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...ops.activation import geglu, gelu, silu, swiglu, swish

__all__ = [
    "FastGELU",
    "GELUTanh",
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "GeluTanhAndMul",
    "NewGELU",
    "QuickGELU",
    "SiLU",
    "SiluAndMul",
]


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return silu(input)


class GeLU(nn.Module):
    """x * Phi(x)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class GeluTanh(nn.Module):
    """GELU's tanh form."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


GELUTanh = NewGELU = FastGELU = GeluTanh


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return swish(input, 1.702)


class SiluAndMul(nn.Module):
    """silu(first half) * second half of the last dimension."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(input)


class GeluAndMul(nn.Module):
    """gelu(first half) * second half."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input)


class GeluTanhAndMul(nn.Module):
    """GELU's tanh form of the first half, times the second."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input, approximate="tanh")
