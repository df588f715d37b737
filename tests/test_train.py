"""`pykernels train`: runs repeat, go on to the same bits, compare with stock PyTorch, and end with clear codes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import pykernels
from pykernels.cli import main
from pykernels.cli.train import loop, model
from pykernels.testing.models import TASKS
from pykernels.testing.training import train_both

SENTENCES = (
    "A tale of two kernels, and of the gradients they sent back.",
    "Every row was read once; nobody wrote to memory twice.",
    "In the morning the warp was early, in the evening it waited!",
    "Where are the losses? They fell, step by step, until the end.",
    "It's the scheduler's secret: work that waits is work that is late.",
)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("train") / "book.txt"
    chosen = torch.randint(len(SENTENCES), (150,), generator=torch.Generator().manual_seed(3)).tolist()
    path.write_text("\n".join(SENTENCES[i] for i in chosen), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(name: str, book: str | Path, *more: object) -> Result:
    arguments = ["train", name, "--size", "small", "--text", str(book), *map(str, more)]
    return CliRunner().invoke(main, arguments)


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal bit by bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(book: str, tmp_path: Path, name: str) -> None:
    """Stopped within a chunk of batches and resumed across its end; nothing of the process before is left."""
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    assert train(name, book, "--steps", 19, "--checkpoint", whole).exit_code == 0
    assert train(name, book, "--steps", 5, "--checkpoint", parts).exit_code == 0
    torch.manual_seed(99)  # the global generator is part of the checkpoint
    early = saved(parts)
    result = train(name, book, "--steps", 19, "--checkpoint", parts, "--resume", "--json")
    assert result.exit_code == 0, result.output
    a, b = saved(whole), saved(parts)
    assert same(a, b) and len(a["losses"]) == 19
    assert not same(early["model"], b["model"]) and not same(early["optimizer"], b["optimizer"])
    found = json.loads(result.stdout)
    assert found["resumed_at"] == 5 and found["losses"] == a["losses"].tolist() and found["samples"]
    assert not list(tmp_path.glob("*.part"))


def test_state_that_is_left_out_is_noticed(book: str, tmp_path: Path) -> None:
    """A mistake planted: the optimizer starts anew. The comparison of the test above must see it."""
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    train("gpt", book, "--steps", 6, "--checkpoint", whole)
    train("gpt", book, "--steps", 3, "--checkpoint", parts)
    state = saved(parts)
    state["optimizer"]["state"] = {}
    torch.save(state, parts)
    assert train("gpt", book, "--steps", 6, "--checkpoint", parts, "--resume").exit_code == 0
    assert not same(saved(whole)["model"], saved(parts)["model"])


def test_the_seed_decides(book: str) -> None:
    first, again, other = (
        json.loads(train("lstm-lm", book, "--steps", 3, "--seed", seed, "--json").stdout) for seed in (1, 1, 2)
    )
    assert first["losses"] == again["losses"] != other["losses"] and first["samples"] == again["samples"]


def test_it_learns_and_shows_it(book: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = train("gpt", book, "--steps", 60, "--report", page)
    assert result.exit_code == 0, result.output
    first, last = (float(x) for x in re.findall(r"loss (\S+) -> ([\d.]+)", result.stdout)[0])
    assert last < first - 0.5 and "given: " in result.stdout and "made:  " in result.stdout
    html = page.read_text()
    assert not re.search(r"https?:|//|\bsrc=|@import|url\(|<link|<script", html)
    assert len(re.findall("<polyline", html)) == 1 and "What the model makes of it" in html


@pytest.mark.parametrize("name", TASKS)
def test_every_model_compared_with_stock_pytorch(book: str, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.html"
    result = train(name, book, "--steps", 6, "--compare", "--json", "--report", page)
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["equal"] is True, found["checks"]
    assert found["tokens_per_second"]["ratio"] > 0 and found["peak_bytes"]["ratio"] > 0
    assert set(found["samples"]) == {"stock PyTorch", "pykernels"} and all(found["samples"].values())
    alone = json.loads(train(name, book, "--steps", 6, "--json").stdout)
    assert found["losses"]["pykernels"] == alone["losses"], "not the run that it is said to be"
    assert "The losses are equal." in page.read_text()


def test_a_difference_is_code_1_and_has_no_speed(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def adopt(network: torch.nn.Module) -> None:
        pykernels.patch(network)
        network.layers[0].mlp[1] = torch.nn.GELU("tanh")  # type: ignore[index, union-attr]

    monkeypatch.setattr(model, "train_both", partial(train_both, adopt=adopt))
    page = tmp_path / "page.html"
    result = train("gpt", book, "--steps", 3, "--compare", "--report", page)
    assert result.exit_code == 1 and "DIFFERENT" in result.stdout
    speed = result.stdout.split("Tokens a second")[1].split("Peak memory")[0]
    assert "not equal" in speed and not re.search(r"\d\.\d\dx", speed)
    assert "losses of gpt differ" in page.read_text() and not re.search(r"stock <b>\d", page.read_text())
    assert json.loads(train("gpt", book, "--steps", 3, "--compare", "--json").stdout)["tokens_per_second"] is None


def test_ctrl_c_finishes_the_step_and_saves(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.stream

    def interrupting(task: Any, seed: int, start: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(real(task, seed, start)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    train("lstm-lm", book, "--steps", 8, "--checkpoint", whole)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "stream", interrupting)
        result = train("lstm-lm", book, "--steps", 8, "--checkpoint", parts)
        assert result.exit_code == 130 and "Interrupted after step 4; saved" in result.stderr
        unsaved = train("lstm-lm", book, "--steps", 8)
        assert unsaved.exit_code == 130 and "nothing was saved" in unsaved.stderr
    assert signal.getsignal(signal.SIGINT) is handler and len(saved(parts)["losses"]) == 4
    assert train("lstm-lm", book, "--steps", 8, "--checkpoint", parts, "--resume").exit_code == 0
    assert same(saved(whole), saved(parts))


def test_a_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), loop.interruptible() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        signal.raise_signal(signal.SIGINT)


def test_a_failed_save_leaves_the_old_checkpoint(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    train("gpt", book, "--steps", 2, "--checkpoint", path)
    before = path.read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = train("gpt", book, "--steps", 3, "--checkpoint", path, "--resume")
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_no_number_is_code_1(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Training, "steps", _diverging)
    path = tmp_path / "model.pt"
    result = train("gpt", book, "--steps", 9, "--checkpoint", path)
    assert result.exit_code == 1 and "the loss of step 1 is nan" in result.stderr and not path.exists()


def _diverging(self: loop.Training, until: int | None, seconds: float | None = None) -> Iterator[float]:
    self.losses.append(float("nan"))
    yield self.losses[-1]


def test_time_ends_a_run(book: str) -> None:
    found = json.loads(train("lstm-lm", book, "--time", "0.05", "--json").stdout)
    assert 1 <= found["steps"] == len(found["losses"]) < 3000


def test_a_named_backend_serves_or_says_why_not(book: str) -> None:
    CliRunner().invoke(main, ["info"])  # which looks at the rooms, and once made them anew
    chosen = json.loads(train("gpt", book, "--steps", 3, "--backend", "reference", "--json").stdout)
    auto = json.loads(train("gpt", book, "--steps", 3, "--json").stdout)
    assert chosen["losses"] == pytest.approx(auto["losses"], rel=1e-5)
    before = pykernels.explain(pykernels.functional.gelu, torch.zeros(2)).backend
    result = train("gpt", book, "--steps", 3, "--backend", "cuda")  # of tensors in host memory
    assert result.exit_code == 2 and result.stderr.strip().count("\n") == 0 and result.stdout == ""
    assert "backend 'cuda' (from --backend) cannot serve this call" in result.stderr
    assert pykernels.explain(pykernels.functional.gelu, torch.zeros(2)).backend == before


def test_other_checkpoints_are_refused(book: str, tmp_path: Path) -> None:
    path, text = tmp_path / "model.pt", tmp_path / "other.txt"
    text.write_text(Path(book).read_text() + "One more line.\n")
    assert train("gpt", book, "--steps", 2, "--checkpoint", path).exit_code == 0
    broken, foreign = tmp_path / "broken.pt", tmp_path / "foreign.pt"
    broken.write_bytes(path.read_bytes()[:500])
    torch.save({"weight": torch.zeros(2)}, foreign)
    for result, complaint in (
        (train("gpt", book, "--checkpoint", path), "exists; --resume goes on from it"),
        (train("bert", book, "--checkpoint", path, "--resume"), "a checkpoint of gpt, not of bert"),
        (train("gpt", book, "--checkpoint", path, "--resume", "--seed", 1), "a checkpoint of --seed 0, not 1"),
        (train("gpt", text, "--checkpoint", path, "--resume"), "a checkpoint of another text"),
        (train("gpt", book, "--checkpoint", path, "--resume", "--steps", 1), "the checkpoint is at step 2 already"),
        (train("gpt", book, "--checkpoint", broken, "--resume"), "not a checkpoint, or a broken one"),
        (train("gpt", book, "--checkpoint", foreign, "--resume"), "not a checkpoint of pykernels train"),
        (train("gpt", book, "--checkpoint", tmp_path / "none", "--resume"), "cannot be read"),
    ):
        assert result.exit_code == 2 and complaint in result.stderr, (complaint, result.stderr)
        assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_bad_input_is_one_sentence_and_code_2(book: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for arguments, complaint in (
        (("perceptron", book), "no model 'perceptron'; there are word2vec, lstm-lm, gpt"),
        (("gpt", tmp_path / "none.txt"), "none.txt: cannot be read: No such file or directory"),
        (("gpt", empty), "the file is empty"),
        (("gpt", book, "--resume"), "--resume needs --checkpoint FILE"),
        (("gpt", book, "--report", tmp_path / "no" / "page.html"), "there is no folder"),
        (("gpt", book, "--compare", "--checkpoint", tmp_path / "x.pt"), "--compare does not go with --checkpoint"),
        (("gpt", book, "--compare", "--threads", 2), "leave --threads out"),
    ):
        result = train(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("Error: ") and complaint in result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    for option in (("--steps", 0), ("--time", 0), ("--size", "huge"), ("--what",)):
        assert train("gpt", book, *option).exit_code == 2


def test_help_has_an_example() -> None:
    for name in ("word2vec", *TASKS):
        result = CliRunner().invoke(main, ["train", name, "--help"])
        assert result.exit_code == 0 and f"Example: pykernels train {name}" in result.stdout


def test_word2vec_interrupted_is_code_130(book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykernels.word2vec import Word2Vec

    def interrupted(self: Word2Vec, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Word2Vec, "_train", interrupted)
    path = tmp_path / "model.pt"
    command = ["train", "word2vec", "--text", book, "--size", "8", "--min-count", "1", "--checkpoint", str(path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 130 and "Saved" in result.stderr and path.exists()


def test_without_a_text_it_reads_pythons_own(monkeypatch: pytest.MonkeyPatch, book: str) -> None:
    monkeypatch.setattr(model, "default_text", lambda: model.read_text(book))
    result = CliRunner().invoke(main, ["train", "lstm-lm", "--size", "small", "--steps", "2"])
    assert result.exit_code == 0 and "2 steps, loss" in result.stdout
