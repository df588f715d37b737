"""Real text to train on, and its two tokenisations: words and characters."""

from __future__ import annotations

import ast
import codecs
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_WORDS = 1000
MAX_BYTES = 8 << 20  # far more than the demo trains on; a larger file is read up to here
DEFAULT_LENGTH = 1_000_000  # characters, about: no more of the standard library is read
MAX_WORD_TYPES = 5000
MAX_CHARACTER_TYPES = 256
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


class TextError(ValueError):
    """The text cannot be used; the message is one line that names the file and the reason."""


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    source: str
    content: str

    def __post_init__(self) -> None:
        words = sum(1 for _ in _WORD.finditer(self.content))
        if words < MIN_WORDS:
            raise TextError(f"{self.source}: {words} words is too short; at least {MIN_WORDS} words are needed")

    def words(self) -> Tokens:
        """Lower-case words, the rarest dropped as word2vec does, ids by descending frequency."""
        words = [match.group().lower() for match in _WORD.finditer(self.content)]
        vocabulary = [word for word, _ in Counter(words).most_common(MAX_WORD_TYPES)]
        index = {word: i for i, word in enumerate(vocabulary)}
        return Tokens(torch.tensor([index[word] for word in words if word in index]), vocabulary)

    def characters(self) -> Tokens:
        """Characters, the rarest replaced by U+FFFD, ids by descending frequency."""
        vocabulary = [character for character, _ in Counter(self.content).most_common(MAX_CHARACTER_TYPES - 1)]
        index = {character: i for i, character in enumerate(vocabulary)}
        unknown = index.get(UNKNOWN, len(vocabulary))
        ids = torch.tensor([index.get(character, unknown) for character in self.content])
        return Tokens(ids, vocabulary if UNKNOWN in index else [*vocabulary, UNKNOWN])


@dataclass(frozen=True)
class Tokens:
    """``ids``: int64 (N,); ``vocabulary[i]``: what id ``i`` stands for."""

    ids: torch.Tensor
    vocabulary: list[str]

    def counts(self) -> torch.Tensor:
        """How often each id occurs, float32 (V,)."""
        return torch.bincount(self.ids, minlength=len(self.vocabulary)).float()


def default_text() -> Text:
    """Prose that Python itself ships: the help topics of ``pydoc`` and the docstrings of the standard library.

    Docstrings are read from the source files, not from imported modules: nothing runs, and ``python -OO`` has them too.
    """
    parts: list[str] = []
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions split it off; the docstrings are enough on their own
        pass
    else:
        parts += [topics.topics[name] for name in sorted(topics.topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if sum(map(len, parts)) > DEFAULT_LENGTH:
            break
        parts += _docstrings(path)
    return Text(f"text shipped with Python {sysconfig.get_python_version()}", "\n\n".join(parts))


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, documented) and (text := ast.get_docstring(node))]


def read_text(path: str | Path) -> Text:
    """Read the first ``MAX_BYTES`` of a UTF-8 text file (with or without a byte-order mark).

    Raises:
        TextError: the file is missing, unreadable, empty, not UTF-8, holds NUL bytes, or has fewer than ``MIN_WORDS``
            words.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES)
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not raw.strip():
        raise TextError(f"{path}: the file is empty")
    try:
        content = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=len(raw) < MAX_BYTES)
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise TextError(f"{path}: not UTF-8 text: {where} cannot be decoded") from error
    if "\0" in content:
        raise TextError(f"{path}: not text: NUL byte at character {content.index(chr(0))}")
    return Text(str(path), content.replace("\r\n", "\n"))
