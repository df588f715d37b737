"""Activation modules: torch.nn's constructors, `extra_repr` and state_dict, with the fused kernels inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activation as ops

__all__ = [
    "ELU", "GEGLU", "GELU", "GLU", "Bilinear", "LeakyReLU", "PReLU", "RReLU", "ReGLU", "ReLU", "SiLU", "Sigmoid",
    "SwiGLU", "Swish", "Tanh",
]  # fmt: skip


class Sigmoid(nn.Sigmoid):
    """`torch.nn.Sigmoid`; see `pykernels.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.sigmoid(input)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh`; see `pykernels.functional.tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.tanh(input)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU(inplace=False)`; see `pykernels.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU(negative_slope=0.01, inplace=False)`; see `pykernels.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.leaky_relu(input, self.negative_slope, self.inplace)


class PReLU(nn.PReLU):
    """`torch.nn.PReLU(num_parameters=1, init=0.25)`; see `pykernels.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.prelu(input, self.weight)


class RReLU(nn.RReLU):
    """`torch.nn.RReLU(lower=1/8, upper=1/3, inplace=False)`; see `pykernels.functional.rrelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.rrelu(input, self.lower, self.upper, self.training, self.inplace)


class ELU(nn.ELU):
    """`torch.nn.ELU(alpha=1.0, inplace=False)`; see `pykernels.functional.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.elu(input, self.alpha, self.inplace)


class GELU(nn.GELU):
    """`torch.nn.GELU(approximate="none")`; see `pykernels.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU(inplace=False)`; see `pykernels.functional.silu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.silu(input, self.inplace)


class Swish(nn.Module):
    """y = x * sigmoid(beta * x); see `pykernels.functional.swish`.

    Args:
        beta: initial value.
        learnable: beta becomes a parameter (state_dict entry "beta"); otherwise it is a constant.
        num_parameters: 1, or the number of channels (dimension 1 of the input); more than 1 needs learnable=True.
        device, dtype: of the parameter.

    Raises:
        ValueError: num_parameters < 1, or > 1 without learnable.
    """

    def __init__(
        self, beta: float = 1.0, learnable: bool = False, num_parameters: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if num_parameters < 1 or (num_parameters > 1 and not learnable):
            raise ValueError(f"Swish: num_parameters must be 1, or more with learnable=True, got {num_parameters}")
        self.init, self.num_parameters = beta, num_parameters
        if learnable:
            self.beta: float | nn.Parameter = nn.Parameter(
                torch.full((num_parameters,), beta, device=device, dtype=dtype)
            )
        else:
            self.beta = beta

    def forward(self, input: Tensor) -> Tensor:
        return ops.swish(input, self.beta)

    def extra_repr(self) -> str:
        learnable = isinstance(self.beta, nn.Parameter)
        return f"beta={self.init}" + (f", learnable=True, num_parameters={self.num_parameters}" if learnable else "")


class GLU(nn.GLU):
    """`torch.nn.GLU(dim=-1)`; see `pykernels.functional.glu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.glu(input, self.dim)


class SwiGLU(nn.Module):
    """silu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.swiglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)


class ReGLU(nn.Module):
    """relu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.reglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.reglu(gate, up)


class Bilinear(nn.Module):
    """gate * up of two tensors, or of one that holds both halves; see `pykernels.functional.bilinear`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.bilinear(gate, up)


class GEGLU(nn.Module):
    """gelu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.geglu`.

    Args:
        approximate: "none" or "tanh".
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
