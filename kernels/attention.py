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

from . import _attention_launch as launching
from . import _lib
from ._attention_backward import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel, attention_rows_kernel
from ._attention_bias import attention_bwd_dbias_kernel, attention_bwd_dbias_rows_kernel
from ._attention_forward import attention_fwd_kernel

__all__ = ["attention_backward", "attention_forward", "unsupported"]


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
    out = launching.rows_like(query, (*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    lse_low = torch.empty_like(lse)
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    size = launching.sizes(query, key, cu_seqlens_q, bias, mask, key_padding_mask)
    tiles = launching.tiles_for("forward", query, value)
    a_head, programs = size.programs(tiles.queries, False, cu_seqlens_q is not None)
    if size.batch * size.heads * size.lq == 0:
        return out, lse, lse_low
    if size.lk == 0:
        masks, bias = (None, None, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed), None
    query, key, value = (launching.in_rows(x) for x in (query, key, value))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    _lib.launch(
        attention_fwd_kernel, (programs,), query, query, key, value, out, lse, lse_low, sinks,
        *launching.strides(out), *launching.row_strides(lse), tiles=a_head,
        PLAIN=scale > 0 and softcap == 0 and bias is None and alibi_slopes is None, SINKS=sinks is not None,
        **shared, **tiles.constants(), **launching.register_limit(tiles, shared),
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
    wanted = [launching.rows_like(x, tuple(x.shape)) for x in (query, key, value)]
    wanted += [query if x is None else x.new_empty(x.shape) for x in (bias, sinks)]
    dq, dk, dv, dbias, dsinks = (x if m else query.new_empty(0) for x, m in zip(wanted, output_mask, strict=True))
    size = launching.sizes(query, key, cu_seqlens_q, bias, mask, key_padding_mask)
    if size.batch * size.heads * size.lq == 0 or size.lk == 0:
        for x in (dq, dk, dv, dbias):
            x.zero_()
        if output_mask[4]:
            # without keys the sink is all there is: lse = sink
            dsinks.copy_(dlse.sum([d for d in range(dlse.dim()) if d != 1]) if size.lq else torch.zeros_like(dsinks))
        return dq, dk, dv, dbias, dsinks
    masks = mask, key_padding_mask, prefix_length, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed
    query, key, value, dout, out = (launching.in_rows(x) for x in (query, key, value, dout, out))
    options = causal, window_left, window_right, softcap, dropout_p, scale
    base, delta = _row_sums(dout, out, lse, lse_low, dlse)
    tensors = query, key, value, dout, base, delta
    steps = (*launching.strides(dout), *launching.row_strides(base))
    shared = launching.shared_arguments(query, key, value, bias, masks, options, size)
    packed = cu_seqlens_q is not None
    if output_mask[0]:
        tiles = launching.tiles_for("dq", query, value)
        a_head, programs = size.programs(tiles.queries, False, packed)
        _lib.launch(
            attention_bwd_dq_kernel, (programs,), query, *tensors, dq, *steps, *launching.strides(dq), scale,
            tiles=a_head, **shared, **tiles.constants(),
        )  # fmt: skip
    if output_mask[1] or output_mask[2]:
        _key_gradients(dk, dv, output_mask, tensors, steps, scale, size, shared, packed)
    share = _sink_share(sinks, lse)
    if output_mask[3] and bias is not None:
        if bias.shape[-1] > 1:
            _bias_gradient(dbias, tensors, steps, shared)
        else:
            _bias_gradient_of_rows(dbias, torch.where(lse == -torch.inf, 0.0, dlse + share * delta), shared)
    if output_mask[4]:
        dsinks.copy_(-(share * delta).sum([d for d in range(lse.dim()) if d != 1]))
    return dq, dk, dv, dbias, dsinks


def _row_sums(dout: Tensor, out: Tensor, lse: Tensor, lse_low: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """(base, delta), float32 of lse's layout."""
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    heads, length = lse.shape[1], lse.shape[0 if lse.dim() == 2 else 2]
    block_dv = launching.padded(out.shape[-1])
    block = max(8, 8192 // out.element_size() // block_dv)
    _lib.launch(
        attention_rows_kernel, (triton.cdiv(lse.numel(), block),), lse,
        dout, out, lse, lse_low, dlse, base, delta, lse.numel(), heads, length,
        *launching.strides(dout), *launching.strides(out), *launching.row_strides(dlse), *launching.row_strides(lse),
        DV=out.shape[-1], BLOCK_DV=block_dv, BLOCK=block,
    )  # fmt: skip
    return base, delta


def _key_gradients(
    dk: Tensor,
    dv: Tensor,
    output_mask: tuple[bool, ...],
    tensors: tuple[Tensor, ...],
    steps: tuple[int, ...],
    scale: float,
    size: launching.Sizes,
    shared: dict[str, Any],
    packed: bool,
) -> None:
    """dk and dv, each query head's by itself where several share a key head, then summed in order."""
    query, key, value = tensors[:3]
    group = shared["group"]
    outputs = []
    for found, x, want in ((dk, key, output_mask[1]), (dv, value, output_mask[2])):
        if want and group > 1:
            outputs.append(x.new_empty((x.shape[0], size.heads, *x.shape[2:]), dtype=torch.float32))
        else:
            outputs.append(found if want else x)  # what is not wanted is not written
    tiles = launching.tiles_for("dkdv", query, value)
    a_head, programs = size.programs(tiles.keys, True, packed)
    wanted = (output_mask[1], output_mask[2])
    for need_k, need_v in ((wanted[0], False), (False, wanted[1])) if tiles.apart else (wanted,):
        if need_k or need_v:
            _lib.launch(
                attention_bwd_dkdv_kernel, (programs,), query, *tensors, *outputs, *steps,
                *launching.strides(outputs[0]), *launching.strides(outputs[1]), scale,
                tiles=a_head, NEED_K=need_k, NEED_V=need_v, **shared, **tiles.constants(),
            )  # fmt: skip
    if group > 1:
        for found, by_head, want in ((dk, outputs[0], output_mask[1]), (dv, outputs[1], output_mask[2])):
            if want:
                found.copy_(by_head.unflatten(1, (-1, group)).sum(2))


def _sink_share(sinks: Tensor | None, lse: Tensor) -> Tensor | float:
    """The weight of the sink in every query's softmax."""
    if sinks is None:
        return 0.0
    sink = sinks.float().unsqueeze(-1) if lse.dim() == 3 else sinks.float()
    return torch.where(sink == -torch.inf, 0.0, torch.exp(sink - lse))


def _bias_gradient(dbias: Tensor, tensors: tuple[Tensor, ...], steps: tuple[int, ...], shared: dict[str, Any]) -> None:
    tiles = launching.tiles_for("dbias", tensors[0], tensors[2])
    batch, heads, rows, columns = dbias.shape
    across = triton.cdiv(columns, tiles.keys)
    programs = batch * heads * triton.cdiv(rows, tiles.queries) * across
    _lib.launch(
        attention_bwd_dbias_kernel, (programs,), dbias, *tensors, dbias, *steps, *dbias.shape,
        tiles=across, ALL_BATCH=batch == 1, ALL_HEADS=heads == 1, ALL_ROWS=rows == 1, **shared, **tiles.constants(),
    )  # fmt: skip


def _bias_gradient_of_rows(dbias: Tensor, sums: Tensor, shared: dict[str, Any]) -> None:
    """Of a bias that is the same for all keys; sums: of ds along the keys, for each query, laid out as the lse."""
    batch, heads, rows, _ = dbias.shape
    block = 256
    tiles = triton.cdiv(rows, block)
    names = ("heads", "batch", "lq", "lk", "max_q", "max_k", "cu_q_ptr", "cu_k_ptr", "SEQUENCES")
    _lib.launch(
        attention_bwd_dbias_rows_kernel, (batch * heads * tiles,), dbias,
        sums, dbias, *launching.row_strides(sums), heads, rows, tiles=tiles, BLOCK_Q=block,
        ALL_BATCH=batch == 1, ALL_HEADS=heads == 1, ALL_ROWS=rows == 1, **{name: shared[name] for name in names},
    )  # fmt: skip
