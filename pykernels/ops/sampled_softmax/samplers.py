"""Candidate samplers: which classes stand in for all of them, and how often each is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import functorch_active
from ...reference.sampled_softmax import samplers as reference
from ...reference.sampled_softmax import tables
from .. import _check, _ids
from .._library import as_seed
from ._checks import check_count, check_ids, check_labels
from ._functions import ROOM, candidate_sample
from .tables import AliasTable

__all__ = [
    "compute_accidental_hits",
    "fixed_unigram_candidate_sampler",
    "log_uniform_candidate_sampler",
    "uniform_candidate_sampler",
]

Sampled = tuple[Tensor, Tensor, Tensor]


def log_uniform_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Sampled:
    """Draws classes from a Zipf-like distribution: `P(v) = log(1 + 1 / (v + 1)) / log(range_max + 1)`.

    Class ids must be sorted by descending frequency. As `tf.random.log_uniform_candidate_sampler`; the random numbers
    are counter-based, so one seed gives the same classes on every backend and device.

    Args:
        true_classes: Tensor[B, num_true] (or Tensor[B] with one label a row), int32 or int64; they set the device.
        num_true: labels a row.
        num_sampled: K, classes to draw for the whole batch.
        unique: whether all K differ (drawn until K different ones are found). The kernels wait for nothing; on a GPU
            the reference waits for the device to learn how many draws that took.
        range_max: V; classes are in [0, V).
        seed: int or one-element int64 tensor; None draws one from torch's generator of the device.
        tf_compat: where K unique classes happen to be found in K draws, TensorFlow gives K p(v) for the expected counts
            in place of `1 - (1 - p(v))**K`; this does the same.
        bounds_check: what happens to a true class outside [0, V). "error": on the CPU an IndexError; on a GPU its
            expected count is 0, and the next checked call or `pykernels.check_errors()` raises. "sync": on a GPU this
            call waits and raises. "none": on a GPU nobody looks, and that count means nothing.
        backend: see `pykernels.explain`.

    Returns:
        (sampled, true_expected_count, sampled_expected_count): Tensor[K] int64, Tensor of `true_classes`' shape and
        Tensor[K], both float32. Expected counts are K p(v) with replacement, and `1 - (1 - p(v))**T` for unique
        classes, T the number of draws it took.

    Raises:
        TypeError: `true_classes` is not a Tensor, a count is not an int, a wrong seed.
        RuntimeError: `true_classes` is not int32 or int64.
        ValueError: wrong shape; counts too small; `num_sampled > range_max` with `unique`.
        IndexError: a true class is outside [0, V); see `bounds_check`.
        BackendError: the named backend cannot serve the call.
    """
    given = ("log_uniform_candidate_sampler", true_classes, num_true, num_sampled, unique, range_max)
    return _sampled(*given, "log_uniform", None, seed, tf_compat, bounds_check, backend)


def uniform_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Sampled:
    """Draws classes with equal probability 1 / range_max. As `tf.random.uniform_candidate_sampler`; arguments, results
    and errors as in `log_uniform_candidate_sampler`."""
    given = ("uniform_candidate_sampler", true_classes, num_true, num_sampled, unique, range_max)
    return _sampled(*given, "uniform", None, seed, tf_compat, bounds_check, backend)


def fixed_unigram_candidate_sampler(
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    unigrams: tables.AliasTable | Tensor | Sequence[float],
    distortion: float = 0.75,
    *,
    seed: int | Tensor | None = None,
    tf_compat: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Sampled:
    """Draws classes with `P(v)` proportional to `unigrams[v]**distortion`, in constant time through an alias table.

    As `tf.random.fixed_unigram_candidate_sampler` (whose default distortion is 1; 0.75 is word2vec's); arguments,
    results and errors as in `log_uniform_candidate_sampler`, and:

    Args:
        unigrams: counts or weights of the V classes; 0 means never. An `AliasTable` is used as it is: build it once for
            a training run, counts are made into one on every call.
        distortion: exponent, for counts.

    Raises:
        TypeError: `unigrams` is not a Tensor, a sequence of numbers or an AliasTable.
        ValueError: `unigrams` is not of length range_max, not finite, negative or all zero; `unique` with more samples
            than classes of probability above 0; a true class has probability 0 (read on the CPU in eager mode;
            elsewhere its expected count is 0).
    """
    name = "fixed_unigram_candidate_sampler"
    if unigrams is None:
        raise TypeError(f"{name}(): argument 'unigrams' must be counts of the classes or an AliasTable, not None")
    table = unigrams if isinstance(unigrams, tables.AliasTable) else AliasTable.from_counts(unigrams, distortion)
    return _sampled(
        name,
        true_classes,
        num_true,
        num_sampled,
        unique,
        range_max,
        "alias",
        table,
        seed,
        tf_compat,
        bounds_check,
        backend,
    )


def _sampled(
    name: str,
    true_classes: Tensor,
    num_true: int,
    num_sampled: int,
    unique: bool,
    range_max: int,
    kind: str,
    table: tables.AliasTable | None,
    seed: int | Tensor | None,
    tf_compat: bool,
    bounds_check: str,
    backend: str | None,
) -> Sampled:
    _ids.before(name, bounds_check)
    _check.tensor(name, "true_classes", true_classes)
    check_count(name, "num_true", num_true, 1)
    check_count(name, "num_sampled", num_sampled, 0)
    check_count(name, "range_max", range_max, 1)
    check_labels(name, "true_classes", true_classes, num_true)
    check_ids(name, "true_classes", true_classes, range_max, "true_classes", true_classes)
    classes, what = range_max, "range_max"
    if table is not None:
        if table.alias.shape[0] != range_max:
            held = table.alias.shape[0]
            raise ValueError(f"{name}(): argument 'unigrams' must hold range_max = {range_max} classes, not {held}")
        table = table.to(true_classes.device)
        classes, what = table.support, "the number of classes of probability above 0"
        _check_possible(name, true_classes, table)
    if unique and num_sampled > classes:
        raise ValueError(
            f"{name}(): argument 'num_sampled' must be at most {what} = {classes} with unique=True, not {num_sampled}"
        )
    seeded = as_seed(seed, true_classes, name)
    threshold, alias, probability = (None,) * 3 if table is None else (table.threshold, table.alias, table.probability)
    backend = ROOM.resolve(name, backend, true_classes)
    draw = reference.sample if functorch_active() else candidate_sample[backend]
    ids, tries = draw(seeded, threshold, alias, kind, num_sampled, range_max, unique)
    given, looked_at = true_classes, _ids.readable(true_classes)
    true_classes = _ids.checked(backend, bounds_check, name, "true_classes", true_classes, range_max)
    right = true_classes if looked_at else true_classes.clamp(0, range_max - 1)
    rest = (right, kind, num_sampled, range_max, unique, probability, tf_compat)
    sampled, true_expected, sampled_expected = reference.with_expected_counts(ids, tries, *rest)
    if true_classes is not given:
        true_expected = torch.where(true_classes < 0, 0, true_expected)
    _ids.after(bounds_check)
    return sampled, true_expected, sampled_expected


def _check_possible(name: str, true_classes: Tensor, table: tables.AliasTable) -> None:
    if true_classes.numel() == 0 or not _ids.readable(true_classes):
        return
    never = table.probability[true_classes.long()] == 0
    if bool(never.any()):
        at = never.nonzero()[0].tolist()
        value = true_classes[tuple(at)].item()
        raise ValueError(
            f"{name}(): argument 'true_classes': true_classes{at} is {value}, whose probability in unigrams is 0; "
            "its expected count would be 0 and its corrected logit infinite"
        )


def compute_accidental_hits(true_classes: Tensor, sampled_candidates: Tensor, num_true: int) -> Sampled:
    """Finds sampled classes that are labels. As `tf.nn.compute_accidental_hits`, except that with replacement every
    copy of a label in the sample is found, not just one.

    Args:
        true_classes: Tensor[B, num_true] (or Tensor[B] with one label a row), int32 or int64.
        sampled_candidates: Tensor[K], int32 or int64.
        num_true: labels a row.

    Returns:
        (indices, ids, weights), one entry a hit: its row, its position in the sample (both int64) and the most negative
        float32, to be added to the logit. How many there are depends on the data, so a GPU is waited for; the losses do
        not call this.

    Raises:
        TypeError: not Tensors.   ValueError: wrong shapes.   RuntimeError: wrong dtypes or devices.
    """
    name = "compute_accidental_hits"
    _check.tensor(name, "true_classes", true_classes)
    _check.tensor(name, "sampled_candidates", sampled_candidates)
    check_count(name, "num_true", num_true, 1)
    check_labels(name, "true_classes", true_classes, num_true)
    if sampled_candidates.dim() != 1:
        shape = tuple(sampled_candidates.shape)
        raise ValueError(f"{name}(): argument 'sampled_candidates' must have the shape (K,), not {shape}")
    for key, ids in (("true_classes", true_classes), ("sampled_candidates", sampled_candidates)):
        _ids.integers(name, key, ids)
        _ids.same_device(name, key, ids, "true_classes", true_classes)
    return reference.compute_accidental_hits(true_classes.reshape(-1, num_true), sampled_candidates, num_true)
