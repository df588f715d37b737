"""Attention modules on our functions: torch.nn's MultiheadAttention, and a decoder's causal self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from ..ops.attention import attention, attention_and_weights, scaled_dot_product_attention

__all__ = ["CausalSelfAttention", "MultiheadAttention"]


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
            query: Tensor[Lq, B, embed_dim] (Tensor[B, Lq, embed_dim] with batch_first) or Tensor[Lq, embed_dim]. Or,
                with batch_first, a nested tensor of either layout, which must be key and value too, without masks.
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
        if query.is_nested:
            masks = key_padding_mask, attn_mask
            return self._forward_nested(query, key, value, masks, need_weights, average_attn_weights)
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

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: tuple[Tensor | None, ...],
        need_weights: bool,
        average_attn_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a nested tensor, as torch has it in inference, and in training too: padded and back.
        Weights are padded with zeros."""
        if not (query is key and key is value and self.batch_first and all(m is None for m in masks)):
            raise AssertionError(
                "MultiheadAttention: nested tensors must be query, key and value at once, with batch_first, without "
                "key_padding_mask and attn_mask"
            )
        parts = query.unbind()
        padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        lengths = torch.tensor([len(x) for x in parts], device=padded.device)
        padding = torch.arange(padded.shape[1], device=padded.device) >= lengths.unsqueeze(1)
        out, weights = self.forward(
            padded, padded, padded, padding, need_weights, average_attn_weights=average_attn_weights
        )
        if weights is not None:
            weights = weights.masked_fill(
                padding[(slice(None), *(None,) * (weights.dim() - 3), slice(None), None)], 0.0
            )
        kept = [row[: len(x)] for row, x in zip(out, parts, strict=True)]
        return torch.nested.as_nested_tensor(kept, layout=query.layout), weights

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


