"""What kernels on a device found wrong with ids and offsets, told to the host without waiting for the device.

A kernel that meets an invalid id skips it (reads nothing, writes nothing for it) and reports it in the *record* of its
device: int64 words in memory that the device writes and the host reads (pinned memory on CUDA: a kernel takes it like
any pointer, and reading it needs no synchronisation). The next call of a checked function on that device raises what
it finds there, `pykernels.check_errors()` waits for the devices first. CUDA graphs replay reports like everything else.

The words of a record, all 0 while nothing is wrong:

| word | |
|---|---|
| 0 | taken: an atomic compare-and-swap from 0 to 1; who wins writes the other words, who loses writes nothing |
| 1 | what: the code of the argument (`code`); kernels get that of the ids, and add 1 where offsets are wrong |
| 2 | position of the value in the (flattened) argument |
| 3 | value |
| 4 | bound: ids must be in [0, bound), offsets in [0, bound] |
| 5 | table: number of the table where the argument is a list, else 0 |

A kernel that is given the code 0 reports nothing (`bounds_check="none"`). Kernels on CPU tensors (the emulator's and
interpreted Triton's) report the same way; native CPU code raises before it writes anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = 8
CHECKS = ("error", "sync", "none")

_records: dict[torch.device, Tensor] = {}
_codes: dict[int, tuple[str, str, bool]] = {}  # code -> function, argument, whether it is a list


def code(function: str, ids: str = "input", offsets: str = "offsets", many: bool = False) -> int:
    """Registers a function's arguments of ids and offsets; returns the code of the ids, the offsets' is one more.

    Called while importing, in an order that does not change, so that a compiled graph may keep the number.
    """
    number = len(_codes) + 1
    _codes[number], _codes[number + 1] = (function, ids, many), (function, offsets, many)
    return number


def record(device: torch.device) -> Tensor:
    """The record that kernels on this device write to: int64[8], for as long as the process lives."""
    found = _records.get(device)
    if found is None:
        found = torch.zeros(WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        found = _records.setdefault(device, found)
    return found


def any_records() -> bool:
    """Whether kernels have asked for a record on any device."""
    return bool(_records)


def raise_recorded() -> None:
    """Raises what a record holds by now, without waiting for any device; the record is empty then."""
    for device, found in list(_records.items()):
        taken, what, position, value, bound, table = found[:6].tolist()
        if taken:
            found.zero_()
            raise _error(device, what, position, value, bound, table)


def _error(device: torch.device, what: int, position: int, value: int, bound: int, table: int) -> Exception:
    function, argument, many = _codes.get(what, ("a kernel", "of unknown name", False))
    where = f"{argument}[{table}][{position}]" if many else f"{argument}[{position}]"
    found = f"{function}(): argument '{argument}' on {device}: {where} (counted flat) is {value}"
    if argument.endswith("offsets"):
        return ValueError(
            f"{found}; offsets must begin with 0, not decrease, and not exceed {bound}, the number of ids"
        )
    return IndexError(f"{found}, which is not in [0, {bound})")


def check_errors() -> None:
    """Raises the first invalid id or offset that kernels have met on any device since the last time one was raised.

    Waits for the devices. Kernels skip what is invalid and go on, and every checked call raises what was found by then;
    so this is needed only where an error must be known at a certain point, after the last call or a CUDA graph's
    replay.

    Raises:
        IndexError: an id outside its table, named with its position (in the flattened argument) and value.
        ValueError: offsets that do not begin with 0, decrease, or exceed the number of ids.
    """
    for device in list(_records):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    raise_recorded()
