"""What the backward of a lookup leaves for an optimizer that steps rows itself, in place of a gradient.

An optimizer registers its tables (parameters). The backward of `embedding`, `embedding_bag`, `embedding_bag_multi` and
of the losses over sampled classes on such a parameter computes no gradient for it: it notes the ids and the gradient of
the output, and the optimizer's `step()` consumes the notes with the fused row updates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What happens to a row: "sgd", "adagrad", "rowwise_adagrad" or "adam", and its numbers."""

    name: str
    lr: float
    weight_decay: float = 0.0
    eps: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    step: int = 1


@dataclass(frozen=True)
class Positions:
    """Which rows a lookup (mode None) or bags touched, and the gradient of the output: what backward knows."""

    ids: Tensor
    dy: Tensor
    offsets: Tensor | None = None
    per_sample_weights: Tensor | None = None
    maxima: Tensor | None = None
    mode: str | None = None
    include_last_offset: bool = False
    padding_idx: int | None = None
    by_frequency: bool = False

    def versions(self) -> tuple[int, ...]:
        """In-place writes to the tensors so far; they are used later than autograd would look."""
        held = (self.ids, self.dy, self.offsets, self.per_sample_weights)
        return tuple(x._version for x in held if x is not None and not x.is_inference())


class Table:
    """One registered parameter and the notes of its lookups' backward, until they are cleared."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._noted: list[tuple[Positions, tuple[int, ...]]] = []

    def note(self, at: Positions) -> None:
        self._noted.append((at, at.versions()))

    def clear(self) -> None:
        self._noted.clear()

    def positions(self) -> list[Positions]:
        """The notes; RuntimeError where ids or gradients were written to in place since."""
        for at, versions in self._noted:
            if at.versions() != versions:
                raise RuntimeError(
                    "ids, offsets, weights of ids or the gradient of a lookup's output were modified by an in-place "
                    "operation between backward and the optimizer's step, which needs them as they were"
                )
        return [at for at, _ in self._noted]


_MARK = "_pykernels_rows"
_tables: dict[int, weakref.ref[Table]] = {}  # id of the parameter; the optimizer keeps table and parameter alive
_outside: Callable[..., Any] | None = None


def register(weight: Tensor) -> Table:
    """From now on the backward of lookups of this parameter notes instead of making a gradient, while Table lives."""
    global _outside
    if (known := _tables.get(id(weight))) is not None and known() is not None:
        raise ValueError(
            "this table is already stepped by another pykernels.optim optimizer; delete that first (del optimizer)"
        )
    if _outside is None:  # what is noted is no output of a graph; importing the compiler is left to those who register
        _outside = torch.compiler.disable(_call, reason="a pykernels.optim optimizer steps this table's rows")
    table, key = Table(weight), id(weight)
    _tables[key] = weakref.ref(table)
    setattr(weight, _MARK, True)
    weakref.finalize(table, _release, key, weakref.ref(weight))
    return table


def _release(key: int, weight: weakref.ref[Tensor]) -> None:
    _tables.pop(key, None)
    if (held := weight()) is not None and hasattr(held, _MARK):
        delattr(held, _MARK)


def table_of(weight: Tensor) -> weakref.ref[Table] | None:
    """The parameter's Table, if an optimizer registered it; weak, so that a graph keeps no optimizer's table alive."""
    return _tables.get(id(weight)) if not torch.compiler.is_compiling() and _tables else None


def expects(table: weakref.ref[Table] | None) -> bool:
    """Whether there is still an optimizer to take a note, and no graph of the gradient is wanted."""
    return table is not None and not torch.is_grad_enabled() and table() is not None


def note(table: weakref.ref[Table] | None, make: Callable[[], Positions]) -> bool:
    """Leaves a note instead of a gradient, if there is still an optimizer to take it and no graph of it is wanted."""
    known = None if table is None or torch.is_grad_enabled() else table()
    if known is None:
        return False
    known.note(make())
    return True


def _call(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return function(*args, **kwargs)


def is_held(*weights: Tensor) -> bool:
    """Whether an optimizer registered one of them: an attribute of the parameter, which compiled graphs guard."""
    return any(getattr(weight, _MARK, False) for weight in weights)


def outside_graphs(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls `function` where a compiled graph is left for it."""
    assert _outside is not None
    result: Tensor = _outside(function, *args, **kwargs)
    return result
