"""Every address against the tensor it came from.

A pointer handle carries the `Extent` of the argument it was computed from through all pointer arithmetic. So an index
that runs past one tensor into its neighbour is found, which an address check over all arguments would let pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle as Handle

from . import state
from .state import LaunchError, MemoryCheckError

ORIGIN = "pykernels.origin"

#: Builder methods whose pointer result points where their (first) pointer operand does.
POINTER_METHODS = (
    *("create_addptr", "create_splat", "create_unsplat", "create_broadcast", "create_expand_dims", "create_reshape"),
    *("create_trans", "create_bitcast", "create_cat", "create_join", "create_split", "create_gather"),
)


class Extent:
    """The bytes that belong to one tensor argument: base address, sizes and strides, gaps between rows excluded."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.name = name
        self.itemsize = tensor.element_size()
        self.shape, self.strides, self.dtype = tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
        self.low = tensor.data_ptr()
        elements = 0
        if tensor.numel():
            elements = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.high = self.low + elements * self.itemsize
        # Dimensions from the widest stride down; a tensor is dense if together they leave no gap.
        steps = [(s, n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1 and s]
        self.steps = sorted(steps, reverse=True)
        self.dense = True
        inner = 1
        for stride, size in reversed(self.steps):
            self.dense &= stride <= inner
            inner += (size - 1) * stride

    def contains(self, addresses: np.ndarray, nbytes: int) -> np.ndarray:
        """For each access of `nbytes` bytes, whether all of it lies in the tensor."""
        inside = (addresses >= self.low) & (addresses + np.uint64(nbytes) <= self.high)
        if self.dense or not inside.any():
            return inside
        inside &= self._in_a_row(addresses)
        return inside & self._in_a_row(addresses + np.uint64(nbytes - 1)) if nbytes > self.itemsize else inside

    def element(self, address: int) -> int:
        return (int(address) - self.low) // self.itemsize

    def _in_a_row(self, addresses: np.ndarray) -> np.ndarray:
        rest = (addresses.astype(np.int64) - self.low) // self.itemsize
        for stride, size in self.steps:
            rest = rest - np.minimum(rest // stride, size - 1) * stride
        return rest == 0

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name} ({kind}, shape {list(self.shape)}, strides {list(self.strides)})"


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of an argument, with their names: itself, the members of a tuple (`masks.bias`, `pair[1]`), or the
    base of a tensor descriptor."""
    if isinstance(value, (tuple, list)):
        members = getattr(value, "_fields", None)
        for n, member in enumerate(value):
            yield from tensors_in(f"{name}.{members[n]}" if members else f"{name}[{n}]", member)
    elif hasattr(value, "base") and hasattr(value, "block_shape"):
        yield from tensors_in(name, value.base)
    elif hasattr(value, "data_ptr"):
        yield name, value


def check(builder: Any, pointers: Handle, mask: Any, kind: str) -> None:
    """Look at one access (`kind`: load, store, atomic) of the running program before it happens."""
    launch, options = state.launch, state.current
    if launch is None or not (options.memory or options.races):
        return
    active = mask if isinstance(mask, np.ndarray) else mask.data
    shape = np.broadcast_shapes(pointers.data.shape, active.shape)
    lanes = np.flatnonzero(np.broadcast_to(active, shape))
    if lanes.size == 0:
        return
    addresses = np.broadcast_to(pointers.data, shape).reshape(-1)[lanes]
    nbytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    origin: Extent | None = pointers.attr.get(ORIGIN)
    if options.memory:
        _check_extent(builder, origin, addresses, nbytes, lanes, shape, kind)
    if options.races:
        launch.races.check(builder.grid_idx, origin, addresses, nbytes, lanes, shape, kind)


def _check_extent(
    builder: Any, origin: Extent | None, addresses: np.ndarray, nbytes: int, lanes: np.ndarray, shape: Any, kind: str
) -> None:
    assert state.launch is not None
    skewed = addresses % np.uint64(nbytes) != 0
    if skewed.any():
        raise MemoryCheckError(_describe(builder, origin, addresses, lanes, shape, kind, skewed, "is not aligned"))
    extents = [origin] if origin is not None else state.launch.extents
    inside = np.zeros(addresses.shape, dtype=bool)
    for extent in extents:
        inside |= extent.contains(addresses, nbytes)
        if inside.all():
            return
    raise MemoryCheckError(_describe(builder, origin, addresses, lanes, shape, kind, ~inside, "is out of bounds"))


def _describe(
    builder: Any, origin: Extent | None, addresses: np.ndarray, lanes: np.ndarray, shape: Any, kind: str,
    wrong: np.ndarray, fault: str,
) -> str:  # fmt: skip
    assert state.launch is not None
    bad = np.flatnonzero(wrong)
    shown = []
    for i in bad[:4]:
        where = f"address {int(addresses[i]):#x}" if origin is None else f"element {origin.element(addresses[i])}"
        shown.append(f"lane {lane_name(lanes[i], shape)} at {where}")
    target = "a pointer that comes from no argument" if origin is None else str(origin)
    return (
        f"{kind} in {state.launch.kernel} {fault}: {target}, program {builder.grid_idx}, {bad.size} of "
        f"{np.prod(shape)} lanes: {', '.join(shown)}{', ...' if bad.size > 4 else ''} [{state.kernel_line()}]"
    )


def lane_name(lane: int, shape: Any) -> str:
    index = [int(i) for i in np.unravel_index(lane, shape)] if shape else [0]
    return str(index[0]) if len(index) == 1 else str(tuple(index))


def keeping_origin(original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        origin = next((a.attr[ORIGIN] for a in args if isinstance(a, Handle) and ORIGIN in a.attr), None)
        if origin is not None:
            for handle in result if isinstance(result, tuple) else (result,):
                handle.attr[ORIGIN] = origin
        return result

    return method


def create_select(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_select(self: Any, condition: Handle, lhs: Handle, rhs: Handle) -> Handle:
        result = original(self, condition, lhs, rhs)
        origin = lhs.attr.get(ORIGIN)
        if origin is not None and rhs.attr.get(ORIGIN) is origin:
            result.attr[ORIGIN] = origin
        return result

    return create_select


def keeping_base(original: Callable[..., Any]) -> Callable[..., Any]:
    """For tensor descriptors and block pointers, which make their pointers at the access."""

    def materialize_pointers(self: Any, *args: Any) -> Any:
        pointers, mask = original(self, *args)
        if ORIGIN in self.base.attr:
            pointers.attr[ORIGIN] = self.base.attr[ORIGIN]
        return pointers, mask

    return materialize_pointers


#: What a tensor map cannot say; the driver or the hardware refuses it, or reads elsewhere.
MAX_BOX, ALIGNMENT, MAX_SIZE, MAX_STRIDE = 256, 16, 2**32, 2**40


def validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """The limits of the copy engine, by name; the stock checks are asserts without a message, or missing."""

    def validate(self: Any) -> None:
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        sizes = [int(np.ravel(n.data)[0]) for n in self.shape]
        strides = [int(np.ravel(s.data)[0]) for s in self.strides]
        box = list(self.block_shape)
        faults = [
            (self.base.data.item() % ALIGNMENT, f"the base address is not a multiple of {ALIGNMENT} bytes"),
            (
                any(s <= 0 or s * itemsize % ALIGNMENT or s * itemsize >= MAX_STRIDE for s in strides[:-1]),
                f"strides {strides[:-1]} (of {itemsize} bytes) are not multiples of {ALIGNMENT} bytes in (0, 2**40)",
            ),
            (any(not 0 < n <= MAX_SIZE for n in sizes), f"sizes {sizes} are not in [1, 2**32]"),
            (any(n > MAX_BOX for n in box), f"block {box} has a side of more than {MAX_BOX}"),
        ]
        for wrong, why in faults:
            if wrong and state.launch is not None:
                raise LaunchError(f"tensor descriptor in {state.launch.kernel}: {why} [{state.kernel_line()}]")
        original(self)

    return validate


def checked(original: Callable[..., Any], kind: str, pointer: int, mask: int | None) -> Callable[..., Any]:
    """`original` after a check; `pointer` and `mask` are the positions of those operands."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = np.ones(args[pointer].data.shape, dtype=bool) if mask is None else args[mask]
        check(self, args[pointer], active, kind)
        if kind == "atomic" and state.launch is not None and state.current.races:
            semantic = args[-2] if len(args) >= 2 else None
            state.launch.races.synchronise(args[pointer], str(semantic))
        return original(self, *args, **kwargs)

    return method


def implicit_cvt(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def implicit_cvt(arg: Any) -> Any:
        result = original(arg)
        if state.launch is not None and hasattr(arg, "data_ptr"):
            extent = state.launch.extent_of.get(id(arg))
            if extent is not None:
                result.handle.attr[ORIGIN] = extent
        return result

    return implicit_cvt


def install() -> None:
    builder = stock.InterpreterBuilder
    for name in (*POINTER_METHODS, "create_int_to_ptr"):
        setattr(builder, name, keeping_origin(getattr(builder, name)))
    builder.create_select = create_select(builder.create_select)
    builder.create_masked_load = checked(builder.create_masked_load, "load", 0, 1)
    builder.create_masked_store = checked(builder.create_masked_store, "store", 0, 2)
    builder.create_atomic_rmw = checked(builder.create_atomic_rmw, "atomic", 1, 3)
    builder.create_atomic_cas = checked(builder.create_atomic_cas, "atomic", 0, None)
    stock.TensorDescHandle.validate = validate(stock.TensorDescHandle.validate)
    for name in ("TensorDescHandle", "BlockPointerHandle"):
        handle = getattr(stock, name, None)  # block pointers are gone from 3.8 on
        if handle is not None:
            handle.materialize_pointers = keeping_base(handle.materialize_pointers)
    stock._implicit_cvt = implicit_cvt(stock._implicit_cvt)
