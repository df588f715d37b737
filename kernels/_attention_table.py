"""Tile sizes of the attention kernels, by dtype, head size, capability and what a call adds to the products."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: What a call adds to the products, in rising need of registers: masks by position, the cap and ALiBi; also bias and
#: masks given as tensors; also dropout.
POSITIONS, TENSORS, DROPOUT = range(3)


class Tiles(NamedTuple):
    """How one kernel is launched: queries and keys in a tile, warps, stages of the software pipeline.

    serves: the most that a call may add (POSITIONS, TENSORS, DROPOUT).
    copied: tiles are fetched by the tensor copy engine, which takes a fifth of the registers off. Only for calls whose
    tensors it can read (`describable`).
    registers: a limit for each thread, with which two blocks share a multiprocessor.
    apart: dk and dv in a launch each; a fifth product, but the sums of wide heads do not fit in registers together.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    serves: int = DROPOUT
    copied: bool = False
    registers: int = 0
    apart: bool = False

    def options(self) -> dict[str, int]:
        """Constants and launch options; the limit of registers is one of NVIDIA's."""
        limit = {"maxnreg": self.registers} if self.registers and torch.version.hip is None else {}
        return {
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


#: (kernel, half precision) -> (head size up to, from this capability, Tiles); the first that fits is taken. Chosen so
#: that nothing spills, and from 90 on so that 64 rows of a product make four warps: fewer would be computed twice.
TABLE: dict[tuple[str, bool], tuple[tuple[int, int, Tiles], ...]] = {
    ("forward", True): (
        (64, 100, Tiles(128, 64, 4, 3, POSITIONS, copied=True)),
        (64, 90, Tiles(128, 64, 8, 3, POSITIONS, copied=True, registers=128)),
        (64, 0, Tiles(128, 64, 8, 3, TENSORS)),
        (128, 90, Tiles(128, 128, 8, 2, POSITIONS, copied=True)),
        (128, 90, Tiles(128, 64, 8, 3, TENSORS)),
        (128, 0, Tiles(128, 64, 8, 3, POSITIONS)),
        (128, 0, Tiles(64, 32, 4, 2)),
        (256, 90, Tiles(128, 64, 8, 2, POSITIONS, copied=True)),
        (256, 90, Tiles(128, 32, 8, 2, TENSORS)),
        (256, 90, Tiles(128, 16, 8, 2)),
        (256, 0, Tiles(64, 64, 8, 2)),
    ),
    ("dq", True): (
        (128, 90, Tiles(64, 64, 4, 2, POSITIONS, copied=True)),
        (64, 90, Tiles(64, 64, 4, 2, TENSORS)),
        (128, 90, Tiles(128, 32, 8, 2)),
        (128, 0, Tiles(64, 64, 4, 2, POSITIONS)),
        (64, 0, Tiles(64, 32, 4, 2)),
        (128, 0, Tiles(64, 32, 8, 2)),
        (256, 90, Tiles(128, 16, 8, 1)),
        (256, 0, Tiles(64, 32, 8, 1)),
    ),
    ("dkdv", True): (
        (64, 90, Tiles(64, 64, 4, 2, POSITIONS, copied=True)),
        (64, 90, Tiles(64, 64, 4, 2, POSITIONS)),
        (64, 90, Tiles(32, 64, 4, 2)),
        (64, 0, Tiles(32, 64, 4, 2, POSITIONS)),
        (64, 0, Tiles(32, 64, 8, 2)),
        (128, 90, Tiles(32, 64, 4, 2, POSITIONS, copied=True)),
        (128, 90, Tiles(32, 64, 4, 2, apart=True)),
        (128, 0, Tiles(64, 64, 8, 2, POSITIONS)),
        (128, 0, Tiles(32, 64, 8, 2, apart=True)),
        (256, 90, Tiles(16, 128, 8, 1, apart=True)),
        (256, 0, Tiles(32, 64, 8, 1)),
    ),
    ("dbias", True): ((64, 0, Tiles(64, 32, 4, 1)), (128, 0, Tiles(64, 16, 4, 1)), (256, 0, Tiles(64, 16, 8, 1))),
    ("forward", False): (
        (256, 100, Tiles(32, 16, 8, 1)),
        (64, 0, Tiles(64, 32, 4, 2)),
        (128, 90, Tiles(64, 16, 4, 1)),
        (128, 0, Tiles(64, 32, 8, 1)),
        (256, 0, Tiles(32, 16, 8, 1)),
    ),
    ("dq", False): (
        (64, 100, Tiles(32, 32, 8, 1)),
        (128, 100, Tiles(32, 16, 8, 1)),
        (64, 0, Tiles(64, 32, 4, 1)),
        (128, 90, Tiles(128, 16, 8, 1)),
        (128, 0, Tiles(64, 16, 4, 1)),
        (256, 0, Tiles(32, 32, 8, 1)),
    ),
    ("dkdv", False): (
        (64, 100, Tiles(32, 32, 8, 1, apart=True)),
        (128, 100, Tiles(16, 32, 8, 1, apart=True)),
        (64, 90, Tiles(32, 128, 8, 1)),
        (64, 0, Tiles(32, 64, 8, 1)),
        (128, 90, Tiles(16, 128, 8, 1, apart=True)),
        (256, 0, Tiles(32, 32, 8, 1, apart=True)),
    ),
    ("dbias", False): (
        (128, 100, Tiles(32, 16, 8, 1)),
        (64, 0, Tiles(64, 32, 4, 1)),
        (128, 0, Tiles(64, 16, 4, 1)),
        (256, 0, Tiles(32, 32, 8, 1)),
    ),
}
