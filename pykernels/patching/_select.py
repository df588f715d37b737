"""`only` and `exclude`: names, globs, classes and predicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Selector = Any
"""A name or glob of module names, a module class, a predicate (name, module) -> bool, or an iterable of those."""


class Selection:
    """The modules that any of the selectors names.

    A name or glob means the modules it matches with all that is below them; a class means its instances (and those of
    its subclasses), alone.
    """

    def __init__(self, argument: str, selectors: Selector, names: Iterable[str]) -> None:
        self.names: set[str] = set()
        self.classes: tuple[type, ...] = ()
        self.predicates: list[Callable[[str, nn.Module], bool]] = []
        known = list(names)
        for selector in _flat(selectors):
            if isinstance(selector, str):
                found = [name for name in known if fnmatchcase(name, selector)]
                if not found:
                    raise ValueError(f"patch(): argument {argument!r}: the model has no module named {selector!r}")
                self.names.update(found)
            elif isinstance(selector, type) and issubclass(selector, nn.Module):
                self.classes += (selector,)
            elif callable(selector) and not isinstance(selector, (type, nn.Module)):
                self.predicates.append(selector)
            else:
                raise TypeError(
                    f"patch(): argument {argument!r} must be names, globs, module classes or predicates of "
                    f"(name, module), not {selector!r}"
                )

    def __contains__(self, item: tuple[str, nn.Module]) -> bool:
        name, module = item
        if isinstance(module, self.classes) or any(predicate(name, module) for predicate in self.predicates):
            return True
        return bool(self.names) and any(above in self.names for above in _and_above(name))


def _and_above(name: str) -> Iterable[str]:
    """ "a.b.c" -> "a.b.c", "a.b", "a", ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _flat(selectors: Selector) -> list[Any]:
    if selectors is None:
        return []
    if isinstance(selectors, (str, type)) or callable(selectors):
        return [selectors]
    try:
        return list(selectors)
    except TypeError:
        return [selectors]
