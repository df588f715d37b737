"""Classes that are made at run time around a module's own, and the question whether a module is running."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch import nn

# parametrize and FSDP2 give an instance a class of its own, derived from the one it had.
_MAKERS = ("torch.nn.utils.parametrize", "torch.distributed.")


def _made_at_run_time(kind: type) -> bool:
    return kind.__module__.startswith(_MAKERS) and any(_is_module(base) for base in kind.__bases__)


def _is_module(kind: type) -> bool:
    return issubclass(kind, nn.Module) and kind is not nn.Module


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that somebody wrote: below what parametrizations and FSDP2 put around it."""
    kind = type(module)
    while _made_at_run_time(kind) and "<locals>" not in kind.__qualname__ and _wraps(kind):
        kind = next(base for base in kind.__bases__ if _is_module(base))
    return kind


def _wraps(kind: type) -> bool:
    """Parametrized<Name> and FSDP<Name> are named for what they wrap."""
    return any(_is_module(base) and kind.__name__.endswith(base.__name__) for base in kind.__bases__)


def rebased(kind: type, old: type, new: type) -> type:
    """`kind` with `old` replaced by `new` below what was made at run time around it."""
    if kind is old:
        return new
    bases = tuple(rebased(base, old, new) if _is_module(base) else base for base in kind.__bases__)
    names = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__.replace(old.__name__, new.__name__), bases, names)


def running(modules: Collection[nn.Module]) -> nn.Module | None:
    """One of the modules whose call is in progress, in any thread, if there is one."""
    wanted = {id(module) for module in modules}
    calls = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}
    for top in sys._current_frames().values():
        frame = top
        while frame is not None:
            if frame.f_code in calls:
                owner = frame.f_locals.get("self")
                if id(owner) in wanted:
                    return owner
            frame = frame.f_back  # type: ignore[assignment]
    return None
