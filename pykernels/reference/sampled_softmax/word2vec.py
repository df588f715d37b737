"""word2vec's training step, one update after the other in plain torch. Slow: the kernel is checked against it."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .tables import AliasTable, HuffmanTree

__all__ = ["Word2VecCounts", "word2vec_step_"]

_WORD, _GAMMA = 2**64 - 1, 0x9E3779B97F4A7C15
_GROUP = 6  # a window's updates are made for six output rows at a time


class Word2VecCounts(NamedTuple):
    """What a step has done: `words` read, `pairs` trained (CBOW: centres), the sum of their losses where asked for."""

    words: int
    pairs: int
    loss: float


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _draw(key: int, place: int) -> int:
    """64 random bits: SplitMix64 (Steele, Lea, Flood 2014) at a place of the stream of `key`."""
    return _mix((key + (place + 1) * _GAMMA) & _WORD)


def _below(draw: int, count: int) -> int:
    return ((draw >> 32) * count) >> 32


def keep_bound(probability: float) -> int:
    """A word is kept iff the upper half of its draw is below this; 2^32 - 1: always."""
    return min(int(probability * 2**32), 2**32 - 1)


def word2vec_step_(
    vectors: Tensor,
    outputs: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    *,
    noise: AliasTable | None = None,
    tree: HuffmanTree | None = None,
    keep_probability: Tensor | None = None,
    window: int = 5,
    negatives: int = 5,
    cbow: bool = False,
    window_batched: bool = False,
    word2vec_compat: bool = False,
    lr: float | tuple[float, float] = 0.025,
    seed: int = 0,
    first_sentence: int = 0,
    compute_loss: bool = False,
) -> Word2VecCounts:
    """See `pykernels.functional.word2vec_step_`. Any floating dtype; the tables are updated in it."""
    rates = lr if isinstance(lr, tuple) else (lr, lr)
    bounds = None if keep_probability is None else [keep_bound(p) for p in keep_probability.tolist()]
    edges, ids = offsets.tolist(), tokens.tolist()
    pairs, loss = 0, 0.0
    for s, (begin, end) in enumerate(itertools.pairwise(edges)):
        rate = rates[0] + (rates[1] - rates[0]) * (begin / max(edges[-1], 1))
        key = _draw(seed & _WORD, first_sentence + s)
        keep_key, reach_key, negative_key = (_draw(key, i) for i in range(3))
        words, reach = [], []
        for i, word in enumerate(ids[begin:end]):
            bound = 2**32 - 1 if bounds is None else bounds[word]
            if bound == 2**32 - 1 or _draw(keep_key, i) >> 32 < bound:
                words.append(word)
                reach.append(1 + _below(_draw(reach_key, i), window))
        if len(words) < 2:
            continue
        for i, word in enumerate(words):
            around = [words[j] for j in range(max(0, i - reach[i]), min(len(words), i + reach[i] + 1)) if j != i]

            def targets(
                pair: int, word: int = word, place: int = i * 2 * window * negatives, key: int = negative_key
            ) -> tuple[list[int], list[float]]:
                if tree is not None:
                    path = slice(int(tree.starts[word]), int(tree.starts[word + 1]))
                    return tree.points[path].tolist(), [(c + 1) / 2 for c in tree.codes[path].tolist()]
                assert noise is not None
                drawn = [_noise(noise, _draw(key, place + pair * negatives + k)) for k in range(negatives)]
                return [*drawn, word], [0.0] * negatives + [1.0]

            hit = word if tree is None else -1  # a negative that is the word itself is left out
            if cbow:
                loss += _train_mean(vectors, outputs, around, *targets(0), hit, rate, word2vec_compat)
                pairs += 1
            elif window_batched:
                loss += _train_window(vectors, outputs, around, *targets(0), hit, rate)
                pairs += len(around)
            else:
                for pair, context in enumerate(around):
                    x = vectors[context]
                    rows, labels = targets(pair)
                    g, one = _errors(x, outputs, rows, labels, hit, rate)
                    x += _update(outputs, rows, g, x.clone())
                    loss += one
                pairs += len(around)
    return Word2VecCounts(len(ids), pairs, loss if compute_loss else 0.0)


def _noise(table: AliasTable, draw: int) -> int:
    bucket = _below(draw, table.alias.shape[0])
    return bucket if draw & 0xFFFFFFFF < keep_bound(float(table.threshold[bucket])) else int(table.alias[bucket])


def _errors(
    x: Tensor, outputs: Tensor, rows: list[int], labels: list[float], hit: int, rate: float
) -> tuple[list[float], float]:
    """rate * (label - sigmoid(x . w)) of each output row, and the loss, -log sigmoid(+-x . w) summed."""
    dots = (outputs[rows] @ x).tolist()
    g, loss = [], 0.0
    for row, label, dot in zip(rows, labels, dots, strict=True):
        if row == hit and label == 0.0:
            g.append(0.0)
            continue
        e = math.exp(-abs(dot))
        g.append(rate * (label - (1 / (1 + e) if dot >= 0 else e / (1 + e))))
        loss += max(-dot if label > 0.5 else dot, 0.0) + math.log1p(e)
    return g, loss


def _update(outputs: Tensor, rows: list[int], g: list[float], x: Tensor) -> Tensor:
    """w_k += g_k x, one row after the other; returns sum_k g_k w_k of the rows as they were met."""
    error = torch.zeros_like(x)
    for row, gradient in zip(rows, g, strict=True):
        error += gradient * outputs[row]
        outputs[row] += gradient * x
    return error


def _train_mean(
    vectors: Tensor,
    outputs: Tensor,
    around: list[int],
    rows: list[int],
    labels: list[float],
    hit: int,
    rate: float,
    classic: bool,
) -> float:
    mean = vectors[around].mean(0)
    g, loss = _errors(mean, outputs, rows, labels, hit, rate)
    error = _update(outputs, rows, g, mean)
    for context in around:
        vectors[context] += error if classic else error / len(around)
    return loss


def _train_window(
    vectors: Tensor, outputs: Tensor, around: list[int], rows: list[int], labels: list[float], hit: int, rate: float
) -> float:
    found = [_errors(vectors[context], outputs, rows, labels, hit, rate) for context in around]
    for first in range(0, len(rows), _GROUP):
        some = rows[first : first + _GROUP]
        before, change = outputs[some], torch.zeros_like(outputs[some])
        for context, (g, _) in zip(around, found, strict=True):
            part = torch.tensor(g[first : first + _GROUP], dtype=vectors.dtype)
            x = vectors[context].clone()
            vectors[context] += part @ before
            change += torch.outer(part, x)
        outputs.index_add_(0, torch.tensor(some), change)
    return sum(loss for _, loss in found)
