"""Checks of `attention`'s arguments, and their one form for the operators."""

from __future__ import annotations

import itertools
import numbers
from typing import Any

import torch
from torch import Tensor

from .. import _autocast, _check, _ids

_MOST = 2**63 - 1  # of operators' int64
ALIGNMENTS = {False: "none", True: "bottom_right", "bottom_right": "bottom_right", "top_left": "top_left"}


def query_key_value(name: str, *tensors: Any) -> list[Tensor]:
    """Query, key and value: checked one by one and against each other, in autocast's lower precision."""
    names = ("query", "key", "value")
    for label, value in zip(names, tensors, strict=True):
        _check.tensor(name, label, value)
    cast: list[Tensor] = _autocast.lower(tensors, tensors[0].device)
    _check.floating(name, "query", cast[0])
    for label, value in zip(names, cast, strict=True):
        _check.same(name, label, value, "query", cast[0])
    return cast


def shapes(name: str, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    """Dimensions, heads, head sizes and lengths of query, key and value."""
    layout = "(total, heads, head size)" if packed else "(batch, heads, length, head size)"
    for label, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != (3 if packed else 4):
            raise RuntimeError(f"{name}(): argument '{label}' must have the dimensions {layout}, not {tuple(x.shape)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"{name}(): argument 'key' must have query's head size {query.shape[-1]}, not {key.shape[-1]}"
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise RuntimeError(
            f"{name}(): argument 'value' must have key's shape {tuple(key.shape[:-1])} before the head size, "
            f"not {tuple(value.shape[:-1])}"
        )
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise RuntimeError(
            f"{name}(): argument 'key' must have a number of heads that divides query's {heads}, not {kv_heads}"
        )
    if not packed and key.shape[0] != query.shape[0]:
        raise RuntimeError(
            f"{name}(): argument 'key' must have query's batch size {query.shape[0]}, not {key.shape[0]}"
        )


def four_dimensions(name: str, label: str, x: Any, weights: tuple[int, ...], query: Tensor) -> Tensor:
    """A bias or mask with four dimensions, each 1 or that of the weights (B, H, Lq, Lk)."""
    _check.tensor(name, label, x)
    _ids.same_device(name, label, x, "query", query)
    fits = x.dim() <= 4 and all(n in (1, full) for n, full in zip(x.shape, weights[4 - x.dim() :], strict=True))
    if not fits:
        raise RuntimeError(
            f"{name}(): argument '{label}' must be broadcastable to {tuple(weights)}, not {tuple(x.shape)}"
        )
    return x[(None,) * (4 - x.dim())]


def bias_dtype(name: str, label: str, bias: Tensor, query: Tensor) -> None:
    if bias.dtype not in (torch.float32, query.dtype):
        allowed = " or ".join(dict.fromkeys(("torch.float32", str(query.dtype))))
        raise RuntimeError(f"{name}(): argument '{label}' must be {allowed}, not {bias.dtype}")


def boolean(name: str, label: str, x: Tensor) -> None:
    if x.dtype != torch.bool:
        hint = "; what is added to the scores is 'bias'" if label == "mask" and x.is_floating_point() else ""
        raise RuntimeError(f"{name}(): argument '{label}' must be torch.bool, not {x.dtype}{hint}")


def alignment(name: str, causal: Any) -> str:
    if not isinstance(causal, (bool, str)) or causal not in ALIGNMENTS:
        raise ValueError(
            f"{name}(): argument 'causal' must be False, True, 'bottom_right' or 'top_left', not {causal!r}"
        )
    return ALIGNMENTS[causal]


def window_bounds(name: str, window: Any) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{name}(): argument 'window' must be (left, right), not {window!r}")
    for side in window:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{name}(): argument 'window' must hold two ints, not {window!r}")
        if side < -1:
            raise ValueError(
                f"{name}(): argument 'window' must hold numbers >= -1 (-1: unbounded), not {tuple(window)}"
            )
        if isinstance(side, int) and side > _MOST:
            raise ValueError(f"{name}(): argument 'window' must hold numbers below 2^63, not {tuple(window)}")
    return window[0], window[1]


def prefix_lengths(name: str, prefix: Any, batch: int, query: Tensor) -> Tensor | None:
    if prefix is None:
        return None
    if isinstance(prefix, (int, torch.SymInt)) and not isinstance(prefix, bool):
        if prefix < 0:
            raise ValueError(f"{name}(): argument 'prefix_length' must not be negative, not {prefix}")
        if isinstance(prefix, int) and prefix > _MOST:
            raise ValueError(f"{name}(): argument 'prefix_length' must be below 2^63, not {prefix}")
        return torch.full((batch,), prefix, dtype=torch.int64, device=query.device)
    if not isinstance(prefix, Tensor):
        raise TypeError(f"{name}(): argument 'prefix_length' must be an int or Tensor, not {type(prefix).__name__}")
    _ids.integers(name, "prefix_length", prefix)
    _ids.same_device(name, "prefix_length", prefix, "query", query)
    if tuple(prefix.shape) != (batch,):
        raise RuntimeError(
            f"{name}(): argument 'prefix_length' must have the shape ({batch},), not {tuple(prefix.shape)}"
        )
    if _ids.readable(prefix) and prefix.numel() and int(prefix.min()) < 0:
        raise ValueError(f"{name}(): argument 'prefix_length' must not be negative, not {int(prefix.min())}")
    return prefix.to(torch.int64)


def per_head(name: str, label: str, x: Any, allowed: tuple[tuple[int, ...], ...], query: Tensor) -> Tensor:
    """alibi_slopes or sinks: a floating-point tensor of one of the shapes."""
    _check.tensor(name, label, x)
    _check.floating(name, label, x)
    _ids.same_device(name, label, x, "query", query)
    if tuple(x.shape) not in allowed:
        choices = " or ".join(str(shape) for shape in allowed)
        raise RuntimeError(f"{name}(): argument '{label}' must have the shape {choices}, not {tuple(x.shape)}")
    return x


def positive(name: str, label: str, x: Any) -> float:
    value = _check.number(name, label, x)
    if not value > 0:
        raise ValueError(f"{name}(): argument '{label}' must be positive, not {x}; None leaves it out")
    return value


def probability(name: str, label: str, x: Any) -> float:
    value = _check.number(name, label, x)
    if not 0 <= value < 1:
        raise ValueError(f"{name}(): argument '{label}' must be in [0, 1), not {x}")
    return value


def sequences(name: str, label: str, ends: Any, packed: Tensor, packed_name: str) -> Tensor:
    """cu_seqlens_*: (B + 1,), from 0 up to the packed length, never decreasing. Values are read on the CPU only;
    elsewhere `_ids.checked` looks, and the kernels keep to the packed length whatever they hold."""
    _check.tensor(name, label, ends)
    _ids.integers(name, label, ends)
    _ids.same_device(name, label, ends, packed_name, packed)
    if ends.dim() != 1 or ends.shape[0] < 1:
        raise RuntimeError(f"{name}(): argument '{label}' must have the shape (batch + 1,), not {tuple(ends.shape)}")
    if _ids.readable(ends):
        values = ends.tolist()
        if values[0] != 0:
            raise ValueError(f"{name}(): argument '{label}' must start at 0, not {values[0]}")
        for i, (one, two) in enumerate(itertools.pairwise(values)):
            if two < one:
                raise ValueError(
                    f"{name}(): argument '{label}' must not decrease; {label}[{i + 1}] is {two} after {one}"
                )
        if values[-1] != packed.shape[0]:
            raise ValueError(
                f"{name}(): argument '{label}' must end at {packed_name}'s total {packed.shape[0]}, not {values[-1]}"
            )
    return ends.to(torch.int64)


def packed(name: str, cu_seqlens_q: Any, cu_seqlens_k: Any) -> bool:
    """Whether the layout is that of packed sequences."""
    given = cu_seqlens_q is not None, cu_seqlens_k is not None
    if given[0] != given[1]:
        missing = "cu_seqlens_k" if given[0] else "cu_seqlens_q"
        raise RuntimeError(f"{name}(): argument '{missing}' must be given with the other cu_seqlens, not None")
    return given[0]


def both_sequences(
    name: str, cu_seqlens_q: Any, cu_seqlens_k: Any, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    ends_q = sequences(name, "cu_seqlens_q", cu_seqlens_q, query, "query")
    ends_k = sequences(name, "cu_seqlens_k", cu_seqlens_k, key, "key")
    if ends_k.shape != ends_q.shape:
        raise RuntimeError(
            f"{name}(): argument 'cu_seqlens_k' must have cu_seqlens_q's {ends_q.shape[0]} elements, "
            f"not {ends_k.shape[0]}"
        )
    return ends_q, ends_k


def longest(name: str, label: str, given: Any, ends: Tensor) -> Any:
    """max_seqlen_*, an int or a SymInt; where it is not given it is read from the ends (which waits for a GPU)."""
    if given is None:
        return int(ends.diff().max()) if ends.numel() > 1 else 0
    if isinstance(given, bool) or not isinstance(given, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}(): argument '{label}' must be int, not {type(given).__name__}")
    if _ids.readable(ends) and ends.numel() > 1 and given < int(ends.diff().max()):
        raise ValueError(
            f"{name}(): argument '{label}' must be at least the longest, {int(ends.diff().max())}, not {given}"
        )
    return int(given) if type(given).__module__ == "numpy" else given
