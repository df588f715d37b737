"""The registry: which backends a room has here, which one serves a call, and why the others do not.

A room's floors are found by name: `_cpu/<room>.py`, `_triton/<room>.py`, `_cuda/<room>.py` (which serves both the CUDA
module and its emulation on the CPU). A backend is *absent* when triton, its extension module or the room's file is not
there, or when an extension was built for another torch; any other import error is a bug and is raised.

A backend that a call names never falls back. `auto` takes the first of `PREFERENCE` that can serve the tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("cpu", "triton", "cuda", "emulator")
"""The backends with kernels; "reference" (pure torch) is always there."""

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Order of `auto` by device type; the reference is last everywhere. On the CPU the native kernels lead: measured ahead
of torch's own (benchmarks/results). On GPUs Triton leads until a GPU record says otherwise."""

REBUILD = "pip install --force-reinstall --no-deps ."  # in the repository
DEFAULT = os.environ.get("PYKERNELS_BACKEND") or None  # read once, at import
_origin = "PYKERNELS_BACKEND"

is_compiling = torch.compiler.is_compiling
# Private queries; this is the one place they are named (tests run them on every supported torch).
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def unusual_view(view: torch.Tensor) -> bool:
    """Whether autograd may refuse in-place work on this view for how it was made: chunk, unbind, under no_grad, ..."""
    meta: Any = torch._C._autograd
    return bool(meta._get_creation_meta(view) != meta.CreationMeta.DEFAULT)


class BackendError(RuntimeError):
    """A backend named by the call (or by PYKERNELS_BACKEND) cannot serve it; the message says why."""


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why the others would not. Printable.

    kernels: which of the backend's kernels, where it has several for one operator.
    """

    function: str
    room: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    kernels: str = ""

    def __str__(self) -> str:
        lines = [f"{self.function} ({self.room}): {self.backend}{f', {self.kernels}' if self.kernels else ''}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


class _Explained(BaseException):
    """Carries an Explanation out of the call that explain() made; not an Exception, so nothing on the way eats it."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_explaining: int | None = None  # ident of the thread inside explain(), if any
_explain_lock = threading.Lock()


