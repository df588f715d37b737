"""Attention modules: torch.nn's constructors, parameters and state_dict, on our functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..ops.attention import attention_and_weights, scaled_dot_product_attention

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """`concat(head_1, ..., head_H) W_o^T + b_o`, head_i = attention of the i-th slices of the projected inputs.

    `torch.nn.MultiheadAttention` with its constructor, plus keyword-only `backend`. Fused kernels can serve it only
    with `need_weights=False`: they never hold the weights. A query all of whose keys are masked gets a zero before the
    output projection (and zero weights), where torch gives NaN with `need_weights=True`.

    Raises:
        AssertionError, RuntimeError: where torch.nn.MultiheadAttention raises them; the message names the argument.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: Tensor[Lq, B, embed_dim] (Tensor[B, Lq, embed_dim] with batch_first) or Tensor[Lq, embed_dim].
            key, value: likewise, of length Lk, with sizes kdim and vdim.
            key_padding_mask: Tensor[B, Lk] (Tensor[Lk] unbatched); bool: True = **ignore** this key; floating point:
                added to the scores.
            need_weights: also return the attention weights.
            attn_mask: Tensor[Lq, Lk] or Tensor[B * num_heads, Lq, Lk]; bool: True = may **not** attend; floating point:
                added to the scores.
            average_attn_weights: weights averaged over the heads, or one per head.
            is_causal: a hint that `attn_mask` is the causal one, which must be given.

        Returns:
            (output shaped as query, weights Tensor[B, Lq, Lk], or Tensor[B, num_heads, Lq, Lk], or None).
        """
        batched = _check_inputs(self, query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("MultiheadAttention: attn_mask must be given with the is_causal hint, not None")
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        first = self.batch_first or not batched
        q, k, v = (_heads(x, self.num_heads, first) for x in self._project(query, key, value))
        _check_masks(q, k, key_padding_mask, attn_mask)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merge(attn_mask, key_padding_mask, q)
        k, v, mask = self._extend(k, v, mask)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_and_weights(q, k, v, mask, p, backend=self.backend)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights if batched else weights.squeeze(0)
        else:
            out = scaled_dot_product_attention(q, k, v, mask, p, causal, backend=self.backend)
        out = (out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)).flatten(-2)
        out = linear(out, self.out_proj.weight, self.out_proj.bias)
        return out if batched else out.squeeze(0), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The input projections; one product where query, key and value are the same tensor."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and query is key and key is value:
            return linear(query, self.in_proj_weight, bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends the learnt key (add_bias_kv) and the zero key (add_zero_attn); every query may attend to them."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            learnt = (b.view(1, self.num_heads, 1, self.head_dim).to(k.dtype) for b in (self.bias_k, self.bias_v))
            extra.append(tuple(learnt))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, 1, 1, 1), v.new_zeros(1, 1, 1, 1)))
        for key, value in extra:
            k = torch.cat([k, key.expand(*k.shape[:2], 1, k.shape[3])], 2)
            v = torch.cat([v, value.expand(*v.shape[:2], 1, v.shape[3])], 2)
            if mask is not None:
                mask = pad(mask, (0, 1), value=mask.dtype == torch.bool)
        return k, v, mask

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, *, backend: str | None = None) -> MultiheadAttention:
        """A MultiheadAttention with the options and the very parameters of a `torch.nn.MultiheadAttention`."""
        new = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
            backend=backend,
        )
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(owner), leaf, parameter)
        return new.train(module.training)


def _heads(x: Tensor, heads: int, batch_first: bool) -> Tensor:
    """(B, L, E) or (L, B, E) -> (B, H, L, E / H)."""
    x = x.unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """One mask for our function, broadcastable to (B, H, Lq, Lk): True = may attend, or additive."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2]))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if all(mask.dtype == torch.bool for mask in masks):
        masks = [~mask for mask in masks]
        return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    added = [_additive(mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of the module's conventions as numbers to add; what is forbidden is -inf whatever dtype said so."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return torch.where(mask <= torch.finfo(mask.dtype).min, -torch.inf, mask.to(dtype))


def _check_inputs(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> bool:
    """torch's checks of dimensions and sizes, all AssertionErrors; returns whether the input is batched."""
    name = "MultiheadAttention:"
    if query.dim() not in (2, 3):
        raise AssertionError(f"{name} query must be 2-D (unbatched) or 3-D, not {query.dim()}-D")
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise AssertionError(
            f"{name} key and value must be {query.dim()}-D as query, not {key.dim()}-D and {value.dim()}-D"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != query.dim() - 1:
        expected, dims = query.dim() - 1, key_padding_mask.dim()
        raise AssertionError(f"{name} key_padding_mask must be {expected}-D as query is {query.dim()}-D, not {dims}-D")
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(f"{name} attn_mask must be 2-D or 3-D, not {attn_mask.dim()}-D")
    for label, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"{name} {label} must be bool or floating point, not {mask.dtype}")
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"{name} query must have embed_dim {module.embed_dim}, not {query.shape[-1]}")
    same = key.shape == value.shape if module._qkv_same_embed_dim else key.shape[:-1] == value.shape[:-1]
    if not same:
        raise AssertionError(f"{name} key and value differ in shape: {tuple(key.shape)} and {tuple(value.shape)}")
    return query.dim() == 3


def _check_masks(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    """Shapes against the batch, heads and lengths."""
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    if k.shape[0] != batch:
        raise RuntimeError(f"MultiheadAttention: key must have query's batch size {batch}, not {k.shape[0]}")
    if attn_mask is not None:
        shape = (length, keys) if attn_mask.dim() == 2 else (batch * heads, length, keys)
        if attn_mask.shape != shape:
            given = tuple(attn_mask.shape)
            raise RuntimeError(f"MultiheadAttention: attn_mask must have the shape {shape}, not {given}")
    if key_padding_mask is not None and key_padding_mask.shape != (batch, keys):
        shape = tuple(key_padding_mask.shape)
        raise AssertionError(f"MultiheadAttention: key_padding_mask must have the shape {(batch, keys)}, not {shape}")
