"""The choice of tiles, and what all kernels of attention take alike: strides, masks, options, tensor descriptors."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _attended
from . import _lib
from ._attention_place import Masks, Numbers, Plane, Rows, Sizes
from ._attention_seen import attention_seen_kernel
from ._attention_table import DROPOUT, POSITIONS, TABLE, TENSORS, Tiles

#: The widest head: beyond, the operands of one tile do not fit in shared memory.
WIDEST = 256


def tiles_for(kernel: str, shared: dict[str, Any]) -> Tiles:
    """The first of TABLE that serves this call. shared: of `shared_arguments`, with "dout" in the backward."""
    query = shared["q"].ptr
    widest = max(shared["BLOCK_D"], shared["BLOCK_DV"])
    masks, numbers = shared["masks"], shared["numbers"]
    adds = TENSORS if masks.bias or masks.mask or masks.seen else POSITIONS
    adds = adds if numbers.seed is None else DROPOUT
    can_copy = describable(shared)
    for size, least, tiles in TABLE[kernel, query.dtype != torch.float32]:
        fits = widest <= size and architecture(query) >= least
        if fits and adds <= tiles.serves and (can_copy or not tiles.copied):
            return tiles
    raise AssertionError(f"{kernel} has no tiles for heads of {widest}")


def architecture(x: Tensor) -> int:
    """The capability whose tiles fit: 120 and on have the matrix instructions of 80, and less shared memory than 90;
    other vendors' numbers mean something else."""
    capability = _lib.device_properties(x.device).capability
    return 80 if capability >= 120 or torch.version.hip is not None else capability


def padded(size: int) -> int:
    """Columns of a tile for this head size; a product wants 16 at least."""
    return max(16, triton.next_power_of_2(size))


def precision(query: Tensor, value: Tensor) -> str:
    """How float32 products are made: of six bfloat16 products, unless torch allows tf32.

    tf32x3 takes as long and leaves out the product of the low parts, four float32 roundings: gradients, which are
    differences (dp - delta), then miss what torch's own float32 reaches. The pieces of heads beyond 128 do not fit in
    registers, and for capability 100 Triton 3.7 makes a kernel of six products that consists of a trap: there it is
    float32 arithmetic without tensor cores. Half precision does not look at this.
    """
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    wide = query.dtype == torch.float32 and max(query.shape[-1], value.shape[-1]) > 128
    return "ieee" if wide or architecture(query) >= 100 else "bf16x6"


