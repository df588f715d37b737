"""What kernels on a device found wrong with ids, lengths and offsets, told to the host without waiting for the device.

A kernel that meets an invalid value skips it (reads nothing, writes nothing for it) and reports it in the *record* of
its device: int64 words in memory that the device writes and the host reads (pinned memory on CUDA: a kernel takes it
like any pointer, and reading it needs no synchronisation). The next call of a checked function raises what it finds
there, `pykernels.check_errors()` waits for the devices first. CUDA graphs replay reports like everything else.

The words of a record, all 0 while nothing is wrong:

| word | |
|---|---|
| 0 | 1: taken, by an atomic compare-and-swap from 0; who wins writes the other words, who loses nothing. 2: written |
| 1 | what: the code of the argument (`code`, `argument`) |
| 2 | position of the value in the (flattened) argument |
| 3 | value |
| 4 | bound: ids must be in [0, bound), offsets in [0, bound] |
| 5 | table: number of the table where the argument is a list, else 0 |

A kernel that is given the code 0 reports nothing (`bounds_check="none"`). Kernels on CPU tensors (the emulator's and
interpreted Triton's) report the same way; native CPU code raises before it writes anything.
"""

from __future__ import annotations

import ctypes
import threading
from typing import NamedTuple

import torch
from torch import Tensor

WORDS = 8
CHECKS = ("error", "sync", "none")
_Words = ctypes.c_int64 * WORDS
WRITTEN = 2  #: word 0 of a record that is to be raised


class Argument(NamedTuple):
    """What a code stands for. kind: "ids", "offsets" (of bags), "ends" (`cu_seqlens`) or "counts"; many: a list."""

    function: str
    name: str
    kind: str = "ids"
    many: bool = False


_RULES = {
    "offsets": "; offsets must begin with 0, not decrease, and not exceed {bound}, the number of ids",
    "ends": "; they must begin with 0, not decrease, and end with {bound}",
    "counts": "; it must not be negative",
}

_records: dict[torch.device, Tensor] = {}
_codes: dict[int, Argument] = {}
_numbers: dict[Argument, int] = {}
_lock = threading.Lock()


def argument(function: str, name: str, kind: str = "ids", many: bool = False) -> int:
    """The code of an argument, for as long as the process lives: graphs that outlive it must keep the names."""
    given = Argument(function, name, kind, many)
    found = _numbers.get(given)
    if found is None:
        with _lock:
            found = _numbers.setdefault(given, len(_numbers) + 1)
            _codes[found] = given
    return found


def code(function: str, ids: str = "input", offsets: str = "offsets", many: bool = False) -> int:
    """The code of a function's ids; that of its offsets (or of other ids, by their name) is one more.

    Called while importing, in an order that does not change, so that a compiled graph may keep the number.
    """
    number = argument(function, ids, many=many)
    argument(function, offsets, "offsets" if offsets.endswith("offsets") else "ids", many)
    return number


def record(device: torch.device) -> Tensor:
    """The record that kernels on this device write to: int64[8], for as long as the process lives."""
    found = _records.get(device)
    if found is None:
        # In whatever mode the caller is: an inference tensor could not be emptied outside of it.
        with torch.inference_mode(False):
            found = torch.zeros(WORDS, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        found = _records.setdefault(device, found)
    return found


def any_records() -> bool:
    """Whether kernels have asked for a record on any device."""
    return bool(_records)


def raise_recorded() -> None:
    """Raises what a record holds by now, without waiting for any device; the record is empty then."""
    for device, found in list(_records.items()):
        words = _Words.from_address(found.data_ptr())  # not by torch, whose modes (fake tensors, tracing) would see it
        if words[0] == WRITTEN:
            with _lock:  # of two threads that find it one raises
                state, what, position, value, bound, table = words[:6]
                if state != WRITTEN:
                    continue
                words[1:] = [0] * (WORDS - 1)
                words[0] = 0  # last: from now on kernels may write again
            raise error(device, what, position, value, bound, table)


def error(device: torch.device, what: int, position: int, value: int, bound: int, table: int = 0) -> Exception:
    """The exception for a wrong value: IndexError for ids, ValueError for the other kinds."""
    function, name, kind, many = _codes.get(what, Argument("a kernel", "of unknown name"))
    where = f"{name}[{table}][{position}]" if many else f"{name}[{position}]"
    found = f"{function}(): argument '{name}' on {device}: {where} (counted flat) is {value}"
    if kind == "ids":
        return IndexError(f"{found}, which is not in [0, {bound})")
    return ValueError(found + _RULES[kind].format(bound=bound))


def check_errors() -> None:
    """Raises the first invalid id, label, length or offset that kernels have met since the last time one was raised.

    Waits for the devices. Kernels skip what is invalid and go on, and every checked call raises what was found by then;
    so this is needed only where an error must be known at a certain point, after the last call or a CUDA graph's
    replay.

    Raises:
        IndexError: an id, label or length out of its range, named with its position (in the flattened argument) and
            value.
        ValueError: offsets or `cu_seqlens` that do not begin with 0, decrease, or do not end where they must; a
            negative prefix length.
    """
    for device in list(_records):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    raise_recorded()
