"""The attention function that Transformers' models call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.attention import attention, attention_decode, scaled_dot_product_attention
from .masks import Pattern


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the arguments that Transformers hands to every implementation.

    Args:
        module: the layer; its `is_causal` (default True) counts where there is no mask and no `is_causal`.
        query: Tensor[B, H, Lq, D].
        key, value: Tensor[B, Hkv, Lk, D]; a cache has been joined to them.
        attention_mask: what `make_mask` made, or a model's own: None, or four dimensions broadcastable to
            (B, H, Lq, Lk or more), bool with True = may attend, or floating point, added to the scores.
        dropout: probability of dropping a weight.
        scaling: default 1 / sqrt(D).
        softcap, s_aux: `softcap` and `sinks` of `pykernels.functional.attention`.
        position_bias: added to the scores, with gradient.
        kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, ends of the sequences that the only row packs, are served. Others
            are for other implementations; `sliding_window` too, because the mask knows its window.

    Returns:
        (Tensor[B, Lq, H, Dv], None): attention weights are never made.

    Raises:
        NotImplementedError: a paged cache (continuous batching).
        RuntimeError: a mask of other dimensions, or one made for other keys; and what `attention` raises.
    """
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "attn_implementation='pykernels' does not serve paged caches; use a dynamic or static one"
        )
    ends = kwargs.get("cu_seq_lens_q")
    causal = False
    if attention_mask is None:
        causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if softcap is s_aux is position_bias is ends is None:  # most calls: the shortest way
            if query.shape[2] == 1 and not dropout and not _learns(query, key, value):
                plain: Tensor = attention_decode(query, key, value, None, scale=scaling, backend=backend)
                return plain.transpose(1, 2).contiguous(), None
            plain = scaled_dot_product_attention(
                query, key, value, None, dropout, causal, scaling, True, backend=backend
            )
            return plain.transpose(1, 2).contiguous(), None
    options: dict[str, Any] = {
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "scale": scaling,
        "backend": backend,
    }
    length = key.shape[2]
    if isinstance(attention_mask, Pattern):
        left, right, keys, options["key_padding_mask"], known = attention_mask
        ends = ends if known is None else known
        if keys > length:
            raise RuntimeError(f"the mask was made for {keys} keys, and there are {length}")
        if keys < length:
            key, value = key[:, :, :keys], value[:, :, :keys]
        options |= {"causal": right == 0, "window": (left, -1 if right == 0 else right)}
    elif attention_mask is None:
        options["causal"] = "top_left" if causal else False
    else:
        mask = attention_mask if attention_mask.shape[-1] == length else attention_mask[..., :length]
        if mask.dtype != torch.bool:
            position_bias = mask if position_bias is None else position_bias + mask
        elif mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
            options["key_padding_mask"] = mask[:, 0, 0].expand(query.shape[0], -1)
        else:
            options["mask"] = mask
    if ends is not None:
        if position_bias is not None or not (attention_mask is None or isinstance(attention_mask, Pattern)):
            raise NotImplementedError("attn_implementation='pykernels' packs sequences without a bias or dense mask")
        return _packed(query, key, value, ends, options), None
    out: Tensor = attention(query, key, value, bias=position_bias, **options)
    return out.transpose(1, 2).contiguous(), None


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _packed(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, options: dict[str, Any]) -> Tensor:
    """Sequences one after another through the rows of a batch: (B, H, L, D) becomes (B * L, H, D) and back."""
    rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Tensor = attention(*rows, cu_seqlens_q=ends, cu_seqlens_k=ends, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))
