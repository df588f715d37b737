"""Activations of one tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _backends, reference
from ..._backends import is_compiling
from .. import _autocast, _check
from .._function import apply
from .._library import as_seed
from ._functions import (
    REFERENCE,
    ROOM,
    SAVES_OUTPUT,
    Parametric,
    RReLU,
    Unary,
    UnaryInplace,
    parametric_forward,
    parametric_reference,
    rrelu_forward,
    unary_,
    unary_forward,
)

__all__ = ["elu", "gelu", "leaky_relu", "prelu", "relu", "rrelu", "sigmoid", "silu", "swish", "tanh"]


def _unary(function: str, input: Tensor, activation: str, alpha: float, inplace: bool, backend: str | None) -> Tensor:
    if not isinstance(input, Tensor) or input.dtype not in _check.FLOATS:
        return _unusual(function, input, activation, alpha, inplace, backend)
    backend = ROOM.resolve(function, backend, input)
    if inplace:
        return _unary_inplace(function, input, activation, alpha, backend)
    if backend == "reference":
        return REFERENCE[activation](input, alpha)
    if torch.is_grad_enabled() and input.requires_grad:
        result: Tensor = Unary.apply(input, (activation, alpha, backend))
        return result
    return unary_forward[backend](input, activation, alpha)


def _unary_inplace(function: str, input: Tensor, activation: str, alpha: float, backend: str) -> Tensor:
    _check.writable(function, input)
    if backend == "reference":
        return input.copy_(REFERENCE[activation](input.clone(), alpha))
    if torch.is_grad_enabled() and input.requires_grad:
        if not is_compiling() and input._is_view() and (input._base.is_leaf or _backends.unusual_view(input)):
            # copy_ asks autograd whether this view may be written (a leaf's may not, nor a chunk) before it writes;
            # mark_dirty asks after the kernel has written
            return input.copy_(Unary.apply(input.clone(), (activation, alpha, backend)))
        # leaky_relu with a positive slope keeps the sign, which is all that its derivative asks for
        output_serves = activation in SAVES_OUTPUT or (activation == "leaky_relu" and alpha > 0)
        saved = None if output_serves else input.clone()
        result: Tensor = UnaryInplace.apply(input, saved, (activation, alpha, backend))
        return result
    unary_[backend](input, activation, alpha)
    if not is_compiling():  # the operator is opaque: without this, autograd would not see that a saved tensor changed
        torch.autograd.graph.increment_version(input)
    return input


def _unusual(function: str, input: Tensor, activation: str, alpha: float, inplace: bool, backend: str | None) -> Tensor:
    """Arguments no kernel serves. What torch computes (relu of integers, sigmoid and tanh of anything) is computed."""
    _check.tensor(function, "input", input)
    complex_ok = input.is_complex() and activation in ("sigmoid", "tanh", "silu")
    integral = not input.is_complex() and not input.is_floating_point()
    integral_ok = integral and (
        activation in ("sigmoid", "tanh") or (activation == "relu" and input.dtype != torch.bool)
    )
    if not complex_ok and not integral_ok:
        _check.floating(function, "input", input)
    if backend not in (None, "auto", "reference"):
        raise _backends.BackendError(
            f"{function}(): backend {backend!r} cannot serve this call: kernels are for real floats, not {input.dtype}"
        )
    ROOM.resolve(function, "reference", input)
    result = REFERENCE[activation](input, alpha)
    return input.copy_(result) if inplace else result


def sigmoid(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Logistic sigmoid, y = 1 / (1 + exp(-x)), elementwise. As `torch.sigmoid`.

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64 (integers are converted to the default dtype,
            complex numbers are served by the reference).
        backend: None/"auto", "cpu", "triton", "cuda", "reference" (and "emulator", for tests).

    Raises:
        TypeError: input is not a tensor.   BackendError: the named backend cannot serve the call, and why.
        ValueError: no such backend.   NotImplementedError: a dtype torch does not serve either.
    """
    return _unary("sigmoid", input, "sigmoid", 0.0, False, backend)


