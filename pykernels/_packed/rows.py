"""Layers with layer normalisation or zoneout on GPUs: each step is a product of torch's and one kernel over its rows.

The kernel sees whole rows of gates, a program or block for each: it normalises the product, applies the cell,
normalises c and chooses between the old state and the new one. Everything is float32 but the operands of products,
which have the layer's dtype (h is rounded to it, so that nothing is lost).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .steps import Steps, Visit, product

GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
OFF, BLEND, MASK = 0, 1, 2
_SHIFTS = tuple((use * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for use in (2, 3))  # of the masks' seeds, as int64


@dataclass
class Zone:
    """Zoneout of h and of c: how, with which probability, and where the words of its mask begin."""

    modes: tuple[int, int]
    shares: tuple[float, float]
    firsts: tuple[int, int]
    seeds: Tensor | None  #: (2), int64
    places: Tensor | None  #: (N), int64; none: 0, 1, ...

    @property
    def thresholds(self) -> tuple[int, int]:
        h, c = (round(p * 2.0**32) for p in self.shares)
        return h, c


@dataclass
class Weights:
    """Vectors of a layer's loop; each may be missing."""

    bias_n: Tensor | None
    peephole: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    norm_c_bias: Tensor | None


@dataclass
class RowsForward:
    """What the kernel of a step forward is given and fills; rows are those of the batch, tokens those of the layer."""

    kind: str
    rounding: torch.dtype
    gates: Tensor  #: (N, G H): the input's part
    weights: Weights
    zone: Zone
    h0: Tensor
    output: Tensor  #: (N, H)
    h_n: Tensor
    c: Tensor | None  #: (B, H): running
    products: Tensor | None  #: (N, G H): normalised; wanted where they are
    kept: Tensor | None
    cells: Tensor | None
    stats: Tensor | None


@dataclass
class RowsBackward:
    kind: str
    weights: Weights
    zone: Zone
    h0: Tensor
    c0: Tensor | None
    output: Tensor
    products: Tensor
    kept: Tensor
    cells: Tensor | None
    stats: Tensor
    dy: Tensor
    through: Tensor  #: (B, H): dh by way of the product, of rows that end dh_n
    carry_h: Tensor
    carry_c: Tensor | None
    dgates: Tensor
    dstate: Tensor
    dproducts: Tensor
    fresh: Tensor | None  #: (N, H): c' before zoneout
    dnorm: Tensor | None  #: (N, H): the gradient of what tanh is taken of


