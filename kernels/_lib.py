"""What two Triton rooms or more share: questions about the device, memory layouts, jit helpers, activations.

The jit functions compute in float32. PRECISE says whether the result must be good to float32's rounding; without it a
relative error of 3e-4 is allowed, a fraction of the rounding to float16 or bfloat16 that follows, for fewer
instructions (in half precision these kernels are close to issue-bound). No libdevice call: the interpreter has none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class DeviceProperties(NamedTuple):
    """The two figures of a device that change how a wrapper launches."""

    capability: int  #: 80, 86, 90, 100: ten times the major plus the minor compute capability
    sm_count: int  #: streaming multiprocessors


#: What wrappers see for a CPU tensor, which only the interpreter can serve: the portable code path, and so few
#: multiprocessors that a persistent kernel's loop over tiles turns more than once on a test-sized input.
INTERPRETED_DEVICE = DeviceProperties(capability=80, sm_count=4)

_override: DeviceProperties | None = None


def interpreting() -> bool:
    """Whether Triton kernels run on its CPU interpreter in this process, so that they can serve CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def device_properties(device: torch.device) -> DeviceProperties:
    """Capability and multiprocessor count of `device`: the only place where a wrapper may ask for them.

    A CPU device gives `INTERPRETED_DEVICE`. `override_device_properties` replaces the answer for every device.
    """
    if _override is not None:
        return _override
    if device.type == "cuda":
        return _cuda_properties(torch.cuda.current_device() if device.index is None else device.index)
    return INTERPRETED_DEVICE


@contextlib.contextmanager
def override_device_properties(properties: DeviceProperties) -> Iterator[None]:
    """Make `device_properties` answer `properties`: how the ahead-of-time lint compiles for a GPU that is not there."""
    global _override
    previous, _override = _override, properties
    try:
        yield
    finally:
        _override = previous


@functools.cache
def _cuda_properties(index: int) -> DeviceProperties:
    properties = torch.cuda.get_device_properties(index)
    return DeviceProperties(10 * properties.major + properties.minor, properties.multi_processor_count)


def unsupported_tensor(x: Tensor) -> str | None:
    """Why Triton kernels cannot serve this tensor, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"Triton kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cpu" and not interpreting():
        return "Triton kernels need a GPU tensor; CPU tensors are for the interpreter (TRITON_INTERPRET=1)"
    return None


def launch(kernel: Any, programs: Sequence[int], like: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel` on the device of `like`. Triton launches on the current device, which may be another one."""
    constants.setdefault("num_warps", 4)
    constants.setdefault("enable_fp_fusion", True)
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[tuple(programs)](*args, **constants)
    else:
        kernel[tuple(programs)](*args, **constants)


class Rows(NamedTuple):
    """Several tensors of one shape, seen as `rows` runs of `cols` adjacent elements; one row stride for each tensor."""

    rows: int
    cols: int
    strides: tuple[int, ...]


def as_rows(*tensors: Tensor) -> Rows | None:
    """One 2-D view that fits all the tensors (same shape, not empty), or None where there is none.

    Dimensions are taken in the order of the first tensor's strides, so dense tensors of one memory format are one row
    whatever the format.
    """
    first = tensors[0]
    dims = sorted((d for d in range(first.dim()) if first.shape[d] > 1), key=lambda d: -first.stride(d))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for d in dims:
        size, strides = first.shape[d], tuple(t.stride(d) for t in tensors)
        if merged and merged[-1][1] == tuple(size * s for s in strides):
            size *= merged.pop()[0]
        merged.append((size, strides))
    if not merged or any(s != 1 for s in merged[-1][1]):
        return None if merged else Rows(1, 1, (0,) * len(tensors))
    if len(merged) == 1:
        return Rows(1, merged[0][0], (0,) * len(tensors))
    return Rows(merged[0][0], merged[1][0], merged[0][1]) if len(merged) == 2 else None


def fit_rows(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Rows, list[Tensor], list[Tensor]]:
    """The 2-D view for a kernel, with copies in place of what does not fit the first output's layout.

    A replaced output is a new tensor: the caller copies it back. Inputs are copied only where there is no other way
    (an expanded gradient, a transposed operand).
    """
    whole = as_rows(*outputs, *inputs)
    if whole is None:
        layout = outputs[0] if as_rows(outputs[0]) else torch.empty_like(outputs[0])
        fits = [as_rows(layout, t) is not None for t in (*outputs, *inputs)]
        outputs, inputs = _replace(layout, fits, outputs, inputs)
        whole = as_rows(*outputs, *inputs)
    if whole is None:  # each fits the layout, but in rows of different lengths
        layout = torch.empty_like(layout)
        fits = [t.stride() == layout.stride() for t in (*outputs, *inputs)]
        outputs, inputs = _replace(layout, fits, outputs, inputs)
        whole = as_rows(*outputs, *inputs)
    assert whole is not None, "a dense layout is one row"
    return whole, list(outputs), list(inputs)


