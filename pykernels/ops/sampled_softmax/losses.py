"""Losses over sampled classes, and over the path to the class in a Huffman tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._backends import is_compiling
from ...reference import sampled_softmax as reference
from ...reference.sampled_softmax.losses import reduce
from ...reference.sampled_softmax.tables import HuffmanTree
from .. import _autocast, _check, _ids
from .._function import apply
from .._pending import is_held, outside_graphs, table_of
from ._checks import check_count, check_ids, check_labels, check_matrices, check_positive, check_reduction, check_shape
from ._functions import ROOM, LogisticRows, SampledRows, SparseLogisticRows, SparseSampledRows
from .samplers import Sampled, log_uniform_candidate_sampler

__all__ = ["hierarchical_softmax_loss", "nce_loss", "negative_sampling_loss", "sampled_softmax_loss"]


def negative_sampling_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    negatives: Tensor,
    reduction: str = "mean",
    *,
    sparse: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """word2vec's negative sampling: tell the true class from K sampled ones, each by a logistic regression.

    `loss[i] = -log sigmoid(x_i . w[target_i]) - sum_k log sigmoid(-x_i . w[negatives_ik])`, x = `input`, w = `weight`.
    A negative that equals the target counts like any other. No correction for the sampling probabilities.
    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality" (2013).

    Args:
        input: Tensor[B, D], floating point.
        weight: Tensor[V, D] of `input`'s dtype, one row per class.
        target: Tensor[B], int32 or int64.
        negatives: Tensor[B, K], or Tensor[K] shared by all rows; int32 or int64.
        reduction: "none" (Tensor[B]), "mean" over B (of no rows: NaN, as torch's losses give) or "sum".
        sparse: give `weight` a row-sparse gradient (`torch.sparse_coo`). The native kernels make it coalesced: each
            class once, in ascending order.
        bounds_check: what happens to an id outside [0, V). "error": on the CPU an IndexError before anything is
            computed; on a GPU a row whose target is wrong adds nothing (loss 0, no gradient), a wrong negative is left
            out, and the next checked call or `pykernels.check_errors()` raises, with no synchronisation here. "sync":
            the same, but on a GPU this call waits and raises. "none": on a GPU nobody looks; wrong ids are not read,
            the losses of their rows mean nothing.
        backend: see `pykernels.explain`.

    Returns:
        The loss, computed in float32 (float64 for float64) and rounded to `input`'s dtype. Under autocast `input` and
        `weight` are cast to float32, as torch casts its losses.

    Raises:
        TypeError: an argument is not a Tensor.
        NotImplementedError: `input` or `weight` is not floating point.
        RuntimeError: `target` or `negatives` is not int32 or int64; `input` and `weight` differ in dtype; different
            devices.
        ValueError: wrong shapes; unknown `reduction` or `bounds_check`.
        IndexError: a target or negative is outside [0, V), named with its position; see `bounds_check`.
        BackendError: the named backend cannot serve the call.
    """
    name = "negative_sampling_loss"
    if is_compiling() and is_held(weight):
        given: dict[str, Any] = {"sparse": sparse, "bounds_check": bounds_check, "backend": backend}
        return outside_graphs(negative_sampling_loss, input, weight, target, negatives, reduction, **given)
    _ids.before(name, bounds_check)
    for key, value in (("input", input), ("weight", weight), ("target", target), ("negatives", negatives)):
        _check.tensor(name, key, value)
    input, weight = _autocast.float32((input, weight), input.device)
    check_matrices(name, input, weight)
    batch = input.shape[0]
    check_shape(name, "target", target, (batch,))
    if negatives.dim() != 1 and (negatives.dim() != 2 or negatives.shape[0] != batch):
        shape = tuple(negatives.shape)
        raise ValueError(f"{name}(): argument 'negatives' must have the shape ({batch}, K) or (K,), not {shape}")
    check_reduction(name, reduction)
    for key, ids in (("target", target), ("negatives", negatives)):
        check_ids(name, key, ids, weight.shape[0], "input", input)
    backend = ROOM.resolve(name, backend, input)
    classes, given_target = weight.shape[0], target
    target = _ids.checked(backend, bounds_check, name, "target", target, classes)
    negatives = _ids.checked(backend, bounds_check, name, "negatives", negatives, classes)
    if backend == "reference":
        return reference.negative_sampling_loss(input, weight, target, negatives, reduction, sparse=sparse)
    if negatives.dim() == 1:
        fixed = (None, target.unsqueeze(1), negatives, None, None, "logistic", False)
        loss = apply(
            SparseSampledRows if sparse else SampledRows, backend, sparse, table_of(weight), input, weight, *fixed
        )
    else:
        ids = torch.cat([target.unsqueeze(1), negatives.to(target.dtype)], 1)
        loss = apply(
            SparseLogisticRows if sparse else LogisticRows, backend, sparse, table_of(weight), input, weight, ids, None
        )
    if target is not given_target:
        loss = torch.where(target < 0, 0, loss)
    _ids.after(bounds_check)
    return reduce(loss, reduction, input.dtype)


def hierarchical_softmax_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tree: HuffmanTree,
    reduction: str = "mean",
    *,
    sparse: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of a softmax that is a walk down a binary tree: log V logistic regressions in place of V.

    `loss[i] = -log P(target_i)`, `P(v) = product over the nodes n on the path to v of sigmoid(code_n x_i . w[n])`.
    The probabilities of the V classes sum to one.
    Source: Morin and Bengio, "Hierarchical probabilistic neural network language model" (2005); with a Huffman tree:
    Mikolov et al. (2013).

    Args:
        input: Tensor[B, D], floating point.
        weight: Tensor[V - 1, D] of `input`'s dtype, one row per inner node.
        target: Tensor[B], int32 or int64.
        tree: of the V classes, `HuffmanTree.from_counts(counts)`; kept on `input`'s device by `tree.to(device)`.
        reduction: "none" (Tensor[B]), "mean" over B or "sum".
        sparse, bounds_check: as in `negative_sampling_loss`.
        backend: see `pykernels.explain`.

    Returns:
        The loss, computed in float32 (float64 for float64) and rounded to `input`'s dtype; autocast as in
        `negative_sampling_loss`.

    Raises:
        TypeError: an argument is not a Tensor, or `tree` not a HuffmanTree.
        NotImplementedError, RuntimeError, ValueError, BackendError: as in `negative_sampling_loss`.
        IndexError: a target is outside [0, V), named with its position; see `bounds_check`.
    """
    name = "hierarchical_softmax_loss"
    if is_compiling() and is_held(weight):
        given: dict[str, Any] = {"sparse": sparse, "bounds_check": bounds_check, "backend": backend}
        return outside_graphs(hierarchical_softmax_loss, input, weight, target, tree, reduction, **given)
    _ids.before(name, bounds_check)
    for key, value in (("input", input), ("weight", weight), ("target", target)):
        _check.tensor(name, key, value)
    if not isinstance(tree, HuffmanTree):
        raise TypeError(f"{name}(): argument 'tree' must be HuffmanTree, not {type(tree).__name__}")
    input, weight = _autocast.float32((input, weight), input.device)
    check_matrices(name, input, weight, "V - 1")
    classes = tree.starts.shape[0] - 1
    check_shape(name, "weight", weight, (classes - 1, input.shape[1]))
    check_shape(name, "target", target, (input.shape[0],))
    check_reduction(name, reduction)
    check_ids(name, "target", target, classes, "input", input)
    backend = ROOM.resolve(name, backend, input)
    looked_at = _ids.readable(target)
    target = _ids.checked(backend, bounds_check, name, "target", target, classes)
    if backend == "reference":
        return reference.hierarchical_softmax_loss(input, weight, target, tree, reduction, sparse=sparse)
    inside = None if looked_at else (target >= 0) & (target < classes)
    nodes, signs = tree.to(target.device).paths(target if inside is None else torch.where(inside, target, 0))
    if inside is not None:  # a path without nodes
        nodes = torch.where(inside.unsqueeze(1), nodes, -1)
    loss = apply(
        SparseLogisticRows if sparse else LogisticRows, backend, sparse, table_of(weight), input, weight, nodes, signs
    )
    _ids.after(bounds_check)
    return reduce(loss, reduction, input.dtype)


def sampled_softmax_loss(
    weights: Tensor,
    biases: Tensor | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: Sampled | None = None,
    remove_accidental_hits: bool = True,
    reduction: str = "mean",
    *,
    seed: int | Tensor | None = None,
    sparse: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Softmax cross entropy over each row's labels and K sampled classes. As `tf.nn.sampled_softmax_loss`.

    `z_c = inputs_i . weights[c] + biases[c] - log E(c)`, E the expected count of class c in the sample;
    `loss[i] = logsumexp(z over the labels of row i and the sample) - mean over the labels of z`. A sampled class that
    is a label of the row is left out of its sum (every copy of it). For training; evaluate with the full softmax over
    plain logits (`linear_cross_entropy`).
    Source: Jean et al., "On using very large target vocabulary for neural machine translation" (2015).

    Args:
        weights: Tensor[V, D], floating point.
        biases: Tensor[V] of the same dtype, or None.
        labels: Tensor[B, num_true] (or Tensor[B] with one label a row), int32 or int64; each has probability
            1 / num_true.
        inputs: Tensor[B, D] of `weights`' dtype.
        num_sampled: K, classes to draw where `sampled_values` does not give them.
        num_classes: V.
        num_true: labels a row.
        sampled_values: (sampled, true_expected_count, sampled_expected_count) of a candidate sampler, taken as
            constants. Default: `log_uniform_candidate_sampler`, unique, which needs classes sorted by frequency.
        remove_accidental_hits: see above.
        reduction: "none" (Tensor[B], as TensorFlow returns), "mean" over B or "sum".
        seed: of the default sampler.
        sparse: give `weights` a row-sparse gradient, as in `negative_sampling_loss`; that of `biases` is dense.
        bounds_check: as in `negative_sampling_loss`: a row with a wrong label adds nothing, a wrong sampled class is
            left out.
        backend: see `pykernels.explain`.

    Returns:
        The loss, computed in float32 (float64 for float64) and rounded to `inputs`' dtype; autocast as in
        `negative_sampling_loss`.

    Raises:
        TypeError: an argument is not a Tensor or an int.
        NotImplementedError: `weights` or `inputs` is not floating point.
        RuntimeError: wrong dtypes; different devices.
        ValueError: wrong shapes; `num_sampled > num_classes`; an expected count that is not above 0 (read on the CPU in
            eager mode); unknown `reduction`.
        IndexError: a label or sampled class is outside [0, V), named with its position; see `bounds_check`.
        BackendError: the named backend cannot serve the call.
    """
    fixed = (labels, inputs, num_sampled, num_classes, num_true, sampled_values, remove_accidental_hits)
    if is_compiling() and is_held(weights):
        options: dict[str, Any] = {"seed": seed, "sparse": sparse, "bounds_check": bounds_check, "backend": backend}
        return outside_graphs(sampled_softmax_loss, weights, biases, *fixed, reduction, **options)
    rest = (reduction, seed, sparse, bounds_check, backend)
    return _sampled_loss("sampled_softmax_loss", "softmax", weights, biases, *fixed, *rest)


def nce_loss(
    weights: Tensor,
    biases: Tensor | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int = 1,
    sampled_values: Sampled | None = None,
    remove_accidental_hits: bool = False,
    reduction: str = "mean",
    *,
    seed: int | Tensor | None = None,
    sparse: bool = False,
    bounds_check: str = "error",
    backend: str | None = None,
) -> Tensor:
    """Noise-contrastive estimation: tell a row's labels from K sampled classes by logistic regressions. As
    `tf.nn.nce_loss`.

    `z_c` as in `sampled_softmax_loss`; `loss[i] = sum over the labels of BCE(z, 1 / num_true) + sum over the sample of
    BCE(z, 0)`, `BCE(z, y) = log(1 + exp(z)) - y z`. With `remove_accidental_hits` a sampled class that is a label of
    the row is left out ("sampled logistic" loss).
    Source: Gutmann and Hyvarinen, "Noise-contrastive estimation of unnormalized statistical models" (2012).

    Arguments, results and errors as in `sampled_softmax_loss`.
    """
    fixed = (labels, inputs, num_sampled, num_classes, num_true, sampled_values, remove_accidental_hits)
    if is_compiling() and is_held(weights):
        options: dict[str, Any] = {"seed": seed, "sparse": sparse, "bounds_check": bounds_check, "backend": backend}
        return outside_graphs(nce_loss, weights, biases, *fixed, reduction, **options)
    rest = (reduction, seed, sparse, bounds_check, backend)
    return _sampled_loss("nce_loss", "logistic", weights, biases, *fixed, *rest)


def _sampled_loss(
    name: str,
    kind: str,
    weights: Tensor,
    biases: Tensor | None,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int,
    sampled_values: Sampled | None,
    remove_hits: bool,
    reduction: str,
    seed: int | Tensor | None,
    sparse: bool,
    bounds_check: str,
    backend: str | None,
) -> Tensor:
    _ids.before(name, bounds_check)
    for key, value in (("weights", weights), ("labels", labels), ("inputs", inputs)):
        _check.tensor(name, key, value)
    if biases is not None:
        _check.tensor(name, "biases", biases)
    inputs, weights, biases = _autocast.float32((inputs, weights, biases), inputs.device)
    check_matrices(name, inputs, weights, names="inputs weights")
    check_count(name, "num_classes", num_classes, 1)
    check_count(name, "num_true", num_true, 1)
    check_shape(name, "weights", weights, (num_classes, inputs.shape[1]))
    if biases is not None:
        _check.same(name, "biases", biases, "inputs", inputs)
        check_shape(name, "biases", biases, (num_classes,))
    check_labels(name, "labels", labels, num_true, inputs.shape[0])
    check_reduction(name, reduction)
    check_ids(name, "labels", labels, num_classes, "inputs", inputs)
    labels = labels.reshape(-1, num_true)
    if sampled_values is None:
        check_count(name, "num_sampled", num_sampled, 0)
        if num_sampled > num_classes:
            most = f"num_classes = {num_classes}, since they are all different"
            raise ValueError(f"{name}(): argument 'num_sampled' must be at most {most}, not {num_sampled}")
    else:
        _check_sampled(name, sampled_values, labels, inputs, num_classes)
    backend = ROOM.resolve(name, backend, inputs)
    given = labels
    labels = _ids.checked(backend, bounds_check, name, "labels", labels, num_classes)
    wrong = None if labels is given else labels < 0
    if sampled_values is None:
        right = labels if _ids.readable(labels) else labels.clamp(0, num_classes - 1)
        fixed = (num_true, num_sampled, True, num_classes)
        sampled_values = log_uniform_candidate_sampler(right, *fixed, seed=seed, bounds_check="none")
    sampled, true_expected, sampled_expected = sampled_values
    sampled = _ids.checked(backend, bounds_check, name, "sampled_values[0]", sampled, num_classes)
    true_log = true_expected.detach().float().log().reshape(labels.shape)
    sampled_log = sampled_expected.detach().float().log()
    if wrong is not None:  # no more than a logit of 0, whatever was expected
        true_log = torch.where(wrong, 0, true_log)
    arguments = (inputs, weights, biases, labels, sampled, true_log, sampled_log, kind, remove_hits)
    if backend == "reference":
        loss = reference.losses.sampled_rows(*arguments, sparse=sparse)
    else:
        loss = apply(SparseSampledRows if sparse else SampledRows, backend, sparse, table_of(weights), *arguments)
    if wrong is not None:
        loss = torch.where(wrong.any(1), 0, loss)
    _ids.after(bounds_check)
    return reduce(loss, reduction, inputs.dtype)


def _check_sampled(name: str, values: Sampled, labels: Tensor, inputs: Tensor, num_classes: int) -> None:
    key = "sampled_values"
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        raise TypeError(
            f"{name}(): argument '{key}' must be (sampled, true_expected_count, sampled_expected_count), "
            f"not {type(values).__name__}"
        )
    for i, value in enumerate(values):
        _check.tensor(name, f"{key}[{i}]", value)
        _ids.same_device(name, f"{key}[{i}]", value, "inputs", inputs)
    sampled, true_expected, sampled_expected = values
    if sampled.dim() != 1:
        raise ValueError(f"{name}(): argument '{key}[0]' must have the shape (K,), not {tuple(sampled.shape)}")
    check_ids(name, f"{key}[0]", sampled, num_classes, "inputs", inputs)
    if true_expected.numel() != labels.numel():
        check_shape(name, f"{key}[1]", true_expected, tuple(labels.shape))
    check_shape(name, f"{key}[2]", sampled_expected, tuple(sampled.shape))
    check_positive(name, f"{key}[1]", true_expected)
    check_positive(name, f"{key}[2]", sampled_expected)
