"""Attention on Triton: online softmax forward, and a backward without atomics in two or three kernels.

O(L) memory: no score is ever stored. Loops over full tiles and over masked tiles are apart, and tiles that causal
masks, windows, prefixes and the ends of the padding leave nothing of are not visited. float16 and bfloat16 products are
accumulated in float32; float32 ones are made of three tf32 products unless torch allows one
(`torch.set_float32_matmul_precision`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import _attended
from . import _attention_launch as launching
from . import _lib
from ._attention_backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel, attention_rows_kernel
from ._attention_bias import attention_bwd_dbias_kernel, attention_bwd_dbias_rows_kernel
from ._attention_decode_launch import attention_decode
from ._attention_forward import attention_fwd_kernel

__all__ = ["attention_backward", "attention_decode", "attention_forward", "unsupported"]


def unsupported(x: Tensor, *features: str) -> str | None:
    """Why these kernels cannot serve tensors of this device and dtype, or a call with these features, or None."""
    if features:
        return f"the Triton kernels of attention do not serve: {', '.join(features)}"
    return _lib.unsupported_tensor(x)


def _check_head_size(query: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("value", value)):
        if x.shape[-1] > launching.WIDEST:
            raise NotImplementedError(
                f"attention: the Triton kernels take head sizes up to {launching.WIDEST}; {name} has {x.shape[-1]}"
            )


def attention_forward(
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
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    size = launching.sizes(query, key, cu_seqlens_q, cu_seqlens_k, bias, mask, key_padding_mask)
    if size.batch * size.heads * size.lq == 0:
        return out, lse, lse_low
    if size.lk == 0:
        masks, bias = (None, None, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed), None
    query, key, value = (launching.in_rows(x) for x in (query, key, value))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    tiles = launching.tiles_for("forward", shared)
    a_head, programs = launching.programs(size, tiles.queries)
    _lib.launch(
        attention_fwd_kernel, (programs,), query,
        out=launching.rows(out), lse=launching.lines(lse), lse_low_ptr=lse_low, sinks_ptr=sinks, tiles=a_head,
        PLAIN=scale > 0 and softcap == 0 and bias is None and alibi_slopes is None,
        **shared, **launching.descriptors(tiles, shared), **tiles.options(),
    )  # fmt: skip
    return out, lse, lse_low


def attention_backward(
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
    size = launching.sizes(query, key, cu_seqlens_q, cu_seqlens_k, bias, mask, key_padding_mask)
    if size.batch * size.heads * size.lq == 0 or size.lk == 0:
        _attended.fill_without_keys(grads, dlse)
        return grads
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    query, key, value, dout, out = (launching.in_rows(x) for x in (query, key, value, dout, out))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    base, delta = _row_sums(dout, out, lse, lse_low, dlse)
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    shared |= {"dout": launching.rows(dout), "base": launching.lines(base), "delta_ptr": delta}
    if output_mask[0]:
        tiles = launching.tiles_for("dq", shared)
        a_head, programs = launching.programs(size, tiles.queries)
        _lib.launch(
            attention_bwd_dq_kernel, (programs,), query, dq=launching.rows(dq), dq_scale=scale, tiles=a_head,
            **shared, **launching.descriptors(tiles, shared), **tiles.options(),
        )  # fmt: skip
    if output_mask[1] or output_mask[2]:
        _key_gradients(dk, dv, output_mask, key, value, scale, shared)
    share = _attended.sink_share(sinks, lse)
    if output_mask[3] and bias is not None:
        if bias.shape[-1] > 1:
            _bias_gradient(dbias, shared)
        else:
            _bias_gradient_of_rows(dbias, torch.where(lse == -torch.inf, 0.0, dlse + share * delta), shared)
    if output_mask[4]:
        dsinks.copy_(-_attended.sum_over_queries(share * delta))
    return grads


def _row_sums(dout: Tensor, out: Tensor, lse: Tensor, lse_low: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """(base, delta), float32 of lse's layout."""
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    heads, length = lse.shape[1], lse.shape[0 if lse.dim() == 2 else 2]
    block_dv = launching.padded(out.shape[-1])
    block = max(8, 4096 // out.element_size() // block_dv)
    _lib.launch(
        attention_rows_kernel, (triton.cdiv(lse.numel(), block),), lse,
        launching.rows(dout), launching.rows(out), launching.lines(lse), lse_low, launching.lines(dlse), base, delta,
        lse.numel(), heads, length, DV=out.shape[-1], BLOCK_DV=block_dv, BLOCK=block,
    )  # fmt: skip
    return base, delta


def _key_gradients(
    dk: Tensor,
    dv: Tensor,
    output_mask: tuple[bool, ...],
    key: Tensor,
    value: Tensor,
    scale: float,
    shared: dict[str, Any],
) -> None:
    """dk and dv, each query head's by itself where several share a key head, then summed in order."""
    size, query = shared["size"], shared["q"].ptr
    wanted = output_mask[1], output_mask[2]
    outputs = []
    for found, x, want in zip((dk, dv), (key, value), wanted, strict=True):
        if want and size.group > 1:
            outputs.append(x.new_empty((x.shape[0], size.heads, *x.shape[2:]), dtype=torch.float32))
        else:
            outputs.append(found if want else x)  # what is not wanted is not written
    tiles = launching.tiles_for("dkdv", shared)
    a_head, programs = launching.programs(size, tiles.keys, of_keys=True)
    described = launching.descriptors(tiles, shared)
    for need_k, need_v in ((wanted[0], False), (False, wanted[1])) if tiles.apart else (wanted,):
        if need_k or need_v:
            _lib.launch(
                attention_bwd_dkdv_kernel, (programs,), query,
                dk=launching.rows(outputs[0]), dv=launching.rows(outputs[1]), dk_scale=scale, tiles=a_head,
                NEED_K=need_k, NEED_V=need_v, **shared, **described, **tiles.options(),
            )  # fmt: skip
    if size.group > 1:
        for found, by_head, want in zip((dk, dv), outputs, wanted, strict=True):
            if want:
                found.copy_(by_head.unflatten(1, (-1, size.group)).sum(2))


def _bias_gradient(dbias: Tensor, shared: dict[str, Any]) -> None:
    tiles = launching.tiles_for("dbias", shared)
    batch, heads, rows, columns = dbias.shape
    across = triton.cdiv(columns, tiles.keys)
    programs = batch * heads * triton.cdiv(rows, tiles.queries) * across
    _lib.launch(
        attention_bwd_dbias_kernel, (programs,), dbias,
        dbias_ptr=dbias, bias_heads=heads, bias_rows=rows, bias_columns=columns, tiles=across,
        ALL_BATCH=batch == 1, ALL_HEADS=heads == 1, ALL_ROWS=rows == 1, **shared, **tiles.options(),
    )  # fmt: skip


def _bias_gradient_of_rows(dbias: Tensor, sums: Tensor, shared: dict[str, Any]) -> None:
    """Of a bias that is the same for all keys; sums: of ds along the keys, for each query, laid out as the lse."""
    batch, heads, rows, _ = dbias.shape
    block = 256
    _lib.launch(
        attention_bwd_dbias_rows_kernel, (batch * heads * triton.cdiv(rows, block),), dbias,
        launching.lines(sums), dbias, heads, rows, BLOCK_Q=block,
        ALL_BATCH=batch == 1, ALL_HEADS=heads == 1, ALL_ROWS=rows == 1,
        **{name: shared[name] for name in ("size", "masks", "numbers", "TOP_LEFT", "SEQUENCES")},
    )  # fmt: skip
