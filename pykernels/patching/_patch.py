"""patch and unpatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _torch  # noqa: F401  (registers torch.nn's rules)
from ._classes import plain_class, rebased, running
from ._select import Selection, Selector
from .registry import Rule, is_ours, rule_for, why_left
from .report import Entry, PatchReport

MARK = "_pykernels_patch"
"""Where a swapped module keeps [its class before, its class now, names of added attributes, what Rule.apply gave]: in
the instance, so that copies and pickles of a patched model can be unpatched too."""


def patch(model: nn.Module, *, only: Selector = None, exclude: Selector = None) -> PatchReport:
    """Swaps torch.nn's modules (and those of packages we integrate with) for ours, in place.

    Every module stays the same object with the same parameters, buffers, hooks, names and training mode; its class
    becomes the one of `pykernels.nn`. Outputs and gradients stay equal (`pykernels.testing.compare` says what that
    means). Initialise before patching where initialisation asks for exact classes: `torch.nn.LSTM` becomes
    `pykernels.nn.LSTM`, which torch.compile accepts and which is no subclass of it; all other classes are subclasses.

    Args:
        model: any module tree; the model itself may be swapped too.
        only: swap these alone. A name or glob ("encoder", "layers.*.act"; with all that is below), a module class, a
            predicate (name, module) -> bool, or several of those.
        exclude: leave these, given in the same ways.

    Returns:
        PatchReport: what became of each module and why; printable. Patching again changes nothing.

    Raises:
        TypeError: `model` is no module; a selector of another kind.
        ValueError: a name that the model does not have.
        RuntimeError: under torch.compile, or while a forward of the model is running.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("patch(): it must be called before torch.compile traces, not inside")
    modules = _modules("patch", model)
    names = [name for found in modules.values() for name in found]
    wanted = Selection("only", only, names) if only is not None else None
    spared = Selection("exclude", exclude, names) if exclude is not None else None
    report = PatchReport()
    plan: list[tuple[nn.Module, Rule]] = []
    for module, found in modules.items():
        kind = plain_class(module)
        rule = rule_for(kind)
        status: Any = "left"
        if MARK in module.__dict__ or is_ours(kind):
            status, detail = "already", kind.__name__
        elif spared is not None and any((name, module) in spared for name in found):
            detail = "excluded"
        elif wanted is not None and not any((name, module) in wanted for name in found):
            detail = "not among `only`"
        elif rule is None:
            detail = why_left(kind)
        elif (reason := _why_not(module, rule)) is not None:
            detail = reason
        else:
            status, detail = "patched", f"pykernels {(rule.target or kind).__name__}"
            plan.append((module, rule))
        report.entries.append(Entry(found[0], kind.__name__, status, detail))
    done: list[nn.Module] = []
    try:
        for module, rule in plan:
            done.append(module)
            _swap(module, rule)
    except BaseException:
        for module in done:
            _restore(module)
        raise
    return report


def unpatch(model: nn.Module) -> None:
    """Gives every module that `patch` swapped its class back; others, `pykernels.nn` modules too, stay.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: under torch.compile, or while a forward of the model is running.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("unpatch(): it must be called before torch.compile traces, not inside")
    for module in _modules("unpatch", model):
        _restore(module)


def _modules(function: str, model: Any) -> dict[nn.Module, list[str]]:
    """Every module with all its names; raises where patching is not possible."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    busy = running(found)
    if busy is not None:
        raise RuntimeError(f"{function}(): a forward of the model is running ({type(busy).__name__})")
    return found


_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter)


def _why_not(module: nn.Module, rule: Rule) -> str | None:
    if "forward" in module.__dict__ and rule.target is not None:
        return "its forward was replaced on the instance"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in _PLAIN and type(tensor).__name__ != "DTensor":
            return f"{name} is a {type(tensor).__name__}, which kernels cannot read"
    return rule.why_not(module)


def _swap(module: nn.Module, rule: Rule) -> None:
    kind = plain_class(module)
    target = rule.target or kind
    added = {key: value for key, value in rule.attributes(module).items() if key not in module.__dict__}
    if target is not kind:  # first: where Python refuses it, nothing is left behind
        module.__class__ = rebased(type(module), kind, target)
    module.__dict__.update(added)
    mark = module.__dict__[MARK] = [kind, target, list(added)]
    if rule.apply is not None:
        mark.append(rule.apply(module))


def _restore(module: nn.Module) -> None:
    mark = module.__dict__.get(MARK)
    if mark is None or plain_class(module) is not mark[1]:  # not swapped, or somebody changed its class since
        return
    kind, target, added, *saved = mark
    rule = rule_for(kind)
    if saved and rule is not None and rule.restore is not None:
        rule.restore(module, saved[0])
    for name in (MARK, *added):
        module.__dict__.pop(name, None)
    if target is not kind:
        module.__class__ = rebased(type(module), target, kind)
