"""Losses over sampled classes and over paths of a tree. float16 and bfloat16 are computed in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._rows import gather_rows
from .samplers import Sampled, log_uniform_candidate_sampler
from .tables import HuffmanTree

__all__ = ["hierarchical_softmax_loss", "nce_loss", "negative_sampling_loss", "sampled_softmax_loss"]


def reduce(loss: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """The loss of each row, reduced in the type it was computed in."""
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def logistic_rows(input: Tensor, weight: Tensor, ids: Tensor, signs: Tensor | None, sparse: bool = False) -> Tensor:
    """loss_i = -sum_k log sigmoid(s_ik x_i . w[ids_ik]) over the k with ids_ik >= 0.

    signs None: +1 in the first column, -1 in the others.
    """
    if signs is None:
        signs = torch.ones_like(ids[:1]).neg()
        signs[:, :1] = 1
    if weight.shape[0] == 0:  # a tree of one class: no node on any path
        return gather_rows(input, ids.new_zeros(0)).new_zeros(ids.shape[0]) + 0 * input.sum() + 0 * weight.sum()
    x = input if input.dtype == torch.float64 else input.float()
    inside = ids >= 0
    rows = gather_rows(weight, torch.where(inside, ids, 0).reshape(-1), sparse).reshape(*ids.shape, x.shape[1])
    logits = torch.bmm(rows, x.unsqueeze(2)).squeeze(2) * signs.to(x.dtype)
    return -torch.where(inside, logsigmoid(logits), 0).sum(-1)


def sampled_rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    sampled: Tensor,
    true_log: Tensor | None,
    sampled_log: Tensor | None,
    kind: str,
    remove_hits: bool,
    sparse: bool = False,
) -> Tensor:
    """The loss of each row over its own T labels and K classes that all rows share.

    z_it = x_i . w[y_it] + b[y_it] - true_log_it, z_ij = x_i . w[s_j] + b[s_j] - sampled_log_j, left out where s_j is a
    label of row i and `remove_hits`. "softmax": lse(all z of the row) - mean_t z_it. "logistic": over the labels
    softplus(z) - z / T, plus over the samples softplus(z).
    """
    x = input if input.dtype == torch.float64 else input.float()
    count, size = labels.shape[1], x.shape[1]
    ids = torch.cat([labels.reshape(-1), sampled]).long()
    rows = gather_rows(weight, ids, sparse)
    own, shared = rows[: labels.numel()].reshape(-1, count, size), rows[labels.numel() :]
    true = torch.bmm(own, x.unsqueeze(2)).squeeze(2)
    other = x @ shared.mT
    if bias is not None:
        entries = gather_rows(bias.unsqueeze(1), ids).squeeze(1)
        true = true + entries[: labels.numel()].reshape(-1, count)
        other = other + entries[labels.numel() :]
    if true_log is not None:
        true = true - true_log
    if sampled_log is not None:
        other = other - sampled_log
    if remove_hits:
        hit = torch.zeros(other.shape, dtype=torch.bool, device=other.device)
        for t in range(count):  # one label at a time: nothing of size B x T x K
            hit = hit | (labels[:, t, None] == sampled)
        other = torch.where(hit, -torch.inf, other)
    if kind == "softmax":
        return -torch.log_softmax(torch.cat([true, other], 1), 1)[:, :count].mean(1)
    return (-logsigmoid(-true) - true / count).sum(1) - logsigmoid(-other).sum(1)


def negative_sampling_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    negatives: Tensor,
    reduction: str = "mean",
    *,
    sparse: bool = False,
) -> Tensor:
    """loss_i = -log sigmoid(x_i . w[target_i]) - sum_k log sigmoid(-x_i . w[negatives_ik]).

    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality" (NeurIPS
    2013), equation 4, with its sign turned.
    """
    if negatives.dim() == 1:
        labels = target.unsqueeze(1)
        loss = sampled_rows(input, weight, None, labels, negatives, None, None, "logistic", False, sparse)
    else:
        ids = torch.cat([target.unsqueeze(1).long(), negatives.long()], 1)
        loss = logistic_rows(input, weight, ids, None, sparse)
    return reduce(loss, reduction, input.dtype)


def hierarchical_softmax_loss(
    input: Tensor, weight: Tensor, target: Tensor, tree: HuffmanTree, reduction: str = "mean", *, sparse: bool = False
) -> Tensor:
    """loss_i = -sum over the nodes n on the path of target_i of log sigmoid(code_n x_i . w[n])."""
    ids, signs = tree.to(target.device).paths(target)
    return reduce(logistic_rows(input, weight, ids, signs, sparse), reduction, input.dtype)


def _with_samples(
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
) -> Tensor:
    labels = labels.reshape(-1, num_true)
    if sampled_values is None:
        sampled_values = log_uniform_candidate_sampler(labels, num_true, num_sampled, True, num_classes, seed=seed)
    sampled, true_expected, sampled_expected = sampled_values
    true_log, sampled_log = true_expected.detach().float().log(), sampled_expected.detach().float().log()
    fixed = (labels, sampled, true_log.reshape(labels.shape), sampled_log)
    loss = sampled_rows(inputs, weights, biases, *fixed, kind, remove_hits, sparse)
    return reduce(loss, reduction, inputs.dtype)


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
) -> Tensor:
    """Cross entropy over a row's labels and the sampled classes, each logit less the log of its expected count.

    Source: Jean et al., "On using very large target vocabulary for neural machine translation" (ACL 2015).
    """
    fixed = (labels, inputs, num_sampled, num_classes, num_true, sampled_values, remove_accidental_hits)
    return _with_samples("softmax", weights, biases, *fixed, reduction, seed, sparse)


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
) -> Tensor:
    """Logistic regression of labels (1 / num_true each) against sampled classes (0), corrected as above.

    Source: Gutmann and Hyvarinen, "Noise-contrastive estimation" (AISTATS 2010).
    """
    fixed = (labels, inputs, num_sampled, num_classes, num_true, sampled_values, remove_accidental_hits)
    return _with_samples("logistic", weights, biases, *fixed, reduction, seed, sparse)
