"""Words and their counts, and sentences as ids."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

LONGEST_SENTENCE = 10_000

Sentences = Iterable[Sequence[str]]


class LineSentences:
    """A text file as sentences: one a line, words between white space. Can be read any number of times.

    Raises:
        OSError: the file cannot be read.   ValueError: it is not UTF-8; the message names the line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[list[str]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    words = line.decode("utf-8").split()
                except UnicodeDecodeError as error:
                    raise ValueError(f"{self.path}: line {number} is not UTF-8: {error.reason}") from error
                if words:
                    yield words


def as_sentences(sentences: Sentences | str | Path) -> Sentences:
    """A path stands for its lines.

    Raises:
        TypeError: an iterator, which would be used up after one reading, or a sentence that is a string.
    """
    if isinstance(sentences, (str, Path)):
        return LineSentences(sentences)
    if isinstance(sentences, Iterator):
        kind = type(sentences).__name__
        raise TypeError(
            f"argument 'sentences' must be readable more than once (a list, LineSentences, or a path), not {kind}"
        )
    for sentence in islice(sentences, 1):
        if isinstance(sentence, str):
            raise TypeError("argument 'sentences' must hold sequences of words, not strings; split them first")
    return sentences


class Vocabulary:
    """The words of a text by descending count (of equal counts: by the word), and how often each occurs.

    Attributes:
        words: list of V words; the id of a word is its place.
        counts: Tensor[V] int64.
        index: word -> id.
    """

    def __init__(self, words: Sequence[str], counts: Tensor) -> None:
        self.words, self.counts = list(words), counts
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    @classmethod
    def build(cls, sentences: Sentences | str | Path, min_count: int = 5, most: int | None = None) -> Vocabulary:
        """The words that occur at least `min_count` times, at most the `most` frequent of them.

        Raises:
            ValueError: fewer than two words are left.   TypeError: sentences that cannot be read again.
        """
        seen: Counter[str] = Counter()
        for sentence in as_sentences(sentences):
            seen.update(sentence)
        kept = sorted(((word, n) for word, n in seen.items() if n >= min_count), key=lambda item: (-item[1], item[0]))
        kept = kept[:most]
        if len(kept) < 2:
            raise ValueError(
                f"the text has {seen.total()} words, {len(seen)} different ones, of which {len(kept)} occur "
                f"min_count = {min_count} times; at least two are needed"
            )
        return cls([word for word, _ in kept], torch.tensor([n for _, n in kept]))

    def encode(self, sentences: Sentences | str | Path) -> tuple[Tensor, Tensor]:
        """(tokens (N,) int32, offsets (S + 1,) int64): unknown words left out, sentences of more than 10,000 split."""
        find, tokens, offsets = self.index.get, array("i"), array("q", [0])
        for sentence in as_sentences(sentences):
            before = len(tokens)
            tokens.extend(i for i in map(find, sentence) if i is not None)
            offsets.extend(range(before + LONGEST_SENTENCE, len(tokens), LONGEST_SENTENCE))
            if len(tokens) > before:
                offsets.append(len(tokens))
        ids = torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.empty(0, dtype=torch.int32)
        return ids, torch.frombuffer(offsets, dtype=torch.int64)

    def keep_probability(self, sample: float) -> Tensor:
        """Tensor[V] float64 in [0, 1]: min(1, (sqrt(f / s) + 1) s / f), with f a word's share of the text, s `sample`.

        0 keeps everything. Source: word2vec's program; the paper has 1 - sqrt(s / f) for the share left out.
        """
        if sample == 0:
            return torch.ones(len(self), dtype=torch.float64)
        share = self.counts.double() / self.counts.sum()
        return (((share / sample).sqrt() + 1) * sample / share).clamp(max=1.0)
