"""The casts of an active autocast, made before anything is differentiated; gradients keep the caller's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, "Tensor | None")


# asked once: graphs of torch 2.11 break at the question
_AVAILABLE = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def enabled(device: torch.device) -> bool:
    """Whether autocast is active for tensors of this device (some, as meta, have none)."""
    return device.type in _AVAILABLE and torch.is_autocast_enabled(device.type)


def _cast(tensors: Sequence[T], dtype: torch.dtype) -> list[T]:
    return [t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def lower(tensors: Sequence[T], device: torch.device) -> list[T]:
    """The policy of torch's matrix products: under autocast its lower precision, but float64 and integers as given."""
    return _cast(tensors, torch.get_autocast_dtype(device.type)) if enabled(device) else list(tensors)


def float32(tensors: Sequence[T], device: torch.device) -> list[T]:
    """The policy of torch's losses: under autocast float32, but float64 and integers as given."""
    return _cast(tensors, torch.float32) if enabled(device) else list(tensors)