def _replace(
    layout: Tensor, fits: Sequence[bool], outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    new_outputs = [t if fit else torch.empty_like(layout) for t, fit in zip(outputs, fits, strict=False)]
    new_inputs = [
        t if fit else torch.empty_like(layout).copy_(t) for t, fit in zip(inputs, fits[len(outputs) :], strict=True)
    ]
    return new_outputs, new_inputs


class Tiling(NamedTuple):
    """How a kernel cuts `Rows`: the grid of programs, and the constants that `tile` needs."""

    programs: tuple[int, ...]
    constants: dict[str, Any]


def tile_rows(rows: int, cols: int, size: int = 1024) -> Tiling:
    """Tiles of `size` elements. 1024 with four warps gives each thread eight: one 128-bit access in half precision."""
    if rows == 1:
        return Tiling((triton.cdiv(cols, size),), {"FLAT": True, "ROW_AXIS": 1, "ROWS": 1, "COLS": size})
    width = min(size, triton.next_power_of_2(cols))
    height = size // width
    programs = triton.cdiv(cols, width), triton.cdiv(rows, height)
    row_axis = 1 if programs[1] < 65536 else 0  # the second axis of a grid is that short
    constants = {"FLAT": False, "ROW_AXIS": row_axis, "ROWS": height, "COLS": width}
    return Tiling(programs if row_axis else programs[::-1], constants)


@triton.jit
def tile(rows, cols, FLAT: tl.constexpr, ROW_AXIS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's int64 row and column numbers, and whether all of them exist.

    The address of an element is row * stride + col. A tile that is whole needs no mask, and only an unmasked access is
    128 bits wide whatever the length: with a mask Triton must know that the length is a multiple of 16.
    """
    first_col = tl.program_id(1 - ROW_AXIS).to(tl.int64) * COLS
    if FLAT:
        return 0, first_col + tl.arange(0, COLS), first_col + COLS <= cols
    else:
        first_row = tl.program_id(ROW_AXIS).to(tl.int64) * ROWS
        row = (first_row + tl.arange(0, ROWS))[:, None]
        col = (first_col + tl.arange(0, COLS))[None, :]
        return row, col, (first_row + ROWS <= rows) & (first_col + COLS <= cols)


@triton.jit
def tile_mask(row, col, rows, cols, FLAT: tl.constexpr):
    if FLAT:
        return col < cols
    else:
        return (row < rows) & (col < cols)


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """exp(x); 0 and inf where float32 ends, NaN for NaN.

    exp2(x * log2(e)) alone is wrong by the rounding of the product, 5e-6 at |x| = 80: PRECISE takes the integer part
    off first (Cody and Waite).
    """
    if PRECISE:
        n = tl.minimum(tl.maximum(tl.floor(x * LOG2E + 0.5), -150.0), 150.0)
        fraction = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, n times the first is exact
        return tl.exp2(n) * tl.exp2(fraction * LOG2E)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x, PRECISE: tl.constexpr):
    """exp(x) - 1 for x <= 0, with relative accuracy near 0."""
    if PRECISE:
        x = tl.maximum(x, -30.0)
        n = tl.floor(x * LOG2E + 0.5)
        f = (x - n * 0.693359375) + n * 2.12194440e-4
        q = 0.008333270438015461 + f * (0.0013942033983767033 + f * 0.0001991560566239059)
        q = 0.5 + f * (0.1666666716337204 + f * (0.04166634380817413 + f * q))
        scale = tl.exp2(n)
        return scale * (f + f * f * q) + (scale - 1.0)
    else:
        series = x + x * x * (0.5 + x * 0.16666667)
        return tl.where(x > -0.0625, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def sigmoid(x, PRECISE: tl.constexpr):
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + exp(-x, PRECISE))


@triton.jit
def sigmoid_and_slope(x, PRECISE: tl.constexpr):
    """(s, s * (1 - s)) with s = sigmoid(x).

    Where s is near 1, 1 - s has lost its digits, which shows once the product is scaled by a large x: PRECISE then
    multiplies exp(-|x|) instead. Where s is near 1/2 it is the difference that is exact.
    """
    if PRECISE:
        e = exp(-tl.abs(x), PRECISE)
        larger = 1.0 / (1.0 + e)
        smaller = tl.where(e > 0.25, 1.0 - larger, e * larger)
        return tl.where(x < 0.0, smaller, larger), smaller * larger
    else:
        s = sigmoid(x, PRECISE)
        return s, s * (1.0 - s)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh(x) = 1 - 2 / (exp(2 x) + 1), and an odd polynomial near 0 where that difference cancels."""
    square = x * x
    if PRECISE:
        p = -0.05374349653720856 + square * (0.020650584250688553 + square * -0.005717041902244091)
        small = x + x * square * (-0.3333328366279602 + square * (0.13331490755081177 + square * p))
        large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)  # of |x|: exact to the last bit near 1
        return tl.where(square < 0.390625, small, tl.where(x < 0.0, -large, large))
    else:
        small = x + x * square * -0.33333334
        return tl.where(square < 0.00390625, small, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def normal_cdf(x):
    """Phi(x) = (1 + erf(x / sqrt(2))) / 2 to float32's rounding, with relative accuracy in the lower tail too.

    An odd polynomial on [-1, 1]; beyond, the tail is exp(-x^2/2) times a polynomial in 1 / (1 + 0.4 |x|), as
    Abramowitz and Stegun 7.1.26. Both fitted (minimax) for this library. erf takes a third more instructions, and
    1 + erf loses the tail.
    """
    square = x * x
    p = -0.0011863530380651355 + square * (0.00011351265857229009 + square * -7.664679287699983e-06)
    p = 0.3989422917366028 + square * (-0.06649035960435867 + square * (0.009973331354558468 + square * p))
    t = 1.0 / (1.0 + 0.4 * tl.abs(x))
    q = 0.10536323487758636 + t * (-0.18642807006835938 + t * 0.06812139600515366)
    q = 0.1590999960899353 + t * (0.13900232315063477 + t * (0.05554052069783211 + t * q))
    tail = tl.exp2(square * (-0.5 * LOG2E)) * (t * (0.159595787525177 + t * q))
    return tl.where(square < 1.0, 0.5 + x * p, tl.where(x < 0.0, tail, 1.0 - tail))


@triton.jit
def normal_tail(a):
    """Phi(-a), a >= 0, for results of 16 bits: its logarithm is a polynomial, so there is no erf, no division.

    Relative error 2.3e-4 up to 5.4, where Phi is 3e-8; the polynomial falls on beyond.
    """
    p = -0.46909815073013306 + a * (-0.0449480339884758 + a * (0.004953416995704174 + a * -0.00024016056))
    return tl.exp2(-1.0003297328948975 + a * (-1.1465929746627808 + a * p))


# Activations: value(x, alpha, PRECISE), and gradient(dy, x, alpha, PRECISE) = dy * value'(x). Kinks select, as torch
# does, rather than multiply by 0 or 1: a NaN or an infinity takes the side torch gives it.


@triton.jit
def sigmoid_value(x, alpha, PRECISE: tl.constexpr):
    return sigmoid(x, PRECISE)


@triton.jit
def sigmoid_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    _, slope = sigmoid_and_slope(x, PRECISE)
    return dy * slope


@triton.jit
def sigmoid_gradient_of_output(dy, y, alpha, PRECISE: tl.constexpr):
    return dy * y * (1.0 - y)


@triton.jit
def tanh_value(x, alpha, PRECISE: tl.constexpr):
    return tanh(x, PRECISE)


@triton.jit
def tanh_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    y = tanh(x, PRECISE)
    return dy * (1.0 - y * y)


@triton.jit
def tanh_gradient_of_output(dy, y, alpha, PRECISE: tl.constexpr):
    return dy * (1.0 - y * y)


@triton.jit
def relu_value(x, alpha, PRECISE: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def relu_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, dy)  # the same of the input and of the output


@triton.jit
def leaky_relu_value(x, alpha, PRECISE: tl.constexpr):
    return tl.where(x > 0.0, x, x * alpha)


@triton.jit
def leaky_relu_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    return tl.where(x > 0.0, dy, dy * alpha)


@triton.jit
def elu_value(x, alpha, PRECISE: tl.constexpr):
    return tl.where(x <= 0.0, alpha * expm1(x, PRECISE), x)


@triton.jit
def elu_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    return tl.where(x <= 0.0, dy * (alpha * exp(x, PRECISE)), dy)


@triton.jit
def gelu_value(x, alpha, PRECISE: tl.constexpr):
    if PRECISE:
        return x * normal_cdf(x)
    else:
        bounded = tl.abs(tl.minimum(x, 1e4))  # inf must not meet a tail of 0; at -inf, NaN is right
        return tl.maximum(x, 0.0) - bounded * normal_tail(tl.abs(x))  # of x, which keeps a NaN


@triton.jit
def gelu_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    """dy (Phi(x) + x phi(x)); for 16 bits phi(x) is Phi(-|x|) times its hazard, which is nearly linear in |x|."""
    if PRECISE:
        density = 0.3989422804014327 * tl.exp2(x * x * (-0.5 * LOG2E))
        return dy * (normal_cdf(x) + x * density)
    else:
        a = tl.abs(x)
        tail = normal_tail(a)
        s = tl.minimum(a, 6.0)
        hazard = -0.09568795 + s * (0.014385988935828209 + s * -0.0008892577025108039)
        hazard = -0.7947394847869873 + s * (-0.6481797695159912 + s * hazard)
        below = (a * tail) * hazard + tail  # the derivative at -a
        return dy * tl.where(x < 0.0, below, 1.0 - below)


@triton.jit
def _gelu_tanh_argument(x, square):
    """z with (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 = sigmoid(z)"""
    return x * (1.5957691216057308 + 0.07135481627263583 * square)


@triton.jit
def gelu_tanh_value(x, alpha, PRECISE: tl.constexpr):
    return x / (1.0 + exp(-_gelu_tanh_argument(x, x * x), PRECISE))


@triton.jit
def gelu_tanh_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    square = x * x
    s, slope = sigmoid_and_slope(_gelu_tanh_argument(x, square), PRECISE)
    inner = 1.5957691216057308 + 0.21406444881790748 * tl.minimum(square, 1e4)  # x^2 = inf must not meet slope = 0
    return dy * (s + x * slope * inner)


@triton.jit
def silu_value(x, alpha, PRECISE: tl.constexpr):
    return x / (1.0 + exp(-x, PRECISE))


@triton.jit
def silu_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    s, slope = sigmoid_and_slope(x, PRECISE)
    return dy * (s + x * slope)


@triton.jit
def swish_value(x, beta, PRECISE: tl.constexpr):
    return x / (1.0 + exp(-(beta * x), PRECISE))


@triton.jit
def swish_gradient(dy, x, beta, PRECISE: tl.constexpr):
    s, slope = sigmoid_and_slope(beta * x, PRECISE)
    return dy * (s + x * slope * beta)  # x and not beta * x, which may have become infinite


@triton.jit
def swish_weight_gradient(dy, x, beta, PRECISE: tl.constexpr):
    _, slope = sigmoid_and_slope(beta * x, PRECISE)
    return dy * (x * slope * x)  # not x * x: it overflows


@triton.jit
def prelu_weight_gradient(dy, x, slope, PRECISE: tl.constexpr):
    return tl.where(x > 0.0, 0.0, dy * x)


@triton.jit
def identity_value(x, alpha, PRECISE: tl.constexpr):
    return x


@triton.jit
def identity_gradient(dy, x, alpha, PRECISE: tl.constexpr):
    return dy


class Activation(NamedTuple):
    """The jit functions of one activation; `gradient` takes the input."""

    value: Any
    gradient: Any


ACTIVATIONS: dict[str, Activation] = {
    "sigmoid": Activation(sigmoid_value, sigmoid_gradient),
    "relu": Activation(relu_value, relu_gradient),
    "leaky_relu": Activation(leaky_relu_value, leaky_relu_gradient),
    "elu": Activation(elu_value, elu_gradient),
    "gelu": Activation(gelu_value, gelu_gradient),
    "gelu_tanh": Activation(gelu_tanh_value, gelu_tanh_gradient),
    "silu": Activation(silu_value, silu_gradient),
    "swish": Activation(swish_value, swish_gradient),
    "identity": Activation(identity_value, identity_gradient),
}


@triton.jit
def philox_word(seed, offset):
    """First word of Philox4x32-10, uint32: key seed, counter (offset low, high, 0, 0)."""
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = (offset >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word


@triton.jit
def philox_uniform(seed, offset):
    """float32 uniforms in [0, 1): 24 bits of `philox_word`."""
    return (philox_word(seed, offset) >> 8).to(tl.float32) * 5.9604644775390625e-08