def tanh(input: Tensor, *, backend: str | None = None) -> Tensor:
    """Hyperbolic tangent, elementwise. As `torch.tanh`; arguments and errors as `sigmoid`."""
    return _unary("tanh", input, "tanh", 0.0, False, backend)


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """y = max(x, 0), elementwise; NaN stays NaN. As `torch.nn.functional.relu`.

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64 (integers are served by the reference).
        inplace: write the result into `input` and return it. Backward reads the output, no copy is kept.
        backend: as in `sigmoid`.

    Raises:
        TypeError: input is not a tensor.   BackendError, ValueError: as `sigmoid`.
        NotImplementedError: bool, complex and other dtypes.
        RuntimeError: inplace on a leaf that requires grad, or on a tensor whose elements share memory.
    """
    return _unary("relu", input, "relu", 0.0, inplace, backend)


def leaky_relu(
    input: Tensor, negative_slope: float = 0.01, inplace: bool = False, *, backend: str | None = None
) -> Tensor:
    """y = x if x > 0 else negative_slope * x. As `torch.nn.functional.leaky_relu`.

    Arguments and errors as `relu` (integers: NotImplementedError), and TypeError when negative_slope is no number. In
    place with a slope below zero a copy of the input is kept for backward (torch refuses that case).
    """
    slope = _check.number("leaky_relu", "negative_slope", negative_slope)
    return _unary("leaky_relu", input, "leaky_relu", slope, inplace, backend)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """y = x if x > 0 else alpha * (exp(x) - 1). As `torch.nn.functional.elu`. Clevert et al., 2015.

    Arguments and errors as `leaky_relu`. In place, a copy of the input is kept when a gradient is needed.
    """
    return _unary("elu", input, "elu", _check.number("elu", "alpha", alpha), inplace, backend)


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """Gaussian error linear unit. As `torch.nn.functional.gelu`. Hendrycks and Gimpel, 2016.

    y = x * Phi(x), Phi the normal distribution function (erf); with approximate="tanh"
    y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))).

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64.
        approximate: "none" or "tanh".
        backend: as in `sigmoid`.

    Raises:
        RuntimeError: approximate is something else.   TypeError: input is not a tensor.
        NotImplementedError: another dtype.   BackendError, ValueError: as `sigmoid`.
    """
    return _unary("gelu", input, gelu_name("gelu", approximate), 0.0, False, backend)


def gelu_name(function: str, approximate: str) -> str:
    if approximate == "none":
        return "gelu"
    if approximate == "tanh":
        return "gelu_tanh"
    raise RuntimeError(f"{function}(): approximate argument must be either none or tanh, not {approximate!r}")


def silu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """y = x * sigmoid(x), elementwise. As `torch.nn.functional.silu`.

    Arguments and errors as `relu` (integers: NotImplementedError; complex is served by the reference). In place, a copy
    of the input is kept when a gradient is needed, as torch does.
    """
    return _unary("silu", input, "silu", 0.0, inplace, backend)


def swish(input: Tensor, beta: float | Tensor = 1.0, *, backend: str | None = None) -> Tensor:
    """y = x * sigmoid(beta * x); beta=1 is SiLU. Ramachandran et al., 2017.

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64.
        beta: a number; or a learnable tensor of 1 element or of input.shape[1] elements (one a channel, as prelu's
            weight), of input's dtype (under autocast it is cast to it) and device, with gradient. Its gradient is a
            fixed-order sum: same bits every run.
        backend: as in `sigmoid`.

    Raises:
        TypeError: input is not a tensor, beta neither a number nor a tensor.   NotImplementedError: another dtype.
        RuntimeError: beta's size, dtype or device does not fit input.   BackendError, ValueError: as `sigmoid`.
    """
    if isinstance(beta, Tensor):
        return _parametric("swish", input, "beta", beta, "swish", backend)
    return _unary("swish", input, "swish", _check.number("swish", "beta", beta), False, backend)


