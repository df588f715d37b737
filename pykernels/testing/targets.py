"""The speed that was asked for, row by row, and what a record says of it. One thread of a CPU; written once, here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BOTH, TUNED = "forward+backward", "eager, tuned malloc"


@dataclass(frozen=True)
class Target:
    """A row of a benchmark and the ratio asked for: the peer's time / ours.

    Attributes:
        work: in words.
        record: the room, or "word2vec": benchmarks/results/cpu-<record>.json.
        op, shape, dtype, direction: as the row has them. Directions beside a row's own: "epoch" and "two threads" of
            word2vec (speed-up of two threads over one), and of the cost of a call on next to nothing, where `ratio` is
            the microseconds allowed above torch's call, "call, no grad", "call, forward", "call, forward+backward".
        peer: None for the fastest of those in the row, else its name there.
        page: of the docs, with the place that explains the distance; why: that explanation in a few words.
    """

    work: str
    record: str
    op: str
    shape: str
    ratio: float
    dtype: str = "float32"
    direction: str = BOTH
    peer: str | None = None
    page: str = ""
    why: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.direction

    @property
    def of_call(self) -> bool:
        return self.direction.startswith("call, ")


@dataclass(frozen=True)
class Result:
    """Ratio (of a call: microseconds above torch's) with its spread, and the peer it was taken against."""

    median: float
    p20: float
    p80: float
    peer: str

    def verdict(self, target: Target) -> str:
        """ "met", "within the spread" (the better fifth of the rounds reaches it) or "missed"."""
        if target.of_call:
            return "met" if self.median <= target.ratio else "missed"
        return "met" if self.median >= target.ratio else "within the spread" if self.p80 >= target.ratio else "missed"


_SDPA, _BAG, _IDS = "scaled_dot_product_attention", "100kx128-4096x20", "100kx128-64k-zipf"
_ACTIVATION, _ATTENTION = "activation.md#measured-on-a-cpu", "attention.md#measured"
_RECURRENT, _EMBEDDING = "recurrent.md#measured-on-a-cpu", "embedding.md#measured-on-a-cpu"
_SAMPLED, _WORD2VEC = "sampled_softmax.md#measured-on-a-cpu", "word2vec.md#measured"


def _activations() -> Iterable[Target]:
    def row(work: str, op: str, shape: str, ratio: float, why: str = "", **more: Any) -> Target:
        return Target(work, "activation", op, shape, ratio, page=_ACTIVATION, why=why, **more)

    memory = "memory bound: `bilinear` moves the same bytes and is no faster"
    for op in ("swiglu", "geglu"):
        for dtype, ratio in (("float32", 3.0), ("bfloat16", 4.0)):
            yield row(f"{op} 256 x 8192", op, "256x8192", ratio, memory, dtype=dtype)
    yield row("swiglu 2048 x 8192", "swiglu", "2048x8192", 5.0, memory)
    yield row("swiglu 2048 x 8192", "swiglu", "2048x8192", 2.5, memory, peer=TUNED)
    for op in ("gelu", "silu"):
        yield row(f"{op} 256 x 4096", op, "256x4096", 1.3)
        yield row(f"{op} 256 x 4096", op, "256x4096", 1.0, "not known; 0.8 to 1.3 by the run", direction="forward")
    yield row("gelu 2048 x 4096", "gelu", "2048x4096", 3.3)
    yield row("gelu 2048 x 4096", "gelu", "2048x4096", 1.3, peer=TUNED)
    philox = "Philox words, which can be replayed: 1.2 of 3.9 ms in each direction"
    yield row("bias + gelu + dropout 256 x 4096", "bias_activation_dropout", "gelu 256x4096", 4.0, philox)


def _attentions() -> Iterable[Target]:
    def row(work: str, op: str, shape: str, ratio: float, why: str, dtype: str = "float32") -> Target:
        return Target(work, "attention", op, shape, ratio, dtype=dtype, page=_ATTENTION, why=why)

    cold = "cold caches behind torch's kernel: in a loop of its own 1.0 ms in place of 1.8"
    tiles = "the tile unit: its clock, stores and the port it shares with the softmax"
    diagonal = "blocks cut by the diagonal make an eighth more; 1.8 to 2.0 by the run"
    for length, size, dtype, ratio, why in (
        (512, 64, "float32", 2.0, diagonal), (2048, 64, "float32", 1.35, ""),
        (512, 64, "bfloat16", 6.0, cold), (2048, 64, "bfloat16", 4.0, tiles),
        (512, 128, "bfloat16", 4.5, cold), (2048, 128, "bfloat16", 2.8, tiles),
    ):  # fmt: skip
        work = f"attention, causal, {length} x {size}"
        yield row(work, _SDPA, f"causal-{length}x{size}", ratio, why, dtype)
    products = "the seven products alone take as long as the target allows"
    for kind, what in (("bias", "a bias and its gradient"), ("prefix", "a prefix"), ("window", "a window")):
        yield row(f"attention with {what}", "attention", f"{kind}-1024x64", 3.0, products)


def _recurrences() -> Iterable[Target]:
    def row(work: str, op: str, shape: str, ratio: float, why: str = "", **more: Any) -> Target:
        return Target(work, "recurrent", op, shape, ratio, page=_RECURRENT, why=why, **more)

    products = "the matrix products bound it: {} by torch's alone"
    steps = "the products of each step, of 32 rows, bound it: 1.5 to 1.6 with the others in bfloat16 parts on AMX"
    for hidden, ratio in ((256, 1.1), (512, 1.18)):
        shape = f"T64-B32-H{hidden}"
        yield row(f"LSTM, H {hidden}", "lstm", shape, ratio, products.format("1.15 to 1.3"))
        yield row(f"LSTM, H {hidden}", "lstm", shape, 1.0, "the same two products", direction="forward")
    small = "24.3 of 25.9 ms are its matrix products; at H 64 splitting them into bfloat16 parts gains nothing"
    yield row("LSTM, T 100, B 128, H 64", "lstm", "T100-B128-H64", 2.1, small)
    gates = "a step has 32 rows to each weight it reads: tiles reach 1 of 2.2 TFLOP/s; three quarters are products"
    for hidden, ratio in ((256, 1.8), (512, 2.2)):
        yield row(f"LSTM, H {hidden}", "lstm", f"T64-B32-H{hidden}", ratio, gates, dtype="bfloat16")
    ragged = "ours at 86% of the best product at H 256; torch's took 165 and 316 ms in two runs, ours 38 and 50"
    for mode, shape, ratio in (
        ("LSTM", "T200-B8-H128", 13.0), ("LSTM", "T100-B32-H256", 5.0), ("GRU", "T100-B32-H256", 4.0)
    ):  # fmt: skip
        name = f"{mode} ragged, fwd+bwd"
        yield row(f"{mode} of a PackedSequence, {shape}", name, shape, ratio, ragged, direction="step")
    for shape, ratio, why in (
        ("T200-B8-H128", 4.2, "4.2 to 4.6 in other runs"),
        ("T100-B128-H64", 2.5, "2.3 to 2.5 by the run"),
        ("T64-B32-H256", 1.7, "1.65 to 1.73 by the run"),
    ):
        yield row(f"GRU, {shape}", "gru", shape, ratio, why)
    for shape, why in (("T64-B32-H256", steps), ("T100-B128-H64", products.format("2.67"))):
        yield row(f"RNN, {shape}", "rnn", shape, 3.0, why)
    shape = "T64-B32-H256-proj64"
    yield row("LSTM with a projection to 64", "lstm", shape, 3.0, steps)


def _embeddings() -> Iterable[Target]:
    def row(work: str, op: str, shape: str, ratio: float, why: str = "", direction: str = "step") -> Target:
        return Target(work, "embedding", op, shape, ratio, direction=direction, page=_EMBEDDING, why=why)

    yield row("sparse gradient, coalesced, 64k Zipf ids", "sparse gradient, coalesced", _IDS, 3.0,
              "reading dy in the order of the sort alone takes 4.3 of 6.5 ms")  # fmt: skip
    yield row("embedding backward and SGD in one", "backward and SGD", _IDS, 3.0, "torch moves the same bytes")
    fetch = "fetching 82k random rows; {} from rows that stay in cache"
    yield row("EmbeddingBag max", "embedding_bag max", _BAG, 20.0, fetch.format("38x"), "forward")
    yield row("EmbeddingBag, padding_idx", "embedding_bag sum", f"{_BAG}-padding", 8.0, fetch.format("5.5x"), "forward")
    yield row("EmbeddingBag training step, SGD (FBGEMM)", "bag step, SGD", "100kx128-2048x32-zipf", 1.5,
              "sums and steps wait for 18,000 rows of memory")  # fmt: skip


def _sampled() -> Iterable[Target]:
    def row(
        work: str, op: str, shape: str, ratio: float, why: str, dtype: str = "float32", way: str = "step"
    ) -> Target:
        return Target(work, "sampled_softmax", op, shape, ratio, dtype, way, page=_SAMPLED, why=why)

    step, rows = (
        "negative sampling step, SGD",
        "rows come from memory twice and go back once; forward takes 1.2 times a bag's sum",
    )
    for shape, ratio in (("100kx128-K5", 6.0), ("100kx128-K64", 12.0), ("1Mx128-K5", 6.0), ("1Mx128-K64", 6.0)):
        yield row(f"negatives of each row's own, {shape}", step, shape, ratio, rows)
    for dtype, ratio in (("float32", 2.0), ("bfloat16", 2.5)):
        why = "1.9 to 2.6 by the run: the compiled peer takes 63 to 93 ms, ours 33 to 35" if dtype != "float32" else ""
        yield row("sampled softmax, 8192 shared", "sampled_softmax_loss", "100kx128-K8192", ratio, why, dtype, BOTH)
    yield row("linear cross entropy, 128k classes", "linear cross entropy, fwd+bwd", "512x256-V128k", 1.3,
              "without AMX: four products where a peer that keeps logits makes three")  # fmt: skip


def _word2vec() -> Iterable[Target]:
    for name, ratio, why in (
        ("skip-gram, negative sampling", 6.0, "asking for rows, 25%; updates, 17%; sigmoid, 12%"),
        ("skip-gram, negatives shared by a window", 12.0, "as skip-gram: asking for rows, updates"),
        ("CBOW, negative sampling", 8.0, "a window's mean waits for the rows that the centre before left"),
        ("skip-gram, hierarchical softmax", 6.0, "13.4 products for paths of 10.9 nodes; sums over lanes and sigmoids"),
    ):
        yield Target(name, "word2vec", name, "", ratio, direction="epoch", peer="gensim", page=_WORD2VEC, why=why)
        hot = "merges of hot rows and rows without copies: 11% to 28% more CPU a word: [the step](word2vec.md#the-step)"
        yield Target(name, "word2vec", name, "", 1.8, "float32", "two threads", "one thread",
                     _WORD2VEC, hot)  # fmt: skip


def _calls() -> Iterable[Target]:
    for kind, extra in (("no grad", 2.5), ("forward", 8.0), (BOTH, 12.0)):
        yield Target(f"cost of a call, relu, {kind}", "activation", "relu", "2x4", extra, direction=f"call, {kind}",
                     peer="eager", page=_ACTIVATION, why="a second operator and autograd through Python")  # fmt: skip


TARGETS = (
    *_activations(), *_attentions(), *_recurrences(), *_embeddings(), *_sampled(), *_word2vec(), *_calls(),
)  # fmt: skip


def result(target: Target, record: Mapping[str, Any]) -> Result | None:
    """What the record says; None: it has no such row, or its check failed."""
    if target.of_call:
        kinds = record.get("call_overhead", {}).get(target.op)
        if not kinds:
            return None
        ours, theirs = (kinds[target.direction.removeprefix("call, ")][name] for name in ("pykernels", "eager"))
        low, high = ours["p20"] - theirs["p80"], ours["p80"] - theirs["p20"]
        return Result(1e6 * (ours["median"] - theirs["median"]), 1e6 * low, 1e6 * high, "eager")
    if target.record == "word2vec":
        return _of_words(target, record.get("word2vec", record).get("rows", ()))
    for row in record.get("rows", ()):
        if (row["op"], row["shape"], row["dtype"], row["direction"]) == target.key and row["correct"] and row["ratio"]:
            if target.peer is None or target.peer == row["best_peer"]:
                return Result(**row["ratio"], peer=row["best_peer"])
            theirs = {**row["seconds"], **row.get("beside", {})}.get(target.peer)
            if theirs:
                ours = row["seconds"]["pykernels"]
                ends = theirs["p20"] / ours["p80"], theirs["p80"] / ours["p20"]
                return Result(theirs["median"] / ours["median"], *ends, target.peer or "")
    return None


def _of_words(target: Target, rows: Iterable[Mapping[str, Any]]) -> Result | None:
    """The record of benchmarks/word2vec.py has rows of its own kind."""
    for row in rows:
        if row.get("variant") != target.op:
            continue
        if target.direction == "epoch":
            return Result(**row["ratio"], peer="gensim")
        both = row["two_threads_wall_speedup"].get("pykernels")
        return Result(both, both, both, "one thread") if both else None
    return None
