"""Ids, lengths and offsets, looked at on csrc/cuda. `ext`: the CUDA module, or its emulation on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _errors
from ._extension import Extension

__all__ = ["check_values"]


def report_values(
    ext: Extension,
    values: Tensor,
    out: Tensor | None,
    what: int,
    kind: str,
    bound: int,
    fill: int = -1,
    ignored: bool = False,
    table: int = 0,
) -> None:
    """Reports the first wrong one, as `what`; out: the values, of wrong ids `fill`. All contiguous."""
    ext.call(
        "checks_values", values, out, _errors.record(values.device), what, values.dtype == torch.int32, values.numel(),
        bound, fill, ignored, table, kind,
    )  # fmt: skip


def check_values(
    ext: Extension, values: Tensor, function: str, argument: str, kind: str, bound: int, fill: int, ignored: bool
) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    report_values(ext, values, out, _errors.argument(function, argument, kind), kind, bound, fill, ignored)
    return out
