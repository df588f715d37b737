"""The operators of the activation room (schemas, fakes) and one autograd Function for each family of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import _backends, reference
from .._function import differentiable, second_derivative
from .._library import define

ROOM = _backends.Room("activation")

# Backward reads the output of these (torch saves it too, and the next layer usually keeps it alive anyway).
SAVES_OUTPUT = frozenset(("sigmoid", "tanh", "relu"))
_GRADIENT_FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda dy, y: dy * y * (1 - y),
    "tanh": lambda dy, y: dy * (1 - y * y),
    "relu": lambda dy, y: torch.where(y <= 0, torch.zeros_like(dy), dy),
}
REFERENCE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda x, _: reference.sigmoid(x),
    "tanh": lambda x, _: reference.tanh(x),
    "relu": lambda x, _: reference.relu(x),
    "leaky_relu": lambda x, alpha: reference.leaky_relu(x, alpha),
    "elu": lambda x, alpha: reference.elu(x, alpha),
    "gelu": lambda x, _: reference.gelu(x),
    "gelu_tanh": lambda x, _: reference.gelu(x, "tanh"),
    "silu": lambda x, _: reference.silu(x),
    "swish": lambda x, alpha: reference.swish(x, alpha),
}


#: `bias_activation_dropout`'s names of the gated units; their input holds both halves.
GATED_UNITS = frozenset(reference.activation.GATED_UNITS)


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _contiguous(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_glu(input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    return input.new_empty([n // 2 if d == dim else n for d, n in enumerate(input.shape)])


def _masked(*made: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    return tuple(x if wanted else x.new_empty(0) for x, wanted in made)


unary_forward = define(
    ROOM, "unary_forward(Tensor x, str activation, float alpha) -> Tensor", lambda x, activation, alpha: _dense(x), "x"
)
unary_backward = define(
    ROOM,
    "unary_backward(Tensor dy, Tensor saved, str activation, float alpha) -> Tensor",
    lambda dy, saved, activation, alpha: _dense(saved),
    ("dy", "saved"),
)
unary_ = define(ROOM, "unary_(Tensor(a!) x, str activation, float alpha) -> ()", lambda x, activation, alpha: None)
gated_forward = define(
    ROOM,
    "gated_forward(Tensor gate, Tensor up, str activation) -> Tensor",
    lambda gate, up, activation: _dense(gate),
    ("gate", "up"),
)
gated_backward = define(
    ROOM,
    "gated_backward(Tensor dy, Tensor gate, Tensor up, str activation, bool[2] output_mask) -> (Tensor, Tensor)",
    lambda dy, gate, up, activation, mask: _masked((_dense(gate), mask[0]), (_dense(up), mask[1])),
    ("dy", "gate", "up"),
)
glu_forward = define(ROOM, "glu_forward(Tensor input, int dim, str activation, bool gate_first) -> Tensor", _fake_glu)
glu_backward = define(
    ROOM,
    "glu_backward(Tensor dy, Tensor input, int dim, str activation, bool gate_first) -> Tensor",
    lambda dy, input, dim, activation, gate_first: _contiguous(input),
)
parametric_forward = define(
    ROOM,
    "parametric_forward(Tensor x, Tensor weight, str activation) -> Tensor",
    lambda x, weight, activation: _contiguous(x),
)
parametric_backward = define(
    ROOM,
    "parametric_backward(Tensor dy, Tensor x, Tensor weight, str activation, bool[2] output_mask) -> (Tensor, Tensor)",
    lambda dy, x, weight, activation, mask: _masked((_contiguous(x), mask[0]), (_contiguous(weight), mask[1])),
)
rrelu_forward = define(
    ROOM,
    "rrelu_forward(Tensor x, float lower, float upper, Tensor seed) -> Tensor",
    lambda x, lower, upper, seed: _contiguous(x),
)
rrelu_backward = define(
    ROOM,
    "rrelu_backward(Tensor dy, Tensor x, float lower, float upper, Tensor seed) -> Tensor",
    lambda dy, x, lower, upper, seed: _contiguous(x),
)


def _fused_shape(x: Tensor, activation: str) -> list[int]:
    return [*x.shape[:-1], x.shape[-1] // 2] if activation in GATED_UNITS else list(x.shape)


def _fake_fused_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, alpha: float, p: float, mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if mask[0] else 0),
        x.new_empty(bias.shape if mask[1] and bias is not None else 0),
        x.new_empty(_fused_shape(x, activation) if mask[2] else 0),
    )


fused_forward = define(
    ROOM,
    "fused_forward(Tensor x, Tensor? bias, Tensor? seed, str activation, float alpha, float p) -> Tensor",
    lambda x, bias, seed, activation, alpha, p: x.new_empty(_fused_shape(x, activation)),
)
# output_mask: dx, dbias, and the output, made anew: what a weight gradient downstream needs need not be kept for it.
fused_backward = define(
    ROOM,
    "fused_backward(Tensor dy, Tensor x, Tensor? bias, Tensor? seed, str activation, float alpha, float p, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    _fake_fused_backward,
)

Options = tuple[str, float, str]  # activation, alpha, backend: one argument, since apply pays for each


class UnaryGrad(Function):
    """dx as a function of (dy, saved); its own backward differentiates the reference."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, saved: Tensor, options: Options) -> Tensor:
        activation, alpha, backend = options
        ctx.save_for_backward(dy, saved)
        ctx.options = options
        dx: Tensor = unary_backward[backend](dy, saved, activation, alpha)
        return dx

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> Any:
        activation, alpha, _ = ctx.options

        def first(dy: Tensor, saved: Tensor) -> Tensor:
            if activation in SAVES_OUTPUT:
                return _GRADIENT_FROM_OUTPUT[activation](dy, saved)
            dx: Tensor = torch.func.vjp(lambda x: REFERENCE[activation](x, alpha), saved)[1](dy)[0]
            return dx

        return *second_derivative(first, ctx.saved_tensors, ddx), None


