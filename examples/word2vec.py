"""word2vec in its four variants: skip-gram and CBOW, with negative sampling and with hierarchical softmax.

Trains each on the same text, from the same seed, and prints the mean loss of each epoch and the neighbours of a few
words. There is no stock PyTorch side: a training of a million tiny dependent updates is what PyTorch has no operator
for (`examples/cbow.py` compares the batched form).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pykernels.testing.text import Text, default_text, read_text
from pykernels.word2vec import Word2Vec

VARIANTS = {
    "skip-gram, negative sampling": {},
    "skip-gram, hierarchical softmax": {"hierarchical_softmax": True},
    "CBOW, negative sampling": {"cbow": True},
    "CBOW, hierarchical softmax": {"cbow": True, "hierarchical_softmax": True},
}


def sentences(text: Text) -> list[list[str]]:
    """Lower-case words between full stops and blank lines."""
    parts = re.split(r"[.!?]\s|\n\s*\n", text.content.lower())
    return [words for part in parts if (words := re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", part))]


def train(text: Text, size: int = 100, epochs: int = 5) -> dict[str, Word2Vec]:
    """Each variant's model."""
    read = sentences(text)
    return {
        name: Word2Vec(vector_size=size, epochs=epochs, **options).fit(read, compute_loss=True)
        for name, options in VARIANTS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose that Python ships)")
    parser.add_argument("--size", type=int, default=100, help="columns of a vector (default: 100)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the text (default: 5)")
    options = parser.parse_args()
    text = read_text(options.text) if options.text else default_text()
    for name, model in train(text, options.size, options.epochs).items():
        print(f"{name}: loss a pair {' '.join(f'{loss:.3f}' for loss in model.losses)}")
        vectors = model.word_vectors
        for word in vectors.words[50:53]:
            near = ", ".join(f"{other} {cosine:.2f}" for other, cosine in vectors.most_similar(word, topn=6))
            print(f"  {word}: {near}")


if __name__ == "__main__":
    main()
