"""The same results sooner: what the stock interpreter computes anew in every operation, kept.

Kernels of small blocks spend nearly all of their time on the types and shapes of Triton's own objects, not on data. A
type determines all of that, so it is made once for each type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as stock

LIMIT = 1 << 14  # block types kept: pointer types are new in every launch


class Kept:
    """What follows from a type. All block types of one element type and shape share it, as `_pykernels_kept`."""

    __slots__ = ("numpy", "tensor", "with_element")

    def __init__(self) -> None:
        self.numpy: Any = None
        self.tensor: dict[str, Any] | None = None  # of a tensor of this type, all but handle and type
        self.with_element: dict[int, tuple[Any, Any]] = {}


def kept(kind: Any) -> Kept:
    found = kind.__dict__.get("_pykernels_kept")
    if found is None:
        found = kind.__dict__["_pykernels_kept"] = Kept()
    return found


def get_np_dtype(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Stock builds a dictionary of all types at each call."""

    def _get_np_dtype(tt_dtype: Any) -> Any:
        of_type = kept(tt_dtype)
        if of_type.numpy is None:
            of_type.numpy = original(tt_dtype)
        return of_type.numpy

    return _get_np_dtype


def block_type_init(original: Callable[..., None]) -> Callable[..., None]:
    """The attributes from element type and shape; stock's check of the shape is made once for each."""
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *(s.value if s.__class__ is tl.constexpr else s for s in shape))
        found = made.get(key)
        if found is None:
            original(self, element_ty, shape)
            kept(self)
            if len(made) >= LIMIT:
                made.clear()
            made[key] = dict(self.__dict__)  # holds element_ty, whose id is therefore no other's
        else:
            self.__dict__.update(found)

    return __init__


def with_element_ty(original: Callable[..., Any]) -> Callable[..., Any]:
    def with_element_ty(self: Any, scalar_ty: Any) -> Any:
        known = kept(self).with_element
        found = known.get(id(scalar_ty))
        if found is None:
            found = known[id(scalar_ty)] = (original(self, scalar_ty), scalar_ty)
        return found[0]

    return with_element_ty


def tensor_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, handle: Any, type: Any) -> None:
        of_type = kept(type)
        if of_type.tensor is None:
            original(self, handle, type)
            of_type.tensor = {name: x for name, x in self.__dict__.items() if name not in ("handle", "type")}
        else:
            self.__dict__.update(of_type.tensor)
            self.handle, self.type = handle, type

    return __init__


def scalar_equal(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def __eq__(self: Any, other: Any) -> bool:
        if self is other:
            return True
        return self.name == other.name if other.__class__ is tl.dtype else original(self, other)

    return __eq__


def block_equal(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or original(self, other)


def unwrap_if_constexpr(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    plain = {int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}

    def _unwrap_if_constexpr(o: Any) -> Any:
        kind = o.__class__
        if kind is tl.constexpr:
            return o.value
        return o if kind in plain else original(o)

    return _unwrap_if_constexpr


def binary_op_type_checking_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """Two tensors of one scalar type need no promotion, but that 16-bit floats are divided as float32."""

    def binary_op_type_checking_impl(
        self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        both = lhs.__class__ is tl.tensor and rhs.__class__ is tl.tensor and not div_or_mod
        if both and lhs.dtype is rhs.dtype and lhs.dtype.__class__ is tl.dtype:  # no pointers
            return self.broadcast_impl_value(lhs, rhs)
        return original(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return binary_op_type_checking_impl


def broadcast_impl_value(original: Callable[..., Any]) -> Callable[..., Any]:
    """Two blocks of one shape are returned as they are, which stock finds out by building types."""

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape.values == right.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast_impl_value


def patch_attr(obj: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = stock.interpreter_semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, called)


def install() -> None:
    stock._get_np_dtype = get_np_dtype(stock._get_np_dtype)
    stock._patch_attr = patch_attr
    block = tl.block_type
    block.__init__ = block_type_init(block.__init__)
    block.with_element_ty = with_element_ty(block.with_element_ty)
    block.__eq__ = block_equal(block.__eq__)
    tl.dtype.__eq__ = scalar_equal(tl.dtype.__eq__)
    tl.tensor.__init__ = tensor_init(tl.tensor.__init__)
    tl.core._unwrap_if_constexpr = unwrap_if_constexpr(tl.core._unwrap_if_constexpr)
    semantic = stock.TritonSemantic
    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl(semantic.binary_op_type_checking_impl)
    semantic.broadcast_impl_value = broadcast_impl_value(semantic.broadcast_impl_value)
