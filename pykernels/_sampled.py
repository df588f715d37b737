"""The sampled_softmax room's operators as both GPU floors have them: what torch does around their kernels.

Sums are taken in float32 and rounded once, gradients of class rows by sorted runs: no atomics, the same bits on every
run. Ids outside the classes add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._segments import Segments, adjacent, by_row

Mask = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Shared:
    """Classes that all rows of a call share.

    Attributes:
        ids: of the sample, (K,); None where the classes are all rows of `weight`.
        log: what is taken from the logits of the sample, (K,), or None.
        labels: int (B, T) whose equals are left out of the sample, or (B,) targets.
        factors: (V,) class weights, or None.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor | None
    log: Tensor | None
    labels: Tensor
    factors: Tensor | None
    kind: str  #: "softmax" or "logistic"

    @property
    def count(self) -> int:
        return self.weight.shape[0] if self.ids is None else self.ids.shape[0]

    @property
    def bias_step(self) -> int:
        return 0 if self.bias is None else self.bias.stride(0)

    @property
    def hits(self) -> int:
        """Labels of a row that are looked for in the sample."""
        return 0 if self.ids is None else self.labels.shape[1]


class Floor:
    """What a floor has kernels for; all tensors but input, weight, bias and out are contiguous."""

    def sum_rows(self, values: Tensor, segments: Segments, out: Tensor) -> None:
        """out[key] (with ranks: out[rank]) = the sum of factor * values[source] over the entries of each key."""
        raise NotImplementedError

    def true_logits(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, true_log: Tensor | None, out: Tensor
    ) -> None:
        """out[i, t] = input_i . weight[labels_it] + bias[labels_it] - true_log_it"""
        raise NotImplementedError

    def losses(self, sample: Shared, statistics: Tensor) -> Tensor:
        """Of the rows; `statistics` has the true logits from its third column on, the first two are filled."""
        raise NotImplementedError

    def slopes(self, dloss: Tensor, statistics: Tensor, count: int, kind: str) -> Tensor:
        """(B, T) float32: the gradients of the true logits."""
        raise NotImplementedError

    def gradients(
        self, sample: Shared, dloss: Tensor, statistics: Tensor, mask: Mask, drows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the sample's logits: (that of input, those of the sample's biases), float32; `drows` (K, D) is filled."""
        raise NotImplementedError

    def add_rows(self, out: Tensor, weight: Tensor, ids: Tensor, factor: Tensor) -> None:
        """out_i += sum_t factor_it weight[ids_it]"""
        raise NotImplementedError

    def _dense(self, values: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
        out = values.new_zeros((segments.rows, values.shape[1]), dtype=dtype)
        self.sum_rows(values, segments, out)
        return out

    def _sparse(self, values: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        segments, unique = adjacent(segments)
        out = values.new_empty((unique.numel(), values.shape[1]), dtype=dtype)
        self.sum_rows(values, segments, out)
        return unique.unsqueeze(0), out

    def row_gradient(self, dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int) -> Tensor:
        return self._dense(input, _row_entries(dloss, ids, coefficient, rows), input.dtype)

    def row_gradient_sparse(
        self, dloss: Tensor, input: Tensor, ids: Tensor, coefficient: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        return self._sparse(input, _row_entries(dloss, ids, coefficient, rows), input.dtype)

    def sampled_rows_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        sampled: Tensor,
        true_log: Tensor | None,
        sampled_log: Tensor | None,
        kind: str,
        remove_hits: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, count = labels.shape
        statistics = torch.zeros((batch, 2 + count), dtype=torch.float32, device=input.device)
        kept = statistics.new_empty((batch, sampled.shape[0]) if keep else (0,))
        if batch == 0:
            return statistics.new_empty(0), statistics, kept
        own_log = None if true_log is None else true_log.contiguous()
        self.true_logits(input, weight, bias, labels.contiguous(), own_log, statistics[:, 2:])
        sample = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
        return self.losses(sample, statistics), statistics, kept

    def sampled_rows_backward(
        self,
        dloss: Tensor,
        statistics: Tensor,
        logits: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        sampled: Tensor,
        true_log: Tensor | None,
        sampled_log: Tensor | None,
        kind: str,
        remove_hits: bool,
        output_mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sample = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
        dinput, entries, dbias = self._sampled_gradients(dloss, statistics, labels, sample, output_mask)
        return dinput, input.new_empty(0) if entries is None else self._dense(*entries, weight.dtype), dbias

    def sampled_rows_backward_sparse(
        self,
        dloss: Tensor,
        statistics: Tensor,
        logits: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        sampled: Tensor,
        true_log: Tensor | None,
        sampled_log: Tensor | None,
        kind: str,
        remove_hits: bool,
        output_mask: Mask,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sample = _sample(input, weight, bias, labels, sampled, sampled_log, kind, remove_hits)
        dinput, entries, dbias = self._sampled_gradients(dloss, statistics, labels, sample, output_mask)
        if entries is None:
            nothing = input.new_empty(0)
            return dinput, torch.empty((1, 0), dtype=torch.int64, device=input.device), nothing, dbias
        return dinput, *self._sparse(*entries, weight.dtype), dbias

    def _sampled_gradients(
        self, dloss: Tensor, statistics: Tensor, labels: Tensor, sample: Shared, mask: Mask
    ) -> tuple[Tensor, tuple[Tensor, Segments] | None, Tensor]:
        """Gradients of input and bias, and the entries that make weight's: rows of input, then those of the sample."""
        input, weight = sample.input, sample.weight
        (batch, count), (rows, cols), device = labels.shape, weight.shape, input.device
        wanted = (mask[0], mask[1], sample.bias is not None and mask[2])
        dloss, labels, statistics = dloss.contiguous(), labels.contiguous(), statistics.contiguous()
        dinput, dbias = input.new_empty(0), input.new_empty(0)
        own = torch.empty((batch, count), dtype=torch.float32, device=device)
        values = own.new_empty((batch + sample.count, cols)) if mask[1] else None
        dshared, of_sample = None, None
        if values is not None:
            values[:batch] = input
            of_sample = values[batch:] if batch else values.zero_()
        if batch:
            own = self.slopes(dloss, statistics, count, sample.kind)
            found, dshared = self.gradients(sample, dloss, statistics, wanted, of_sample)
            if found is not None:
                self.add_rows(found, weight, labels, own)
                dinput = found.to(input.dtype)
        elif mask[0]:
            dinput = torch.zeros_like(input)
        assert sample.ids is not None
        ids = torch.cat([labels.reshape(-1).long(), sample.ids.long()])
        places = torch.arange(ids.numel(), device=device)
        if wanted[2]:
            shares = torch.cat([own.reshape(-1), own.new_zeros(sample.count) if dshared is None else dshared])
            entries = by_row(ids, places, None, rows)
            dbias = self._dense(shares.unsqueeze(1), entries, input.dtype).squeeze(1)
        if values is None:
            return dinput, None, dbias
        source = torch.where(places < labels.numel(), places // max(count, 1), places - (labels.numel() - batch))
        factor = torch.cat([own.reshape(-1), own.new_ones(sample.count)])
        return dinput, (values, by_row(ids, source, factor, rows)), dbias


def _row_entries(dloss: Tensor, ids: Tensor, coefficient: Tensor, rows: int) -> Segments:
    source = torch.arange(ids.numel(), device=ids.device) // max(ids.shape[1], 1)
    return by_row(ids.reshape(-1), source, (coefficient * dloss.unsqueeze(1)).reshape(-1), rows)


def _sample(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
) -> Shared:
    hits = labels.contiguous() if remove_hits else labels.new_empty((1, 0))
    log = None if sampled_log is None else sampled_log.contiguous()
    return Shared(input, weight, bias, sampled.contiguous(), log, hits, None, kind)