def in_rows(x: Tensor) -> Tensor:
    """x with adjacent elements along the head size; copied where it has none, or where aligned rows would not be
    copied asynchronously (16 bytes at a time) for a stride alone."""
    aligned = all(s % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    if x.stride(-1) == 1 and (aligned or x.shape[-1] % 16):
        return x
    return x.contiguous()


def rows(x: Tensor) -> Rows:
    """For the kernels: a (B, H, L, D) tensor, or a packed (total, H, D) one."""
    return Rows(x, 0, x.stride(1), x.stride(0)) if x.dim() == 3 else Rows(x, *x.stride()[:3])


def lines(x: Tensor) -> Rows:
    """`rows` for a tensor without head size."""
    return Rows(x, 0, x.stride(1), x.stride(0)) if x.dim() == 2 else Rows(x, *x.stride())


def sizes(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *masks: Tensor | None
) -> Sizes:
    """masks: tensors over queries and keys, which bound the lengths of packed sequences."""
    heads, kv_heads = query.shape[1], key.shape[1]
    group = heads // kv_heads if kv_heads else 1
    if cu_seqlens_q is None:
        batch, _, lq, _ = query.shape
        return Sizes(batch, heads, group, lq, key.shape[2], lq, key.shape[2], None, None)
    lq, lk = query.shape[0], key.shape[0]
    bounds = _attended.longest(lq, lk, *masks)
    return Sizes(cu_seqlens_q.shape[0] - 1, heads, group, lq, lk, *bounds, cu_seqlens_q, cu_seqlens_k)


def programs(size: Sizes, tile: int, of_keys: bool = False) -> tuple[int, int]:
    """(tiles a head, programs); with packed sequences a bound on both."""
    packed = size.cu_q is not None
    tiles = triton.cdiv(size.lk if of_keys else size.lq, tile) + (size.batch if packed else 0)
    return tiles, tiles * size.heads * (1 if packed else size.batch)


def plane(x: Tensor | None) -> Plane | None:
    return None if x is None else Plane(x, *_attended.broadcast_strides(x))


def seen_together(query: Tensor, shared: dict[str, Any]) -> Masks:
    """The masks with `seen` and `span` of all of them together; a pass over the tensors among them."""
    size, masks = shared["size"], shared["masks"]
    seen = torch.zeros(size.batch, size.heads, size.max_k, dtype=torch.uint8, device=query.device)
    block_q, block_k = 16, 64  # eight elements a thread, whose addresses are 64 bits each
    a_head, count = programs(size, block_k, of_keys=True)
    named = {name: shared[name] for name in ("size", "TOP_LEFT", "LOWEST", "SEQUENCES")}
    bare = {"masks": masks._replace(slopes=None), "numbers": shared["numbers"]._replace(seed=None)}
    _lib.launch(
        attention_seen_kernel, (count,), query, seen, tiles=a_head, **named, **bare, BLOCK_Q=block_q, BLOCK_K=block_k
    )
    span = _attended.span_of(seen)
    return masks._replace(
        seen=Rows(seen, *_attended.broadcast_strides(seen)), span=Rows(span, *_attended.broadcast_strides(span)[:2], 1)
    )


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
    mask, key_padding_mask, prefix, slopes, _, _, seed = masks
    causal, left, right, softcap, dropout_p, scale = options
    if causal == "none":
        prefix = None
    elif prefix is None:
        right = 0
    together = (mask is not None) + (bias is not None) + (left >= 0 or right >= 0) > 1
    alone = (None, key_padding_mask, None) if together else (mask, key_padding_mask, bias)
    seen, span = _attended.seen_keys(*alone, size.max_k)
    least, keep_scale = _attended.kept(dropout_p)
    of_products, cap = _attended.factors(scale, softcap)
    longest = size.lq + size.lk  # as good as unbounded, and 32 bits hold it
    shared = {
        "q": rows(query),
        "k": rows(key),
        "v": rows(value),
        "size": size,
        "masks": Masks(
            left=min(left, longest) if left >= 0 else None,
            right=min(right, longest) if right >= 0 else None,
            prefix=prefix,
            bias=plane(bias),
            mask=plane(None if mask is None else mask.view(torch.uint8)),
            seen=None if seen is None else Rows(seen, *_attended.broadcast_strides(seen)),
            span=None if span is None else Rows(span, *_attended.broadcast_strides(span)[:2], 1),
            slopes=None if slopes is None else Rows(slopes.contiguous(), size.heads * (slopes.dim() - 1), 1, 0),
        ),
        "numbers": Numbers(
            scale=of_products,
            softcap=cap if softcap else None,
            seed=seed if dropout_p > 0 else None,
            threshold=least,
            keep_scale=keep_scale,
        ),
        "D": query.shape[-1],
        "DV": value.shape[-1],
        "BLOCK_D": padded(query.shape[-1]),
        "BLOCK_DV": padded(value.shape[-1]),
        "PRECISION": precision(query, value),
        "TOP_LEFT": causal == "top_left",
        "LOWEST": torch.finfo(bias.dtype).min if bias is not None else -math.inf,
        "SEQUENCES": 0 if size.cu_q is None else triton.next_power_of_2(max(size.batch, 1)),
    }
    if together:
        shared["masks"] = seen_together(query, shared)
    return shared


def descriptors(tiles: Tiles, shared: dict[str, Any]) -> dict[str, TensorDescriptor | None]:
    """`q_desc`, `k_desc`, `v_desc` and, in the backward, `dout_desc`: None where `tiles` does without."""
    sizes = {"q": (tiles.queries, "D"), "k": (tiles.keys, "D"), "v": (tiles.keys, "DV"), "dout": (tiles.queries, "DV")}
    return {
        f"{name}_desc": described(shared[name].ptr, rows, shared[f"BLOCK_{width}"]) if tiles.copied else None
        for name, (rows, width) in sizes.items()
        if name in shared
    }


def describable(shared: dict[str, Any]) -> bool:
    """Whether the copy engine can fetch the tiles. It reads whole tensors: keys hidden from every query would not be
    read as 0, and packed sequences would not end."""
    tensors = [shared[name].ptr for name in ("q", "k", "v", "dout") if name in shared]
    return all_keys_seen(shared) and all(map(can_be_described, tensors))


def all_keys_seen(shared: dict[str, Any]) -> bool:
    """Whether every key is seen by some query, as far as is known here (`places.here` has the same limits)."""
    size, masks = shared["size"], shared["masks"]
    if size.cu_q is not None or masks.seen is not None:
        return False
    shift = 0 if shared["TOP_LEFT"] else size.lk - size.lq
    bounded = masks.right if masks.prefix is None else 0
    last = size.lk if bounded is None else size.lq + shift + bounded
    return last >= size.lk and (masks.left is None or shift <= masks.left)


def can_be_described(x: Tensor) -> bool:
    """What a tensor map asks for: rows at multiples of 16 bytes, nothing expanded, nothing empty. It is NVIDIA's."""
    steps = [s * x.element_size() for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    aligned = x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
    return aligned and x.numel() > 0 and all(s > 0 and s % 16 == 0 for s in steps) and torch.version.hip is None


def described(x: Tensor, height: int, width: int) -> TensorDescriptor:
    """x read in tiles of height rows of one head; a width beyond the head size reads 0."""
    steps = [x.shape[-1] * 16 if n == 1 else s for n, s in zip(x.shape[:-1], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, height, width])
