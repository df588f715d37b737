"""Gated linear units: activation(gate) * up, from two tensors or from one that holds both halves."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .. import _autocast, _check
from .._function import apply
from ._functions import ROOM, Gated, Glu, gated_forward, glu_forward, glu_reference
from .unary import gelu_name

__all__ = ["bilinear", "geglu", "glu", "reglu", "swiglu"]


def _gated(function: str, gate: Tensor, up: Tensor | None, activation: str, backend: str | None) -> Tensor:
    _check.tensor(function, "gate", gate)
    _check.floating(function, "gate", gate)
    if up is None:
        return _glu(function, "gate", gate, -1, activation, True, backend)
    _check.tensor(function, "up", up)
    if gate.dtype != up.dtype and up.dtype in _check.FLOATS and _autocast.enabled(gate.device):
        common = torch.promote_types(gate.dtype, up.dtype)  # as torch's product of the two
        gate, up = gate.to(common), up.to(common)
    _check.same(function, "up", up, "gate", gate)
    if gate.shape != up.shape:
        raise RuntimeError(
            f"{function}(): argument 'up' must have the shape of 'gate' {tuple(gate.shape)}, got {tuple(up.shape)}"
        )
    backend = ROOM.resolve(function, backend, gate)
    if backend == "reference":
        return reference.activation.gated(gate, up, activation)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        result: Tensor = apply(Gated, backend, gate, up, activation)
        return result
    return gated_forward[backend](gate, up, activation)


def _glu(
    function: str, name: str, input: Tensor, dim: int, activation: str, gate_first: bool, backend: str | None
) -> Tensor:
    if input.dim() == 0:
        raise RuntimeError(f"{function}(): '{name}' must not be a scalar: the halving size must be even")
    dim = _check.dimension(function, "dim", dim, input.dim())
    if input.shape[dim] % 2:
        raise RuntimeError(
            f"{function}(): halving dimension must be even, but dimension {dim} of '{name}' is size {input.shape[dim]}"
        )
    backend = ROOM.resolve(function, backend, input)
    if backend == "reference":
        return glu_reference(input, dim, activation, gate_first)
    if torch.is_grad_enabled() and input.requires_grad:
        result: Tensor = Glu.apply(backend, input, dim, activation, gate_first)
        return result
    return glu_forward[backend](input, dim, activation, gate_first)


def glu(input: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """Gated linear unit, y = a * sigmoid(b), (a, b) the halves of input along dim. As `torch.nn.functional.glu`.

    Dauphin et al., 2016. One kernel each way: the halves are read in place and both gradients are written into one
    tensor of input's shape (no split, no concatenation). Saved: input alone.

    Args:
        input: any strides; float32, float16, bfloat16, float64; even size along dim.
        dim: the dimension that is halved.
        backend: as in `sigmoid`.

    Raises:
        TypeError: input is not a tensor, dim not an int.   IndexError: dim out of range.
        RuntimeError: a scalar, or an odd size along dim.   NotImplementedError: another dtype.
        BackendError, ValueError: as `sigmoid`.
    """
    _check.tensor("glu", "input", input)
    _check.floating("glu", "input", input)
    return _glu("glu", "input", input, dim, "sigmoid", False, backend)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = silu(gate) * up, elementwise, in one kernel each way. Shazeer, "GLU variants improve transformer", 2020.

    Args:
        gate: any shape and strides; float32, float16, bfloat16, float64. With `up` left out, the last dimension of
            `gate` holds both halves, gate first; then the gradient is one tensor too, which saves the concatenation
            that autograd makes for two views of one tensor: prefer this form after a fused projection.
        up: gate's shape, dtype (under autocast they may differ and are promoted) and device. Views of one tensor are
            read in place.
        backend: as in `sigmoid`.

    Saved for backward: gate and up (or the one tensor).

    Raises:
        TypeError: not a tensor.   NotImplementedError: another dtype.
        RuntimeError: shapes, dtypes or devices differ; one tensor with an odd last dimension, or a scalar.
        BackendError, ValueError: as `sigmoid`.
    """
    return _gated("swiglu", gate, up, "silu", backend)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """y = gelu(gate) * up; approximate "none" or "tanh" (else RuntimeError). Arguments and errors as `swiglu`."""
    return _gated("geglu", gate, up, gelu_name("geglu", approximate), backend)


def reglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = relu(gate) * up. Arguments and errors as `swiglu`."""
    return _gated("reglu", gate, up, "relu", backend)


def bilinear(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = gate * up, the bilinear GLU. Arguments and errors as `swiglu`."""
    return _gated("bilinear", gate, up, "identity", backend)
