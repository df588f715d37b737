"""The attention operators (schemas, fakes) and the autograd Function that every backend runs under.

Saved for backward: query, key, value, the output, the log-sum-exp (and what rounding it to float32 left out, since all
probabilities of a row are made again from it), the masks as given and the seed. Nothing of the size Lq x Lk is kept or
made, except the gradient of a bias that has this size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _attended, _backends, reference
from .._function import apply, second_derivative
from .._library import define

ROOM = _backends.Room("attention")
WIDE_HEADS = "head sizes above 256"  # a feature that not every backend serves (see Room.resolve)

_MASKS = (
    "Tensor? mask, Tensor? key_padding_mask, Tensor? prefix_length, Tensor? alibi_slopes, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed"
)
_OPTIONS = "str causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p, float scale"


class Masks(NamedTuple):
    """The tensor arguments without gradient, as the operators take them.

    mask: bool, four dimensions, each 1 or the full size. key_padding_mask: (B, Lk) bool. prefix_length: (B,) int64.
    alibi_slopes: float32, (H,) or (B, H). cu_seqlens: (B + 1,) int64. seed: one int64.
    """

    mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    prefix_length: Tensor | None = None
    alibi_slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None


class Options(NamedTuple):
    """The other arguments. causal: "none", "bottom_right" or "top_left"; window: -1 unbounded; softcap 0: none."""

    causal: str = "none"
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    scale: float = 1.0


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _attended.results(query, value)


def _fake_backward(
    dout: Tensor, dlse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _attended.gradients(query, key, value, rest[3], rest[4], rest[-1])


attention_forward = define(
    ROOM,
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? sinks, "
    f"{_MASKS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
attention_backward = define(
    ROOM,
    "attention_backward(Tensor dout, Tensor dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"Tensor lse_low, Tensor? bias, Tensor? sinks, {_MASKS}, {_OPTIONS}, bool[5] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None, masks: Masks, options: Options
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the operators' arguments."""
    return reference.attention(
        query,
        key,
        value,
        bias=bias,
        sinks=sinks,
        mask=masks.mask,
        key_padding_mask=masks.key_padding_mask,
        prefix_length=masks.prefix_length,
        alibi_slopes=masks.alibi_slopes,
        cu_seqlens_q=masks.cu_seqlens_q,
        cu_seqlens_k=masks.cu_seqlens_k,
        seed=masks.seed,
        causal=False if options.causal == "none" else options.causal,
        window=(options.window_left, options.window_right),
        softcap=options.softcap or None,
        dropout_p=options.dropout_p,
        scale=options.scale,
        return_lse=True,
    )


class AttentionGrad(Function):
    """The gradients as a function of (dout, dlse, query, key, value, bias, sinks), differentiated by the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        dout: Tensor,
        dlse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        *masks, options, backend, wanted = rest
        ctx.save_for_backward(dout, dlse, query, key, value, bias, sinks, *masks)
        ctx.options, ctx.wanted = options, wanted
        grads: tuple[Tensor, ...] = attention_backward[backend](
            dout, dlse, query, key, value, out, lse, lse_low, bias, sinks, *masks, *options, wanted
        )
        return grads

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        saved, masks = ctx.saved_tensors[:7], Masks(*ctx.saved_tensors[7:])
        present = [i for i, x in enumerate(saved) if x is not None]
        wanted = [i for i in range(5) if ctx.wanted[i]]

        def first(*given: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = [None] * 7
            for i, x in zip(present, given, strict=True):
                full[i] = x

            def of(*chosen: Tensor) -> tuple[Tensor, Tensor]:
                arguments = list(full[2:])
                for i, x in zip(wanted, chosen, strict=True):
                    arguments[i] = x
                return attention_reference(*arguments, masks, ctx.options)  # type: ignore[arg-type, call-arg]

            pullback = torch.func.vjp(of, *(full[2 + i] for i in wanted))[1]
            found: tuple[Tensor, ...] = pullback((full[0], full[1]))
            return found

        second = second_derivative(first, tuple(saved[i] for i in present), tuple(cotangents[i] for i in wanted))
        by_input: list[Tensor | None] = [None] * 7
        for i, x in zip(present, second, strict=True):
            by_input[i] = x
        return *by_input, *(None,) * (3 + len(masks) + 3)


class Attention(Function):
    """(out, lse), both differentiable, of (query, key, value, bias, sinks, *masks, options, backend)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *masks, options, backend = rest
        out, lse, lse_low = attention_forward[backend](query, key, value, bias, sinks, *masks, *options)
        ctx.save_for_backward(query, key, value, bias, sinks, *masks, out, lse, lse_low)
        ctx.options, ctx.backend = options, backend
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        query, key, value, bias, sinks, *masks, out, lse, lse_low = ctx.saved_tensors
        if type(dlse) is not type(lse):  # autograd fills in plain zeros where lse was not used, also beside DTensors
            dlse = torch.zeros_like(lse)
        wanted, tail = ctx.needs_input_grad[:5], (None,) * (len(masks) + 2)
        if torch.is_grad_enabled():
            grads = AttentionGrad.apply(
                dout, dlse, query, key, value, bias, sinks, out, lse, lse_low, *masks, ctx.options, ctx.backend, wanted
            )
        else:
            grads = attention_backward[ctx.backend](
                dout, dlse, query, key, value, out, lse, lse_low, bias, sinks, *masks, *ctx.options, wanted
            )
        return *(g if m else None for g, m in zip(grads, wanted, strict=True)), *tail


_PLAIN = (None,) * (2 + len(Masks._fields))  # bias, sinks, masks


class PlainAttention(Function):
    """out of (query, key, value, options, backend): `Attention` without what most calls do not have, whose handing
    around would be a third of the cost of a small call."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str) -> Tensor:
        saved = attention_forward[backend](query, key, value, *_PLAIN, *options)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.options, ctx.backend = options, backend
        return saved[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        query, key, value, out, lse, lse_low = ctx.saved_tensors
        for_query, for_key, for_value = ctx.needs_input_grad[:3]
        wanted = (for_query, for_key, for_value, False, False)
        inputs = (dout, torch.zeros_like(lse), query, key, value)
        if torch.is_grad_enabled():
            grads = AttentionGrad.apply(
                *inputs, None, None, out, lse, lse_low, *_PLAIN[2:], ctx.options, ctx.backend, wanted
            )
        else:
            grads = attention_backward[ctx.backend](*inputs, out, lse, lse_low, *_PLAIN, *ctx.options, wanted)
        dq, dk, dv = grads[:3]
        return dq if for_query else None, dk if for_key else None, dv if for_value else None, None, None


def run_plain(backend: str, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """out alone, without bias, sinks and masks, on a backend that has kernels."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return apply(PlainAttention, query, key, value, options, backend)
    return attention_forward[backend](query, key, value, *_PLAIN, *options)[0]


def run(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    masks: Masks,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(out, lse) on the backend that the registry chose."""
    if backend == "reference":
        return attention_reference(query, key, value, bias, sinks, masks, options)
    return apply(Attention, query, key, value, bias, sinks, *masks, options, backend)
