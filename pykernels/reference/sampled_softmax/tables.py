"""What is built once from the classes' counts: alias tables for drawing, Huffman trees for hierarchical softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AliasTable", "HuffmanTree"]


def _counts(name: str, counts: Tensor | Sequence[float]) -> Tensor:
    """Counts as a float64 CPU vector, checked."""
    try:
        values = torch.as_tensor(counts).detach().to("cpu", torch.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = type(counts).__name__
        raise TypeError(f"{name}: counts must be a Tensor or a sequence of numbers, not {kind}") from error
    if values.dim() != 1:
        raise ValueError(f"{name}: counts must be 1-D, one for each class, not {values.dim()}-D")
    if values.shape[0] == 0:
        raise ValueError(f"{name}: counts must hold at least one class, not 0")
    if not bool((values.isfinite() & (values >= 0)).all()):
        at = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
        raise ValueError(f"{name}: counts must be finite and not negative, but counts[{at}] is {values[at].item()}")
    return values


@dataclass(frozen=True, eq=False)
class AliasTable:
    """Draws a class in constant time from any fixed distribution, with 12 bytes a class.

    Bucket b holds class b with probability `threshold[b]`, class `alias[b]` otherwise. A draw takes one uniform number
    u: its bucket is floor(u V), and what is left of u V decides.
    Source: Walker, "An efficient method for generating discrete random variables" (1977); built by Vose (1991).

    Attributes:
        probability: Tensor[V] float64, sums to 1.
        threshold: Tensor[V] float64 in [0, 1].
        alias: Tensor[V] int32.
        support: classes of probability above 0.
    """

    probability: Tensor
    threshold: Tensor
    alias: Tensor
    support: int

    @classmethod
    def from_counts(cls, counts: Tensor | Sequence[float], distortion: float = 1.0) -> Self:
        """P(v) proportional to counts[v]**distortion; a count of 0 has probability 0.

        Raises:
            TypeError: `counts` is not a Tensor or a sequence of numbers.
            ValueError: `counts` is empty, not 1-D, not finite, negative, or all zero.
        """
        values = _counts("AliasTable.from_counts()", counts)
        weights = torch.where(values > 0, values.pow(distortion), 0.0)
        if not bool((weights > 0).any()):
            raise ValueError("AliasTable.from_counts(): counts must not be all zero")
        probability = weights / weights.sum()
        threshold, alias = cls._fill(probability * probability.shape[0])
        return cls(probability, threshold, alias, int((probability > 0).sum()))

    @staticmethod
    def _fill(scaled_probability: Tensor) -> tuple[Tensor, Tensor]:
        """(threshold, alias) for probabilities times V."""
        scaled = scaled_probability.tolist()
        size = len(scaled)
        alias = list(range(size))
        small = [v for v in range(size) if scaled[v] < 1.0]
        large = [v for v in range(size) if scaled[v] >= 1.0]
        while small and large:
            low, high = small.pop(), large[-1]
            alias[low] = high
            scaled[high] -= 1.0 - scaled[low]
            if scaled[high] < 1.0:
                small.append(large.pop())
        for v in large:
            scaled[v] = 1.0
        for v in small:  # rounding left them a little below 1; a class of probability 0 always has an alias
            if alias[v] == v:
                scaled[v] = 1.0
        return torch.tensor(scaled, dtype=torch.float64), torch.tensor(alias, dtype=torch.int32)

    @cached_property
    def packed(self) -> Tensor:
        """Tensor[V] int64: threshold * 2^32 in the low half, alias in the high half; one load a draw."""
        low = (self.threshold * 2.0**32).clamp(max=2.0**32 - 1).to(torch.int64)
        return low | (self.alias.to(torch.int64) << 32)

    def to(self, device: torch.device | str) -> Self:
        """The same table on another device; itself where it is there already."""
        if self.alias.device == torch.device(device):
            return self
        moved = (self.probability.to(device), self.threshold.to(device), self.alias.to(device))
        return type(self)(*moved, self.support)


@dataclass(frozen=True, eq=False)
class HuffmanTree:
    """The classes as leaves of a binary tree in which frequent ones are near the root.

    The path of class v from the root is `points[starts[v] : starts[v + 1]]`, numbers of inner nodes in [0, V - 1), and
    at each of them `codes` says where it goes: +1 or -1. P(v) is the product over the path of
    sigmoid(code * x . w[point]), so the probabilities of all classes sum to one.
    Source: Mikolov et al., "Efficient estimation of word representations in vector space" (2013).

    Attributes:
        starts: Tensor[V + 1] int64.
        points: Tensor[sum of path lengths] int32.
        codes: Tensor of the same length, int8, +1 or -1.
        depth: length of the longest path.
    """

    starts: Tensor
    points: Tensor
    codes: Tensor
    depth: int

    @classmethod
    def from_counts(cls, counts: Tensor | Sequence[float]) -> Self:
        """The tree of least expected path length for these counts. Linear in V after a sort.

        Of equal counts the larger id is merged first. The second of two merged nodes is the one on the side of +1.

        Args:
            counts: Tensor[V] or a sequence, not negative.

        Raises:
            TypeError: `counts` is not a Tensor or a sequence of numbers.
            ValueError: `counts` is empty, not 1-D, not finite or negative.
        """
        values = _counts("HuffmanTree.from_counts()", counts)
        order = torch.flip(torch.argsort(values, descending=True, stable=True), (0,))  # ascending, larger ids first
        starts, points, codes = cls._paths(values[order], order)
        return cls(starts, points, codes, int(starts.diff().max()))

    @staticmethod
    def _paths(counts: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(starts, points, codes) for ascending counts, of which the i-th is that of class order[i]."""
        parents, codes = _merge(counts)
        position = torch.empty_like(order)
        position[order] = torch.arange(order.shape[0])
        return _paths(parents, codes, position)

    def to(self, device: torch.device | str) -> Self:
        """The same tree on another device; itself where it is there already."""
        if self.starts.device == torch.device(device):
            return self
        return type(self)(self.starts.to(device), self.points.to(device), self.codes.to(device), self.depth)

    @property
    def classes(self) -> int:
        return self.starts.shape[0] - 1

    def paths(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(nodes, signs), each Tensor[*target.shape, depth]: int64 numbers of inner nodes, -1 beyond a path's end, and
        int8 signs, 0 there."""
        first, last = self.starts[target].unsqueeze(-1), self.starts[target + 1].unsqueeze(-1)
        at = first + torch.arange(self.depth, device=target.device)
        inside = at < last
        at = torch.where(inside, at, 0)
        if self.points.shape[0] == 0:
            return at, at.to(torch.int8)
        return torch.where(inside, self.points[at].long(), -1), torch.where(inside, self.codes[at], 0)


def _merge(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Huffman's merges of V ascending counts: (parents, codes) of the nodes 0 .. 2 V - 2, leaves first; the root is the
    last. Two queues: leaves by count, and inner nodes, which come into being in ascending order."""
    leaves = counts.tolist()
    size = len(leaves)
    total = leaves + [0.0] * (size - 1)
    parents, codes = [0] * (2 * size - 1), [0] * (2 * size - 1)
    leaf, inner = 0, size
    for made in range(size, 2 * size - 1):
        for code in (-1, 1):
            if leaf < size and (inner == made or leaves[leaf] <= total[inner]):
                taken, leaf = leaf, leaf + 1
            else:
                taken, inner = inner, inner + 1
            total[made] += total[taken]
            parents[taken], codes[taken] = made, code
    return torch.tensor(parents), torch.tensor(codes, dtype=torch.int8)


def _paths(parents: Tensor, codes: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, points, codes) from parents: all leaves climb together, one level a step. position: class -> leaf."""
    size = position.shape[0]
    root = 2 * size - 2
    climbers, nodes, steps = torch.arange(size), position, []
    while climbers.numel() and size > 1:
        steps.append((climbers, nodes))
        nodes = parents[nodes]
        alive = nodes != root
        climbers, nodes = climbers[alive], nodes[alive]
    length = torch.zeros(size, dtype=torch.int64)
    for climbers, _ in steps:
        length[climbers] += 1
    starts = torch.cat([length.new_zeros(1), length.cumsum(0)])
    points = torch.empty(int(starts[-1]), dtype=torch.int32)
    signs = torch.empty(points.shape, dtype=torch.int8)
    for level, (climbers, nodes) in enumerate(steps):  # the leaf's own parent is the last of its path
        at = starts[climbers + 1] - 1 - level
        points[at] = (root - parents[nodes]).to(torch.int32)  # the root is node 0
        signs[at] = codes[nodes]
    return starts, points, signs
