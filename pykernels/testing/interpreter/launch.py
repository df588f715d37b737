"""One launch: its arguments' extents, the order of its programs, CUDA's grid limits, and readable errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from . import state
from .memory import Extent, tensors_in
from .races import Races
from .state import CheckError, LaunchError, UnsupportedError

GRID_LIMITS = (2**31 - 1, 65535, 65535)

#: Everything that `_patch_lang` may find in a kernel's globals, so that one call serves kernel and device functions.
LANGUAGES = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


class Launch:
    """What is known of the launch in progress."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.extents: list[Extent] = []
        self.extent_of: dict[int, Extent] = {}
        self.races = Races([])
        self.order: np.ndarray | None = None

    def set_arguments(self, arguments: dict[str, Any]) -> None:
        for argument, value in arguments.items():
            for name, tensor in tensors_in(argument, value):
                extent = Extent(name, stock._unwrap_tensor(tensor))
                self.extents.append(extent)
                self.extent_of[id(tensor)] = extent
        self.races = Races(self.extents)


def init_args_hst(original: Callable[..., Any]) -> Callable[..., Any]:
    def _init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, keywords = original(self, args_dev, kwargs)
        if state.launch is not None:
            state.launch.set_arguments(inspect.signature(self.fn).bind(*args, **keywords).arguments)
        return args, keywords

    return _init_args_hst


def executor_call(original: Callable[..., Any], patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        previous, state.launch = state.launch, Launch(self.fn.__name__)
        scope = patch_lang(LANGUAGES)
        try:
            with np.errstate(all="ignore"):  # overflow to infinity is arithmetic, not news
                return original(self, *args, **kwargs)
        except InterpreterError as error:
            found = _ours(error)
            if found is None:
                raise
        finally:
            scope.restore()
            state.launch = previous
        raise found

    return __call__


def _ours(error: BaseException | None) -> BaseException | None:
    """The check's own error inside the interpreter's wrapping."""
    while error is not None and not isinstance(error, (CheckError, UnsupportedError)):
        error = error.__cause__
    return error


def patched_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The stock interpreter patches the language anew for every device function called, at 0.3 ms a call."""

    def _patch_lang(fn: Any) -> Any:
        return stock._LangPatchScope() if state.launch is not None else original(fn)

    return _patch_lang


def device_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if state.launch is None:
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    return __call__


def set_grid_dim(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_dim(self: Any, *grid: int) -> None:
        for axis, (size, limit) in enumerate(zip(grid, GRID_LIMITS, strict=True)):
            if size > limit and state.launch is not None:
                raise LaunchError(
                    f"grid {grid} of {state.launch.kernel} has {size} programs along axis {axis}; CUDA allows {limit}"
                )
        original(self, *grid)
        if state.launch is not None and state.current.order_seed is not None:
            state.launch.order = np.random.default_rng(state.current.order_seed).permutation(np.prod(grid, dtype=int))

    return set_grid_dim


def set_grid_idx(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if state.launch is not None:
            _, ny, nz = self.grid_dim
            if state.launch.order is not None:
                program = int(state.launch.order[(x * ny + y) * nz + z])
                x, y, z = program // (ny * nz), program // nz % ny, program % nz
            state.launch.races.start_program(self.grid_dim, (x, y, z))
        original(self, x, y, z)

    return set_grid_idx


def install() -> None:
    patch_lang = stock._patch_lang
    stock._patch_lang = patched_once(patch_lang)
    stock.InterpretedFunction.__call__ = device_call(stock.InterpretedFunction.__call__)
    executor = stock.GridExecutor
    executor._init_args_hst = init_args_hst(executor._init_args_hst)
    executor.__call__ = executor_call(executor.__call__, patch_lang)
    builder = stock.InterpreterBuilder
    builder.set_grid_dim = set_grid_dim(builder.set_grid_dim)
    builder.set_grid_idx = set_grid_idx(builder.set_grid_idx)
