"""Arithmetic as a GPU does it: bfloat16, matrix products by input precision, NaN in minimum and maximum, fused add.

The stock interpreter stores bfloat16 as uint16 and hands those bit patterns to numpy. Every builder method that
computes on values is wrapped here: bfloat16 operands are widened to float32 and the result is rounded to nearest even,
which is what the hardware does for each single operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle as Handle

from . import state
from .state import IntegerOverflowError, UnsupportedError

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
WRAPPING = (np.add, np.subtract, np.multiply)

#: Smallest K of tl.dot that every supported Triton version compiles, by operand bits.
MIN_DOT_K = {8: 32, 16: 16, 32: 16, 64: 16}


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, round to nearest even; NaN gives the canonical quiet NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32) if values.flags.c_contiguous else values.copy().view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def up(handle: Handle) -> Handle:
    return Handle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def down(handle: Handle) -> Handle:
    return Handle(narrow(handle.data), tl.bfloat16)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the 13 low bits of the mantissa cut off.

    Triton converts nothing for a plain tf32 product: the tensor core reads the upper 19 bits of each operand.
    """
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def tf32_nearest(values: np.ndarray) -> np.ndarray:
    """float32 rounded to tf32, ties away from zero: cvt.rna.tf32, which the split product applies to its pieces."""
    bits = np.ascontiguousarray(values).view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    return widen(narrow(values))


def split_product(a: np.ndarray, b: np.ndarray, rounding: Callable[[np.ndarray], np.ndarray], terms: int) -> np.ndarray:
    """a @ b from `terms` pieces of each operand, keeping the products that one more piece would not swamp."""
    pieces: list[list[np.ndarray]] = []
    for operand in (a, b):
        rest, parts = operand, []
        for _ in range(terms):
            part = rounding(rest)
            parts.append(part)
            rest = rest - part
        pieces.append(parts)
    products = [np.matmul(pieces[0][i], pieces[1][j]) for i in range(terms) for j in range(terms) if i + j < terms]
    return sum(reversed(products[:-1]), products[-1])


def product(a: np.ndarray, b: np.ndarray, precision: Any) -> np.ndarray:
    """float32 matrix product under Triton's `input_precision`."""
    kind = ir.INPUT_PRECISION
    if precision == kind.TF32:
        return np.matmul(tf32(a), tf32(b))
    if precision == kind.TF32x3:
        return split_product(a, b, tf32_nearest, 2)
    if precision == kind.BF16x3:
        return split_product(a, b, bf16, 2)
    if precision == kind.BF16x6:
        return split_product(a, b, bf16, 3)
    return np.matmul(a, b)


def create_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Handle, b: Handle, d: Handle, precision: Any, max_imprecise: int) -> Handle:
        kinds = {a.dtype.scalar, b.dtype.scalar}
        if tl.float64 in kinds:
            raise UnsupportedError("tl.dot on float64: no supported Triton version computes it reliably")
        if not kinds <= {tl.float16, tl.bfloat16, tl.float32}:
            return original(self, a, b, d, precision, max_imprecise)
        # Half-precision operands are exact in float32, where their products are too.
        left, right = (up(x).data.astype(np.float32, copy=False) for x in (a, b))
        result = product(left, right, precision if kinds == {tl.float32} else ir.INPUT_PRECISION.IEEE)
        result = result + up(d).data
        return down(Handle(result, tl.float32)) if is_bf16(d) else Handle(result.astype(d.data.dtype), d.dtype.scalar)

    return create_dot


def binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Handle, rhs: Handle, op: Callable[..., Any]) -> Handle:
        narrowing = is_bf16(lhs) or is_bf16(rhs)
        if narrowing:
            lhs, rhs = up(lhs), up(rhs)
        if op in COMPARISONS:
            # The stock result keeps the operands' type, so a later cast would read truth values as floats.
            return Handle(op(lhs.data, rhs.data), tl.int1)
        if op in WRAPPING and lhs.data.dtype == np.bool_ and rhs.data.dtype == np.bool_:
            wide = op(lhs.data.astype(np.int8), rhs.data.astype(np.int8))
            return Handle((wide & 1).astype(np.bool_), tl.int1)
        result = original(self, lhs, rhs, op)
        return down(result) if narrowing else result

    return binary_op


def unary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    def unary_op(self: Any, arg: Handle, op: Callable[..., Any]) -> Handle:
        return down(original(self, up(arg), op)) if is_bf16(arg) else original(self, arg, op)

    return unary_op


def create_fma(self: Any, x: Handle, y: Handle, z: Handle) -> Handle:
    """One rounding: float16 and float32 products are exact in float64."""
    wide = [up(h).data.astype(np.float64) for h in (x, y, z)]
    result = wide[0] * wide[1] + wide[2]
    if is_bf16(z):
        return Handle(narrow(result.astype(np.float32)), tl.bfloat16)
    return Handle(result.astype(z.data.dtype), z.dtype.scalar)


