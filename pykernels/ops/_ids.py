"""Checks of ids, labels, lengths and offsets, whatever the room.

Eager CPU tensors are looked at by the public functions, at once (`in_range`). Elsewhere looking would wait for the
device or cannot be traced: there the operator `check_values` looks (`checked`). On GPUs it reports what is wrong
(`pykernels._errors`) and gives invalid ids a value that the kernels skip; on the CPU, in graphs, it raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _errors
from .._backends import Room, functorch_active, is_compiling
from ._library import LIBRARY, define


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
    return type(ids) is Tensor and ids.is_cpu and not is_compiling() and not functorch_active()


def in_range(function: str, name: str, ids: Tensor, count: int) -> None:
    """Raises IndexError that names position and value of the first id outside [0, count).

    Read for eager CPU tensors only; see `checked`.
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


_CHECKS = define(
    Room("checks"),
    "check_values(Tensor values, str function, str argument, str kind, SymInt bound, int fill, bool ignored) -> Tensor",
    lambda values, *_: torch.empty_like(values, memory_format=torch.contiguous_format),
)


def _look(values: Tensor, function: str, argument: str, kind: str, bound: int, fill: int, ignored: bool) -> Tensor:
    """On the CPU: raises; gives the values."""
    flat = values.reshape(-1)
    if kind in ("ids", "counts"):
        wrong = ((flat < 0) | (flat >= bound)) & ~(ignored & (flat == fill))
    else:
        before = torch.cat([flat.new_zeros(1), flat[:-1]])
        wrong = (flat < before) | (flat > bound)
        wrong[:1] |= flat[:1] != 0
        wrong[-1:] |= (flat[-1:] != bound) & (kind == "ends")
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        what = _errors.argument(function, argument, kind)
        raise _errors.error(values.device, what, at, int(flat[at]), bound)
    return values.clone(memory_format=torch.contiguous_format)


# in plain torch both: native kernels look again, to guard memory
LIBRARY.define(
    "check_values.reference(Tensor values, str function, str argument, str kind, SymInt bound, int fill, bool ignored) "
    "-> Tensor"
)
torch.library.register_fake(
    "pykernels::check_values.reference",
    lambda values, *_: torch.empty_like(values, memory_format=torch.contiguous_format),
    lib=LIBRARY,
)
for _backend in ("cpu", "reference"):
    LIBRARY.impl(f"check_values.{_backend}", _look, "CPU")
_CHECKS["reference"] = torch.ops.pykernels.check_values.reference


def before(function: str, bounds_check: str) -> None:
    """Raises what kernels have reported by now, but for "none"; ValueError for an unknown `bounds_check`."""
    if bounds_check not in _errors.CHECKS:
        allowed = ", ".join(_errors.CHECKS)
        raise ValueError(f"{function}(): argument 'bounds_check' must be one of {allowed}, not {bounds_check!r}")
    if bounds_check != "none" and not is_compiling() and _errors.any_records():
        _errors.raise_recorded()


def after(bounds_check: str) -> None:
    """For `bounds_check="sync"`: waits for this call's kernels and raises what they reported."""
    if bounds_check == "sync" and not is_compiling():
        _errors.check_errors()


def checked(
    backend: str,
    bounds_check: str,
    function: str,
    name: str,
    values: Tensor,
    bound: int,
    kind: str = "ids",
    fill: int = -1,
    ignored: bool = False,
) -> Tensor:
    """The values for the kernels of `backend`, invalid ids as `fill`; as they are where they were looked at before.

    kind: "ids" in [0, bound), or `fill` where `ignored`; "counts", the same with another message; "ends" (`cu_seqlens`)
    begin with 0, do not decrease and end with bound; wrong ones are put right.
    """
    if readable(values) or functorch_active() or (bounds_check == "none" and backend not in ("cpu", "reference")):
        return values
    if backend == "reference" and not values.is_cpu:
        return values  # torch's own device-side assertions
    result: Tensor = _CHECKS[backend](values, function, name, kind, bound, fill, ignored)
    return result
