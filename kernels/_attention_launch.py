"""Tile sizes, and what all kernels of attention take alike: strides, masks, options."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _lib

LOG2E = 1.4426950408889634

#: The widest head: beyond, the operands of one tile do not fit in shared memory.
WIDEST = 256


class Tiles(NamedTuple):
    """How one kernel is launched: queries and keys in a tile, warps, stages of the software pipeline.

    apart: dk and dv in a launch each; a fifth product, but the sums of wide heads do not fit in registers together.
    registers: a limit for each thread, kept where no mask but the causal one takes some: then two blocks share a
    multiprocessor.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = False
    registers: int = 0

    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


#: (kernel, half precision) -> (head size up to, from this capability, Tiles); the first that fits is taken. Chosen so
#: that nothing spills, and from 90 on so that 64 rows of a product make four warps: fewer would be computed twice.
TABLE: dict[tuple[str, bool], tuple[tuple[int, int, Tiles], ...]] = {
    ("forward", True): (
        (64, 90, Tiles(128, 64, 8, 3, registers=128)),
        (128, 0, Tiles(128, 64, 8, 3)),
        (256, 90, Tiles(128, 64, 8, 2)),
        (256, 0, Tiles(64, 64, 8, 2)),
    ),
    ("dq", True): ((128, 0, Tiles(64, 64, 4, 2)), (256, 90, Tiles(128, 16, 8, 1)), (256, 0, Tiles(64, 32, 8, 1))),
    ("dkdv", True): (
        (64, 90, Tiles(64, 64, 4, 2)),
        (64, 0, Tiles(32, 64, 4, 2)),
        (128, 90, Tiles(32, 64, 4, 2)),
        (128, 0, Tiles(64, 64, 8, 2)),
        (256, 90, Tiles(16, 128, 8, 1, apart=True)),
        (256, 0, Tiles(32, 64, 8, 1)),
    ),
    ("dbias", True): ((128, 0, Tiles(64, 64, 4, 1)), (256, 90, Tiles(128, 64, 8, 1)), (256, 0, Tiles(64, 64, 8, 1))),
    ("forward", False): (
        (64, 0, Tiles(64, 32, 4, 2)),
        (128, 90, Tiles(128, 32, 8, 1)),
        (128, 0, Tiles(64, 32, 8, 1)),
        (256, 0, Tiles(32, 16, 8, 1)),
    ),
    ("dq", False): ((64, 0, Tiles(64, 32, 4, 1)), (128, 0, Tiles(64, 16, 4, 1)), (256, 0, Tiles(32, 32, 8, 1))),
    ("dkdv", False): (
        (64, 90, Tiles(32, 128, 8, 1)),
        (64, 0, Tiles(32, 64, 8, 1)),
        (128, 90, Tiles(16, 128, 8, 1, apart=True)),
        (256, 0, Tiles(32, 32, 8, 1, apart=True)),
    ),
    ("dbias", False): ((64, 0, Tiles(64, 32, 4, 1)), (128, 0, Tiles(64, 16, 4, 1)), (256, 0, Tiles(32, 32, 8, 1))),
}


#: What makes a kernel need more registers than its products do.
_EXTRAS = ("BIAS", "MASK", "SEEN", "ALIBI", "SOFTCAP", "DROPOUT", "LEFT", "PREFIX", "SEQUENCES")


def register_limit(tiles: Tiles, shared: dict[str, Any]) -> dict[str, int]:
    """The launch option for `Tiles.registers`, where the limit costs no spills; it is one of NVIDIA's."""
    ragged = (shared["D"], shared["DV"]) != (shared["BLOCK_D"], shared["BLOCK_DV"])
    if not tiles.registers or ragged or torch.version.hip is not None or any(shared[name] for name in _EXTRAS):
        return {}
    return {"maxnreg": tiles.registers}


def padded(size: int) -> int:
    """Columns of a tile for this head size; a product wants 16 at least."""
    return max(16, triton.next_power_of_2(size))


def tiles_for(kernel: str, query: Tensor, value: Tensor) -> Tiles:
    widest = padded(max(query.shape[-1], value.shape[-1]))
    capability = _lib.device_properties(query.device).capability
    choices = TABLE[kernel, query.dtype != torch.float32]
    return next(tiles for size, least, tiles in choices if widest <= size and capability >= least)


def precision(query: Tensor, value: Tensor) -> str:
    """How float32 products are made: of six bfloat16 products, unless torch allows tf32.

    tf32x3 takes as long and leaves out the product of the low parts, four float32 roundings: gradients, which are
    differences (dp - delta), then miss what torch's own float32 reaches. The pieces of heads beyond 128 do not fit in
    registers: there it is float32 arithmetic without tensor cores. Half precision does not look at this.
    """
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    wide = query.dtype == torch.float32 and max(query.shape[-1], value.shape[-1]) > 128
    return "ieee" if wide else "bf16x6"


def in_rows(x: Tensor) -> Tensor:
    """x with adjacent elements along the head size; copied where it has none, or where aligned rows would not be
    copied asynchronously (16 bytes at a time) for a stride alone."""
    aligned = all(s % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    if x.stride(-1) == 1 and (aligned or x.shape[-1] % 16):
        return x
    return x.contiguous()


def rows_like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Dense, with x's order of heads and positions (what the operators promise)."""
    if len(shape) == 4 and x.stride(1) < x.stride(2):
        batch, heads, length, size = shape
        return x.new_empty((batch, length, heads, size), dtype=dtype).transpose(1, 2)
    return x.new_empty(shape, dtype=dtype)


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, position) of a (B, H, L, D) tensor, or of a packed (total, H, D) one."""
    return (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]  # type: ignore[return-value]


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """`strides` for a tensor without head size."""
    return (0, x.stride(1), x.stride(0)) if x.dim() == 2 else x.stride()  # type: ignore[return-value]


class Sizes(NamedTuple):
    """lq and lk: lengths, packed: totals. limit_q, limit_k: bounds on one sequence's lengths."""

    batch: int
    heads: int
    lq: int
    lk: int
    limit_q: int
    limit_k: int

    def programs(self, tile: int, of_keys: bool, packed: bool) -> tuple[int, int]:
        """(tiles a head, programs)."""
        length = self.lk if of_keys else self.lq
        tiles = triton.cdiv(length, tile) + (self.batch if packed else 0)
        return tiles, tiles * self.heads * (1 if packed else self.batch)


