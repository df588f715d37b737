"""Activations as formulas in plain torch: the truth that every kernel is compared with.

Forward only; autograd of these is the oracle for gradients. float16 and bfloat16 are computed in float32 and rounded
once, as the kernels do. Where a formula has a kink, the branch is chosen so that NaN takes the side torch gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._random import keep_mask, seed_on, uniform

__all__ = [
    "bias_activation_dropout", "bilinear", "elu", "geglu", "gelu", "glu", "leaky_relu", "mlp", "prelu", "reglu", "relu",
    "rrelu", "sigmoid", "silu", "swiglu", "swish", "tanh",
]  # fmt: skip

_HALF = (torch.float16, torch.bfloat16)


def _rounded_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computes half-precision arguments in float32 and rounds the result to the first argument's dtype."""

    def wrapped(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        if input.dtype not in _HALF:
            return function(input, *args, **kwargs)
        wide = [a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for a in args]
        wide_kwargs = {k: a.float() if isinstance(a, Tensor) and a.dtype in _HALF else a for k, a in kwargs.items()}
        return function(input.float(), *wide, **wide_kwargs).to(input.dtype)

    wrapped.__name__, wrapped.__qualname__, wrapped.__doc__ = function.__name__, function.__qualname__, function.__doc__
    return wrapped


def _float_if_integral(input: Tensor) -> Tensor:
    return input if input.is_floating_point() or input.is_complex() else input.to(torch.get_default_dtype())


@_rounded_once
def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    return torch.sigmoid(_float_if_integral(input))


@_rounded_once
def tanh(input: Tensor) -> Tensor:
    """(exp(x) - exp(-x)) / (exp(x) + exp(-x))"""
    return torch.tanh(_float_if_integral(input))


def relu(input: Tensor) -> Tensor:
    """max(x, 0)"""
    return torch.where(input <= 0, torch.zeros_like(input), input)


@_rounded_once
def leaky_relu(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """x if x > 0 else negative_slope * x"""
    return torch.where(input > 0, input, input * negative_slope)


def _per_channel(weight: Tensor, input: Tensor) -> Tensor:
    """weight of 1 or C elements, shaped to broadcast along dimension 1 of input."""
    if weight.numel() == 1:
        return weight.reshape(())
    return weight.reshape(-1, *(1,) * (input.dim() - 2))


@_rounded_once
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """x if x > 0 else weight[c] * x, c the index along dimension 1 (or one weight for all)"""
    return torch.where(input > 0, input, input * _per_channel(weight, input))


@_rounded_once
def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """slope * x if x <= 0 else x; slope uniform in [lower, upper) for each element (training), or their mean"""
    if not training:
        return leaky_relu(input, (lower + upper) / 2)
    slope = lower + (upper - lower) * uniform(seed_on(seed, input.device), input.shape).to(input.dtype)
    return torch.where(input <= 0, input * slope, input)


@_rounded_once
def elu(input: Tensor, alpha: float = 1.0) -> Tensor:
    """x if x > 0 else alpha * (exp(x) - 1)"""
    return torch.where(input <= 0, alpha * torch.expm1(input.clamp(max=0)), input)


@_rounded_once
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2

    approximate="tanh": x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2. Hendrycks and Gimpel, 2016.
    """
    if approximate == "none":
        return input * (0.5 * (1.0 + torch.erf(input * math.sqrt(0.5))))
    inner = math.sqrt(2.0 / math.pi) * (input + 0.044715 * input * input * input)
    return input * (0.5 * (1.0 + torch.tanh(inner)))


@_rounded_once
def silu(input: Tensor) -> Tensor:
    """x * sigmoid(x)"""
    return input * torch.sigmoid(input)


@_rounded_once
def swish(input: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """x * sigmoid(beta * x), beta a number or a tensor of 1 or C elements (dimension 1). Ramachandran et al., 2017."""
    return input * torch.sigmoid((_per_channel(beta, input) if isinstance(beta, Tensor) else beta) * input)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": sigmoid,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": lambda gate: gelu(gate, "tanh"),
    "silu": silu,
    "identity": lambda gate: gate,
}


@_rounded_once
def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return GATES[activation](gate) * up


def gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * up; up None: gate holds both halves along its last dimension. Shazeer, 2020."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return _gated(gate, up, activation)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b), (a, b) the halves of input along dim. Dauphin et al., 2016."""
    up, gate = input.chunk(2, dim)
    return gated(gate, up, "sigmoid")


def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """relu(gate) * up"""
    return gated(gate, up, "relu")


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(gate) * up"""
    return gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up"""
    return gated(gate, up, "silu")


def bilinear(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """gate * up"""
    return gated(gate, up, "identity")


#: Names for `bias_activation_dropout`: function of (x, alpha), and of one tensor that holds both halves.
UNARY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, _: x,
    "sigmoid": lambda x, _: sigmoid(x),
    "tanh": lambda x, _: tanh(x),
    "relu": lambda x, _: relu(x),
    "leaky_relu": leaky_relu,
    "elu": elu,
    "gelu": lambda x, _: gelu(x),
    "gelu_tanh": lambda x, _: gelu(x, "tanh"),
    "silu": lambda x, _: silu(x),
    "swish": swish,
}
GATED_UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "glu": glu,
    "reglu": reglu,
    "geglu": geglu,
    "geglu_tanh": lambda x: geglu(x, approximate="tanh"),
    "swiglu": swiglu,
    "bilinear": bilinear,
}
ALPHA = {"leaky_relu": 0.01, "elu": 1.0, "swish": 1.0}  #: defaults of the activations that take a number


@_rounded_once
def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    *,
    alpha: float | None = None,
) -> Tensor:
    """dropout(activation(input + bias)): what is kept is divided by 1 - p. Kept iff word >= round(p 2^32)."""
    x = input if bias is None else input + bias
    if activation in GATED_UNITS:
        y = GATED_UNITS[activation](x)
    else:
        y = UNARY[activation](x, ALPHA.get(activation, 0.0) if alpha is None else alpha)
    if not training or round(p * 2.0**32) == 0:
        return y
    return torch.where(keep_mask(seed_on(seed, y.device), y.shape, p), y * (1.0 / (1.0 - p)), torch.zeros_like(y))


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    save: str = "preactivation",
    *,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    alpha: float | None = None,
) -> Tensor:
    """dropout(activation(x w1^T + b1)) w2^T + b2. `save` is what the fused form keeps, and has no meaning here."""
    hidden = torch.nn.functional.linear(x, w1)
    hidden = bias_activation_dropout(hidden, b1, activation, p, training, seed, alpha=alpha)
    return torch.nn.functional.linear(hidden, w2, b2)