def prelu(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """y = x if x > 0 else weight * x, weight learnable. As `torch.nn.functional.prelu`. He et al., 2015.

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64.
        weight: 1 element, or input.shape[1] elements (one a channel); input's dtype and device (under autocast both
            are cast to its lower precision, as torch does). Its gradient is a fixed-order sum: same bits every run.
        backend: as in `sigmoid`.

    Raises:
        TypeError: input or weight is not a tensor.   NotImplementedError: another dtype.
        RuntimeError: weight's dimensions, size, dtype or device do not fit.   BackendError, ValueError: as `sigmoid`.
    """
    return _parametric("prelu", input, "weight", weight, "prelu", backend)


def _parametric(
    function: str, input: Tensor, name: str, weight: Tensor, activation: str, backend: str | None
) -> Tensor:
    _check.tensor(function, "input", input)
    _check.tensor(function, name, weight)
    _check.floating(function, "input", input)
    if _autocast.enabled(input.device):
        # torch's policy for prelu; swish, which torch lacks, keeps its input's dtype as other elementwise operators do
        if activation == "prelu":
            input, weight = _autocast.lower((input, weight), input.device)
        elif weight.dtype in _check.FLOATS:
            weight = weight.to(input.dtype)
    _check.same(function, name, weight, "input", input)
    if weight.dim() > 1:
        raise RuntimeError(
            f"{function}(): expected '{name}' to be a scalar or 1D tensor, but got: ndim = {weight.dim()}"
        )
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.numel() not in (1, channels):
        raise RuntimeError(
            f"{function}(): mismatch of parameter numbers and input channel size: '{name}' has {weight.numel()} "
            f"elements, allowed are 1 and {channels} (dimension 1 of 'input')"
        )
    backend = ROOM.resolve(function, backend, input)
    if backend == "reference":
        return parametric_reference(input, weight, activation)
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        result: Tensor = apply(Parametric, backend, input, weight, activation)
        return result
    return parametric_forward[backend](input, weight, activation)


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Randomised leaky ReLU: y = x if x > 0 else slope * x. As `torch.nn.functional.rrelu`. Xu et al., 2015.

    In training slope is uniform in [lower, upper), drawn anew for each element; otherwise it is (lower + upper) / 2.
    The draw is addressed by the element's position, so it is the same for every backend, tile size and replay of one
    seed; it is recomputed in backward, nothing of it is stored. Not torch's stream: equality holds in distribution.

    Args:
        input: any shape and strides; float32, float16, bfloat16, float64.
        lower, upper: bounds of the slope, finite, lower <= upper.
        training, inplace: as torch's. In place a copy of the input is kept when a gradient is needed.
        seed: an int or a one-element int64 tensor; None draws from torch's generator of the tensor's device.
        backend: as in `sigmoid`.

    Raises:
        RuntimeError: lower > upper, or one is not finite; inplace as in `relu`.
        TypeError: a wrong type of input, bounds or seed.   ValueError: a seed of several elements.
        NotImplementedError: another dtype.   BackendError, ValueError: as `sigmoid`.
    """
    low, high = _check.number("rrelu", "lower", lower), _check.number("rrelu", "upper", upper)
    if not -math.inf < low <= high < math.inf:
        raise RuntimeError(
            "rrelu(): lower bound should be less than or equal to the upper bound, both finite, "
            f"got lower={low}, upper={high}"
        )
    if not training:
        return _unary("rrelu", input, "leaky_relu", (low + high) / 2, inplace, backend)
    _check.tensor("rrelu", "input", input)
    _check.floating("rrelu", "input", input)
    backend = ROOM.resolve("rrelu", backend, input)
    if inplace:
        _check.writable("rrelu", input)
    seed = as_seed(seed, input, "rrelu")
    source = input.clone() if inplace else input
    if backend == "reference":
        result = reference.rrelu(source, low, high, True, seed=seed)
    elif torch.is_grad_enabled() and input.requires_grad:
        result = RReLU.apply(backend, source, seed, low, high)
    else:
        result = rrelu_forward[backend](source, low, high, seed)
    return input.copy_(result) if inplace else result
