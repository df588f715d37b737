"""Attention on csrc/cuda: tensors to pointers, outputs, layouts. `ext`: the CUDA module, or its emulation on the CPU.

O(L) memory: no score is ever stored. Rows of whole 16-byte units are read and written where they lie; head sizes and
strides that do not give such rows are copied first. float16 and bfloat16 products are accumulated in float32; float32
ones are as accurate as float32 unless torch allows tf32 (`torch.set_float32_matmul_precision`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _attended
from . import _attention_arguments as launching
from . import _sm90
from ._attention_decode import attention_decode
from ._extension import DTYPE_CODES, Extension

__all__ = ["attention_backward", "attention_decode", "attention_forward", "describe", "unsupported"]

#: The widest head: the sums of a wider one do not fit in registers.
WIDEST = 256


def unsupported(ext: Extension, x: Tensor, *features: str) -> str | None:
    """Why `ext` cannot serve tensors of the dtype and device of x, or a call with these features, or None."""
    if not ext.available:
        return ext.reason
    if features:
        return f"the CUDA kernels of attention do not serve: {', '.join(features)}"
    if x.dtype not in DTYPE_CODES:
        return f"the CUDA kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    device = "cpu" if ext.name == "_emulator_ext" else "cuda"
    if x.device.type != device:
        return f"{ext.name} serves {device} tensors, not {x.device.type} ones"
    return ext.device_reason(x.device) or _sm90.refusal(ext, x.device)


def describe(
    ext: Extension,
    query: Tensor,
    value: Tensor,
    keys: int,
    terms: tuple[Tensor | None, ...],
    softcap: float,
    dropout_p: float,
    scale: float,
) -> str:
    """Which kernels would serve a call with `keys` keys, for `explain`. terms: see `_general`."""
    call = query, value, keys, dropout_p, _general(terms, softcap, scale)
    return _sm90.described(_not_for_sm90(ext, False, *call), _not_for_sm90(ext, True, *call))


def _general(terms: tuple[Tensor | None, ...], softcap: float, scale: float) -> bool:
    """Whether scores are more than the products times a positive scale, masked by position: not `plain` of
    csrc/cuda/attention_sm90.h. terms: bias, mask, padding mask, slopes."""
    return any(x is not None for x in terms) or softcap != 0 or scale <= 0


def _not_for_sm90(
    ext: Extension, backward: bool, query: Tensor, value: Tensor, keys: int, dropout_p: float, general: bool
) -> str | None:
    """Why the kernels for sm_90a do not serve a call, or None."""
    widest = max(query.shape[-1], value.shape[-1])
    if query.dtype == torch.float32:
        return "they have no float32"
    if dropout_p > 0:
        return "they have no dropout"
    if keys == 0 or query.numel() == 0:
        return "they need queries and keys"
    general = general or (backward and widest > 128)  # there is no other
    return _sm90.declined(ext, query.device, _sm90.Kernels("attention", backward, query.dtype, general), widest)


def _check_head_size(query: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("value", value)):
        if x.shape[-1] > WIDEST:
            raise NotImplementedError(
                f"attention: the CUDA kernels take head sizes up to {WIDEST}; {name} has {x.shape[-1]}"
            )


def attention_forward(
    ext: Extension,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    prefix_length: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, lse_low), the last what rounding lse to float32 left out: the operator `attention_forward`."""
    _check_head_size(query, value)
    out, lse, lse_low = _attended.results(query, value)
    size = launching.sizes(query, key, cu_seqlens_q, bias, mask, key_padding_mask)
    if size.batch * size.heads * size.lq == 0:
        return out, lse, lse_low
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    if size.lk == 0:
        masks, bias = (None, None, *masks[2:]), None
    launcher = "attention_forward"
    general = _general((bias, mask, key_padding_mask, alibi_slopes), softcap, scale)
    if _not_for_sm90(ext, False, query, value, size.lk, dropout_p, general) is None:
        launcher = "attention_forward_sm90"
        query, key, value = (launching.unexpanded(x) for x in (query, key, value))
    query, key, value = (launching.in_rows(x) for x in (query, key, value))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    written = launching.out_rows(out)
    ext.call(
        launcher, *shared, written, lse, lse_low, sinks if sinks is None else sinks.contiguous(),
        launching.strides(written), launching.row_strides(lse), query.dtype,
    )  # fmt: skip
    launching.copy_back(out, written)
    return out, lse, lse_low


def attention_backward(
    ext: Extension,
    dout: Tensor,
    dlse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    prefix_length: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    causal: str,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    scale: float,
    output_mask: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias, dsinks), of size 0 where output_mask says so: the operator `attention_backward`."""
    _check_head_size(query, value)
    grads = dq, dk, dv, dbias, dsinks = _attended.gradients(query, key, value, bias, sinks, output_mask)
    size = launching.sizes(query, key, cu_seqlens_q, bias, mask, key_padding_mask)
    if size.batch * size.heads * size.lq == 0 or size.lk == 0:
        _attended.fill_without_keys(grads, dlse)
        return grads
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    general = _general((bias, mask, key_padding_mask, alibi_slopes), softcap, scale)
    other = _not_for_sm90(ext, True, query, value, size.lk, dropout_p, general)
    kernels = "_sm90" if other is None else ""
    if kernels:
        query, key, value, dout = (launching.unexpanded(x) for x in (query, key, value, dout))
    query, key, value, dout, out = (launching.in_rows(x) for x in (query, key, value, dout, out))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    # rows of one head lie together, whatever the layout of lse: the kernels read them by the tile
    packed = cu_seqlens_q is not None
    base, delta = (lse.new_empty((size.heads, size.lq) if packed else lse.shape) for _ in range(2))
    ext.call(
        "attention_rows", *shared, dout, out, lse, lse_low, dlse, base, delta, launching.strides(dout),
        launching.strides(out), launching.row_strides(dlse), launching.row_strides(lse), query.dtype,
    )  # fmt: skip
    of_rows = dout, base, delta
    if output_mask[0]:
        written = launching.out_rows(dq)
        ext.call(
            f"attention_dq{kernels}", *shared, *of_rows, written, launching.strides(dout), launching.strides(written),
            query.dtype,
        )  # fmt: skip
        launching.copy_back(dq, written)
    if output_mask[1] or output_mask[2]:
        made = [launching.out_rows(x) if m else None for x, m in zip((dk, dv), output_mask[1:3], strict=True)]
        rows = tuple((0, 0, 0) if x is None else launching.strides(x) for x in made)
        ext.call(f"attention_dkdv{kernels}", *shared, *of_rows, *made, launching.strides(dout), *rows, query.dtype)
        for x, y in zip((dk, dv), made, strict=True):
            if y is not None:
                launching.copy_back(x, y)
    delta = delta.t() if packed else delta
    share = _attended.sink_share(sinks, lse)
    if output_mask[3] and bias is not None:
        batch, heads, height, width = dbias.shape
        if width > 1:
            bias_shape = batch, heads, height, width
            ext.call("attention_dbias", *shared, *of_rows, dbias, launching.strides(dout), *bias_shape, query.dtype)
        else:
            sums = torch.where(lse == -torch.inf, 0.0, dlse + share * delta)
            sums = (sums.t() if packed else sums).contiguous()
            ext.call("attention_dbias_rows", *shared, sums, dbias, batch, heads, height, bias.dtype)
    if output_mask[4]:
        dsinks.copy_(-_attended.sum_over_queries(share * delta))
    return grads
