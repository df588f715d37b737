"""The bags of a call, as the launchers of csrc/cuda take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _errors
from ._extension import Extension
from .checks import report_values


class Bags:
    """The bags of one call: how many, and where they begin and end. A lookup is bags of one id."""

    def __init__(self, ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
        self.ids = ids.reshape(-1).contiguous()
        self.n, self.narrow = self.ids.numel(), ids.dtype == torch.int32
        self.offsets = None if offsets is None else offsets.long().contiguous()
        self.last = include_last_offset and offsets is not None
        self.count = ids.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
        self.length = ids.shape[1] if offsets is None else 0

    def record(self, ext: Extension, what: int, table: int = 0) -> Tensor | None:
        """Where kernels report invalid ids; offsets are looked at here.

        what: the code of the ids, that of the offsets is one more; 0 for no reports. table: its number.
        """
        if what == 0:
            return None
        if self.offsets is not None:
            report_values(ext, self.offsets, None, what + 1, "offsets", self.n, table=table)
        return _errors.record(self.ids.device)

    def sizes(self, ext: Extension, mode: str, rows: int, padding: int) -> Tensor | None:
        """What the sums of each bag are divided by, None for 1."""
        if mode != "mean":
            return None
        sizes = torch.empty(self.count, dtype=torch.float32, device=self.ids.device)
        ext.call(
            "embedding_bag_sizes", self.ids, self.offsets, sizes, self.narrow, self.count, self.length, self.n,
            self.last, rows, padding,
        )  # fmt: skip
        return sizes


def flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()
