"""Ids, lengths and offsets, looked at on Triton; and how kernels report what is invalid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _errors
from . import _lib

__all__ = ["check_values"]

#: Numbers of a call that change no address: no reason to compile again.
_NUMBERS = ("what", "bound", "fill", "table")


@triton.jit
def report(record_ptr, what, position, value, bound, table):
    """Tells the host of an invalid value, unless another one was told before; see pykernels/_errors.py."""
    taken = tl.atomic_cas(record_ptr, tl.full((), 0, tl.int64), tl.full((), 1, tl.int64), scope="sys")
    if taken == 0:
        tl.store(record_ptr + 1, what)
        tl.store(record_ptr + 2, position)
        tl.store(record_ptr + 3, value)
        tl.store(record_ptr + 4, bound)
        tl.store(record_ptr + 5, table)
        # released: the host, which waits for nothing, must not see half a record
        tl.atomic_xchg(record_ptr, tl.full((), 2, tl.int64), sem="release", scope="sys")


@triton.jit
def first_wrong(values_ptr, index, n, bound, fill, IGNORED: tl.constexpr, SORTED: tl.constexpr):
    """(the values, which of them are wrong, the lowest index of a wrong one or n)"""
    live = index < n
    value = tl.load(values_ptr + index, mask=live, other=0).to(tl.int64)
    if SORTED:
        before = tl.load(values_ptr + index - 1, mask=live & (index > 0), other=0).to(tl.int64)
        wrong = (value < before) | (value > bound) | ((index == 0) & (value != 0))
    else:
        wrong = (value < 0) | (value >= bound)
        if IGNORED:
            wrong = wrong & (value != fill)
    return value, wrong & live, tl.min(tl.where(wrong & live, index, n), 0)


@triton.jit(do_not_specialize=_NUMBERS)
def check_kernel(
    values_ptr, out_ptr, record_ptr, what, n, bound, fill, table,
    IGNORED: tl.constexpr, SORTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    index = begin + tl.arange(0, BLOCK)
    value, wrong, first = first_wrong(values_ptr, index, n, bound, fill, IGNORED, SORTED)
    if out_ptr is not None:
        kept = value if SORTED else tl.where(wrong, fill, value)
        tl.store(out_ptr + index, kept.to(out_ptr.dtype.element_ty), mask=index < n)
    if first < n:  # rare, so it may take its time: the earliest program that has something to report reports it
        earlier = first
        for before in range(0, begin, BLOCK):
            index = before + tl.arange(0, BLOCK).to(tl.int64)
            _, _, found = first_wrong(values_ptr, index, n, bound, fill, IGNORED, SORTED)
            earlier = tl.minimum(earlier, found)
        if earlier == first:
            report(record_ptr, what, first, tl.load(values_ptr + first).to(tl.int64), bound, table)


@triton.jit(do_not_specialize=("what", "bound"))
def check_ends_kernel(values_ptr, out_ptr, record_ptr, what, n, bound, BLOCK: tl.constexpr):
    """One program: there are as many ends as sequences."""
    first = tl.full((), 0, tl.int64) + n
    for begin in range(0, n, BLOCK):
        index = begin + tl.arange(0, BLOCK).to(tl.int64)
        value, _, found = first_wrong(values_ptr, index, n, bound, 0, False, True)
        first = tl.minimum(first, found)
        tl.store(out_ptr + index, value.to(out_ptr.dtype.element_ty), mask=index < n)
    last = tl.load(values_ptr + n - 1).to(tl.int64)
    if (first == n) & (last != bound):
        first = tl.full((), -1, tl.int64) + n
    if first < n:
        report(record_ptr, what, first, tl.load(values_ptr + first).to(tl.int64), bound, 0)
        end = last * 0  # rare: they are put right one by one, so that sequences neither overlap nor leave rows out
        tl.debug_barrier()
        for i in range(0, n):
            if i > 0:
                end = tl.minimum(tl.maximum(tl.load(values_ptr + i).to(tl.int64), end), bound)
                if i == n - 1:
                    end = tl.maximum(end, bound)
            tl.store(out_ptr + i, end.to(out_ptr.dtype.element_ty))


def report_values(
    values: Tensor,
    out: Tensor | None,
    what: int,
    kind: str,
    bound: int,
    fill: int = -1,
    ignored: bool = False,
    table: int = 0,
) -> None:
    """Reports the first wrong one, as `what`. All contiguous.

    kind: "ids" are in [0, bound), or `fill` where `ignored`; "offsets" begin with 0, do not decrease and do not exceed
    bound; "ends" do too, and the last one is bound. out: the values; of wrong ids `fill`, wrong ends put right; None
    for offsets.
    """
    n, record = values.numel(), _errors.record(values.device)
    if n == 0:
        return
    if kind == "ends":
        _lib.launch(check_ends_kernel, (1,), values, values, out, record, what, n, bound, BLOCK=256)
        return
    block = 1024
    _lib.launch(
        check_kernel, (triton.cdiv(n, block),), values, values, out, record, what, n, bound, fill, table,
        IGNORED=ignored, SORTED=kind == "offsets", BLOCK=block,
    )  # fmt: skip


def check_values(
    values: Tensor, function: str, argument: str, kind: str, bound: int, fill: int, ignored: bool
) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    report_values(values, out, _errors.argument(function, argument, kind), kind, bound, fill, ignored)
    return out