def sizes(query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, *masks: Tensor | None) -> Sizes:
    if cu_seqlens_q is None:
        batch, heads, lq, _ = query.shape
        return Sizes(batch, heads, lq, key.shape[2], lq, key.shape[2])
    lq, heads, _ = query.shape
    lk = key.shape[0]
    given = [x for x in masks if x is not None]
    limit_q = min((x.shape[-2] for x in given if x.dim() == 4 and x.shape[-2] > 1), default=lq)
    limit_k = min((x.shape[-1] for x in given if x.shape[-1] > 1), default=lk)
    return Sizes(cu_seqlens_q.shape[0] - 1, heads, lq, lk, limit_q, limit_k)


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def seen_keys(
    mask: Tensor | None, key_padding_mask: Tensor | None, bias: Tensor | None, keys: int
) -> tuple[Tensor, Tensor] | None:
    """Which keys any query sees, as far as masks given as tensors say; uint8 (B or 1, H or 1, keys). And the first and
    one past the last of them, int32 (B or 1, H or 1, 2): what lies outside is not visited.

    Keys that nobody sees may hold NaN, which a weight of 0 does not silence: the kernels read them as 0.
    """
    found = []
    if key_padding_mask is not None:
        found.append(key_padding_mask[:, None])
    if mask is not None:
        found.append(mask.any(-2))
    if bias is not None:
        found.append(~(bias.amax(-2) <= torch.finfo(bias.dtype).min))
    if not found:
        return None
    seen = found[0]
    for other in found[1:]:
        seen = seen & other
    seen = seen.expand(*seen.shape[:2], keys)
    upward = torch.arange(1, keys + 1, dtype=torch.int32, device=seen.device)
    last = (seen * upward).amax(-1)
    first = keys - (seen * upward.flip(0)).amax(-1)
    return seen.view(torch.uint8), torch.stack((first, last), -1)


def shared_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    masks: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    size: Sizes,
) -> dict[str, Any]:
    """What every kernel takes, by name. query, key, value: as `in_rows` gives them."""
    mask, key_padding_mask, prefix, slopes, cu_q, cu_k, seed = masks
    causal, left, right, softcap, dropout_p, scale = options
    seen = seen_keys(mask, key_padding_mask, bias, size.limit_k)
    if causal != "none" and prefix is None:
        right = 0
    longest = size.lq + size.lk  # as good as unbounded, and 32 bits hold it
    arguments: dict[str, Any] = dict(zip(("q_b", "q_h", "q_l"), strides(query), strict=True))
    arguments |= zip(("k_b", "k_h", "k_l"), strides(key), strict=True)
    arguments |= zip(("v_b", "v_h", "v_l"), strides(value), strict=True)
    for name, x in (("bias", bias), ("mask", None if mask is None else mask.view(torch.uint8))):
        names = tuple(f"{name}_{d}" for d in "bhij")
        arguments |= zip(names, (0,) * 4 if x is None else broadcast_strides(x), strict=True)
        arguments[f"{name}_ptr"] = x
    for name, x, dims in (("seen", seen and seen[0], "bhj"), ("span", seen and seen[1], "bh")):
        steps = (0,) * len(dims) if x is None else broadcast_strides(x)[: len(dims)]
        arguments |= zip((f"{name}_{d}" for d in dims), steps, strict=True)
        arguments[f"{name}_ptr"] = x
    return arguments | {
        "prefix_ptr": prefix if causal != "none" else None,
        "slopes_ptr": slopes if slopes is None else slopes.contiguous(),
        "slopes_b": size.heads if slopes is not None and slopes.dim() == 2 else 0,
        "cu_q_ptr": cu_q,
        "cu_k_ptr": cu_k,
        "seed_ptr": seed if dropout_p > 0 else None,
        "heads": size.heads,
        "group": size.heads // key.shape[1] if key.shape[1] else 1,
        "batch": size.batch,
        "lq": size.lq,
        "lk": size.lk,
        "max_q": size.limit_q,
        "max_k": size.limit_k,
        "left": min(left, longest),
        "right": min(right, longest),
        "scale": scale / softcap if softcap else scale * LOG2E,
        "softcap": softcap * LOG2E,
        "threshold": min(round(dropout_p * 2.0**32), 2**32 - 1),
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_D": padded(query.shape[-1]),
        "BLOCK_DV": padded(value.shape[-1]),
        "PRECISION": precision(query, value),
        "TOP_LEFT": causal == "top_left",
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "PREFIX": causal != "none" and prefix is not None,
        "ALIBI": slopes is not None,
        "BIAS": bias is not None,
        "MASK": mask is not None,
        "SEEN": seen is not None,
        "LOWEST": torch.finfo(bias.dtype).min if bias is not None else -math.inf,
        "SOFTCAP": softcap > 0,
        "DROPOUT": dropout_p > 0,
        "SEQUENCES": 0 if cu_q is None else triton.next_power_of_2(max(size.batch, 1)),
    }
