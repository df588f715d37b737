"""Argument checks shared by the rooms: torch's exception classes, messages that name the argument."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


def tensor(function: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(value).__name__}")


def floating(function: str, name: str, value: Tensor) -> None:
    """Raises NotImplementedError (as torch's kernels do) unless the tensor is float16, bfloat16, float32 or float64."""
    if value.dtype not in FLOATS:
        raise NotImplementedError(
            f"{function}(): argument '{name}' of dtype {value.dtype} is not implemented; "
            "allowed: float32, float16, bfloat16, float64"
        )


def number(function: str, name: str, value: object) -> float:
    """`value` as a float; TypeError unless it is a real number."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad):
        return float(value)  # numpy's scalars, and what torch takes for a Number too
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    raise TypeError(f"{function}(): argument '{name}' must be Number, not {type(value).__name__}")


def same(function: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises RuntimeError unless both tensors have one device and one dtype."""
    if value.device != other.device:
        raise RuntimeError(
            f"{function}(): argument '{name}' is on {value.device} but '{other_name}' is on {other.device}; "
            "expected all tensors to be on the same device"
        )
    if value.dtype != other.dtype:
        raise RuntimeError(
            f"{function}(): argument '{name}' is {value.dtype} but '{other_name}' is {other.dtype}; they must agree"
        )


def dimension(function: str, name: str, dim: object, ndim: int) -> int:
    """`dim` counted from the front; TypeError unless an int, IndexError when out of range."""
    if not isinstance(dim, numbers.Integral) or isinstance(dim, bool):
        raise TypeError(f"{function}(): argument '{name}' must be int, not {type(dim).__name__}")
    position = int(dim)  # numpy's integers are integers
    if not -ndim <= position < ndim:
        raise IndexError(
            f"{function}(): argument '{name}' is out of range "
            f"(expected to be in range of [{-ndim}, {ndim - 1}], but got {dim})"
        )
    return position % ndim


def writable(function: str, value: Tensor, name: str = "input") -> None:
    """Refuses in-place work that autograd, inference mode or overlapping memory forbids, before anything is written.

    Autograd's own leaf check comes after a Function's forward has already written.
    """
    if torch.is_grad_enabled() and value.requires_grad and value.is_leaf:
        raise RuntimeError(f"{function}(): a leaf Variable that requires grad is being used in an in-place operation.")
    if not torch.compiler.is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{function}(): inplace update to inference tensor '{name}' outside InferenceMode is not allowed; "
            "clone() it"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise RuntimeError(
            f"{function}(): unsupported operation: more than one element of the written-to tensor '{name}' refers to a "
            "single memory location. Please clone() the tensor before performing the operation."
        )
