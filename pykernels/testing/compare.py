"""What "equal" means: a kernel against the float64 oracle, measured by what torch itself reaches in that dtype.

With o the oracle (the reference in float64 on the same inputs), k the kernel, E the error of torch's own operator (or
of the reference, where torch has none) in the kernel's dtype:

1. max|k - o| <= factor * max|E| + eps(dtype) * max|o| + tiny,  factor 2, or 3 for gradients that sum over a long axis
2. rms(k - o) <= max(RMS[dtype] * rms(o), 2 * rms(E)) + tiny
3. NaN and infinity exactly where the oracle, rounded to the dtype, has them

A plain relative bound fails torch itself at large magnitudes, so the rule calibrates on torch. In float64 the oracle is
no truth but another rounding of the same precision: there rule 1 allows 16 eps in place of one (64 for long sums). A
few elements may be too few to calibrate on, because torch may round all of them well by luck; a case that meets this
allows more roundings by name, and says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RMS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Comparison:
    """The outcome for one tensor: `error` is max|k - o|, `torch_error` max|E|, `bound` the right side of rule 1."""

    name: str
    passed: bool
    error: float
    torch_error: float
    bound: float
    why: str = ""

    @property
    def fraction(self) -> float:
        """error / bound: how much of the allowance was used."""
        return self.error / self.bound if self.bound else (0.0 if self.error == 0 else math.inf)


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64)


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape)) if shape else ()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def compare(
    name: str,
    kernel: Tensor,
    oracle: Tensor,
    same_dtype: Tensor | None = None,
    *,
    long_sum: bool = False,
    rounding: float = 1.0,
) -> Comparison:
    """Judges one tensor by the rule above.

    Args:
        name: of the tensor, for messages ("out", "dx").
        kernel: the result under test.
        oracle: the reference in float64 on the same (rounded) inputs.
        same_dtype: torch's own result, of the dtype that the kernel's must have; None: no allowance beyond rounding.
        long_sum: a gradient that sums over a long axis (factor 3 in place of 2).
        rounding: eps that rule 1 allows at least; more than 1 where a case says why (`Case.rounding`).
    """
    dtype = kernel.dtype
    if kernel.shape != oracle.shape:
        why = f"{name}: shape {tuple(kernel.shape)}, the oracle has {tuple(oracle.shape)}"
        return Comparison(name, False, math.inf, 0.0, 0.0, why)
    if same_dtype is not None and same_dtype.dtype != dtype:
        why = f"{name}: {dtype}, torch's own is {same_dtype.dtype}"
        return Comparison(name, False, math.inf, 0.0, 0.0, why)
    if kernel.numel() == 0:
        return Comparison(name, True, 0.0, 0.0, 0.0)
    k, o = _wide(kernel), _wide(oracle)
    rounded = _wide(oracle.to(dtype))
    special = ~rounded.isfinite()
    wrong = (k.isnan() != rounded.isnan()) | ((special | ~k.isfinite()) & ~rounded.isnan() & (k != rounded))
    if wrong.any():
        at = _index(int(wrong.flatten().nonzero()[0]), k.shape)
        why = f"{name}: {float(k[at])} at {at}, the oracle has {float(rounded[at])} (NaN and infinity must agree)"
        return Comparison(name, False, math.inf, 0.0, 0.0, why)
    zero = torch.zeros_like(k)
    difference = torch.where(special, zero, k - o)
    magnitude = torch.where(special, zero, o)
    own = zero if same_dtype is None else torch.where(special, zero, _wide(same_dtype) - o).nan_to_num(0.0, 0.0, 0.0)
    info = torch.finfo(dtype)
    error, torch_error = float(difference.abs().max()), float(own.abs().max())
    allowance = 1.0
    if dtype == torch.float64:
        allowance = 64.0 if long_sum else 16.0
    eps = max(allowance, rounding) * info.eps
    bound = (3 if long_sum else 2) * torch_error + eps * float(magnitude.abs().max()) + info.tiny
    if error > bound:
        at = _index(int(difference.abs().argmax()), k.shape)
        why = (
            f"{name}: error {error:.3e} > {bound:.3e} at {at}: got {float(k[at])!r}, oracle {float(o[at])!r}; "
            f"torch's own error is {torch_error:.3e}"
        )
        return Comparison(name, False, error, torch_error, bound, why)
    rms, allowed = _rms(difference), max(RMS[dtype] * _rms(magnitude), 2 * _rms(own)) + info.tiny
    if rms > allowed:
        why = f"{name}: rms error {rms:.3e} > {allowed:.3e} (rms of the oracle {_rms(magnitude):.3e})"
        return Comparison(name, False, error, torch_error, bound, why)
    return Comparison(name, True, error, torch_error, bound)


def assert_equal(
    name: str,
    kernel: Tensor,
    oracle: Tensor,
    same_dtype: Tensor | None = None,
    *,
    long_sum: bool = False,
    rounding: float = 1.0,
) -> None:
    """`compare`, raising AssertionError with the tensor's name, the worst index and the figures."""
    outcome = compare(name, kernel, oracle, same_dtype, long_sum=long_sum, rounding=rounding)
    assert outcome.passed, outcome.why
