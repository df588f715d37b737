"""Defines operators in the `pykernels` namespace: one schema, one overload per backend, one fake, all in Python.

The dispatcher cannot choose between backends (native CPU code, the emulator and interpreted Triton all take CPU
tensors) and a choice made through a global would not be recorded in a compiled graph; so the backend is part of the
operator's name, `torch.ops.pykernels.unary_forward.cpu`. Native CPU implementations add themselves when `_cpu_ext`
loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, register_fake

from .._backends import BACKENDS, REBUILD, Room, functorch_active
from ..reference._random import seed_on

LIBRARY = Library("pykernels", "DEF")
_KEYS = {"triton": ("CPU", "CUDA"), "cuda": ("CUDA",), "emulator": ("CPU",)}

DEFINED: dict[str, Sequence[str]] = {}
"""Operator name -> its tensor arguments, for those that are elementwise in all of them (see integrations/dtensor)."""


def define(
    room: Room,
    schema: str,
    fake: Callable[..., Any],
    elementwise: Sequence[str] = (),
    backends: Sequence[str] = BACKENDS,
) -> dict[str, Callable[..., Any]]:
    """Defines `schema` ("name(args) -> returns") once per backend; returns backend -> operator handle.

    backends: those with kernels for it; what the room's other floors refuse has its overload there, and no kernel.
    """
    name, arguments = schema.split("(", 1)
    handles: dict[str, Callable[..., Any]] = {}
    for backend in BACKENDS:
        try:
            LIBRARY.define(f"{name}.{backend}({arguments}")
        except RuntimeError as error:
            if "C++ kernel" not in str(error):
                raise
            raise ImportError(
                f"pykernels._cpu_ext was built from other sources than these; rebuild: {REBUILD}"
            ) from error
        register_fake(f"pykernels::{name}.{backend}", fake, lib=LIBRARY)
        if backend in room.modules and backend in backends and backend in _KEYS:
            for key in _KEYS[backend]:
                LIBRARY.impl(f"{name}.{backend}", getattr(room.modules[backend], name), key)
        handles[backend] = getattr(getattr(torch.ops.pykernels, name), backend)
    if elementwise:
        DEFINED[name] = tuple(elementwise)
    return handles


LIBRARY.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _draw_seed(like: torch.Tensor) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("draw_seed", _draw_seed, _key)
register_fake("pykernels::draw_seed", lambda like: like.new_empty(1, dtype=torch.int64), lib=LIBRARY)

draw_seed = torch.ops.pykernels.draw_seed.default
"""A fresh 64-bit seed (one int64) from torch's generator of the tensor's device.

Tagged `nondeterministic_seeded`: without the tag a compiled checkpoint would silently draw another mask in its replay.
"""


def as_seed(seed: int | torch.Tensor | None, like: torch.Tensor, function: str) -> torch.Tensor:
    """The `seed` argument of a public function as a one-element int64 tensor on `like`'s device; None draws one.

    Raises:
        TypeError: not an int, None or an int64 tensor.   ValueError: a tensor of more than one element.
    """
    if seed is None:  # under vmap torch's own operator knows the `randomness` that was asked for, ours does not
        return _draw_seed(like) if functorch_active() else draw_seed(like)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(
                f"{function}(): seed must be an int or a one-element int64 tensor, not a {seed.dtype} tensor"
            )
        if seed.numel() != 1:
            raise ValueError(f"{function}(): seed must hold one element, not {seed.numel()}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{function}(): seed must be an int or a one-element int64 tensor, not {type(seed).__name__}")
    return seed_on(seed, like.device)