def explaining() -> bool:
    """Whether the call being made is one of explain()'s: then nothing may run."""
    return _explaining is not None and _explaining == threading.get_ident()


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend would serve `function(*args, **kwargs)` and why the others would not, without running it.

    Args:
        function: a public function of `pykernels.functional` or a module of `pykernels.nn` (for a module that calls
            several operators: the first).
        args, kwargs: as the call would have them. They are checked as in the call, so wrong arguments raise here too.

    Returns:
        Explanation: `backend`, and `refused`: backend -> reason.

    Raises:
        TypeError: `function` cannot be called or made no choice of backend (it is not a function of pykernels).
    """
    global _explaining
    if not callable(function):
        raise TypeError(f"explain(): argument 'function' must be a function or module, not {type(function).__name__}")
    with _explain_lock:
        _explaining = threading.get_ident()
        try:
            function(*args, **kwargs)
        except _Explained as found:
            return found.explanation
        finally:
            _explaining = None
            for made in _rooms.values():
                made.explained = ()
    raise TypeError(
        f"explain(): {getattr(function, '__name__', function)!r} did not choose a backend; give a function of pykernels"
    )


def transform_reason() -> str | None:
    """Why only the reference can serve now: a functorch transform or forward-mode differentiation is active.

    Kernels are opaque: under compiled `torch.func.grad` they would give zeros, under forward mode drop the tangent.
    """
    if functorch_active():
        return "a torch.func transform is active; it differentiates the reference"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active; it differentiates the reference"
    return None


def _stale(extension: str) -> str | None:
    """Why a built extension cannot be loaded here: it was built for another torch (read before loading it)."""
    stamp = Path(__file__).with_name(f"{extension}.torch")
    if stamp.exists() and (built := stamp.read_text().strip()) != torch.__version__:
        return f"{extension} was built for torch {built}, this is torch {torch.__version__}; rebuild: {REBUILD}"
    return None


def _find_cpu(room: str) -> tuple[Any, str | None]:
    reason = _stale("_cpu_ext")
    if reason:
        return None, reason
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None, f"the CPU kernels are for Linux on x86-64; this is {sys.platform} {platform.machine()}"
    try:
        importlib.import_module("._cpu_ext", __package__)
        return importlib.import_module(f"._cpu.{room}", __package__), None
    except ModuleNotFoundError as error:
        if error.name == f"{__package__}._cpu_ext":
            return None, f"_cpu_ext is not built; with a C++ compiler: {REBUILD}"
        if error.name != f"{__package__}._cpu.{room}":
            raise
        return None, f"the {room} room has no native CPU kernels yet"


def _find_triton(room: str) -> tuple[Any, str | None]:
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed; pip install triton"
    if torch.version.cuda is None and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            None,
            "this torch is a CPU build (tests run Triton on its interpreter: pykernels.testing.interpreter.install())",
        )
    try:
        return importlib.import_module(f"._triton.{room}", __package__), None
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}._triton.{room}":
            raise
        return None, f"the {room} room has no Triton kernels yet"


class _Bound:
    """A `_cuda/<room>` module with its first argument, the extension, filled in."""

    def __init__(self, module: ModuleType, extension: Any) -> None:
        self._module, self._extension = module, extension

    def __getattr__(self, name: str) -> Any:
        function, extension = getattr(self._module, name), self._extension
        return lambda *args: function(extension, *args)


def _find_cuda(room: str, kind: str) -> tuple[Any, str | None]:
    try:
        module = importlib.import_module(f"._cuda.{room}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in (f"{__package__}._cuda", f"{__package__}._cuda.{room}"):
            raise
        return None, f"the {room} room has no CUDA C++ kernels yet"
    from ._cuda._extension import Extension

    extension = Extension(f"_{kind}_ext")
    return (_Bound(module, extension), None) if extension.available else (None, extension.reason)


_rooms: dict[str, Room] = {}


class Room:
    """The backends of one room: `modules` (name -> module), `absent` (name -> reason).

    A backend module exports `unsupported(x, *features) -> str | None`: why it cannot serve a tensor of this device and
    dtype, or one of the features (short descriptions, for an operator that a backend may serve in part only).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.modules: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        for backend in BACKENDS:
            module, reason = self._find(backend)
            if reason is None:
                self.modules[backend] = module
            else:
                self.absent[backend] = reason
        self.explained: tuple[Any, ...] = ()  # by explain(): what describe() of a backend's module takes of the call
        self._resolved: dict[tuple[Any, ...], str] = {}
        _rooms[name] = self

    def _find(self, backend: str) -> tuple[Any, str | None]:
        if backend == "cpu":
            return _find_cpu(self.name)
        if backend == "triton":
            return _find_triton(self.name)
        return _find_cuda(self.name, backend)

    def resolve(self, function: str, backend: str | None, tensor: torch.Tensor, *features: str) -> str:
        """The backend that serves `function` for tensors like this one, with what the call needs beyond the dtype.

        Raises:
            BackendError: the named backend cannot serve the call, and why.
            ValueError: no such backend.
        """
        if is_compiling():
            if functorch_active() or forward_ad._current_level >= 0 or tensor.layout is torch.jagged:
                return self._decide(function, backend, tensor, {}, features)
            return _resolve_while_tracing(self.name, function, backend, tensor.device.type, tensor.dtype, *features)
        if explaining():
            raise _Explained(self._explanation(function, backend, tensor, features))
        if functorch_active() or forward_ad._current_level >= 0:
            return self._decide(function, backend, tensor, {}, features)
        # is_cpu spares the two objects that device.type makes; they are a sixth of this function's time
        key = (backend, tensor.is_cpu or tensor.device.type, tensor.dtype, tensor.__class__, features)
        found = self._resolved.get(key)
        if found is None:
            _prepare(tensor)
            found = self._resolved[key] = self._decide(function, backend, tensor, {}, features)
            if found == "reference" and tensor.is_cpu and "cpu" in self.absent:
                _warn_once(backend, self.absent["cpu"])
        return found

    def _explanation(
        self, function: str, backend: str | None, tensor: torch.Tensor, features: tuple[str, ...]
    ) -> Explanation:
        refused: dict[str, str] = {}
        chosen = self._decide(function, backend, tensor, refused, features)
        if backend in (None, "auto"):
            for name in BACKENDS:
                if name != chosen and name not in refused:
                    refused[name] = self._reason(name, tensor, features) or self._unpreferred(name, chosen)
        describe = getattr(self.modules.get(chosen), "describe", None) if self.explained else None
        kernels = describe(*self.explained) if describe is not None else ""
        return Explanation(function, self.name, chosen, refused, kernels)

    @staticmethod
    def _unpreferred(name: str, chosen: str) -> str:
        if name == "emulator":
            return "runs only when named: it executes the CUDA kernels on the CPU for tests"
        return f"{chosen} comes first in the order of preference"

    def _reason(self, name: str, tensor: torch.Tensor, features: tuple[str, ...]) -> str | None:
        if name in self.absent:
            return self.absent[name]
        reason: str | None = self.modules[name].unsupported(tensor, *features)
        return reason

    def _decide(
        self,
        function: str,
        backend: str | None,
        tensor: torch.Tensor,
        refused: dict[str, str],
        features: tuple[str, ...] = (),
    ) -> str:
        wanted = DEFAULT if backend is None else backend
        transform = transform_reason()
        if tensor.layout is torch.jagged:
            transform = transform or "a nested tensor; it is served by the reference"
        if wanted is None or wanted == "auto":
            for name in PREFERENCE.get(tensor.device.type, ()):
                reason = transform or self._reason(name, tensor, features)
                if reason is None:
                    return name
                refused[name] = reason
            return "reference"
        if wanted == "reference":
            return "reference"
        origin = f" (from {_origin})" if backend is None else ""
        if wanted not in BACKENDS:
            allowed = ", ".join(("auto", *BACKENDS, "reference"))
            raise ValueError(f"{function}(): backend must be one of {allowed}, not {wanted!r}{origin}")
        reason = transform or self._reason(wanted, tensor, features)
        if reason is not None:
            raise BackendError(f"{function}(): backend {wanted!r}{origin} cannot serve this call: {reason}")
        return wanted


