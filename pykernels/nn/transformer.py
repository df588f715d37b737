"""torch.nn's Transformer stacks on our attention and activations, their inference without padding included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import activation as ops
from ..ops.attention import attention
from .attention import MultiheadAttention

__all__ = ["TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"]


def _activate(activation: Any, x: Tensor, reuse: bool = False) -> Tensor:
    """The layer's activation: torch's functions are served by ours, modules and other functions as they are. `reuse`:
    x may be overwritten."""
    if activation is F.relu or activation is torch.relu:
        return ops.relu(x, reuse)
    if activation is F.gelu:
        return torch.ops.aten.gelu_(x) if reuse else ops.gelu(x)
    if activation is F.silu:
        return ops.silu(x, reuse)
    out: Tensor = activation(x)
    return out


def _adopt_attention(layer: nn.Module, backend: str | None) -> None:
    for name, child in layer.named_children():
        if isinstance(child, nn.MultiheadAttention):
            setattr(layer, name, MultiheadAttention.from_torch(child, backend=backend))


def _watched(module: nn.Module) -> bool:
    """Whether hooks see, and may keep, what goes through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _sum(x: Tensor, y: Tensor, reuse: bool) -> Tensor:
    return y.add_(x) if reuse else x + y


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with its constructor, plus keyword-only `backend`.

    The same code in training and inference, and hooks of its parts are always heard (torch's fast path computes past
    them). A nested tensor (torch's own layers take it in inference only) is computed without padding, in training too.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_attention(self, backend)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None:
                raise RuntimeError("TransformerEncoderLayer: masks must be None with a nested tensor")
            return self._nested(src)
        return self._through(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal))

    def _through(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Both sublayers. Where nobody keeps what lies between, sums and activations overwrite it: fresh pages cost
        the CPU more than the additions."""
        reuse = not torch.is_grad_enabled() and not any(_watched(module) for module in self._modules.values())
        if self.norm_first:
            x = _sum(x, attend(self.norm1(x)), reuse)
            return _sum(x, self._feed(self.norm2(x), reuse), reuse)
        x = self.norm1(_sum(x, attend(x), reuse))
        return self.norm2(_sum(x, self._feed(x, reuse), reuse))

    def _feed(self, x: Tensor, reuse: bool) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(_activate(self.activation, self.linear1(x), reuse))))

    def _nested(self, src: Tensor) -> Tensor:
        parts = src.unbind()
        lengths = [len(x) for x in parts]
        if self._packs():
            ends = torch.tensor([0, *lengths], device=src.device).cumsum(0)
            out = self.packed(torch.cat(parts), ends).split(lengths)
        else:
            padded = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            positions = torch.arange(padded.shape[1], device=src.device)
            padding = positions >= torch.tensor(lengths, device=src.device).unsqueeze(1)
            x = padded if self.self_attn.batch_first else padded.transpose(0, 1)
            x = self.forward(x, src_key_padding_mask=padding)
            x = x if self.self_attn.batch_first else x.transpose(0, 1)
            out = tuple(row[:n] for row, n in zip(x, lengths, strict=True))
        return torch.nested.as_nested_tensor(list(out), layout=src.layout)

    def _packs(self) -> bool:
        """Whether `packed` says all there is: nobody listens to the attention, which it computes past."""
        a: Any = self.self_attn
        hooks = _watched(a) or a._backward_hooks or a._backward_pre_hooks
        plain = type(a) is MultiheadAttention and a._qkv_same_embed_dim and a.bias_k is None and not a.add_zero_attn
        return plain and not hooks

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The layer for sequences laid end to end: no token of padding is computed.

        Args:
            x: Tensor[N, d_model].
            cu_seqlens: int Tensor[B + 1], the sequences' ends, starting with 0.
        """
        return self._through(x, lambda x: self._attend_packed(x, cu_seqlens))

    def _attend_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        a: Any = self.self_attn
        qkv = F.linear(x, a.in_proj_weight, a.in_proj_bias).unflatten(-1, (3, a.num_heads, a.head_dim))
        out = attention(
            *qkv.unbind(1),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            dropout_p=a.dropout if a.training else 0.0,
            backend=a.backend,
        )
        return self.dropout1(F.linear(out.flatten(1), a.out_proj.weight, a.out_proj.bias))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with its constructor, plus keyword-only `backend`."""

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_attention(self, backend)

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(_activate(self.activation, self.linear1(x)))))


def _says_causal(mask: Tensor | None, hint: bool | None, length: int) -> bool:
    """Whether the mask is the causal one, as torch finds it out where nobody said. The numbers of a mask are not read
    while compiling (torch's own modules break the graph there); the mask then serves as it is."""
    if hint is not None or mask is None or torch.compiler.is_compiling():
        return bool(hint)
    if mask.shape != (length, length):
        return False
    forbidden = True if mask.dtype == torch.bool else -torch.inf
    return torch.equal(mask, torch.full((length, length), forbidden, dtype=mask.dtype, device=mask.device).triu(1))


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` with its constructor.

    In inference, where torch computes padding away and gives 0 for it before the final norm (`enable_nested_tensor`,
    batch_first, padding behind the tokens, no other mask), so does this: the layers get the tokens end to end.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        first: Any = self.layers[0]
        if self._drops_padding(src, mask, src_key_padding_mask):
            real = src_key_padding_mask.logical_not()  # type: ignore[union-attr]
            out = self._without_padding(src, real)
        else:
            length = src.size(1 if first.self_attn.batch_first and src.dim() == 3 else 0) if not src.is_nested else 0
            causal = _says_causal(mask, is_causal, length)
            out = src
            for layer in self.layers:
                out = layer(out, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=causal)
        return out if self.norm is None else self.norm(out)

    def _drops_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """torch's conditions for leaving out what is padding, one by one."""
        first: Any = self.layers[0]
        if padding is None or mask is not None or first.training or src.dim() != 3 or src.is_nested:
            return False
        if not (torch.backends.mha.get_fastpath_enabled() and getattr(self, "use_nested_tensor", False)):
            return False
        if torch.is_autocast_enabled() or torch.compiler.is_compiling() or not src.is_floating_point():
            return False
        tensors = (src, *first.parameters())
        if torch.overrides.has_torch_function(tensors):
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        if not getattr(self, "mask_check", True):
            return True
        hidden = padding.logical_not().logical_not()
        return not bool((hidden[:, :-1] & ~hidden[:, 1:]).any())

    def _without_padding(self, src: Tensor, real: Tensor) -> Tensor:
        lengths = real.sum(1)
        out = src.new_zeros(src.shape)
        if all(type(layer) is TransformerEncoderLayer and layer._packs() for layer in self.layers):
            ends = F.pad(lengths.cumsum(0), (1, 0))
            x = src[real]
            for layer in self.layers:
                x = layer.packed(x, ends)
            out[real] = x
            return out
        x = src
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~real)
        return torch.where(real.unsqueeze(-1), x, out)


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` with its constructor."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        first: Any = self.layers[0]
        length = tgt.size(1 if first.self_attn.batch_first and tgt.dim() == 3 else 0)
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _says_causal(tgt_mask, tgt_is_causal, length),
            memory_is_causal,
        )