def create_clampf(self: Any, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
    if propagate_nans == ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
    return self.binary_op(self.binary_op(arg, lo, np.maximum), hi, np.minimum)


def cast_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Handle, dst_type: Any) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if target == tl.bfloat16:
            return Handle(narrow(src.data.astype(np.float32)), target)
        if source == tl.bfloat16:
            return Handle(widen(src.data).astype(stock._get_np_dtype(target)), target)
        return original(self, src, dst_type)

    return cast_impl


def create_fp_to_fp(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, src: Handle, dst_type: Any, rounding: Any) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source.primitive_bitwidth > 16 and rounding == ir.ROUNDING_MODE.RTZ:
            bits = np.ascontiguousarray(src.data.astype(np.float32)).view(np.uint32) >> np.uint32(16)
            return Handle(bits.astype(np.uint16), target)
        if tl.bfloat16 in (source, target) and source.primitive_bitwidth >= 16 and target.primitive_bitwidth >= 16:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding)

    return create_fp_to_fp


def reduced_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """For the vectorised reductions and scans: bfloat16 in float32, rounded once.

    A GPU rounds at each step of its reduction tree, so a bfloat16 sum there is a little worse than here.
    """

    def reduction(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        input = input[0] if isinstance(input, tuple) else input
        if input.dtype != tl.bfloat16:
            return original(self, input, *args, **kwargs)
        result = original(self, _retyped(up(input.handle), input, tl.float32), *args, **kwargs)
        if isinstance(result, (tuple, list)):
            return type(result)(_rounded(r) for r in result)
        return _rounded(result)

    return reduction


def _retyped(handle: Handle, like: Any, scalar: Any) -> Any:
    kind = tl.block_type(scalar, list(like.type.shape)) if like.type.is_block() else scalar
    return tl.core.tensor(handle, kind)


def _rounded(tensor: Any) -> Any:
    return _retyped(down(tensor.handle), tensor, tl.bfloat16) if tensor.dtype == tl.float32 else tensor


def min_max(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions by maximum and minimum drop NaN, also where a whole row is NaN, and without numpy's warning."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        if idx_reduce_op is None:
            val_reduce_op = quiet.get(val_reduce_op, val_reduce_op)
        return original(self, input, val_reduce_op, idx_reduce_op)

    return min_max


def sanitize_overflow(original: Callable[..., Any]) -> Callable[..., Any]:
    """The stock check computes the condition on Triton tensors, slowly, and then asserts it only in debug builds."""
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def binary_op_sanitize_overflow_impl(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        if not isinstance(self.builder, stock.InterpreterBuilder):
            return original(self, lhs, rhs, binary_op)
        scalar = lhs.type.scalar
        if state.launch is None or not state.current.overflow or scalar.int_bitwidth >= 64:
            return None
        if not scalar.is_int_signed() or scalar.is_bool():
            return None
        limits = np.iinfo(lhs.handle.data.dtype)
        exact = operations[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        wrong = (exact < limits.min) | (exact > limits.max)
        if wrong.any():
            raise IntegerOverflowError(
                f"int{scalar.int_bitwidth} overflow in {state.launch.kernel}: {binary_op.__name__} gives "
                f"{exact[wrong][0]} in program {self.builder.grid_idx}, {np.count_nonzero(wrong)} of {exact.size} "
                f"lanes; convert an operand with .to(tl.int64) [{state.kernel_line()}]"
            )
        return None

    return binary_op_sanitize_overflow_impl


def min_dot_size(lhs_type: Any, rhs_type: Any) -> tuple[int, int, int]:
    """(M, N, K) below which the compiler refuses tl.dot; the interpreter alone would take any size."""
    return 1, 1, MIN_DOT_K[lhs_type.scalar.primitive_bitwidth]


def install() -> None:
    semantic = stock.TritonSemantic
    semantic.binary_op_sanitize_overflow_impl = sanitize_overflow(semantic.binary_op_sanitize_overflow_impl)
    builder = stock.InterpreterBuilder
    for wrap in (create_dot, binary_op, unary_op, cast_impl, create_fp_to_fp):
        setattr(builder, wrap.__name__, wrap(getattr(builder, wrap.__name__)))
    builder.create_fma = create_fma
    builder.create_clampf = create_clampf
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)
    stock.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size
    stock.interpreter_builder.options = stock.InterpreterOptions(
        allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
    )
    stock.ReduceOps.min_max = reduced_in_fp32(min_max(stock.ReduceOps.min_max))
    stock.ReduceOps.sum = reduced_in_fp32(stock.ReduceOps.sum)
    stock.ScanOps.cumsum = reduced_in_fp32(stock.ScanOps.cumsum)
    stock.ScanOps.cumprod = reduced_in_fp32(stock.ScanOps.cumprod)
