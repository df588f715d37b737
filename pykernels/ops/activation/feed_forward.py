"""The transformer's feed-forward block: two matrix products by torch's libraries, between them one kernel each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from ... import reference
from .. import _autocast, _check
from .._function import apply
from .._library import as_seed
from ._functions import GATED_UNITS, ROOM, Fused, fused_backward, fused_forward
from .fused import check_length, check_options, check_save, kernel_options

__all__ = ["mlp"]

Options = tuple[str, str, float, float, str]  # backend, activation, alpha, p, save


class _MLP(Function):
    """Saves x, the parameters, the seed and, unless `save` is "input", the pre-activation x w1^T without its bias."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        backend, activation, alpha, p, save = options
        hidden = linear(x, w1)
        out = linear(fused_forward[backend](hidden, b1, seed, activation, alpha, p), w2, b2)
        ctx.options = options
        ctx.save_for_backward(x, w1, b1, w2, seed, hidden if save == "preactivation" else None)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if _autocast.enabled(dy.device):  # of backward's caller: the products are in the dtype of forward's
            with torch.autocast(dy.device.type, enabled=False):
                return _MLP._gradients(ctx, dy)
        return _MLP._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> Any:
        x, w1, b1, w2, seed, hidden = ctx.saved_tensors
        backend, activation, alpha, p, _ = ctx.options
        _, need_x, need_w1, need_b1, need_w2, need_b2, _ = ctx.needs_input_grad
        create_graph = torch.is_grad_enabled()
        if hidden is None or create_graph:  # what was saved hangs on nothing, so a second derivative would end there
            hidden = linear(x, w1)
        rows = _rows(dy)
        dw2 = db2 = dw1 = dx = None
        if need_b2:
            db2 = rows.sum(0)
        need_hidden = need_x or need_w1
        mask = (need_hidden, need_b1, need_w2)
        if not any(mask):
            return None, None, None, None, None, db2, None
        d_activated = dy.matmul(w2)
        if create_graph:
            arguments = (hidden, b1, seed, activation, alpha, p)
            dh, db1, _ = Fused.gradient.apply(backend, (True, need_b1, False), d_activated, *arguments)
            activated = Fused.apply(backend, *arguments)
        else:
            dh, db1, activated = fused_backward[backend](d_activated, hidden, b1, seed, activation, alpha, p, mask)
        if need_w2:
            dw2 = rows.t().matmul(_rows(activated))
        if need_x:
            dx = dh.matmul(w1)
        if need_w1:
            dw1 = _rows(dh).t().matmul(_rows(x))
        return None, dx, dw1, db1 if need_b1 else None, dw2, db2, None


def _rows(x: Tensor) -> Tensor:
    """(N, C); -1 for N would not do where C is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    save: str = "preactivation",
    *,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    alpha: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = dropout(activation(x w1^T + b1)) w2^T + b2. Vaswani et al., 2017; the gated form Shazeer, 2020.

    The products are torch's; bias, activation or gated unit, and dropout are one kernel each way, which in backward
    gives the gradient at the pre-activation, b1's gradient and the activated values that w2's gradient needs. These are
    not kept: eager keeps them beside the pre-activation, and dropout's mask too.

    Args:
        x: (..., D), any strides; float32, float16, bfloat16, float64. Under autocast everything is cast to its lower
            precision first, as torch's products do.
        w1: (H, D) as `torch.nn.Linear`'s weight; for a gated unit (2H, D), the halves in the order of the unit: one
            product, of which both halves are read in place.
        b1: (H,) or (2H,), or None.
        w2: (O, H).
        b2: (O,), or None.
        activation, p, training, seed, alpha: as in `bias_activation_dropout`; the mask has a word for each of the
            (..., H) activated values.
        save: "preactivation" keeps x and x w1^T for backward; "input" keeps x alone, and backward makes the first
            product once more: seven products in place of six.
        backend: as in `sigmoid`; it serves what lies between the products.

    Returns:
        (..., O).

    Raises:
        TypeError: an argument is not a tensor.   NotImplementedError: another dtype.
        RuntimeError: shapes, dtypes or devices do not fit each other, an unknown activation, a gated unit with an odd
            number of rows in w1.
        ValueError: save is something else; p, alpha and seed as in `bias_activation_dropout`.
        BackendError, ValueError: as `sigmoid`.
    """
    _check.tensor("mlp", "x", x)
    given = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    for name, value in given.items():
        if value is not None or name in ("w1", "w2"):
            _check.tensor("mlp", name, value)
    _check.floating("mlp", "x", x)
    alpha, p = check_options("mlp", activation, alpha, p, training)
    check_save("mlp", save)
    if _autocast.enabled(x.device):
        x, w1, b1, w2, b2 = _autocast.lower((x, w1, b1, w2, b2), x.device)
    _check_parameters(x, w1, b1, w2, b2, activation)
    backend = ROOM.resolve("mlp", backend, x)
    drawn = as_seed(seed, x, "mlp") if p > 0.0 else None
    if backend == "reference":
        return reference.mlp(x, w1, b1, w2, b2, activation, p=p, seed=drawn, alpha=alpha)
    activation, alpha = kernel_options(activation, alpha)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)):
        result: Tensor = apply(_MLP, (backend, activation, alpha, p, save), x, w1, b1, w2, b2, drawn)
        return result
    return linear(fused_forward[backend](linear(x, w1), b1, drawn, activation, alpha, p), w2, b2)


def _check_parameters(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> None:
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None:
            _check.same("mlp", name, value, "x", x)
    width = x.shape[-1] if x.dim() else 0
    if w1.dim() != 2 or x.dim() == 0 or w1.shape[1] != width:
        raise RuntimeError(f"mlp(): argument 'w1' must have shape (H, {width}), 'x' ending in D, got {tuple(w1.shape)}")
    hidden = w1.shape[0]
    if activation in GATED_UNITS:
        if hidden % 2:
            raise RuntimeError(f"mlp(): {activation!r} needs an even number of rows in 'w1', got {hidden}")
        hidden //= 2
    if w2.dim() != 2 or w2.shape[1] != hidden:
        raise RuntimeError(f"mlp(): argument 'w2' must have shape (O, {hidden}), to fit 'w1', got {tuple(w2.shape)}")
    if b1 is not None:
        check_length("mlp", "b1", b1, w1.shape[0], "the rows of 'w1'")
    if b2 is not None:
        check_length("mlp", "b2", b2, w2.shape[0], "the rows of 'w2'")
