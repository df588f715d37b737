"""Candidate samplers in plain torch: counter-based random numbers, the same stream on every device.

Draw t uses the Philox words (see reference/_random.py) at offsets 2 t and 2 t + 1, made into one float64 uniform of 53
bits. exp is written out in additions and multiplications, which every device rounds alike: library exponentials differ
in the last bit, and where they straddle an integer so would the class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._random import philox_words, seed_on
from .tables import AliasTable

__all__ = [
    "compute_accidental_hits",
    "fixed_unigram_candidate_sampler",
    "log_uniform_candidate_sampler",
    "uniform_candidate_sampler",
]

Sampled = tuple[Tensor, Tensor, Tensor]
MAX_DRAWS = 2**40  # a sampler that has not found its classes by then never will


def uniform53(seed: Tensor, first: int, count: int) -> Tensor:
    """float64 uniforms in [0, 1) of draws first .. first + count - 1."""
    words = philox_words(seed, torch.arange(2 * first, 2 * (first + count), device=seed.device)).view(count, 2)
    return ((words[:, 0] << 21) | (words[:, 1] >> 11)).double() * 2.0**-53


def exp53(x: Tensor) -> Tensor:
    """exp(x), 0 <= x < 45, in operations that IEEE 754 defines: 2**n times a polynomial of degree 13 in x - n log 2."""
    n = torch.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = torch.full_like(r, 1.0 / math.factorial(13))
    for k in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(k)
    return p * (torch.ones_like(n, dtype=torch.int64) << n.long()).double()


def draw(
    kind: str, seed: Tensor, first: int, count: int, size: int, threshold: Tensor | None, alias: Tensor | None
) -> Tensor:
    """Classes (int64) of draws first .. first + count - 1."""
    u = uniform53(seed, first, count)
    if kind == "log_uniform":
        ids = exp53(u * math.log(size + 1)).floor().long() - 1
        return ids.clamp(0, size - 1)
    scaled = u * size
    bucket = scaled.floor().long().clamp(max=size - 1)
    if kind == "uniform":
        return bucket
    assert threshold is not None and alias is not None
    return torch.where(scaled - bucket < threshold[bucket], bucket, alias[bucket].long())


def sample(
    seed: Tensor, threshold: Tensor | None, alias: Tensor | None, kind: str, count: int, size: int, unique: bool
) -> tuple[Tensor, Tensor]:
    """(classes, tries): `count` draws; with `unique` the first `count` different classes, in the order of their first
    draws, and the number of draws that took."""
    if not unique or count == 0:
        return draw(kind, seed, 0, count, size, threshold, alias), seed.new_full((), count)
    drawn = draw(kind, seed, 0, 2 * count, size, threshold, alias)
    while drawn.shape[0] < MAX_DRAWS:
        # A stable sort keeps draws of one class in their order: the first of each run is its first draw.
        classes, order = torch.sort(drawn, stable=True)
        opens = torch.ones_like(classes, dtype=torch.bool)
        opens[1:] = classes[1:] != classes[:-1]
        first = torch.sort(order[opens]).values  # the shape depends on the data: on a GPU this waits for it
        if first.shape[0] >= count:
            return drawn[first[:count]], first[count - 1] + 1
        drawn = torch.cat([drawn, draw(kind, seed, drawn.shape[0], drawn.shape[0], size, threshold, alias)])
    raise RuntimeError(f"{kind} sampler: {count} different classes were not found in 2**40 draws")


def expected_count(probability: Tensor, count: int, tries: Tensor, unique: bool, tf_compat: bool) -> Tensor:
    """float32 E of how often a class of this float64 probability is in the sample."""
    often = probability * count
    if unique:
        once = -torch.expm1(tries * torch.log1p(-probability))
        often = torch.where(tries == count, often, once) if tf_compat else once
    return often.float()


def log_uniform_probability(ids: Tensor, size: int) -> Tensor:
    return torch.log1p(1.0 / (ids.double() + 1.0)) / math.log(size + 1)


def as_table(unigrams: AliasTable | Tensor | Sequence[float], distortion: float, device: torch.device) -> AliasTable:
    table = unigrams if isinstance(unigrams, AliasTable) else AliasTable.from_counts(unigrams, distortion)
    return table.to(device)


def with_expected_counts(
    ids: Tensor,
    tries: Tensor,
    true_classes: Tensor,
    kind: str,
    count: int,
    size: int,
    unique: bool,
    probability: Tensor | None,
    tf_compat: bool,
) -> Sampled:
    """(sampled, true_expected_count, sampled_expected_count)."""

    def expected(classes: Tensor) -> Tensor:
        if probability is not None:
            p = probability[classes.long()]
        elif kind == "log_uniform":
            p = log_uniform_probability(classes, size)
        else:
            p = torch.full(classes.shape, 1.0 / size, dtype=torch.float64, device=classes.device)
        return expected_count(p, count, tries, unique, tf_compat)

    return ids, expected(true_classes), expected(ids)


def log_uniform_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
) -> Sampled:
    """P(v) = log(1 + 1 / (v + 1)) / log(range_max + 1), drawn as floor(exp(u log(range_max + 1))) - 1."""
    ids, tries = sample(seed_on(seed, true_classes.device), None, None, "log_uniform", num_sampled, range_max, unique)
    rest = (true_classes, "log_uniform", num_sampled, range_max, unique, None, tf_compat)
    return with_expected_counts(ids, tries, *rest)


def uniform_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
) -> Sampled:
    """P(v) = 1 / range_max, drawn as floor(u range_max)."""
    ids, tries = sample(seed_on(seed, true_classes.device), None, None, "uniform", num_sampled, range_max, unique)
    return with_expected_counts(ids, tries, true_classes, "uniform", num_sampled, range_max, unique, None, tf_compat)


def fixed_unigram_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    unigrams: AliasTable | Tensor | Sequence[float],
    distortion: float = 0.75,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
) -> Sampled:
    """P(v) proportional to unigrams[v]**distortion, drawn through an alias table."""
    table = as_table(unigrams, distortion, true_classes.device)
    seeded = seed_on(seed, true_classes.device)
    ids, tries = sample(seeded, table.threshold, table.alias, "alias", num_sampled, range_max, unique)
    rest = (true_classes, "alias", num_sampled, range_max, unique, table.probability, tf_compat)
    return with_expected_counts(ids, tries, *rest)


def compute_accidental_hits(true_classes: Tensor, sampled_candidates: Tensor, num_true: int) -> Sampled:
    """(indices, ids, weights): sampled_candidates[ids[n]] is one of true_classes[indices[n]]."""
    found = (true_classes.unsqueeze(2) == sampled_candidates).any(1).nonzero()
    weights = torch.full((found.shape[0],), torch.finfo(torch.float32).min, device=true_classes.device)
    return found[:, 0], found[:, 1], weights
