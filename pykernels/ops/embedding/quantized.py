"""Tables of 8- and 4-bit codes with a scale and a bias for each row: packing, and lookups for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .. import _check, _ids
from .._library import define
from ._checks import before, check_bags, check_offsets, check_padding, offsets_for_reference, report_code
from ._functions import ROOM

__all__ = ["dequantize_rows", "embedding_bag_quantized", "quantize_rows"]

_BAG = report_code("embedding_bag_quantized", "indices")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _fake_bag(
    packed: Tensor, ids: Tensor, offsets: Tensor | None, scale: Tensor | None, bits: int, mode: str, last: bool,
    padding: int, dtype: torch.dtype, what: int,
) -> Tensor:  # fmt: skip
    size = (packed.shape[1] - bits) * (8 // bits)
    if mode == "none":
        return packed.new_empty((*ids.shape, size), dtype=dtype)
    return packed.new_empty((ids.shape[0] if offsets is None else offsets.shape[0] - int(last), size), dtype=dtype)


# Rows of `packed` have unit inner stride and any outer one. mode: "none" (plain lookup: ids of any shape), "sum",
# "mean"; per_sample_weights: float32. padding_idx: -1 for none. Invalid ids and offsets: as in _functions.py.
embedding_bag_quantized_forward = define(
    ROOM,
    "embedding_bag_quantized_forward(Tensor packed, Tensor ids, Tensor? offsets, Tensor? per_sample_weights, int bits, "
    "str mode, bool include_last_offset, int padding_idx, ScalarType dtype, int what) -> Tensor",
    _fake_bag,
)
quantize_rows_forward = define(
    ROOM,
    "quantize_rows_forward(Tensor weight, int bits) -> Tensor",
    lambda weight, bits: weight.new_empty((weight.shape[0], weight.shape[1] // (8 // bits) + bits), dtype=torch.uint8),
)


def quantize_rows(weight: Tensor, bits: int = 8, *, backend: str | None = None) -> Tensor:
    """Packs each row of a table into codes of 8 or 4 bits with a scale and a bias: `row ~ scale * code + bias`.

    The bytes are those of `torch.ops.quantized.embedding_bag_byte_prepack` and `embedding_bag_4bit_prepack` (FBGEMM's
    fused row-wise formats), so each side reads what the other has packed; `pykernels.reference.quantize_rows` has the
    formulas. Equal to the byte for finite rows, but for the sign of a bias of zero. A row with a NaN or an infinity,
    or whose range (with 4 bits: scale or bias, as float16) overflows, reads as NaN in all of its columns; torch
    loses NaN. The error of an element is at most half a scale, (max - min) / 510 or about (max - min) / 30. Constant
    rows are kept (4 bits: to float16's rounding).

    Args:
        weight: Tensor[V, D]; float32, float16, bfloat16, or float64 (rounded to float32 first); any strides. Not
            differentiable.
        bits: 8 or 4. With 4 D must be even, as in torch: pad the table by a column.
        backend: see `pykernels.explain`.

    Returns:
        uint8 Tensor[V, D + 8]: codes, then scale and bias as float32; for 4 bits Tensor[V, D / 2 + 4]: two codes a
        byte, the even column's in the low half, then scale and bias as float16.

    Raises:
        TypeError: `weight` is not a Tensor.   NotImplementedError: another dtype.
        ValueError: `weight` is not 2-D; `bits` is not 8 or 4; D is odd with 4 bits.
        BackendError: the named backend cannot serve the call.
    """
    name = "quantize_rows"
    _check.tensor(name, "weight", weight)
    _check.floating(name, "weight", weight)
    _check_bits(name, bits)
    if weight.dim() != 2:
        raise ValueError(f"{name}(): argument 'weight' must be 2-D, not {weight.dim()}-D")
    if bits == 4 and weight.shape[1] % 2:
        raise ValueError(
            f"{name}(): argument 'weight' must have an even number of columns with bits 4, not {weight.shape[1]}; "
            "pad it by a column"
        )
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    backend = ROOM.resolve(name, backend, weight)
    if backend == "reference":
        return reference.quantize_rows(weight, bits)
    return quantize_rows_forward[backend](weight, bits)


def dequantize_rows(
    packed: Tensor, bits: int = 8, *, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Tensor:
    """The table that a packed one stands for: `scale * code + bias`, row by row; inverse of `quantize_rows`.

    Args:
        packed: uint8 Tensor[V, D + 8] (bits 8) or Tensor[V, D / 2 + 4] (bits 4), as `quantize_rows` gives it.
        bits: 8 or 4.
        dtype: of the result: float32, float16, bfloat16 or float64. The arithmetic is float32 (float64 for float64).
        backend: see `pykernels.explain`.

    Returns:
        Tensor[V, D] of `dtype`.

    Raises:
        TypeError, NotImplementedError, ValueError, BackendError: as `embedding_bag_quantized`.
    """
    name = "dequantize_rows"
    packed = _check_packed(name, packed, bits, dtype)
    backend = ROOM.resolve(name, backend, packed, *_features(dtype))
    if backend == "reference":
        return reference.dequantize_rows(packed, bits, dtype)
    every = torch.arange(packed.shape[0], device=packed.device)
    return embedding_bag_quantized_forward[backend](packed, every, None, None, bits, "none", False, -1, dtype, 0)


def embedding_bag_quantized(
    packed: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    bits: int = 8,
    mode: str | None = "sum",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    dtype: torch.dtype = torch.float32,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Lookup in a table packed by `quantize_rows`, for inference: `embedding_bag` of the table it stands for.

    `output[b] = sum over i of per_sample_weights[i] * (scale * code + bias)[indices[i]]`, i running over the positions
    of bag b whose id is not `padding_idx`; "mean" divides by their number. Rows are unpacked in registers, so the
    bytes read are those of the packed rows: for D = 128 a quarter (bits 8) or an eighth (4) of float32's, and a little.

    Args:
        packed: uint8 Tensor[V, D + 8] (bits 8) or Tensor[V, D / 2 + 4] (bits 4), of `quantize_rows` or of
            `torch.ops.quantized.embedding_bag_byte_prepack` / `embedding_bag_4bit_prepack`.
        indices: ids, int32 or int64: Tensor[B, L], B bags of L, or Tensor[N], bags one after the other; of any shape
            with mode None.
        offsets: int32 or int64 Tensor[B] (Tensor[B + 1] with `include_last_offset`), the position where each bag
            begins; only with, and required by, 1-D `indices`. None with mode None.
        bits: 8 or 4.
        mode: "sum", "mean", or None for plain lookup.
        per_sample_weights: float32 Tensor of `indices`' shape, not differentiable; not with mode None.
        include_last_offset, bounds_check: as in `embedding_bag`.
        padding_idx: this id (negative counts from V) is left out of every bag. With mode None its row is returned like
            any other.
        dtype: of the result: float32, float16, bfloat16 or float64. Sums are taken in float32 (float64 for float64)
            and rounded once.
        backend: see `pykernels.explain`.

    Returns:
        Tensor[B, D] of `dtype`; with mode None Tensor[*indices.shape, D].

    Raises:
        TypeError: an argument is not a Tensor, `padding_idx` is not an int.
        NotImplementedError: another `dtype`.
        ValueError: `packed` is not 2-D or has fewer than `bits` columns; `bits` is not 8 or 4; unknown `mode`;
            `indices` of a wrong shape; `offsets` missing, not 1-D, decreasing, or with 2-D `indices` or mode None;
            `per_sample_weights` not of `indices`' shape, or given with mode None.
        RuntimeError: wrong dtypes; different devices; `per_sample_weights` requires grad while gradients are recorded;
            `padding_idx` outside [-V, V); offsets that do not begin with 0 or exceed N.
        IndexError: an id is outside [0, V), named with its position before anything is written; on a GPU as
            `bounds_check` says.
        BackendError: the named backend cannot serve the call.
    """
    name = "embedding_bag_quantized"
    packed = _check_packed(name, packed, bits, dtype)
    _check.tensor(name, "indices", indices)
    _ids.integers(name, "indices", indices)
    _ids.same_device(name, "indices", indices, "packed", packed)
    if mode is None:
        for argument, value in (("offsets", offsets), ("per_sample_weights", per_sample_weights)):
            if value is not None:
                raise ValueError(f"{name}(): argument '{argument}' must be None with mode None (plain lookup)")
    elif mode in ("sum", "mean"):
        check_bags(name, indices, offsets, include_last_offset, "indices")
        _check_weights(name, per_sample_weights, indices)
    else:
        raise ValueError(f"{name}(): argument 'mode' must be one of sum, mean, None, not {mode!r}")
    if padding_idx is not None:
        check_padding(name, padding_idx, packed.shape[0])
    backend = ROOM.resolve(name, backend, packed, *_features(dtype))
    what = before(name, bounds_check, _BAG)
    if what and backend != "cpu":  # the native kernels look for themselves before they write
        check_offsets(name, indices, offsets)
        _ids.in_range(name, "indices", indices, packed.shape[0])
    if backend == "reference":
        return reference.embedding_bag_quantized(
            packed,
            indices,
            offsets_for_reference(name, indices, offsets),
            bits=bits,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            dtype=dtype,
        )
    padding = -1 if padding_idx is None or mode is None else padding_idx % packed.shape[0]
    result: Tensor = embedding_bag_quantized_forward[backend](
        packed, indices, offsets, per_sample_weights, bits, mode or "none", include_last_offset, padding, dtype, what
    )
    _ids.after(bounds_check)
    return result


def _features(dtype: torch.dtype) -> tuple[str, ...]:
    return ("quantised rows", "float64 results") if dtype == torch.float64 else ("quantised rows",)


def _check_bits(function: str, bits: int) -> None:
    if bits not in (8, 4) or not isinstance(bits, int):  # 8.0 is in (8, 4)
        raise ValueError(f"{function}(): argument 'bits' must be 8 or 4, not {bits!r}")


def _check_packed(function: str, packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The packed table with adjacent bytes in its rows."""
    _check_bits(function, bits)
    _check.tensor(function, "packed", packed)
    if packed.dtype != torch.uint8:
        raise RuntimeError(f"{function}(): argument 'packed' must be uint8, not {packed.dtype}; see quantize_rows()")
    if packed.dim() != 2 or packed.shape[1] < bits:
        raise ValueError(
            f"{function}(): argument 'packed' must have the shape (V, at least {bits}) with bits {bits}, "
            f"not {tuple(packed.shape)}"
        )
    if dtype not in _DTYPES:
        allowed = "float32, float16, bfloat16, float64"
        raise NotImplementedError(f"{function}(): argument 'dtype' must be one of {allowed}, not {dtype}")
    return packed if packed.stride(1) == 1 or packed.shape[1] <= 1 else packed.contiguous()


def _check_weights(function: str, per_sample_weights: Tensor | None, indices: Tensor) -> None:
    if per_sample_weights is None:
        return
    _check.tensor(function, "per_sample_weights", per_sample_weights)
    argument = f"{function}(): argument 'per_sample_weights' must"
    if per_sample_weights.shape != indices.shape:
        shapes = f"{tuple(indices.shape)} of indices, not {tuple(per_sample_weights.shape)}"
        raise ValueError(f"{argument} have the shape {shapes}")
    if per_sample_weights.dtype != torch.float32:
        raise RuntimeError(f"{argument} be float32, not {per_sample_weights.dtype}")
    _ids.same_device(function, "per_sample_weights", per_sample_weights, "indices", indices)
    if torch.is_grad_enabled() and per_sample_weights.requires_grad:
        raise RuntimeError(f"{argument} not require grad: lookups in packed tables are for inference; detach() them")
