"""Checks of ids and labels, shared by the rooms that read tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import functorch_active


def integers(function: str, name: str, ids: Tensor) -> None:
    """Raises RuntimeError (as torch does) unless the tensor is int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"{function}(): argument '{name}' must be int32 or int64, not {ids.dtype}")


def same_device(function: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises RuntimeError unless both tensors are on one device; their dtypes may differ."""
    if value.device != other.device:
        raise RuntimeError(
            f"{function}(): argument '{name}' is on {value.device} but '{other_name}' is on {other.device}; "
            "expected all tensors to be on the same device"
        )


def readable(ids: Tensor) -> bool:
    """Whether a check may look at the values: an eager CPU tensor, where looking costs no synchronisation."""
    return (
        type(ids) is Tensor
        and ids.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not functorch_active()
    )


def in_range(function: str, name: str, ids: Tensor, count: int) -> None:
    """Raises IndexError that names position and value of the first id outside [0, count).

    Read for eager CPU tensors. Elsewhere it is for the kernels: native CPU code raises, on GPUs those of the embedding
    room report (`pykernels._errors`) and others skip what is invalid.
    """
    if ids.numel() == 0 or not readable(ids):
        return
    low, high = torch.aminmax(ids)
    if low.item() >= 0 and high.item() < count:
        return
    position = ((ids < 0) | (ids >= count)).nonzero()[0].tolist()
    where = f"{name}[{', '.join(map(str, position))}]" if position else name
    value = ids[tuple(position)].item()
    raise IndexError(f"{function}(): argument '{name}': {where} is {value}, which is not in [0, {count})")
