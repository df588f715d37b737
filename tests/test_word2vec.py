"""word2vec: the training step against the reference, update by update; the trainer, its files and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels.functional import AliasTable, HuffmanTree, word2vec_step_
from pykernels.testing.compare import assert_equal

VARIANTS: dict[str, dict[str, Any]] = {
    "skip-gram": {},
    "skip-gram-window": {"window_batched": True},
    "cbow": {"cbow": True},
    "cbow-compat": {"cbow": True, "word2vec_compat": True},
}


def corpus(words: int, tokens: int, sentences: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, offsets, counts): Zipf-like words in sentences of uneven length, empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, words + 1, dtype=torch.float64)
    ids = torch.multinomial(weights, tokens, replacement=True, generator=generator)
    cuts = torch.randint(tokens + 1, (sentences - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])])
    return ids, offsets, torch.bincount(ids, minlength=words) + 1


def tables(words: int, width: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(n, width, generator=generator) * 0.3 for n in (words, rows))
    return tuple(table.to(dtype) for table in made)  # type: ignore[return-value]


def objective(tree: bool, counts: Tensor) -> dict[str, Any]:
    return {"tree": HuffmanTree.from_counts(counts)} if tree else {"noise": AliasTable.from_counts(counts, 0.75)}


@pytest.mark.parametrize("tree", [False, True], ids=["negatives", "tree"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [16, 37, 112])
def test_a_step_is_the_reference_s(variant: str, tree: bool, width: int) -> None:
    ids, offsets, counts = corpus(11, 90, 6)
    keep = torch.linspace(0.4, 1.0, 11, dtype=torch.float64)
    options = {**VARIANTS[variant], **objective(tree, counts), "keep_probability": keep}
    options |= {"window": 3, "negatives": 7, "lr": (0.2, 0.05), "seed": 5, "first_sentence": 40, "compute_loss": True}
    results = {}
    for kind, dtype in (("cpu", torch.float32), ("reference", torch.float32), ("oracle", torch.float64)):
        vectors, outputs = tables(11, width, 11, dtype)
        backend = "reference" if kind == "oracle" else kind
        found = word2vec_step_(vectors, outputs, ids, offsets, backend=backend, **options)
        results[kind] = (vectors, outputs, found)
    for i, name in enumerate(("vectors", "outputs")):
        assert_equal(name, *(results[kind][i] for kind in ("cpu", "oracle", "reference")), long_sum=True)
        assert not torch.equal(results["cpu"][i], tables(11, width, 11)[i]), f"{name} did not change"
    ours, oracle = results["cpu"][2], results["oracle"][2]
    assert (ours.words, ours.pairs) == (oracle.words, oracle.pairs) and ours.words == 90
    assert ours.loss == pytest.approx(oracle.loss, rel=1e-5) and ours.loss > 0
