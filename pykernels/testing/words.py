"""Word vectors against gensim's: words a CPU second, and what was learnt for them.

Both train the same sentences with the same options on one thread, in turns, from scratch in every round; the time is
the process's CPU time, without reading the text. Beside the speed stands the held-out loss of the last round's vectors,
over fixed pairs (and fixed negatives), so that speed is not bought with skipped work, and how many of the ten nearest
words of frequent words both agree on. Needs gensim.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from ..functional import HuffmanTree
from ..word2vec import Vocabulary, Word2Vec, WordVectors
from .targets import TARGETS
from .timing import Timing

VARIANTS: dict[str, dict[str, Any]] = {
    "skip-gram, negative sampling": {},
    "skip-gram, negatives shared by a window": {"window_batched": True},
    "CBOW, negative sampling": {"cbow": True, "word2vec_compat": True},
    "skip-gram, hierarchical softmax": {"hierarchical_softmax": True},
    "skip-gram, hierarchical softmax by window": {"hierarchical_softmax": True, "window_batched": True},
    "CBOW, hierarchical softmax": {"cbow": True, "word2vec_compat": True, "hierarchical_softmax": True},
}
SIZE, WINDOW, NEGATIVES, SAMPLE = 100, 5, 5, 1e-3
PAIRS = 200_000  # held out

Sentences = list[list[str]]


def split(sentences: Sentences) -> tuple[Sentences, Sentences]:
    """(training, held out), 95 to 5."""
    shuffled = random.Random(0).sample(sentences, len(sentences))
    cut = len(shuffled) // 20
    return shuffled[cut:], shuffled[:cut]


class HeldOut:
    """The loss of fixed pairs (centre, context); with negative sampling, against fixed negatives."""

    def __init__(self, sentences: Sentences, vocabulary: Vocabulary) -> None:
        generator = torch.Generator().manual_seed(0)
        keep = vocabulary.keep_probability(SAMPLE).tolist()
        rng = random.Random(1)
        centers, contexts = [], []
        for sentence in sentences:
            ids = [i for word in sentence if (i := vocabulary.index.get(word)) is not None and rng.random() < keep[i]]
            for i, center in enumerate(ids):
                reach = rng.randint(1, WINDOW)
                for context in ids[max(0, i - reach) : i] + ids[i + 1 : i + reach + 1]:
                    centers.append(center)
                    contexts.append(context)
        chosen = torch.randperm(len(centers), generator=generator)[:PAIRS]
        self.centers, self.contexts = torch.tensor(centers)[chosen], torch.tensor(contexts)[chosen]
        noise = vocabulary.counts.double() ** 0.75
        drawn = torch.multinomial(noise, len(chosen) * NEGATIVES, replacement=True, generator=generator)
        self.negatives = drawn.view(-1, NEGATIVES)

    def sampled(self, vectors: torch.Tensor, outputs: torch.Tensor) -> float:
        total = 0.0
        for part in range(0, len(self.centers), 20_000):
            rows = slice(part, part + 20_000)
            x = vectors[self.contexts[rows]]
            right = F.softplus(-(x * outputs[self.centers[rows]]).sum(1))
            wrong = F.softplus(torch.einsum("nd,nkd->nk", x, outputs[self.negatives[rows]])).sum(1)
            total += float((right + wrong).sum())
        return total / len(self.centers)

    def hierarchical(self, vectors: torch.Tensor, outputs: torch.Tensor, path: Callable[[int], Any]) -> float:
        """`path`: word -> (nodes, signs)."""
        total, count = 0.0, 20_000
        for center, context in zip(self.centers[:count].tolist(), self.contexts[:count].tolist(), strict=True):
            nodes, signs = path(center)
            total += float(F.softplus(-signs * (outputs[nodes] @ vectors[context])).sum())
        return total / min(count, len(self.centers))


def train_ours(text: Sentences, vocabulary: Vocabulary, options: dict[str, Any], threads: int = 1) -> Any:
    """(seconds of CPU, seconds of wall, vectors, outputs, path)"""
    model = Word2Vec(vector_size=SIZE, window=WINDOW, negatives=NEGATIVES, sample=SAMPLE, epochs=1, **options)
    model.threads = threads
    model.build_vocabulary(text)
    tokens, offsets = vocabulary.encode(text)
    start, wall = time.process_time(), time.perf_counter()
    with_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    model._train(tokens, offsets, False, None, lambda done, total: None)
    torch.set_num_threads(with_threads)
    seconds = time.process_time() - start, time.perf_counter() - wall
    tree = HuffmanTree.from_counts(vocabulary.counts) if options.get("hierarchical_softmax") else None

    def path(word: int) -> Any:
        assert tree is not None
        span = slice(int(tree.starts[word]), int(tree.starts[word + 1]))
        return tree.points[span].long(), tree.codes[span].float()

    return *seconds, model.vectors, model.outputs, path


def train_gensim(text: Sentences, vocabulary: Vocabulary, options: dict[str, Any], threads: int = 1) -> Any:
    from gensim.models import Word2Vec as Gensim  # type: ignore[import-not-found,import-untyped,unused-ignore]

    hierarchical = bool(options.get("hierarchical_softmax"))
    model = Gensim(
        vector_size=SIZE,
        window=WINDOW,
        min_count=5,
        sg=int(not options.get("cbow")),
        hs=int(hierarchical),
        negative=0 if hierarchical else NEGATIVES,
        sample=SAMPLE,
        epochs=1,
        workers=threads,
        seed=1,
    )
    model.build_vocab(text)
    start, wall = time.process_time(), time.perf_counter()
    model.train(text, total_examples=len(text), epochs=1)
    seconds = time.process_time() - start, time.perf_counter() - wall
    order = [model.wv.key_to_index[word] for word in vocabulary.words]
    vectors = torch.from_numpy(model.wv.vectors)[order]
    outputs = torch.from_numpy(model.syn1) if hierarchical else torch.from_numpy(model.syn1neg)[order]

    def path(word: int) -> Any:
        key = order[word]
        code = torch.tensor(model.wv.get_vecattr(key, "code").tolist())
        return torch.tensor(model.wv.get_vecattr(key, "point").tolist()), 1.0 - 2.0 * code

    return *seconds, vectors, outputs, path


def overlap(first: torch.Tensor, second: torch.Tensor, words: list[str], count: int = 300) -> float:
    """Share of the ten nearest words that two sets of vectors agree on, over the most frequent words."""
    one, other = (WordVectors(words, vectors) for vectors in (first, second))
    shared = 0
    for word in words[:count]:
        near = ({w for w, _ in each.most_similar(word)} for each in (one, other))
        shared += len(set.intersection(*near))
    return shared / (10 * min(count, len(words)))


def measure(
    text: Sentences,
    rounds: int,
    two_threads: bool = False,
    variants: Sequence[str] = tuple(VARIANTS),
    step: Callable[[str], None] = lambda variant: None,
) -> dict[str, Any]:
    """Facts about the text, and a row for each variant.

    Args:
        two_threads: the wall time of two threads over that of one, too; on an idle machine only.
        step: called before each variant.

    Raises:
        ModuleNotFoundError: gensim is not installed.
    """
    training, held = split(text)
    vocabulary = Vocabulary.build(training)
    start = time.process_time()
    words = len(vocabulary.encode(training)[0])
    encoding = time.process_time() - start
    judge = HeldOut(held, vocabulary)
    goals = {t.op: t.ratio for t in TARGETS if t.record == "word2vec" and t.direction == "epoch"}
    rows = []
    for name in variants:
        step(name)
        options = VARIANTS[name]
        trainers = {"pykernels": train_ours, "gensim": train_gensim}
        seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
        last: dict[str, Any] = {}
        for turn in range(rounds):
            for kind in trainers if turn % 2 == 0 else reversed(trainers):
                last[kind] = trainers[kind](training, vocabulary, options)
                seconds[kind].append(last[kind][0])

        def loss(trained: Any, tree: bool = bool(options.get("hierarchical_softmax"))) -> float:
            vectors, outputs, path = trained[2:]
            return judge.hierarchical(vectors, outputs, path) if tree else judge.sampled(vectors, outputs)

        ratio = Timing.of(seconds["pykernels"]).ratio(Timing.of(seconds["gensim"]))
        walls: dict[str, list[list[float]]] = {kind: [[], []] for kind in trainers}
        both: dict[str, Any] = {}
        for _ in range(rounds if two_threads else 0):
            for kind, train in trainers.items():
                walls[kind][0].append(train(training, vocabulary, options, 1)[1])
                both[kind] = train(training, vocabulary, options, 2)
                walls[kind][1].append(both[kind][1])
        rows.append(
            {
                "variant": name,
                "words_per_cpu_second": {kind: words / median(times) for kind, times in seconds.items()},
                "ratio": dict(zip(("median", "p20", "p80"), ratio, strict=True)),
                "target": goals.get(name),
                "held_out_loss": {kind: loss(trained) for kind, trained in last.items()},
                "neighbours_shared": overlap(last["pykernels"][2], last["gensim"][2], vocabulary.words),
                "two_threads_wall_speedup": {k: median(one) / median(two) for k, (one, two) in walls.items() if one},
                "two_threads_held_out_loss": {kind: loss(trained) for kind, trained in both.items()},
            }
        )
    settings = {"size": SIZE, "window": WINDOW, "negatives": NEGATIVES, "rounds": rounds, "encode_seconds": encoding}
    facts = {"words": words, "vocabulary": len(vocabulary), "sentences": len(training), **settings}
    return {"text": facts, "rows": rows}
