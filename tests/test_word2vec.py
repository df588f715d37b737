"""word2vec: the training step against the reference, update by update; the trainer, its files and its errors."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import pykernels
from pykernels.cli import main
from pykernels.functional import AliasTable, HuffmanTree, word2vec_step_
from pykernels.testing.compare import assert_equal
from pykernels.testing.text import default_text
from pykernels.word2vec import LineSentences, Vocabulary, Word2Vec, WordVectors

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


def step(vectors: Tensor, outputs: Tensor, ids: Tensor, offsets: Tensor, counts: Tensor, **options: Any) -> Any:
    chosen = {"backend": "cpu", **objective(False, counts), **options}
    return word2vec_step_(vectors, outputs, ids, offsets, **chosen)


def test_a_step_repeats_bit_by_bit_however_it_is_cut() -> None:
    ids, offsets, counts = corpus(50, 4000, 200)
    whole, parts = tables(50, 32, 50), tables(50, 32, 50)
    step(*whole, ids, offsets, counts)
    for first, last in ((0, 3), (3, 120), (120, 200)):
        cut = offsets[first : last + 1]
        step(*parts, ids[cut[0] : cut[-1]], cut - cut[0], counts, first_sentence=first)
    again = tables(50, 32, 50)
    step(*again, ids, offsets, counts)
    for one, other, repeated in zip(whole, parts, again, strict=True):
        assert torch.equal(one, other) and torch.equal(one, repeated)
    other_seed = tables(50, 32, 50)
    step(*other_seed, ids, offsets, counts, seed=1)
    assert not torch.equal(whole[0], other_seed[0])


def test_rows_with_padding_between_them_are_left_alone() -> None:
    ids, offsets, counts = corpus(20, 300, 9)
    plain = tables(20, 21, 20)
    wide = [torch.full((20, 40), float("nan")) for _ in plain]
    for buffer, table in zip(wide, plain, strict=True):
        buffer[:, 3:24] = table
    step(*plain, ids, offsets, counts)
    step(*(buffer[:, 3:24] for buffer in wide), ids, offsets, counts)
    for buffer, table in zip(wide, plain, strict=True):
        assert torch.equal(buffer[:, 3:24], table)
        assert buffer[:, :3].isnan().all() and buffer[:, 24:].isnan().all()


def test_both_instruction_sets_agree(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from test_word2vec import corpus, step, tables\n"
        "ids, offsets, counts = corpus(30, 600, 20)\n"
        "made = tables(30, 48, 30)\n"
        "step(*made, ids, offsets, counts, negatives=3)\n"
        "torch.save(made, sys.argv[1])\n"
    )
    found = []
    for capability in ("avx2", "default"):
        environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": "avx2"} if capability == "avx2" else {})}
        path, here = tmp_path / capability, Path(__file__).parent
        command = [sys.executable, "-c", script, str(path), str(here), str(here.parent)]
        subprocess.run(command, check=True, env=environment, timeout=600)
        found.append(torch.load(path))
    oracle = [table.double() for table in tables(30, 48, 30)]
    ids, offsets, counts = corpus(30, 600, 20)
    step(*oracle, ids, offsets, counts, negatives=3, backend="reference")
    for i, name in enumerate(("vectors", "outputs")):
        assert_equal(name, found[0][i], oracle[i], found[1][i], long_sum=True)


def test_threads_train_every_sentence() -> None:
    ids, offsets, counts = corpus(400, 40_000, 900)
    one, two = tables(400, 16, 400), tables(400, 16, 400)
    before = torch.get_num_threads()
    counted = step(*one, ids, offsets, counts, compute_loss=True)
    try:
        torch.set_num_threads(2)
        shared = step(*two, ids, offsets, counts, compute_loss=True)
    finally:
        torch.set_num_threads(before)
    assert (shared.words, shared.pairs) == (counted.words, counted.pairs)
    assert shared.loss == pytest.approx(counted.loss, rel=0.05)


@pytest.mark.parametrize("tree", [False, True], ids=["negatives", "tree"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_lose_nothing_of_each_other(tree: bool, threads: int) -> None:
    """At a small rate updates add up in whatever order: copies of output rows must be merged to the same sums. (Rows of
    `vectors` have no copies, and of two writes at once one is lost.) What lies between rows stays, infinities too."""
    ids, offsets, counts = corpus(900, 60_000, 900)
    order = counts.argsort(descending=True).argsort()  # words by descending frequency, as the trainer has them
    ids, counts = order[ids], counts.sort(descending=True).values
    start, moved = tables(900, 21, 900), []
    before = torch.get_num_threads()
    for n in (1, threads):
        buffers = [torch.full((900, 40), float("inf")) for _ in start]
        made = [buffer[:, 3:24].copy_(table) for buffer, table in zip(buffers, start, strict=True)]
        try:
            torch.set_num_threads(n)
            step(*made, ids, offsets, counts, lr=1e-5, **({"noise": None} if tree else {}), **objective(tree, counts))
        finally:
            torch.set_num_threads(before)
        assert all(b[:, :3].isinf().all() and b[:, 24:].isinf().all() for b in buffers)
        moved.append(made[1] - start[1])
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": torch.tensor([0, 5])}, IndexError, r"tokens\[1\] is 5"),
    ({"tokens": torch.tensor([-1, 0])}, IndexError, r"tokens\[0\] is -1"),
    ({"tokens": torch.tensor([0.0, 1.0])}, RuntimeError, "'tokens' must be int32 or int64"),
    ({"offsets": torch.tensor([0, 1])}, ValueError, "'offsets' must rise from 0 to the 2 tokens"),
    ({"offsets": torch.tensor([1, 2])}, ValueError, "'offsets' must rise"),
    ({"offsets": torch.tensor([0, 2, 1, 2])}, ValueError, "smallest step is -1"),
    ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "at least one offset"),
    ({"vectors": torch.zeros(1, 4)}, ValueError, "at least two words"),
    ({"vectors": torch.zeros(5, 4, dtype=torch.float16)}, RuntimeError, "'outputs'"),
    ({"outputs": torch.zeros(4, 4)}, ValueError, "at least 5 rows of 4"),
    ({"outputs": torch.zeros(5, 3)}, ValueError, "at least 5 rows of 4"),
    ({"outputs": torch.zeros(4).expand(5, 4)}, RuntimeError, "'outputs' is written to, so its rows must not overlap"),
    ({"noise": None}, ValueError, "not neither"),
    ({"tree": HuffmanTree.from_counts([1, 2, 3, 4, 5])}, ValueError, "not both"),
    ({"noise": AliasTable.from_counts([1, 2, 3])}, ValueError, "of the 5 words of vectors, not of 3"),
    ({"noise": torch.ones(5)}, TypeError, "'noise' must be AliasTable"),
    ({"window": 0}, ValueError, "'window' must be at least 1"),
    ({"window": 65}, ValueError, "'window' must be at most 64"),
    ({"negatives": 256}, ValueError, "'negatives' must be at most 255"),
    ({"lr": -1.0}, ValueError, "'lr'"),
    ({"lr": float("nan")}, ValueError, "'lr'"),
    ({"cbow": True, "window_batched": True}, ValueError, "'window_batched' is skip-gram's"),
    ({"keep_probability": torch.ones(4)}, ValueError, "'keep_probability' must have the shape"),
    ({"keep_probability": torch.full((5,), 1.5)}, ValueError, r"must lie in \[0, 1\]"),
    ({"backend": "triton"}, pykernels.BackendError, "triton"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named_and_the_tables_stay(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "vectors": torch.ones(5, 4),
        "outputs": torch.ones(5, 4),
        "tokens": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 2]),
        "noise": AliasTable.from_counts([5, 4, 3, 2, 1]),
        **changed,
    }
    before = {name: given[name].clone() for name in ("vectors", "outputs")}
    with pytest.raises(error, match=message):
        word2vec_step_(**given)
    assert all(torch.equal(given[name], table) for name, table in before.items())


def test_nothing_to_read_changes_nothing() -> None:
    made = tables(5, 16, 5)
    counts = torch.ones(5)
    for ids, offsets in (([], [0]), ([], [0, 0, 0]), ([3], [0, 1])):  # a sentence of one word has no pair
        found = step(*made, torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets), counts)
        assert found.pairs == 0 and found.words == len(ids)
    assert all(torch.equal(a, b) for a, b in zip(made, tables(5, 16, 5), strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own prose, a sentence a line."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    lines = default_text().content.lower().replace("\n\n", ".").replace("\n", " ").split(".")
    path.write_text("\n".join(" ".join(filter(str.isalpha, line.split())) for line in lines), encoding="utf-8")
    return path


TRAINERS = {
    "skip-gram": {},
    "skip-gram tree": {"hierarchical_softmax": True},
    "cbow": {"cbow": True},
    "cbow tree": {"cbow": True, "hierarchical_softmax": True},
    "window": {"window_batched": True},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_learns_and_repeats(text: Path, name: str) -> None:
    options = {"vector_size": 24, "epochs": 3, "seed": 3, **TRAINERS[name]}
    model, again = (Word2Vec(**options).fit(text, compute_loss=True) for _ in range(2))
    assert model.losses[2] < model.losses[0]
    assert torch.equal(model.vectors, again.vectors) and model.losses == again.losses
    assert model.vectors.isfinite().all() and model.vectors.shape == (len(model.vocabulary or ()), 24)


def test_a_stopped_training_goes_on_to_the_same_end(text: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "model", {"vector_size": 16, "epochs": 2}
    whole = Word2Vec(**options).fit(text)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Word2Vec(**options).fit(text, checkpoint=path, progress=stop)
    resumed = Word2Vec.load(path)
    assert not torch.equal(resumed.vectors, whole.vectors)
    resumed.train(text)
    assert torch.equal(resumed.vectors, whole.vectors) and torch.equal(resumed.outputs, whole.outputs)
    assert sum(calls) < resumed.options.epochs * int(resumed.vocabulary.counts.sum())  # type: ignore[union-attr]


def test_the_vocabulary() -> None:
    sentences = [["b", "a", "a"], ["c"], ["a", "b", "rare"], []]
    vocabulary = Vocabulary.build(sentences, min_count=1)
    assert vocabulary.words == ["a", "b", "c", "rare"] and vocabulary.counts.tolist() == [3, 2, 1, 1]
    ids, offsets = Vocabulary.build(sentences, min_count=2).encode(sentences)
    assert ids.tolist() == [1, 0, 0, 0, 1] and offsets.tolist() == [0, 3, 5]
    long = Vocabulary.build([["a", "b"] * 12_000], 1).encode([["a", "b"] * 12_000])
    assert long[1].tolist() == [0, 10_000, 20_000, 24_000]
    keep = vocabulary.keep_probability(0.1)
    share = 3 / 7
    assert keep[0] == pytest.approx(((share / 0.1) ** 0.5 + 1) * 0.1 / share) and (keep <= 1).all()
    assert vocabulary.keep_probability(0).eq(1).all()


@pytest.mark.parametrize(
    ("sentences", "error", "message"),
    [
        ([], ValueError, "0 words"),
        ([["one", "one"]], ValueError, "at least two are needed"),
        (iter([["a", "b"]]), TypeError, "readable more than once"),
        (["a b", "c d"], TypeError, "not strings"),
        ("no/such/file", FileNotFoundError, "no/such/file"),
    ],
)
def test_an_unusable_text_is_named(sentences: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Word2Vec(min_count=1).fit(sentences)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"good line\nbad \xff line\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        list(LineSentences(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_size": 0}, "vector_size"),
        ({"threads": 0}, "threads"),
        ({"lr": 1e-5}, "lr"),
        ({"cbow": True, "window_batched": True}, "window_batched"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"'{message}'"):
        Word2Vec(**options)
    with pytest.raises(RuntimeError, match="no vocabulary yet"):
        Word2Vec().train([["a", "b"]])


def test_gensim_s_names_are_told_ours() -> None:
    with pytest.raises(TypeError, match=r"'workers' \(gensim's; here: threads\), 'size'$"):
        Word2Vec(workers=2, size=3)
    with pytest.raises(TypeError, match=r"\.fit\(sentences\)"):
        Word2Vec([["a", "b"]])
    with pytest.raises(AttributeError, match="here: word_vectors"):
        Word2Vec().wv  # noqa: B018


VECTORS = WordVectors(
    ["king", "queen", "man", "woman", "apple"],
    torch.tensor([[1.0, 1, 0], [1, -1, 0], [0, 1, 0.1], [0, -1, 0.1], [0, 0, 1]]),
)


def test_neighbours_and_evaluation(tmp_path: Path) -> None:
    assert VECTORS.most_similar(["king", "woman"], ["man"], topn=1)[0][0] == "queen"
    assert VECTORS.most_similar("king", topn=9)[0][1] == pytest.approx(VECTORS.similarity("king", "man"), rel=1e-5)
    assert len(VECTORS.most_similar("king", topn=9)) == 4
    questions = tmp_path / "questions"
    questions.write_text(": family\nman king woman Queen\nman king woman apple\n: other\nking man queen nobody\n")
    assert VECTORS.evaluate_analogies(questions) == {"family": (1, 2), "other": (0, 0), "total": (1, 2)}
    pairs = ["king man 9", "king apple 1", "man woman 0.5", "king nobody 3"]
    correlation, compared, missing = VECTORS.evaluate_similarity(pairs)
    assert correlation == pytest.approx(1.0) and (compared, missing) == (3, 1)
    with pytest.raises(KeyError, match="'nobody' is not among the 5 words"):
        VECTORS.most_similar("nobody")
    with pytest.raises(ValueError, match="at least one word"):
        VECTORS.most_similar()


@pytest.mark.parametrize("binary", [False, True])
def test_files_hold_the_very_vectors(tmp_path: Path, binary: bool) -> None:
    path = tmp_path / "vectors"
    generator = torch.Generator().manual_seed(0)
    words = WordVectors(
        ["naïve", "b", "c"], torch.randn(3, 7, generator=generator) * torch.tensor([1e-30, 1, 1e30]).view(3, 1)
    )
    words.save(path, binary)
    read = WordVectors.load(path, binary)
    assert read.words == words.words and torch.equal(read.vectors, words.vectors)
    with pytest.raises(ValueError, match=str(path)):
        path.write_bytes(path.read_bytes()[: -20 if binary else -60])
        WordVectors.load(path, binary)
    with pytest.raises(ValueError, match="white space"):
        WordVectors(["two words"], torch.zeros(1, 2)).save(path)
    with pytest.raises(ValueError, match="there twice"):
        WordVectors(["a", "a"], torch.zeros(2, 2))


def test_other_writers_files_are_read(tmp_path: Path) -> None:
    """gensim ends a binary row with nothing, word2vec's own program with a new line."""
    path = tmp_path / "vectors"
    for end in (b"", b"\n"):
        rows = [(b"a", (1.0, 2.0)), (b"b", (3.0, 0.5))]
        path.write_bytes(b"2 2\n" + b"".join(w + b" " + struct.pack("<2f", *row) + end for w, row in rows))
        read = WordVectors.load(path, binary=True)
        assert read.words == ["a", "b"] and read.vectors.tolist() == [[1, 2], [3, 0.5]]
    with pytest.raises(ValueError, match=r"line 2 .* give binary=True"):
        WordVectors.load(path)
    with pytest.raises(ValueError, match="not a Word2Vec model"):
        Word2Vec.load(path)
    assert WordVectors(read.words, read.vectors.numpy()).similarity("a", "b") == read.similarity("a", "b")
    with pytest.raises(TypeError, match="'vectors' must be Tensor, not list"):
        WordVectors(["a"], [[1.0]])  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, text: Path) -> None:
    out = tmp_path / "vectors.bin"
    arguments = [
        "--text",
        str(text),
        "--output",
        str(out),
        "--binary",
        "--size",
        "16",
        "--epochs",
        "1",
        "--near",
        "the",
    ]
    result = CliRunner().invoke(main, ["train", "word2vec", *arguments])
    assert result.exit_code == 0, result.output
    assert "words from" in result.stdout and "\nthe: " in result.stdout
    assert WordVectors.load(out, binary=True).vectors.shape[1] == 16
    result = CliRunner().invoke(main, ["train", "word2vec", "--text", str(tmp_path / "none")])
    assert result.exit_code == 2 and "none" in result.stderr


def test_the_trainer_is_an_attribute_of_the_package() -> None:
    code = "import pykernels as pk; assert pk.word2vec.Word2Vec; assert not hasattr(pk, 'word3vec')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