class RowsFloor:
    """The operators over the row kernels of one floor, which a subclass has."""

    def row_forward(self, r: RowsForward, products: Tensor, visit: Visit) -> None:
        """products: (rows, G H) of this step."""
        raise NotImplementedError

    def row_backward(self, r: RowsBackward, visit: Visit) -> None:
        raise NotImplementedError

    def rows_forward(
        self, gates: Tensor, h0: Tensor, c0: Tensor | None, w_hh: Tensor, w_hr: Tensor | None, bias_n: Tensor | None,
        peephole: Tensor | None, norm_hh: Tensor | None, norm_c: Tensor | None, norm_c_bias: Tensor | None,
        batch_sizes: Tensor | None, seed: Tensor | None, places: Tensor | None, kind: str, dtype: torch.dtype,
        zones: Sequence[float], firsts: Sequence[int], training: bool, reverse: bool, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        (tokens, gated), (batch, hidden) = gates.shape, h0.shape
        weights = _weights(bias_n, peephole, norm_hh, norm_c, norm_c_bias)
        _check(kind, hidden, weights, w_hr, gates=(gates, (tokens, gated)), h0=(h0, (batch, hidden)),
               c0=(c0, (batch, hidden)), w_hh=(w_hh, (gated, hidden)), places=(places, (tokens,)))  # fmt: skip
        steps, new = Steps(tokens, batch, batch_sizes), gates.new_empty
        if steps.tokens < tokens:  # the rest is padding
            real = (gates[: steps.tokens], h0, c0, w_hh, w_hr, bias_n, peephole, norm_hh, norm_c, norm_c_bias)
            options = (kind, dtype, zones, firsts, training, reverse, save)
            found = self.rows_forward(*real, batch_sizes, seed, _present(places, steps.tokens), *options)
            finals = 2 if c0 is None else 3
            return [t if 0 < i < finals else _padded(t, tokens) for i, t in enumerate(found)]
        width = hidden if kind in ("tanh", "relu") else 4 * hidden
        lstm = c0 is not None
        r = RowsForward(
            kind, dtype, gates.contiguous(), weights, _zone(zones, firsts, seed, places, training, lstm),
            h0.contiguous(), new(tokens, hidden), h0.clone(memory_format=torch.contiguous_format),
            None if c0 is None else c0.clone(memory_format=torch.contiguous_format),
            new(tokens, gated) if save and norm_hh is not None else None, new(tokens, width) if save else None,
            new(tokens, hidden) if save and lstm else None, gates.new_zeros(tokens, 3) if save else None,
        )  # fmt: skip
        w = _operand(w_hh, dtype).t()
        for visit in steps.visits(reverse) if hidden else ():
            begun = r.output[visit.previous : visit.previous + visit.begun]
            h = begun if visit.begun == visit.rows else torch.cat((begun, r.h0[visit.begun : visit.rows]))
            self.row_forward(r, product(_operand(h, dtype), w), visit)
        found = [r.output, r.h_n] + ([] if r.c is None else [r.c])
        if save:
            found += [new(0) if r.products is None else r.products, r.kept, r.stats]
            found += [] if r.cells is None else [r.cells]
        return found

    def rows_backward(
        self, dy: Tensor, dhn: Tensor | None, dcn: Tensor | None, h0: Tensor, c0: Tensor | None, w_hh: Tensor,
        w_hr: Tensor | None, peephole: Tensor | None, norm_hh: Tensor | None, norm_c: Tensor | None,
        norm_c_bias: Tensor | None, batch_sizes: Tensor | None, seed: Tensor | None, places: Tensor | None,
        output: Tensor, products: Tensor, kept: Tensor, stats: Tensor, cells: Tensor | None, kind: str,
        dtype: torch.dtype, zones: Sequence[float], firsts: Sequence[int], training: bool, reverse: bool,
        mask: Sequence[bool],
    ) -> list[Tensor]:  # fmt: skip
        (tokens, hidden), batch, gated = dy.shape, h0.shape[0], GATES[kind] * h0.shape[1]
        weights = _weights(None, peephole, norm_hh, norm_c, norm_c_bias)
        width = hidden if kind in ("tanh", "relu") else 4 * hidden
        _check(kind, h0.shape[1], weights, w_hr, dy=(dy, (tokens, h0.shape[1])), w_hh=(w_hh, (gated, hidden)),
               c0=(c0, h0.shape), dhn=(dhn, h0.shape), dcn=(dcn, h0.shape), output=(output, dy.shape),
               products=(None if norm_hh is None else products, (tokens, gated)), kept=(kept, (tokens, width)),
               stats=(stats, (tokens, 3)), cells=(cells, dy.shape), places=(places, (tokens,)))  # fmt: skip
        steps, new, lstm = Steps(tokens, batch, batch_sizes), dy.new_empty, c0 is not None
        if (n := steps.tokens) < tokens:  # the rest is padding
            real = (dhn, dcn, h0, c0, w_hh, w_hr, peephole, norm_hh, norm_c, norm_c_bias, batch_sizes, seed)
            saved = (output[:n], products[:n], kept[:n], stats[:n], _present(cells, n))
            options: Any = (kind, dtype, zones, firsts, training, reverse, mask)
            dgates, *found = self.rows_backward(dy[:n], *real, _present(places, n), *saved, *options)
            return [_padded(dgates, tokens) if mask[0] else dgates, *found]
        dgates = new(tokens, gated)
        dstate = new(tokens, gated) if kind == "gru" else dgates
        carry_c = None if c0 is None else dy.new_zeros(c0.shape) if dcn is None else _copied(dcn)
        r = RowsBackward(
            kind, weights, _zone(zones, firsts, seed, places, training, lstm), h0.contiguous(),
            None if c0 is None else c0.contiguous(), output.contiguous(), products, kept, cells, stats,
            dy if dy.stride(1) == 1 else dy.contiguous(), dy.new_zeros(h0.shape) if dhn is None else _copied(dhn),
            dy.new_zeros(h0.shape), carry_c, dgates, dstate, dstate if norm_hh is None else new(tokens, gated),
            new(tokens, hidden) if lstm else None, new(tokens, hidden) if lstm else None,
        )  # fmt: skip
        w = _operand(w_hh, dtype)
        for visit in reversed(list(steps.visits(reverse))) if hidden else ():
            after = r.dproducts[visit.following : visit.following + visit.staying]
            if visit.staying:
                r.through[: visit.staying] = product(_operand(after, dtype), w)
            self.row_backward(r, visit)
        return self._gradients(r, steps, reverse, w, mask)

    @staticmethod
    def _gradients(r: RowsBackward, steps: Steps, reverse: bool, w_hh: Tensor, mask: Sequence[bool]) -> list[Tensor]:
        def before(after: Tensor, initial: Tensor) -> Tensor:
            return steps.before(after.unsqueeze(0), initial.unsqueeze(0), flipped=reverse)[0]

        hidden, dtype = r.h0.shape[1], w_hh.dtype
        dh0, rows, w = r.through, steps.sizes[0] if steps.sizes else 0, r.weights
        if mask[1]:
            dh0[:rows] = product(_operand(r.dproducts[steps.first(reverse)], dtype), w_hh) + r.carry_h[:rows]
        found: list[Tensor | None] = [r.dgates, dh0, r.carry_c] + [None] * 7
        if mask[3]:
            found[3] = product(_operand(r.dproducts, dtype).t(), _operand(before(r.output, r.h0), dtype))
        if r.kind == "gru" and mask[5]:
            found[5] = r.dstate[:, 2 * hidden :].sum(0)
        if w.peephole is not None and mask[6]:
            di, df, _, do = r.dgates.chunk(4, 1)
            was = before(r.cells, r.c0)
            found[6] = torch.cat(((di * was).sum(0), (df * was).sum(0), (do * r.fresh).sum(0)))
        if w.norm_hh is not None and mask[7]:
            found[7] = (r.dstate * r.products).sum(0)
        if w.norm_c is not None and r.fresh is not None and r.dnorm is not None:
            if mask[8]:
                found[8] = ((r.fresh - r.stats[:, 1:2]) * r.stats[:, 2:] * r.dnorm).sum(0)
            found[9] = r.dnorm.sum(0)
        none = r.dgates.new_empty
        return [none(0) if t is None or not wanted else t for t, wanted in zip(found, mask, strict=True)]


def _weights(*vectors: Tensor | None) -> Weights:
    return Weights(*(None if v is None else v.contiguous() for v in vectors))


def _present(x: Tensor | None, tokens: int) -> Tensor | None:
    return None if x is None else x[:tokens]


def _padded(x: Tensor, tokens: int) -> Tensor:
    return x if x.dim() != 2 else torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[0]))


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An operand of a product; on the CPU (interpreter, emulator) products are made in float32 either way."""
    return x.to(dtype) if x.is_cuda else x


def _zone(
    zones: Sequence[float],
    firsts: Sequence[int],
    seed: Tensor | None,
    places: Tensor | None,
    training: bool,
    lstm: bool,
) -> Zone:
    shares = (zones[0], zones[1] if lstm else 0.0)
    h, c = (OFF if p == 0 else MASK if training else BLEND for p in shares)
    seeds = None if seed is None else torch.cat([seed.reshape(1) + shift for shift in _SHIFTS])
    return Zone((h, c), shares, (int(firsts[0]), int(firsts[1])), seeds, places)


def _check(kind: str, hidden: int, w: Weights, w_hr: Tensor | None, **tensors: Any) -> None:
    """What guards memory: operators may be called on their own (a saved graph)."""
    if w_hr is not None:
        raise RuntimeError("projections are not served together with layer normalisation or zoneout")
    gated = GATES[kind] * hidden
    vectors = {"bias_n": hidden, "peephole": 3 * hidden, "norm_hh": gated, "norm_c": hidden, "norm_c_bias": hidden}
    tensors |= {name: (getattr(w, name), (size,)) for name, size in vectors.items()}
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")
