"""word2vec's training step: many small updates in place, which no gradient of a batch can express."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from ...reference import sampled_softmax as reference
from ...reference.sampled_softmax import AliasTable, HuffmanTree, Word2VecCounts
from .. import _check, _ids
from .._library import LIBRARY
from ._checks import check_count
from ._functions import ROOM

__all__ = ["Word2VecCounts", "word2vec_step_"]

FEATURE = "word2vec_step_"
"""Only the native CPU code has it: a step is a chain of dependent updates of a few hundred bytes each."""

MOST_NEGATIVES, MOST_WINDOW, LONGEST_SENTENCE = 255, 64, 10_000

# counts: words, pairs, loss
LIBRARY.define(
    "word2vec_step_.cpu(Tensor(a!) vectors, Tensor(b!) outputs, Tensor tokens, Tensor offsets, Tensor keep, "
    "Tensor? noise, Tensor? points, Tensor? codes, Tensor? starts, str mode, int window, int negatives, bool classic, "
    "bool with_loss, float first_rate, float last_rate, int seed, int first_sentence) -> Tensor"
)
register_fake(
    "pykernels::word2vec_step_.cpu", lambda vectors, *_: vectors.new_empty(3, dtype=torch.float64), lib=LIBRARY
)
_step = torch.ops.pykernels.word2vec_step_.cpu


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
    backend: str | None = None,
) -> Word2VecCounts:
    """Trains word vectors on sentences, in place, by stochastic gradient descent on one pair after the other.

    Of every sentence the words that subsampling keeps are centres in turn; around centre o lie the contexts c within a
    random reach of 1 .. window. Skip-gram takes each x = vectors[c], CBOW their mean, and lowers

        -log s(x . outputs[o]) - sum_k log s(-x . outputs[n_k])      negative sampling, n_k drawn from `noise`
        -sum_k log s(code_k x . outputs[point_k])                    hierarchical softmax, along o's path in `tree`

    with s the logistic function. A negative that is the centre itself is left out. All products of a pair are taken
    before its updates, then rows change one after the other.

    The draws are a function of (seed, number of the sentence, place): results repeat bit by bit on one thread,
    however sentences are dealt out over calls. With more threads (`torch.set_num_threads`) sentences are shared out and
    the tables are written without locks (Hogwild: Recht et al., 2011); then no two runs are the same. Of the first rows
    of `outputs` each thread has copies, which it merges now and then; that is faster where words come by descending
    frequency.

    Args:
        vectors: Tensor[V, D] float32, updated: the word vectors. Rows that begin on a cache line (D a multiple of 16)
            are fastest; columns of zeros in both tables stay zero.
        outputs: Tensor[V, D] (Tensor[V - 1, D] at least, with `tree`) of the same dtype, updated.
        tokens: Tensor[N] int32 or int64, ids of words.
        offsets: Tensor[S + 1] int64: sentence s is tokens[offsets[s]:offsets[s + 1]]; at most 10,000 words.
        noise: the words' noise distribution, word2vec's being counts**0.75; for negative sampling.
        tree: for hierarchical softmax. One of `noise` and `tree` must be given.
        keep_probability: Tensor[V] in [0, 1], with which an occurrence of a word is kept; None keeps all.
        window: the largest reach, 1 to 64.
        negatives: noise words a pair (a centre, with CBOW or `window_batched`), 1 to 255.
        window_batched: skip-gram takes all products of a centre with its contexts before any update, and negatives are
            drawn once for the centre: about twice as fast, a little less learnt from the same text.
        word2vec_compat: CBOW gives every context the whole error, as the first trainers did, in place of the gradient,
            which is 1 / (number of contexts) of it.
        lr: learning rate, or (first, last) between which it falls with the words read.
        seed: 64 bits.
        first_sentence: number of sentence 0 in the whole training, so that epochs and pieces of a text draw anew.
        compute_loss: sum the losses (as they were before each update); costs about as much again.

    Returns:
        (words, pairs, loss): words read, pairs trained (centres, with CBOW), the sum of their losses (0 unless asked).

    Raises:
        TypeError: not Tensors or not the right kind of table.   RuntimeError: dtypes or devices do not fit.
        ValueError: shapes do not fit, fewer than two words, offsets decrease or leave words out, a sentence is too
            long, an option is out of its range, neither or both of `noise` and `tree`.
        IndexError: a token is not in [0, V).   In all of these cases the tables are as they were.
        BackendError: the named backend has no such step.

    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality" (2013).
    """
    name = "word2vec_step_"
    rates = _check_options(name, window, negatives, lr, cbow, window_batched, noise, tree)
    _check_tables(name, vectors, outputs, noise, tree)
    _check_text(name, vectors, tokens, offsets, keep_probability)
    chosen = ROOM.resolve(name, backend, vectors, FEATURE)
    if chosen == "reference":
        options: dict[str, Any] = {"noise": noise, "tree": tree, "keep_probability": keep_probability}
        options |= {"window": window, "negatives": negatives, "cbow": cbow, "window_batched": window_batched}
        options |= {"word2vec_compat": word2vec_compat, "lr": rates, "seed": seed, "first_sentence": first_sentence}
        with torch.no_grad():
            return reference.word2vec_step_(vectors, outputs, tokens, offsets, compute_loss=compute_loss, **options)
    signed = (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
    words, pairs, loss = _step(
        vectors.detach(),
        outputs.detach(),
        tokens.to(torch.int32).contiguous(),
        offsets.to(torch.int64).contiguous(),
        _keep(vectors.shape[0], keep_probability),
        None if noise is None else noise.packed,
        *((None,) * 3 if tree is None else (tree.points, tree.codes, tree.starts)),
        "cbow" if cbow else "window" if window_batched else "pair",
        window,
        negatives,
        word2vec_compat,
        compute_loss,
        *rates,
        signed,
        first_sentence,
    ).tolist()
    return Word2VecCounts(int(words), int(pairs), loss)


def _keep(words: int, probability: Tensor | None) -> Tensor:
    """Bounds of 32 bits in an int32 tensor; see `keep_bound` in the reference."""
    if probability is None:
        return torch.full((words,), -1, dtype=torch.int32)
    return (probability.double() * 2**32).clamp(max=2**32 - 1).to(torch.int64).to(torch.int32).contiguous()


def _check_options(
    name: str,
    window: int,
    negatives: int,
    lr: float | tuple[float, float],
    cbow: bool,
    window_batched: bool,
    noise: AliasTable | None,
    tree: HuffmanTree | None,
) -> tuple[float, float]:
    for key, value, most in (("window", window, MOST_WINDOW), ("negatives", negatives, MOST_NEGATIVES)):
        check_count(name, key, value, 1)
        if value > most:
            raise ValueError(f"{name}(): argument '{key}' must be at most {most}, not {value}")
    if cbow and window_batched:
        raise ValueError(f"{name}(): argument 'window_batched' is skip-gram's: CBOW has one product for a window")
    if (noise is None) == (tree is None):
        raise ValueError(
            f"{name}(): one of arguments 'noise' and 'tree' must be given, not {'neither' if noise is None else 'both'}"
        )
    for key, table, kind in (("noise", noise, AliasTable), ("tree", tree, HuffmanTree)):
        if table is not None and not isinstance(table, kind):
            raise TypeError(f"{name}(): argument '{key}' must be {kind.__name__}, not {type(table).__name__}")
    rates = lr if isinstance(lr, tuple) else (lr, lr)
    if len(rates) != 2 or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"{name}(): argument 'lr' must be a finite number of at least 0, or two of them, not {lr}")
    return rates


def _check_tables(
    name: str, vectors: Tensor, outputs: Tensor, noise: AliasTable | None, tree: HuffmanTree | None
) -> None:
    for key, table in (("vectors", vectors), ("outputs", outputs)):
        _check.floating(name, key, table)
        if table.dim() != 2:
            raise ValueError(f"{name}(): argument '{key}' must be 2-D, not {table.dim()}-D")
    _check.same(name, "outputs", outputs, "vectors", vectors)
    words, width = vectors.shape
    rows = words if tree is None else max(words - 1, 0)
    if outputs.shape[0] < rows or outputs.shape[1] != width:
        raise ValueError(
            f"{name}(): argument 'outputs' must have at least {rows} rows of {width}, not the shape "
            f"{tuple(outputs.shape)}"
        )
    if words < 2 or width == 0:
        raise ValueError(
            f"{name}(): argument 'vectors' must be of at least two words, not of the shape {(words, width)}"
        )
    classes = tree.classes if tree is not None else noise.alias.shape[0] if noise is not None else 0
    if classes != words:
        key = "noise" if tree is None else "tree"
        raise ValueError(f"{name}(): argument '{key}' must be of the {words} words of vectors, not of {classes}")


def _check_text(name: str, vectors: Tensor, tokens: Tensor, offsets: Tensor, keep_probability: Tensor | None) -> None:
    words = vectors.shape[0]
    for key, ids in (("tokens", tokens), ("offsets", offsets)):
        _check.tensor(name, key, ids)
        _ids.integers(name, key, ids)
        _ids.same_device(name, key, ids, "vectors", vectors)
        if ids.dim() != 1:
            raise ValueError(f"{name}(): argument '{key}' must be 1-D, not {ids.dim()}-D")
    _ids.in_range(name, "tokens", tokens, words)
    if offsets.shape[0] == 0:
        raise ValueError(f"{name}(): argument 'offsets' must hold at least one offset, not 0")
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != tokens.shape[0] or bool((lengths < 0).any()):
        step = int(lengths.min()) if len(lengths) else 0
        raise ValueError(
            f"{name}(): argument 'offsets' must rise from 0 to the {tokens.shape[0]} tokens; it begins with "
            f"{int(offsets[0])} and ends with {int(offsets[-1])}, its smallest step is {step}"
        )
    if len(lengths) and int(lengths.max()) > LONGEST_SENTENCE:
        at = int(lengths.argmax())
        raise ValueError(
            f"{name}(): argument 'offsets': sentence {at} has {int(lengths[at])} words, more than {LONGEST_SENTENCE}; "
            "split it"
        )
    if keep_probability is not None:
        _check.tensor(name, "keep_probability", keep_probability)
        if keep_probability.shape != (words,):
            shape = tuple(keep_probability.shape)
            raise ValueError(f"{name}(): argument 'keep_probability' must have the shape ({words},), not {shape}")
        if not bool(((keep_probability >= 0) & (keep_probability <= 1)).all()):
            raise ValueError(f"{name}(): argument 'keep_probability' must lie in [0, 1]")
