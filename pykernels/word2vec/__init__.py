"""Word vectors from text: the word2vec trainer, its vocabulary, and what one does with the vectors."""

from __future__ import annotations

from .trainer import Word2Vec
from .vectors import WordVectors
from .vocabulary import LineSentences, Vocabulary

__all__ = ["LineSentences", "Vocabulary", "Word2Vec", "WordVectors"]
