"""The word2vec trainer: from sentences to vectors, by the native step of `pykernels.functional.word2vec_step_`."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .vectors import WordVectors
from .vocabulary import Sentences, Vocabulary

_LINE = 16  # floats in a cache line: rows that begin on one are read and written without splits
_GENSIM = {  # its names for what has others here: messages tell them
    "sentences": "fit(sentences)",
    "corpus_file": "fit(path)",
    "workers": "threads",
    "sg": "cbow (sg=0 is cbow=True)",
    "hs": "hierarchical_softmax",
    "negative": "negatives",
    "ns_exponent": "distortion",
    "alpha": "lr",
    "min_alpha": "min_lr",
    "cbow_mean": "word2vec_compat",
    "max_final_vocab": "max_vocabulary",
    "compute_loss": "fit(sentences, compute_loss=True)",
    "wv": "word_vectors",
}


def _here(name: str) -> str:
    return f" (gensim's; here: {_GENSIM[name]})" if name in _GENSIM else ""


@dataclass(frozen=True)
class Options:
    """What `Word2Vec` was made with; see there."""

    vector_size: int = 100
    window: int = 5
    min_count: int = 5
    max_vocabulary: int | None = None
    cbow: bool = False
    hierarchical_softmax: bool = False
    negatives: int = 5
    distortion: float = 0.75
    sample: float = 1e-3
    lr: float | None = None
    min_lr: float = 1e-4
    epochs: int = 5
    window_batched: bool = False
    word2vec_compat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "vector_size": 1,
            "window": 1,
            "min_count": 1,
            "negatives": 1,
            "epochs": 0,
            "distortion": 0,
            "sample": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise ValueError(f"Word2Vec: argument '{name}' must be at least {bound}, not {value}")
        if self.first_lr < self.min_lr or self.min_lr < 0:
            raise ValueError(
                f"Word2Vec: argument 'lr' must be at least min_lr = {self.min_lr} >= 0, not {self.first_lr}"
            )
        if self.cbow and self.window_batched:
            raise ValueError("Word2Vec: argument 'window_batched' is skip-gram's: CBOW has one product for a window")

    @property
    def first_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return 0.05 if self.cbow and not self.word2vec_compat else 0.025


class Word2Vec:
    """Word vectors by skip-gram or CBOW, with negative sampling or hierarchical softmax.

    The loss and its updates are `pykernels.functional.word2vec_step_`'s. With one thread and a seed a training repeats
    bit by bit; with more threads it is Hogwild and does not. Sources: Mikolov et al., "Efficient estimation of word
    representations in vector space" (2013) and "Distributed representations of words and phrases" (2013).

    Args:
        vector_size: D, columns of a vector (default 100).
        window: the largest distance of a context word, 1 to 64 (5); every centre draws its own reach up to it.
        min_count: rarer words are left out (5).
        max_vocabulary: keep only that many of the most frequent words.
        cbow: the mean of a window predicts its centre; otherwise (the default) skip-gram.
        hierarchical_softmax: in place of negative sampling (False).
        negatives: noise words a pair (5).
        distortion: noise words are drawn with probability proportional to `count**distortion` (0.75).
        sample: threshold of subsampling; occurrences of words more frequent than it are dropped at random
            (1e-3; 0: none).
        lr: first learning rate; it falls linearly to `min_lr` (1e-4) over all epochs. None: 0.025, and 0.05
            for CBOW with the gradient of the mean, which is smaller by the number of contexts.
        epochs: passes over the text (5).
        window_batched, word2vec_compat: as in `word2vec_step_` (False).
        seed: of the vectors' start and of every draw (0).
        threads: sentences are trained by that many threads at once.
        backend: None, "auto", "cpu" or "reference".

    Attributes:
        options: the arguments above.
        vocabulary: the `Vocabulary`, None before `build_vocabulary`.
        vectors: Tensor[V, D], the word vectors;  outputs: Tensor[V, D], those of the output side. Views, live.
        losses: mean loss of a pair in each epoch (with `compute_loss`).

    Raises:
        TypeError: another argument, or one without its name.   ValueError: an argument is out of its range.
    """

    def __init__(self, *sentences: Any, threads: int = 1, backend: str | None = None, **options: Any) -> None:
        if sentences:
            raise TypeError("Word2Vec: takes options by name; text goes to fit(): Word2Vec(...).fit(sentences)")
        unknown = [name for name in options if name not in Options.__dataclass_fields__]
        if unknown:
            raise TypeError(f"Word2Vec: unexpected argument {', '.join(repr(name) + _here(name) for name in unknown)}")
        if threads < 1:
            raise ValueError(f"Word2Vec: argument 'threads' must be at least 1, not {threads}")
        self.options = Options(**options)
        self.threads, self.backend = threads, backend
        self.vocabulary: Vocabulary | None = None
        self.losses: list[float] = []
        self._tables: tuple[Tensor, Tensor] | None = None
        self._sentences_done = 0  # over all epochs

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{_here(name)}")

    @property
    def vectors(self) -> Tensor:
        return self._built()[0][:, : self.options.vector_size]

    @property
    def outputs(self) -> Tensor:
        return self._built()[1][:, : self.options.vector_size]

    @property
    def word_vectors(self) -> WordVectors:
        """The words with their vectors, for neighbours, analogies and files. Shares memory with the model."""
        return WordVectors(self._vocabulary().words, self.vectors)

    def _built(self) -> tuple[Tensor, Tensor]:
        if self._tables is None:
            raise RuntimeError("Word2Vec: there is no vocabulary yet; call fit() or build_vocabulary()")
        return self._tables

    def _vocabulary(self) -> Vocabulary:
        self._built()
        assert self.vocabulary is not None
        return self.vocabulary

    def build_vocabulary(self, sentences: Sentences | str | Path) -> Word2Vec:
        """Reads the text once; makes the vocabulary and fresh vectors, uniform in +-1/D (the output side is 0)."""
        self.vocabulary = Vocabulary.build(sentences, self.options.min_count, self.options.max_vocabulary)
        words, size = len(self.vocabulary), self.options.vector_size
        width = -(-size // _LINE) * _LINE
        vectors, outputs = torch.zeros(words, width), torch.zeros(words, width)
        generator = torch.Generator().manual_seed(self.options.seed & (2**63 - 1))
        vectors[:, :size] = (torch.rand(words, size, generator=generator) * 2 - 1) / size
        self._tables, self._sentences_done, self.losses = (vectors, outputs), 0, []
        return self

    def fit(self, sentences: Sentences | str | Path, **options: Any) -> Word2Vec:
        """`build_vocabulary`, then `train` with its options."""
        return self.build_vocabulary(sentences).train(sentences, **options)

    def train(
        self,
        sentences: Sentences | str | Path,
        *,
        compute_loss: bool = False,
        checkpoint: str | Path | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Word2Vec:
        """Trains the epochs that are left. A model loaded from a checkpoint goes on where it was, to the same end.

        Args:
            sentences: lists of words, readable more than once, or the path of a text file (a sentence a line).
            compute_loss: fill `losses`; costs about as much again.
            checkpoint: file to save the model to after every epoch and when interrupted.
            progress: True shows a bar on stderr; a function is called with (words just done, words in all).

        Raises:
            ValueError: no word of the text is in the vocabulary.   RuntimeError: there is no vocabulary.
            KeyboardInterrupt: goes on to the caller; the model is whole, and saved if `checkpoint` was given.
        """
        vocabulary = self._vocabulary()
        tokens, offsets = vocabulary.encode(sentences)
        if len(tokens) == 0:
            raise ValueError("train(): no word of argument 'sentences' is in the vocabulary")
        try:
            with _reporter(progress, len(tokens) * self.options.epochs) as report, _threads(self.threads):
                self._train(tokens, offsets, compute_loss, checkpoint, report)
        except KeyboardInterrupt:
            if checkpoint is not None:
                self.save(checkpoint)
            raise
        return self

    def _train(
        self,
        tokens: Tensor,
        offsets: Tensor,
        compute_loss: bool,
        checkpoint: str | Path | None,
        report: Callable[[int, int], None],
    ) -> None:
        o, sentences, count = self.options, len(offsets) - 1, len(tokens)
        step = self._step_options(compute_loss)
        total = count * max(o.epochs, 1)

        def rate(done: int) -> float:
            return o.first_lr + (o.min_lr - o.first_lr) * (done / total)

        while self._sentences_done < sentences * o.epochs:
            epoch, first = divmod(self._sentences_done, sentences)
            pairs, loss = 0, 0.0
            while first < sentences:
                start = int(offsets[first])
                last = int(torch.searchsorted(offsets, min(start + self._chunk(), count)))
                words = slice(start, int(offsets[last]))
                found = F.word2vec_step_(
                    *self._built(),
                    tokens[words],
                    offsets[first : last + 1] - start,
                    lr=(rate(epoch * count + start), rate(epoch * count + words.stop)),
                    first_sentence=self._sentences_done,
                    **step,
                )
                pairs, loss = pairs + found.pairs, loss + found.loss
                self._sentences_done += last - first
                first = last
                report(found.words, total)
            if compute_loss:
                self.losses.append(loss / max(pairs, 1))
            if checkpoint is not None:
                self.save(checkpoint)

    def _chunk(self) -> int:
        """Words of one step: enough that preparing it (passes over the vocabulary, copies for threads) is nothing."""
        return max(100_000 if self.threads == 1 else 300_000 * self.threads, 8 * len(self._vocabulary()))

    def _step_options(self, compute_loss: bool) -> dict[str, Any]:
        o, vocabulary = self.options, self._vocabulary()
        counts = vocabulary.counts
        names = ("window", "negatives", "cbow", "window_batched", "word2vec_compat", "seed")
        return {
            "noise": None if o.hierarchical_softmax else F.AliasTable.from_counts(counts, o.distortion),
            "tree": F.HuffmanTree.from_counts(counts) if o.hierarchical_softmax else None,
            "keep_probability": vocabulary.keep_probability(o.sample),
            "compute_loss": compute_loss,
            "backend": self.backend,
            **{name: getattr(o, name) for name in names},
        }

    def save(self, path: str | Path) -> None:
        """Writes everything needed to go on training; `load` reads it. The file appears when it is whole."""
        vocabulary = self._vocabulary()
        state = {
            "options": asdict(self.options),
            "words": vocabulary.words,
            "counts": vocabulary.counts,
            "vectors": self.vectors.clone(),
            "outputs": self.outputs.clone(),
            "sentences_done": self._sentences_done,
            "losses": self.losses,
        }
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path: str | Path, *, threads: int = 1, backend: str | None = None) -> Word2Vec:
        """A model that `save` wrote. The file is read as data only (`weights_only`).

        Raises:
            OSError: the file cannot be read.   ValueError: it holds something else.
        """
        try:
            state = torch.load(path, weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{path}: not a Word2Vec model; files of vectors are WordVectors.load's") from error
        if not isinstance(state, dict) or not {"options", "words", "vectors", "outputs"} <= state.keys():
            raise ValueError(f"{path}: not a Word2Vec model")
        model = cls(threads=threads, backend=backend, **state["options"])
        model.vocabulary = Vocabulary(state["words"], state["counts"])
        width = -(-model.options.vector_size // _LINE) * _LINE
        model._tables = (torch.zeros(len(state["words"]), width), torch.zeros(len(state["words"]), width))
        model.vectors.copy_(state["vectors"])
        model.outputs.copy_(state["outputs"])
        model._sentences_done, model.losses = state["sentences_done"], list(state["losses"])
        return model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reporter(progress: bool | Callable[[int, int], None], total: int) -> Iterator[Callable[[int, int], None]]:
    """Calls made with (words just done, words in all)."""
    if progress is not True:
        yield progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("word2vec", total=total)
        yield lambda done, total: bar.update(task, advance=done)