_warned = False


def _warn_once(backend: str | None, reason: str) -> None:
    """A build that was forgotten, or that another torch made useless, should not be found out by its slowness."""
    global _warned
    chosen = (DEFAULT if backend is None else backend) not in (None, "auto")
    if _warned or chosen or "x86-64" in reason:
        return
    _warned = True
    # The reason last: it ends with a command, whose "." must not be followed by another.
    text = f"pykernels: its plain torch reference serves CPU tensors (more: pykernels info): {reason}"
    warnings.warn(text, stacklevel=4)


def room_named(name: str) -> Room:
    """The room of this name that the operators have made (importing `pykernels` makes all)."""
    return _rooms[name]


@contextmanager
def default_backend(name: str | None, origin: str) -> Iterator[None]:
    """Calls that name no backend take this one, in place of PYKERNELS_BACKEND's; messages name `origin`.

    For programs with an option of their own: it holds for all threads, and not for graphs compiled before.
    """
    global DEFAULT, _origin
    before = DEFAULT, _origin
    DEFAULT, _origin = name, origin
    try:
        _forget()
        yield
    finally:
        DEFAULT, _origin = before
        _forget()


@contextmanager
def sm90_kernels(mode: str) -> Iterator[None]:
    """Whether the `cuda` backend takes kernels that only GPUs of compute capability 9.0 run, in all threads.

    Attention has such kernels (without dropout), and LSTM and GRU (hidden sizes up to 512, multiples of 8), of 16 bits.

    Args:
        mode: "auto" (as outside): where a committed GPU record shows them faster, which is nowhere yet. "always": for
            every call they can serve; on another GPU, calls of these rooms that name the backend are refused. "never".
            A backward looks when it runs, not when its forward did. `explain(...).kernels` says which would serve a
            call, and why not those. The emulator has them too.

    Raises:
        ValueError: another mode.
    """
    from ._cuda import _sm90

    if mode not in _sm90.MODES:
        raise ValueError(f"sm90_kernels(): mode must be one of {', '.join(_sm90.MODES)}, not {mode!r}")
    before, _sm90.mode = _sm90.mode, mode
    try:
        _forget()
        yield
    finally:
        _sm90.mode = before
        _forget()


def _forget() -> None:
    for made in _rooms.values():
        made._resolved.clear()


def _resolve_while_tracing(
    room: str, function: str, backend: str | None, device: str, dtype: torch.dtype, *features: str
) -> str:
    """The choice made for a tensor of this device and dtype; Dynamo takes it as a constant of the graph."""
    stand_in = torch.empty(0, device=device, dtype=dtype)
    return _rooms[room]._decide(function, backend, stand_in, {}, features)


# What torch.compiler.assume_constant_result does; calling it would import the compiler, which takes a second.
_resolve_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _prepare(tensor: torch.Tensor) -> None:
    """First sight of a tensor subclass: DTensor needs a sharding rule for each of our operators."""
    if type(tensor).__name__ == "DTensor":
        from .integrations import dtensor

        dtensor.register()