class CausalSelfAttention(nn.Module):
    """`c_proj(attention(q, k, v, causal=True))`, (q, k, v) = slices of `c_attn(x)`: a decoder's self-attention.

    Parameters are named as in GPT-2 and nanoGPT, weights laid out as in `torch.nn.Linear`: `c_attn.weight`
    [(num_heads + 2 * num_kv_heads) * head_dim, embed_dim] with the rows of all query heads, then key heads, then value
    heads; `c_proj.weight` [embed_dim, num_heads * head_dim]; `c_attn.bias`, `c_proj.bias`. There are no buffers. The
    projections are not copied: kernels read the heads where `c_attn` wrote them, and no mask is stored.

    Args:
        embed_dim: size of the input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads. Default num_heads.
        head_dim: default embed_dim / num_heads, which must then be whole.
        dropout: probability of dropping an attention weight, in training.
        residual_dropout: probability of dropping an element of the output, in training.
        bias: both projections have biases.
        window: how many keys before its own a query sees besides its own; None: all. (A "sliding window of W" that
            counts the query's own key is `window=W - 1`.)
        rotary_base: rotate query and key by their positions: pairs (x_t, x_{t + head_dim / 2}) by the angle
            `position * rotary_base ** (-2 t / head_dim)`, in float32. 10000.0 is usual; None: no rotation.
        softcap: bounds the scores, as in `attention`.
        bounds_check, backend: as the function's.

    Raises:
        ValueError: sizes that are not positive or do not divide; an odd head_dim with rotary_base; `dropout` outside
            [0, 1), `residual_dropout` outside [0, 1]; a negative window.

    Source: Radford et al. (2019); Ainslie et al. (arXiv 2305.13245) for shared key heads; Su et al. (arXiv 2104.09864)
    for the rotation.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        bias: bool = True,
        window: int | None = None,
        rotary_base: float | None = None,
        softcap: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", kv_heads)):
            if size < 1:
                raise ValueError(f"CausalSelfAttention: {name} must be positive, not {size}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"CausalSelfAttention: num_heads must divide embed_dim {embed_dim}, not {num_heads}")
        if num_heads % kv_heads:
            raise ValueError(f"CausalSelfAttention: num_kv_heads must divide num_heads {num_heads}, not {kv_heads}")
        size = embed_dim // num_heads if head_dim is None else head_dim
        if size < 1 or (rotary_base is not None and size % 2):
            raise ValueError(f"CausalSelfAttention: head_dim must be positive, and even for a rotation, not {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"CausalSelfAttention: dropout must be in [0, 1), not {dropout}")
        if not 0 <= residual_dropout <= 1:
            raise ValueError(f"CausalSelfAttention: residual_dropout must be in [0, 1], not {residual_dropout}")
        if window is not None and window < 0:
            raise ValueError(f"CausalSelfAttention: window must not be negative, not {window}")
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = embed_dim, num_heads, kv_heads, size
        self.dropout, self.residual_dropout = dropout, residual_dropout
        self.window, self.rotary_base, self.softcap = window, rotary_base, softcap
        self.bounds_check, self.backend = bounds_check, backend
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.c_attn = nn.Linear(embed_dim, (num_heads + 2 * kv_heads) * size, **options)
        self.c_proj = nn.Linear(num_heads * size, embed_dim, **options)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        prefix_length: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: Tensor[B, L, embed_dim], or Tensor[L, embed_dim]: one sequence, or with `cu_seqlens` several, end to end.
            key_padding_mask: bool Tensor[B, L] (Tensor[L] with one sequence); True = real token, as in `attention`.
            prefix_length: int or int Tensor[B]; these first tokens are seen by all (prefix LM).
            cu_seqlens: int Tensor[B + 1], ends of the packed sequences, starting with 0.

        Returns:
            Tensor shaped as x.

        Raises:
            RuntimeError: x has other dimensions or another size; otherwise as `attention`.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim or (cu_seqlens is not None and x.dim() != 2):
            expected = f"(L, {self.embed_dim})" if cu_seqlens is not None else f"(B, L, {self.embed_dim})"
            raise RuntimeError(f"CausalSelfAttention: x must have the shape {expected}, not {tuple(x.shape)}")
        one = x.dim() == 2 and cu_seqlens is None
        if one and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.c_attn(x.unsqueeze(0) if one else x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), -2)
        if self.rotary_base is not None:
            angles = self._angles(x.shape[-2], cu_seqlens, x.device)
            q, k = _rotated(q, angles), _rotated(k, angles)
        if cu_seqlens is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = attention(
            q,
            k,
            v,
            causal=True,
            key_padding_mask=key_padding_mask,
            prefix_length=prefix_length,
            window=None if self.window is None else (self.window, -1),
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )
        out = self.c_proj((out if cu_seqlens is not None else out.transpose(1, 2)).flatten(-2))
        out = dropout(out, self.residual_dropout, self.training)
        return out.squeeze(0) if one else out

    def _angles(self, length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """Tensor[L, head_dim / 2], float32."""
        position = torch.arange(length, device=device)
        if cu_seqlens is not None:
            position = position - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=length)
        power = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        return position.float().unsqueeze(-1) * self.rotary_base**-power

    def load_layout(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the parameters of another implementation's causal self-attention, recognised by its names.

        | names | layout |
        |---|---|
        | `c_attn`, `c_proj` | this module's and nanoGPT's; transposed weights (GPT-2's own, `Conv1D`) are transposed |
        | `in_proj_weight`, `in_proj_bias`, `out_proj` | `torch.nn.MultiheadAttention` |
        | `q_proj`, `k_proj`, `v_proj`, `o_proj` or `out_proj` | one projection each |

        Other entries (masks kept as buffers) are left alone. A rotation must be that of halves: weights made for
        rotating adjacent elements have to be permuted first.

        Args:
            state_dict: of the module, or of a model together with `prefix` ("transformer.h.0.attn.").

        Raises:
            KeyError: a parameter of this module is not there.
            RuntimeError: a shape that does not fit, or biases for a module without.
        """
        names = {name: state_dict[prefix + name] for name in _parameters(state_dict, prefix)}
        found: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            if f"c_attn.{kind}" in names:
                found[f"c_attn.{kind}"] = names[f"c_attn.{kind}"]
            elif f"in_proj_{kind}" in names:
                found[f"c_attn.{kind}"] = names[f"in_proj_{kind}"]
            elif f"q_proj.{kind}" in names:
                found[f"c_attn.{kind}"] = torch.cat([names[f"{part}_proj.{kind}"] for part in "qkv"])
            for out in ("c_proj", "out_proj", "o_proj"):
                if f"{out}.{kind}" in names:
                    found[f"c_proj.{kind}"] = names[f"{out}.{kind}"]
        weight = self.c_attn.weight
        if "c_attn.weight" in found and found["c_attn.weight"].shape == weight.shape[::-1]:
            found |= {name: x.t() for name, x in found.items() if x.dim() == 2}
        own = dict(self.named_parameters())
        if set(found) - set(own):
            raise RuntimeError(f"CausalSelfAttention: made with bias=False, but given {sorted(set(found) - set(own))}")
        for name, parameter in own.items():
            if name not in found:
                raise KeyError(f"CausalSelfAttention: no {name} among {sorted(names)}")
            if found[name].shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)}, not {tuple(found[name].shape)}"
                raise RuntimeError(f"CausalSelfAttention: {name} must have the shape {shapes}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(found[name])

    def extra_repr(self) -> str:
        shown = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "dropout", "residual_dropout", "window")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*shown, "rotary_base", "softcap"))


def _parameters(state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """Names of projections' parameters below the prefix."""
    plain = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    return [name for name in plain if name.endswith(("_attn.weight", "_attn.bias", "_proj.weight", "_proj.bias"))] + [
        name for name in plain if name in ("in_proj_weight", "in_proj_bias")
    ]


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Tensor[..., L, H, D] with each half turned against the other by the angles of its position."""
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    one, two = x.float().chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1).to(x.dtype)
