"""Bias, activation and dropout in one kernel each way."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .. import _autocast, _check
from .._function import apply
from .._library import as_seed
from ._functions import GATED_UNITS, ROOM, Fused, fused_forward

__all__ = ["bias_activation_dropout"]

_ALPHA = reference.activation.ALPHA
NAMES = (*reference.activation.UNARY, *reference.activation.GATED_UNITS)


def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    *,
    alpha: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = dropout(activation(input + bias)), one kernel each way.

    In training each element of y is 0 with probability p and otherwise divided by 1 - p. The decision is addressed by
    the element's row-major position in y (Philox4x32-10; kept iff its word >= round(p * 2**32)): the same for every
    backend, tile size and replay of one seed. It is made anew in backward: saved are input, bias and the seed, and no
    mask. Not torch's stream: with p = 0 the results are torch's, otherwise their distribution is.

    Args:
        input: (..., N), any strides; float32, float16, bfloat16, float64. A sum with the bias is made in float32.
        bias: (N,), added along the last dimension, input's dtype (under autocast it is cast to it) and device. Its
            gradient is a fixed-order sum without atomics: same bits every run. None adds nothing.
        activation: "identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu" (erf), "gelu_tanh", "silu",
            "swish"; or a gated unit, with both halves in the last dimension and y (..., N / 2): "reglu", "geglu",
            "geglu_tanh", "swiglu", "bilinear" (gate first), "glu" (gate second, as torch's).
        p: probability of 0, in [0, 1).
        training: False: no dropout.
        seed: an int or a one-element int64 tensor; None draws from torch's generator of the tensor's device. Not
            looked at where nothing is dropped.
        alpha: leaky_relu's slope (default 0.01), elu's alpha (1.0), swish's beta (1.0).
        backend: as in `sigmoid`.

    Raises:
        TypeError: input or bias is not a tensor, activation not a string, p or alpha no number, seed of another type.
        ValueError: p outside [0, 1); alpha with an activation that has none; a seed of several elements.
        RuntimeError: an unknown activation; a bias of another length, dtype or device; a gated unit on an odd width.
        NotImplementedError: another dtype.   BackendError, ValueError: as `sigmoid`.
    """
    name = "bias_activation_dropout"
    _check.tensor(name, "input", input)
    _check.floating(name, "input", input)
    alpha, p = check_options(name, activation, alpha, p, training)
    _check_width(name, "input", input, activation)
    if bias is not None:
        _check.tensor(name, "bias", bias)
        if bias.dtype in _check.FLOATS and _autocast.enabled(input.device):
            bias = bias.to(input.dtype)
        _check.same(name, "bias", bias, "input", input)
        check_length(name, "bias", bias, input.shape[-1] if input.dim() else 0, "the last dimension of 'input'")
    backend = ROOM.resolve(name, backend, input)
    drawn = as_seed(seed, input, name) if p > 0.0 else None
    if backend == "reference":
        return reference.bias_activation_dropout(input, bias, activation, p, True, drawn, alpha=alpha)
    activation, alpha = kernel_options(activation, alpha)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        result: Tensor = apply(Fused, backend, input, bias, drawn, activation, alpha, p)
        return result
    return fused_forward[backend](input, bias, drawn, activation, alpha, p)


def kernel_options(activation: str, alpha: float) -> tuple[str, float]:
    """The activation by which kernels serve this one, and its alpha."""
    return ("leaky_relu", 1.0) if activation == "identity" else (activation, alpha)


def check_options(function: str, activation: str, alpha: float | None, p: float, training: bool) -> tuple[float, float]:
    """alpha with its default, and p, which is 0 where nothing is dropped."""
    if not isinstance(activation, str):
        raise TypeError(f"{function}(): argument 'activation' must be str, not {type(activation).__name__}")
    if activation not in NAMES:
        raise RuntimeError(f"{function}(): activation must be one of {', '.join(NAMES)}, not {activation!r}")
    if alpha is not None:
        if activation not in _ALPHA:
            raise ValueError(f"{function}(): argument 'alpha' is for {', '.join(_ALPHA)}, not for {activation!r}")
        alpha = _check.number(function, "alpha", alpha)
    p = _check.number(function, "p", p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{function}(): dropout probability 'p' has to be in [0, 1), but got {p}")
    dropping = training and round(p * 2.0**32) > 0
    return _ALPHA.get(activation, 0.0) if alpha is None else alpha, p if dropping else 0.0


def _check_width(function: str, name: str, value: Tensor, activation: str) -> None:
    if activation not in GATED_UNITS:
        return
    if value.dim() == 0:
        raise RuntimeError(f"{function}(): '{name}' must not be a scalar: the halving size must be even")
    if value.shape[-1] % 2:
        raise RuntimeError(
            f"{function}(): halving dimension must be even for {activation!r}, but the last dimension of '{name}' is "
            f"size {value.shape[-1]}"
        )


def check_length(function: str, name: str, value: Tensor, length: int, of: str) -> None:
    if value.dim() != 1 or value.shape[0] != length:
        raise RuntimeError(
            f"{function}(): argument '{name}' must have shape ({length},), {of}, got {tuple(value.shape)}"
        )


def check_block(
    module: str, activation: str, alpha: float | None, p: float, save: str, gated: bool
) -> tuple[float | None, float]:
    """alpha and p of a feed-forward module, checked when it is made.

    Raises:
        as `bias_activation_dropout`, and ValueError: a gated unit where none is taken, or none where one is; save.
    """
    check_options(module, activation, alpha, p, True)
    if (activation in GATED_UNITS) != gated:
        allowed = reference.activation.GATED_UNITS if gated else reference.activation.UNARY
        raise ValueError(f"{module}(): activation must be one of {', '.join(allowed)}, not {activation!r}")
    check_save(module, save)
    return alpha, p


def check_save(function: str, save: str) -> None:
    if save not in ("preactivation", "input"):
        raise ValueError(f"{function}(): argument 'save' must be 'preactivation' or 'input', not {save!r}")
