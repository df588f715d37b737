"""What becomes what: the rules that `patch` goes by, torch.nn's and those of integrations."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def _no_reason(module: nn.Module) -> str | None:
    return None


def _no_attributes(module: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Rule:
    """A class of modules and what `patch` makes of its instances.

    Attributes:
        source: the class. Instances of subclasses are left alone, as they may compute something else, unless
            `subclasses` is set (for what is right for every subclass, as a setting of a whole model).
        target: the class that an instance gets: it must compute the same from the same attributes, parameters and
            child modules (commonly a subclass of `source` with another `forward`). None: the class stays, and `apply`
            does what there is to do.
        why_not: instance -> why it must be left alone, or None.
        attributes: instance -> attributes that the target reads and the source lacks; set with the class, removed by
            `unpatch`.
        apply: called with the instance once its class is set; returns what `restore` needs, plain data that can be
            copied and pickled with the module.
        restore: called by `unpatch` with the instance and what `apply` returned, before the class is set back.
        subclasses: see `source`.
    """

    source: type[nn.Module]
    target: type[nn.Module] | None
    why_not: Callable[[nn.Module], str | None] = _no_reason
    attributes: Callable[[nn.Module], dict[str, Any]] = _no_attributes
    apply: Callable[[Any], Any] | None = None
    restore: Callable[[Any, Any], None] | None = None
    subclasses: bool = False


PROVIDERS: dict[str, str] = {"transformers": "pykernels.integrations.transformers"}
"""Top-level package -> the module of ours that knows its classes. It is imported when a model holds a module of that
package for the first time, and its `patch_rules()` gives the rules (`Iterable[Rule]`); `rule_for(class)` gives those of
classes that it knows only when it sees them, or None. An ImportError out of it (the
package's version does not fit) is the reason, in one sentence, why the package's modules are left."""

_rules: dict[type, Rule] = {}
_left: dict[type, str] = {}
_provided: dict[str, str] = {}  # package -> "" or why its provider has no rules


def register(*rules: Rule) -> None:
    """Adds rules; a later rule for the same class replaces the earlier."""
    for rule in rules:
        _rules[rule.source] = rule


def leave(kind: type[nn.Module], reason: str) -> None:
    """Says why modules of this class are left alone, in place of the general reason."""
    _left[kind] = reason


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls, so that a parent must not compute past it."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def rule_for(kind: type) -> Rule | None:
    """The rule for modules of exactly this class, a provider's included."""
    package = kind.__module__.partition(".")[0]
    if package in PROVIDERS and package not in _provided:
        _provided[package] = _provide(package)
    rule = _rules.get(kind)
    if rule is None and package in PROVIDERS and not _provided[package]:
        rule = sys.modules[PROVIDERS[package]].rule_for(kind)
        if rule is not None:
            register(rule)
    if rule is None:
        above = (_rules.get(base) for base in kind.__mro__[1:])
        rule = next((r for r in above if r is not None and r.subclasses), None)
    return rule


def why_left(kind: type) -> str:
    """Why a class without a rule is left alone."""
    if kind in _left:
        return _left[kind]
    reason = _provided.get(kind.__module__.partition(".")[0])
    if reason:
        return reason
    known = next((base for base in kind.__mro__[1:] if base in _rules), None)
    if known is not None:
        return f"a subclass of {known.__name__}, which may compute something else"
    if any(base in _targets() for base in kind.__mro__[1:]):
        return "a subclass of a pykernels module"
    return "no kernel for this kind"


def is_ours(kind: type) -> bool:
    """Whether the class is one of ours already."""
    return kind in _targets() or kind.__module__.startswith("pykernels.nn")


def _targets() -> set[type]:
    return {rule.target for rule in _rules.values() if rule.target is not None}


def _provide(package: str) -> str:
    try:
        register(*importlib.import_module(PROVIDERS[package]).patch_rules())
    except ImportError as error:
        return str(error)
    return ""
