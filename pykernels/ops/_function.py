"""The autograd recipe, once for all rooms: a Function over every backend's kernels, and a second one for its gradient.

`create_graph=True` alone still runs the kernels (the gradient is a Function too); only a second derivative that is
really taken differentiates the reference. Old-style `forward(ctx, ...)`: setup_context costs 11 us a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._backends import is_compiling

Kernels = Mapping[str, Callable[..., Any]]


_whole: list[type[Function]] = []


def whole(function: type[Function]) -> type[Function]:
    """The same Function, traced by autograd alone in graphs: Dynamo refuses a backward that makes sparse tensors."""
    same = type(f"Sparse{function.__name__}", (function,), {})
    _whole.append(same)
    return same


def _leave_whole() -> None:
    for function in _whole:
        torch.compiler.allow_in_graph(function)


# What torch.compiler.assume_constant_result does: Dynamo runs it while tracing. Either would import the compiler.
_leave_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`; in graphs a tensor that is given twice is given as a view the second time.

    Dynamo refuses a Function that gets one tensor twice: query as key and value, one `cu_seqlens` for queries and keys,
    a table that two features share, (h, h) as states.
    """
    if is_compiling():
        _leave_whole()
        seen: list[Tensor] = []
        distinct: list[Any] = []
        for given in arguments:
            if isinstance(given, Tensor):
                if any(given is other for other in seen):
                    given = given.view_as(given)
                seen.append(given)
            distinct.append(given)
        return function.apply(*distinct)
    return function.apply(*arguments)


def sparse_rows(found: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """The coalesced sparse gradient of a table of so many rows, of int64[1, nnz] ids and their values."""
    indices, values = found
    return torch.sparse_coo_tensor(indices, values, (rows, values.shape[1]), is_coalesced=True, check_invariants=False)


def second_derivative(
    first: Callable[..., Any], primals: tuple[Tensor | None, ...], cotangents: Any
) -> list[Tensor | None]:
    """Gradients of `first(*primals)` for the primals that are floating point; None for the others."""
    differentiable = [i for i, p in enumerate(primals) if p is not None and p.is_floating_point()]

    def partial(*chosen: Tensor) -> Any:
        full = list(primals)
        for i, value in zip(differentiable, chosen, strict=True):
            full[i] = value
        return first(*full)

    _, pullback = torch.func.vjp(partial, *(primals[i] for i in differentiable))
    found = iter(pullback(cotangents))
    return [next(found) if i in differentiable else None for i in range(len(primals))]


def differentiable(
    name: str, forward: Kernels, backward: Kernels, reference: Callable[..., Tensor], tensors: int, masked: bool = False
) -> type[Function]:
    """A Function `apply(backend, *tensors, *options)` that saves its tensors (some may be None) and nothing else. Its
    attribute `gradient` is the second Function, `apply(backend, mask, dy, *tensors, *options)`.

    Args:
        forward: backend -> kernel(*tensors, *options).
        backward: backend -> kernel(dy, *tensors, *options[, output_mask]) giving one gradient per tensor that can have
            one (a bare tensor when that is one); with `masked` it takes bool[] output_mask and leaves the others empty.
        reference: the same function of (*tensors, *options) in torch; its derivatives serve second derivatives.
    """

    class Gradient(Function):
        @staticmethod
        def forward(ctx: Any, backend: str, mask: tuple[bool, ...], dy: Tensor, *arguments: Any) -> Any:
            ctx.options, ctx.mask = arguments[tensors:], mask
            ctx.save_for_backward(dy, *arguments[:tensors])
            return backward[backend](dy, *arguments, *((mask,) if masked else ()))

        @staticmethod
        def backward(ctx: Any, *ddx: Tensor) -> Any:
            wanted = [i for i, needed in enumerate(ctx.mask) if needed]

            def first(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
                def of(*chosen: Tensor) -> Tensor:
                    full = list(inputs)
                    for i, value in zip(wanted, chosen, strict=True):
                        full[i] = value
                    return reference(*full, *ctx.options)

                grads: tuple[Tensor, ...] = torch.func.vjp(of, *(inputs[i] for i in wanted))[1](dy)
                return grads

            cotangents = tuple(ddx[i] for i in wanted)
            return None, None, *second_derivative(first, ctx.saved_tensors, cotangents), *(None,) * len(ctx.options)

    class Forward(Function):
        @staticmethod
        def forward(ctx: Any, backend: str, *arguments: Any) -> Any:
            ctx.backend, ctx.options = backend, arguments[tensors:]
            ctx.save_for_backward(*arguments[:tensors])
            return forward[backend](*arguments)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            options, mask = ctx.options, ctx.needs_input_grad[1 : 1 + tensors]
            if torch.is_grad_enabled():
                grads = Gradient.apply(ctx.backend, mask, dy, *ctx.saved_tensors, *options)
            else:
                grads = backward[ctx.backend](dy, *ctx.saved_tensors, *options, *((mask,) if masked else ()))
            if isinstance(grads, Tensor):
                grads = (grads, *(None,) * (tensors - 1))
            return None, *(g if m else None for g, m in zip(grads, mask, strict=True)), *(None,) * len(options)

    Forward.__name__ = Forward.__qualname__ = name
    Gradient.__name__ = Gradient.__qualname__ = f"{name}Grad"
    Forward.gradient = Gradient
    return Forward
