"""Words with vectors: neighbours, analogies, evaluation, and word2vec's two file formats."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

Words = str | Sequence[str]


class WordVectors:
    """V words and their vectors.

    Attributes:
        words: list of V different words.
        vectors: Tensor[V, D] float32 (numpy arrays are taken too, and share their memory).
        index: word -> row.

    Raises:
        TypeError: `vectors` is no Tensor or array.
        ValueError: the numbers of words and rows differ, or a word is there twice.
    """

    def __init__(self, words: Sequence[str], vectors: Tensor) -> None:
        if type(vectors).__module__ == "numpy":
            vectors = torch.as_tensor(vectors)
        if not isinstance(vectors, Tensor):
            raise TypeError(f"WordVectors: argument 'vectors' must be Tensor, not {type(vectors).__name__}")
        self.words, self.vectors = list(words), vectors
        self.index = {word: i for i, word in enumerate(self.words)}
        if vectors.dim() != 2 or vectors.shape[0] != len(self.words):
            raise ValueError(
                f"vectors must have {len(self.words)} rows, one a word, not the shape {tuple(vectors.shape)}"
            )
        if len(self.index) != len(self.words):
            twice = next(word for i, word in enumerate(self.words) if self.index[word] != i)
            raise ValueError(f"the word {twice!r} is there twice")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def __getitem__(self, word: str) -> Tensor:
        """The vector of a word, (D,). KeyError names a word that is not there."""
        return self.vectors[self._row(word)]

    def _row(self, word: str) -> int:
        if word not in self.index:
            raise KeyError(f"the word {word!r} is not among the {len(self)} words")
        return self.index[word]

    def _directions(self) -> Tensor:
        return torch.nn.functional.normalize(self.vectors, dim=1)

    def similarity(self, first: str, second: str) -> float:
        """The cosine of the angle between two words' vectors."""
        return float(torch.nn.functional.cosine_similarity(self[first], self[second], dim=0))

    def most_similar(self, positive: Words = (), negative: Words = (), topn: int = 10) -> list[tuple[str, float]]:
        """The words nearest, by cosine, to the mean direction of `positive` and of the opposites of `negative`.

        "king" - "man" + "woman" is `most_similar(["king", "woman"], ["man"])`. The words given are left out.

        Raises:
            KeyError: a word is not there.   ValueError: no words are given.
        """
        plus, minus = ([words] if isinstance(words, str) else list(words) for words in (positive, negative))
        if not plus and not minus:
            raise ValueError("most_similar(): give at least one word")
        rows = [self._row(word) for word in (*plus, *minus)]
        signs = torch.tensor([1.0] * len(plus) + [-1.0] * len(minus))
        directions = self._directions()
        cosine = directions @ torch.nn.functional.normalize(signs @ directions[rows], dim=0)
        cosine[rows] = -torch.inf
        best = cosine.topk(min(topn, max(len(self) - len(set(rows)), 0)))
        return [(self.words[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]

    def evaluate_analogies(
        self, lines: str | Path | Iterable[str], restrict: int = 30_000
    ) -> dict[str, tuple[int, int]]:
        """How many questions "a b c d" (a is to b as c to d) are answered with d: section -> (right, asked).

        Lines that begin with ":" start a section; "total" is all of them. Questions with a word that is not among the
        first `restrict` words are left out, as word2vec's own program does; letters' case does not matter.
        """
        directions = self._directions()[:restrict]
        index: dict[str, int] = {}
        for i, word in enumerate(self.words[:restrict]):
            index.setdefault(word.lower(), i)
        results: dict[str, tuple[int, int]] = {}
        for section, questions in _sections(lines):
            known = [[index[w] for w in q] for q in questions if all(w in index for w in q)]
            right = 0
            for part in range(0, len(known), 256):
                a, b, c, d = torch.tensor(known[part : part + 256]).unbind(1)
                cosine = (directions[b] - directions[a] + directions[c]) @ directions.T
                for given in (a, b, c):
                    cosine.scatter_(1, given.unsqueeze(1), -torch.inf)
                right += int((cosine.argmax(1) == d).sum())
            before = results.get(section, (0, 0))
            results[section] = (before[0] + right, before[1] + len(known))
        counts = results.values()
        return {**results, "total": (sum(right for right, _ in counts), sum(asked for _, asked in counts))}

    def evaluate_similarity(self, lines: str | Path | Iterable[str]) -> tuple[float, int, int]:
        """Spearman's rank correlation of cosines with people's judgements, "word word score" a line.

        Returns:
            (correlation, pairs compared, pairs left out because a word is not there). NaN for fewer than two pairs.
        """
        ours, theirs, missing = [], [], 0
        for line in _lines(lines):
            fields = line.replace(",", " ").split()
            if len(fields) < 3 or line.startswith("#"):
                continue
            if fields[0] not in self or fields[1] not in self:
                missing += 1
                continue
            ours.append(self.similarity(fields[0], fields[1]))
            theirs.append(float(fields[2]))
        if len(ours) < 2:
            return float("nan"), len(ours), missing
        ranks = torch.stack([_ranks(torch.tensor(ours)), _ranks(torch.tensor(theirs))])
        return float(torch.corrcoef(ranks)[0, 1]), len(ours), missing

    def save(self, path: str | Path, binary: bool = False) -> None:
        """Writes word2vec's text or binary format, which gensim, fastText and word2vec itself read.

        The file appears when it is whole: an interruption leaves the old one.

        Raises:
            ValueError: a word holds white space, which the formats cannot hold.
        """
        bad = next((word for word in self.words if not word or len(word.split()) != 1 or word.split()[0] != word), None)
        if bad is not None:
            raise ValueError(f"the word {bad!r} is empty or holds white space, which word2vec's formats cannot hold")
        unfinished = Path(f"{path}.part")
        rows = self.vectors.detach().to("cpu", torch.float32).contiguous()
        size = rows.shape[1] * rows.element_size()
        with open(unfinished, "wb") as file:
            file.write(f"{len(self)} {rows.shape[1]}\n".encode())
            for i, word in enumerate(self.words):
                if binary:
                    row = ctypes.string_at(rows.data_ptr() + i * size, size)
                    file.write(word.encode() + b" " + row + b"\n")
                else:  # nine digits are enough to tell any two float32 apart
                    file.write(f"{word} {' '.join(f'{x:.9g}' for x in rows[i].tolist())}\n".encode())
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path, binary: bool = False) -> WordVectors:
        """Reads word2vec's text or binary format.

        Raises:
            OSError: the file cannot be read.   ValueError: it is not in that format; the message says where.
        """
        with open(path, "rb") as file:
            header = file.readline().split()
            try:
                count, width = (int(field) for field in header)
            except ValueError:
                raise ValueError(
                    f"{path}: the first line must hold two numbers, words and columns (gensim writes such files by "
                    "KeyedVectors.save_word2vec_format)"
                ) from None
            if count < 0 or width < 1:
                raise ValueError(f"{path}: {count} words of {width} columns cannot be")
            read = _read_binary if binary else _read_text
            words, values = read(path, file, count, width)
        return cls(words, values.view(count, width))


def _read_text(path: str | Path, file: BinaryIO, count: int, width: int) -> tuple[list[str], Tensor]:
    words, values = [], array("f")
    for number in range(count):
        fields = file.readline().decode("utf-8", "replace").rstrip().split(" ")
        try:
            row = [float(field) for field in fields[1:]]
        except ValueError:
            what = "is not a word and numbers; for word2vec's binary format give binary=True"
            raise ValueError(f"{path}: line {number + 2} {what}") from None
        if len(row) != width:
            raise ValueError(f"{path}: line {number + 2} has {len(row)} numbers, not {width}")
        words.append(fields[0])
        values.extend(row)
    return words, torch.tensor(values, dtype=torch.float32)


def _read_binary(path: str | Path, file: BinaryIO, count: int, width: int) -> tuple[list[str], Tensor]:
    words, values = [], bytearray()
    for number in range(count):
        word = bytearray()
        while (character := file.read(1)) not in (b" ", b""):
            word += character
        row = file.read(4 * width)
        if len(row) != 4 * width:
            raise ValueError(f"{path}: word {number + 1} of {count}: the file ends within it")
        words.append(word.decode("utf-8", "replace").lstrip("\n"))  # some writers end a row with a new line
        values += row
    return words, torch.frombuffer(values, dtype=torch.float32) if values else torch.empty(0)


def _lines(source: str | Path | Iterable[str]) -> Iterator[str]:
    if isinstance(source, (str, Path)):
        with open(source, encoding="utf-8") as file:
            yield from (line.strip() for line in file)
    else:
        yield from (line.strip() for line in source)


def _sections(lines: str | Path | Iterable[str]) -> Iterator[tuple[str, list[list[str]]]]:
    name = ""
    questions: list[list[str]] = []
    for line in _lines(lines):
        if line.startswith(":"):
            if questions:
                yield name, questions
            name, questions = line[1:].strip(), []
        elif len(words := line.lower().split()) == 4:
            questions.append(words)
    if questions:
        yield name, questions


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order; equal values share the mean of theirs."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