def _unary_dx(ctx: Any, dy: Tensor) -> Tensor:
    (saved,) = ctx.saved_tensors
    activation, alpha, backend = ctx.options
    if torch.is_grad_enabled():
        return UnaryGrad.apply(dy, saved, ctx.options)
    return unary_backward[backend](dy, saved, activation, alpha)


class Unary(Function):
    """Every activation of one tensor, on every backend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Options) -> Tensor:
        activation, alpha, backend = options
        y: Tensor = unary_forward[backend](x, activation, alpha)
        ctx.save_for_backward(y if activation in SAVES_OUTPUT else x)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _unary_dx(ctx, dy), None


class UnaryInplace(Function):
    """The in-place form. `saved` is a copy of x made outside, so that second derivatives reach x through it; or None,
    where backward can read the output in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor | None, options: Options) -> Tensor:
        activation, alpha, backend = options
        unary_[backend](x, activation, alpha)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x if saved is None else saved)
        ctx.options = options
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _unary_dx(ctx, dy), None, None


def _by_backend(table: dict[str, Callable[..., Any]], adapt: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {backend: adapt(kernel) for backend, kernel in table.items()}


Gated = differentiable("Gated", gated_forward, gated_backward, reference.activation.gated, tensors=2, masked=True)
Glu = differentiable("Glu", glu_forward, glu_backward, lambda *a: glu_reference(*a), tensors=1)
Parametric = differentiable(
    "Parametric", parametric_forward, parametric_backward, lambda *a: parametric_reference(*a), tensors=2, masked=True
)
Fused = differentiable(
    "BiasActivationDropout",
    fused_forward,
    _by_backend(fused_backward, lambda kernel: lambda *a: (*kernel(*a[:-1], (*a[-1][:2], False))[:2], None)),
    lambda x, bias, seed, activation, alpha, p: reference.bias_activation_dropout(
        x, bias, activation, p, True, seed, alpha=alpha
    ),
    tensors=3,
    masked=True,
)
RReLU = differentiable(
    "RReLU",
    _by_backend(rrelu_forward, lambda kernel: lambda x, seed, lower, upper: kernel(x, lower, upper, seed)),
    _by_backend(rrelu_backward, lambda kernel: lambda dy, x, seed, lower, upper: kernel(dy, x, lower, upper, seed)),
    lambda x, seed, lower, upper: reference.rrelu(x, lower, upper, True, seed=seed),
    tensors=2,
)


def glu_reference(input: Tensor, dim: int, activation: str, gate_first: bool) -> Tensor:
    first, second = input.chunk(2, dim)
    gate, up = (first, second) if gate_first else (second, first)
    return reference.activation.gated(gate, up, activation)


def parametric_reference(x: Tensor, weight: Tensor, activation: str) -> Tensor:
    return reference.prelu(x, weight) if activation == "prelu" else reference.swish(x, weight)
