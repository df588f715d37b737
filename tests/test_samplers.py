"""Candidate samplers: distributions by chi-square, expected counts, one stream for a seed, and bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE
from torch import Tensor

import pykernels as pk

F = pk.functional
LABELS = torch.tensor([[0, 3], [7, 1]])
COUNTS = torch.tensor([50.0, 0.0, 8.0, 8.0, 1.0, 30.0, 2.0, 2.0, 40.0, 5.0])


def _probability(kind: str, size: int) -> Tensor:
    if kind == "log_uniform":
        return torch.log1p(1 / (torch.arange(size).double() + 1)) / math.log(size + 1)
    if kind == "uniform":
        return torch.full((size,), 1 / size, dtype=torch.double)
    weights = torch.cat([COUNTS, torch.arange(1, size - COUNTS.shape[0] + 1)]).double().pow(0.75)
    return weights / weights.sum()


def _call(kind: str, count: int, unique: bool, size: int, labels: Tensor = LABELS * 0, **options: Any) -> Any:
    function: Callable[..., Any] = getattr(F, f"{kind}_candidate_sampler")
    if kind == "fixed_unigram":
        options["unigrams"] = torch.cat([COUNTS, torch.arange(1, size - COUNTS.shape[0] + 1)])
    return function(labels, labels.shape[1], count, unique, size, **options)


KINDS = pytest.mark.parametrize("kind", ("log_uniform", "uniform", "fixed_unigram"))


@KINDS
def test_distribution_by_chi_square(kind: str) -> None:
    """1e6 draws of 5000 classes: the first 50 each, the others in bins of 99. A right sampler fails at a significance
    of 1e-4; the seeds are fixed, so it either always passes or never."""
    size, count = 5000, 1_000_000
    ids, true, expected = _call(kind, count, False, size, seed=11)
    assert ids.dtype == torch.int64 and true.dtype == expected.dtype == torch.float32
    probability = _probability(kind, size)
    bins = torch.cat([torch.arange(50), 50 + torch.arange(size - 50) // 99])
    seen = torch.zeros(100, dtype=torch.double).index_add(0, bins[ids], torch.ones(count, dtype=torch.double))
    wanted = torch.zeros(100, dtype=torch.double).index_add(0, bins, probability * count)
    possible = wanted > 0
    assert not seen[~possible].any()
    freedom = int(possible.sum()) - 1
    statistic = float(((seen - wanted)[possible].square() / wanted[possible]).sum())
    critical = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert statistic < critical
    torch.testing.assert_close(expected, (probability[ids] * count).float())
    torch.testing.assert_close(true, (probability[LABELS * 0] * count).float())


@KINDS
def test_inclusion_of_unique_samples(kind: str) -> None:
    """Over 300 samples of 50 of 1000 classes, each of the 12 most probable ones is found as often as expected, within 3
    sigma (a right sampler fails for 3% of the choices of seeds), and so are all of them together."""
    size, count, trials = 1000, 50, 300
    watched = _probability(kind, size).topk(12).indices
    found, mean, variance = torch.zeros(12), torch.zeros(12), torch.zeros(12)
    for seed in range(trials):
        ids, true, _ = _call(kind, count, True, size, watched.unsqueeze(1), seed=seed)
        assert ids.unique().shape[0] == count
        found += torch.isin(watched, ids)
        mean += true.squeeze(1)
        variance += (true * (1 - true)).squeeze(1)
    assert ((found - mean).abs() <= 3 * variance.sqrt() + 1e-3).all()
    assert abs(float((found - mean).sum())) <= 3 * float(variance.sum()) ** 0.5


@KINDS
def test_unique_is_the_sequential_loop(kind: str) -> None:
    """The first K different classes of the stream with replacement, and T the draws that took."""
    many = _call(kind, 4000, False, 60, seed=5)[0].tolist()
    ids, true, expected = _call(kind, 40, True, 60, seed=5)
    wanted: list[int] = []
    tries = 0
    while len(wanted) < 40:
        if many[tries] not in wanted:
            wanted.append(many[tries])
        tries += 1
    assert ids.tolist() == wanted
    p = _probability(kind, 60)
    torch.testing.assert_close(expected, (1 - (1 - p[ids]) ** tries).float())
    torch.testing.assert_close(true, (1 - (1 - p[LABELS * 0]) ** tries).float())


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_one_stream(backend: str) -> None:
    """These classes are part of the format: a seed means the same on every backend and in every version."""
    labels = LABELS.to(DEVICE)
    draw = F.log_uniform_candidate_sampler(labels, 2, 6, False, 1_000_000, seed=2**63 + 9, backend=backend)[0]
    assert draw.tolist() == STREAM


STREAM = [1266, 685587, 19873, 998, 292744, 88464]


@KINDS
@pytest.mark.parametrize("unique", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_bitwise(kind: str, unique: bool, backend: str) -> None:
    """On another device the classes; there torch's logarithm in the expected counts is not the CPU's."""
    options = {"unigrams": torch.arange(3_000)} if kind == "fixed_unigram" else {}
    function = getattr(F, f"{kind}_candidate_sampler")
    given = (2, 1500 if unique else 10_000, unique, 3_000)
    ours = function((LABELS + 1).to(DEVICE), *given, seed=4, backend=backend, **options)
    theirs = function(LABELS + 1, *given, seed=4, backend="reference", **options)
    assert torch.equal(ours[0].cpu(), theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0 if DEVICE == "cpu" else 1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unique_samples_of_any_size(backend: str) -> None:
    """None, one, all there are, and more than the GPU kernels draw at a time, some of them many times."""
    for count, size in ((0, 5), (1, 1), (50, 50), (1100, 1101)):
        ours, theirs = (
            F.log_uniform_candidate_sampler(LABELS.to(DEVICE) * 0, 2, count, True, size, seed=8, backend=name)
            for name in (backend, "reference")
        )
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)


def test_seed_comes_from_torchs_generator() -> None:
    def draw() -> list[int]:
        return F.uniform_candidate_sampler(LABELS, 2, 9, False, 10**9)[0].tolist()

    torch.manual_seed(1)
    first = draw()
    assert draw() != first
    torch.manual_seed(1)
    assert draw() == first


def test_tensorflow_compatible_expected_count() -> None:
    """All 8 classes found in 8 draws: E = K p there, 1 - (1 - p)**8 here."""
    seed = next(s for s in range(500) if F.uniform_candidate_sampler(LABELS, 2, 3, True, 100, seed=s)[2][0] < 0.0298)
    plain = F.uniform_candidate_sampler(LABELS, 2, 3, True, 100, seed=seed)
    same = F.uniform_candidate_sampler(LABELS, 2, 3, True, 100, seed=seed, tf_compat=True)
    assert torch.equal(plain[0], same[0])
    torch.testing.assert_close(plain[2], torch.full((3,), 1 - 0.99**3))
    torch.testing.assert_close(same[2], torch.full((3,), 0.03))


def test_all_classes_and_few() -> None:
    assert F.log_uniform_candidate_sampler(LABELS, 2, 50, True, 50, seed=0)[0].sort().values.tolist() == list(range(50))
    ids, true, expected = F.log_uniform_candidate_sampler(LABELS * 0, 2, 1, True, 1, seed=0)
    assert ids.tolist() == [0] and expected.tolist() == [1.0] and true.eq(1).all()
    assert F.uniform_candidate_sampler(LABELS, 2, 0, True, 50, seed=0)[0].shape == (0,)


def test_millions_of_classes() -> None:
    """A 53-bit uniform reaches the tail: the last tenth of 5e6 classes is drawn as often as it should be."""
    size, count = 5_000_000, 200_000
    ids = F.log_uniform_candidate_sampler(LABELS, 2, count, False, size, seed=3)[0]
    assert int(ids.min()) >= 0 and int(ids.max()) < size
    share = math.log((size + 1) / (0.9 * size + 1)) / math.log(size + 1)
    assert abs(int((ids >= 0.9 * size).sum()) - count * share) < 4 * math.sqrt(count * share)


def test_alias_table() -> None:
    table = pk.functional.AliasTable.from_counts(COUNTS, 0.75)
    assert table.support == 9 and table.threshold[1] == 0
    # Summed over buckets, thresholds and aliases give the probabilities back.
    mass = table.threshold.clone()
    mass.index_add_(0, table.alias.long(), 1 - table.threshold)
    torch.testing.assert_close(mass / 10, table.probability, rtol=1e-12, atol=0)
    by_table = F.fixed_unigram_candidate_sampler(LABELS[:1], 2, 20, False, 10, table, seed=1)
    by_counts = F.fixed_unigram_candidate_sampler(LABELS[:1], 2, 20, False, 10, COUNTS, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(by_table, by_counts, strict=True))


def test_accidental_hits() -> None:
    """Every copy of a label is found; TensorFlow keeps one for each id."""
    rows, places, weights = F.compute_accidental_hits(LABELS, torch.tensor([3, 5, 3, 7]), 2)
    assert rows.tolist() == [0, 0, 1] and places.tolist() == [0, 2, 3]
    assert weights.tolist() == [torch.finfo(torch.float32).min] * 3


@pytest.mark.parametrize("unique", (False, True))
def test_compiles_whole(unique: bool) -> None:
    torch._dynamo.reset()

    def draw(labels: Tensor) -> Any:
        return F.log_uniform_candidate_sampler(labels, 2, 20, unique, 100, seed=1)

    for ours, theirs in zip(
        torch.compile(draw, fullgraph=True, backend="aot_eager")(LABELS), draw(LABELS), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"true_classes": [1]}, TypeError, "'true_classes'"),
        ({"true_classes": LABELS.float()}, RuntimeError, "'true_classes'"),
        ({"true_classes": LABELS[:, :1]}, ValueError, "'true_classes'"),
        ({"true_classes": LABELS + 8}, IndexError, r"true_classes\[0, 1\] is 11"),
        ({"true_classes": LABELS}, ValueError, r"true_classes\[1, 1\] is 1, whose probability"),
        ({"num_sampled": -1}, ValueError, "'num_sampled'"),
        ({"num_sampled": 2.0}, TypeError, "'num_sampled'"),
        ({"num_sampled": 10}, ValueError, "'num_sampled' must be at most .* = 9"),
        ({"num_true": 0}, ValueError, "'num_true'"),
        ({"range_max": 0}, ValueError, "'range_max'"),
        ({"range_max": 9}, ValueError, "'unigrams'"),
        ({"unigrams": -COUNTS}, ValueError, r"counts\[0\] is -50"),
        ({"unigrams": COUNTS * 0}, ValueError, "all zero"),
        ({"unigrams": COUNTS[:0]}, ValueError, "at least one"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"backend": "cuda"}, pk.BackendError, "cuda"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"true_classes": LABELS[:1], "num_true": 2, "num_sampled": 4, "unique": True, "range_max": 10}
    with pytest.raises(error, match=text):
        F.fixed_unigram_candidate_sampler(**{**good, "unigrams": COUNTS, **changed})


def test_too_many_unique_classes() -> None:
    for name in ("log_uniform", "uniform"):
        with pytest.raises(ValueError, match="'num_sampled' must be at most range_max = 10"):
            getattr(F, f"{name}_candidate_sampler")(LABELS, 2, 11, True, 10)
