"""Masks of Transformers' models as what they are: bounds and padding instead of a dense tensor, where they can be told.

A model describes its mask by a function of (batch, head, query, key) indices, which Transformers composes from parts of
its own. Those parts are recognised by the function that made them, and their numbers read from its closure. Whatever is
not recognised becomes the dense boolean mask that Transformers makes for "sdpa": slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils


class Pattern(NamedTuple):
    """Query i of n, at p = i + keys - n, may attend to key j iff p - left <= j <= p + right and j is no padding.

    left, right: -1 is unbounded. keys: how many are looked at, from the first on. key_padding_mask: (batch, keys),
    True = real token. ends: of packed sequences, one after another through batch and length, starting with 0.

    A tuple, so that what walks through arguments (checkpointing, FSDP, accelerate) finds the tensors. Models hand it
    from the mask maker to the attention function; one that computes with it as if it were a tensor fails at once.
    """

    left: int
    right: int
    keys: int
    key_padding_mask: Tensor | None = None
    ends: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Four dimensions, by which models know a mask that is made already: generation hands them such."""
        return (1, 1, 1, self.keys)

    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> Pattern:
        """Called by generation with a static cache, on every mask."""
        return self


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **rest: Any,
) -> Any:
    """None (all that the module's `is_causal` says), a `Pattern`, or a dense bool mask (batch, 1, q_length, kv_length).

    Transformers calls it once for each kind of layer and forward pass. Arguments as its own mask functions have them:
    attention_mask is the padding, (batch, at most kv_length + kv_offset).
    """
    if isinstance(attention_mask, Pattern):
        return attention_mask

    def dense() -> Tensor:
        made: Tensor = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            **rest,
        )
        return made

    compiling = torch.compiler.is_compiling()
    kind = None if use_vmap else _recognise(mask_function)
    # A tensor as offset is that of a static cache, whose value a graph must not depend on.
    if kind is None or (isinstance(q_offset, Tensor) and (compiling or q_length == 1)):
        return dense()
    left, right = kind.bounds
    if kind.sequences is not None:
        return dense() if compiling else Pattern(left, right, kv_length, ends=_ends(kind.sequences))
    if not (allow_is_causal_skip if kind.causal else allow_is_bidirectional_skip):
        return dense()  # the model computes with it, or a compiled step takes it as input
    keys = kv_length
    if (left, right) != (-1, -1):
        place = int(q_offset) - kv_offset + q_length  # of the last query, plus one
        if place > kv_length or (place < kv_length and right != 0):
            return dense()
        keys = place  # the rest of a static cache is still empty
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + keys]
        if not compiling and bool(padding.all()):
            padding = None
    left = -1 if left >= keys - 1 else left
    right = -1 if q_length == 1 or right >= keys - 1 else right
    if padding is None and left < 0 and (right < 0 or (kind.causal and keys == q_length)) and keys == kv_length:
        return None
    return Pattern(left, right, keys, padding)


class _Kind(NamedTuple):
    """What a mask function says: causal or both ways, within a window, within sequences (batch, length) of numbers."""

    causal: bool
    window: int | None = None
    sequences: Tensor | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """(left, right) of a `Pattern`. Transformers' causal windows count the query's own key, the others do not."""
        if self.causal:
            return (-1 if self.window is None else self.window - 1), 0
        return (-1, -1) if self.window is None else (self.window, self.window)


def _recognise(function: Callable[..., Any]) -> _Kind | None:
    if function is masking_utils.causal_mask_function:
        return _Kind(True)
    if function is masking_utils.bidirectional_mask_function:
        return _Kind(False)
    if torch.compiler.is_compiling():
        return None  # which does not trace through closures
    made_by, cells = _origin(function)
    if made_by != "and_masks" or len(parts := cells.get("mask_functions", ())) != 2:
        return None
    (first, cells), base = _origin(parts[0]), parts[1]
    if first == "packed_sequence_mask_function":
        second, inner = _origin(base)
        if second != "remap_positions_for_packed_sequence":
            return None
        kind = _recognise(inner["mask_function"])
        if kind is None or not kind.causal or kind.sequences is not None:
            return None
        return kind._replace(sequences=cells["packed_sequence_mask"])
    kind = _recognise(base)
    overlays = {"sliding_window_overlay": True, "sliding_window_bidirectional_overlay": False}
    if kind is None or kind != _Kind(kind.causal) or overlays.get(first) is not kind.causal:
        return None
    return kind._replace(window=cells["sliding_window"])


def _origin(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The function of Transformers' mask utilities that made this one, and what it closed over; ("", {}) for others."""
    if not isinstance(function, FunctionType) or function.__module__ != masking_utils.__name__:
        return "", {}
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__qualname__.split(".")[0], dict(zip(function.__code__.co_freevars, cells, strict=True))


def _ends(sequences: Tensor) -> Tensor:
    """Where the runs of equal numbers in the rows end, through all rows, starting with 0."""
    first = torch.ones_like(sequences, dtype=torch.bool)
    first[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    starts = first.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([sequences.numel()])])
