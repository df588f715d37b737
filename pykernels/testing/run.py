"""Runs one case of a spec on a backend and judges every output and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compare import Comparison, compare
from .spec import Case, OpSpec


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(leaf for part in result for leaf in outputs_of(part)) if isinstance(result, (tuple, list)) else ()


def evaluate(
    function: Callable[..., Any], case: Case, inputs: dict[str, Tensor], **more: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs ("out", or "out0", "out1", ...) and gradients ("dx" for an input x) of one call.

    The inputs keep their strides: gradients are taken with respect to detached views of them.
    """
    leaves = {
        name: x.detach().requires_grad_(case.inputs[name].grad and x.is_floating_point()) for name, x in inputs.items()
    }
    outputs = outputs_of(function(**leaves, **case.options, **more))
    names = ["out"] if len(outputs) == 1 else [f"out{i}" for i in range(len(outputs))]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    differentiable = [y for y in outputs if y.requires_grad]
    grads: tuple[Tensor | None, ...] = ()
    if wanted and differentiable:
        cotangents = [case.make_gradient(y) for y in differentiable]
        grads = torch.autograd.grad(differentiable, list(wanted.values()), cotangents, allow_unused=True)
    named = {f"d{name}": g for name, g in zip(wanted, grads, strict=False) if g is not None}
    return {name: y.detach() for name, y in zip(names, outputs, strict=True)}, named


def check_case(spec: OpSpec, case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[Comparison]:
    """Every output and gradient of `spec.function` on `backend` against the float64 oracle."""
    inputs = case.make(dtype, device)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    kernel = evaluate(spec.function, case, inputs, backend=backend)
    oracle = _cast_gradient(spec, case, wide, dtype)
    own = evaluate(spec.call_peer, case, inputs)
    found = []
    for ours, truth, torchs in zip(kernel, oracle, own, strict=True):
        missing = truth.keys() - ours.keys()
        found += [Comparison(name, False, float("inf"), 0.0, 0.0, f"{name}: no gradient came back") for name in missing]
        for name, value in ours.items():
            long_sum = name[1:] in spec.long_sums
            rounding = case.rounding.get(name, 1.0)
            found.append(compare(name, value, truth[name], torchs.get(name), long_sum=long_sum, rounding=rounding))
    return found


def _cast_gradient(
    spec: OpSpec, case: Case, wide: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The oracle, fed the gradient that the kernel is fed: drawn in the kernel's dtype, then widened."""

    class Rounded(Case):
        def make_gradient(self, like: Tensor) -> Tensor:
            return super().make_gradient(like.to(dtype)).double()

    rounded = Rounded(case.label, case.inputs, case.options, case.dy_layout)
    return evaluate(spec.reference, rounded, wide)
