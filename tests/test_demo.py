"""The demo: equal trainings are found equal, unequal ones are not, and the page stands alone."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import pykernels
from pykernels.cli import demo, main
from pykernels.cli.demo.models import Block
from pykernels.cli.demo.report import page
from pykernels.cli.demo.tasks import TINY, make_tasks
from pykernels.testing.text import MIN_WORDS, Text, TextError, default_text, read_text
from pykernels.testing.training import CURVE_BOUND, Outcome, Task, train_both

WORDS = ("the", "of", "kernel", "memory", "and", "gradient", "it's", "warp", "Über", "row")


@pytest.fixture(scope="module")
def text() -> Text:
    pick = torch.randint(len(WORDS), (1500,), generator=torch.Generator().manual_seed(3)).tolist()
    return Text("test text", " ".join(WORDS[i] for i in pick) + ".\n")


@pytest.fixture(scope="module")
def tiny(text: Text) -> dict[str, Task]:
    return {task.name: task for task in make_tasks(text, TINY)}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", *arguments])


@pytest.mark.parametrize("name", ["skip-gram", "LSTM", "GPT"])
def test_pykernels_trains_as_stock_pytorch_does(tiny: dict[str, Task], name: str) -> None:
    heard: list[int] = []
    outcome = train_both(tiny[name], 7, progress=heard.append)
    assert outcome.equal, (outcome.checks, outcome.first.why, outcome.gradient.why)
    assert outcome.first.bound < 1e-5 and max(outcome.differences) < 1e-5
    assert len(outcome.stock.losses) == len(outcome.ours.losses) == 7 and sum(heard) == 14
    assert outcome.stock.losses[0] != outcome.stock.losses[-1], "nothing was learnt"
    assert outcome.stock.peak > 0 and outcome.ours.peak > 0 and outcome.rate(outcome.ours) > 0


def test_operators_are_named_with_their_backend(tiny: dict[str, Task]) -> None:
    served = {op: backend for task in tiny.values() for op, backend, _ in train_both(task, 2).served}
    assert set(served) == {"embedding", "negative_sampling_loss", "lstm", "scaled_dot_product_attention", "gelu"}
    assert served["gelu"] == pykernels.explain(pykernels.functional.gelu, torch.zeros(3)).backend


def test_a_training_repeats_bit_by_bit(tiny: dict[str, Task]) -> None:
    first, second = (train_both(tiny["GPT"], 4) for _ in range(2))
    assert first.ours.losses == second.ours.losses and first.stock.losses == second.stock.losses


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.001


class _WrongGradient(torch.nn.GELU):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(_Scaled.apply(input))


class _WrongLater(torch.nn.GELU):
    """Right in the first step (once for the check, once for the training), half too large after it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(input) * (1.0 if self.calls < 3 else 1.5)


def _patch_with(gelu: Any) -> Any:
    """`patch`, and then another GELU in every block."""

    def adopt(model: torch.nn.Module) -> None:
        pykernels.patch(model)
        for block in model.modules():
            if isinstance(block, Block):
                block.mlp[1] = gelu()

    return adopt


@pytest.mark.parametrize(
    ("gelu", "found"),
    [
        (partial(torch.nn.GELU, "tanh"), "loss at step 1"),
        (_WrongGradient, "gradients at step 1"),
        (_WrongLater, "loss along the curve"),
    ],
    ids=["wrong-formula", "wrong-gradient", "wrong-later"],
)
def test_a_planted_mistake_is_found(tiny: dict[str, Task], gelu: Any, found: str) -> None:
    outcome = train_both(tiny["GPT"], 8, adopt=_patch_with(gelu))
    assert not outcome.checks[found] and not outcome.equal
    if gelu is _WrongGradient:
        assert outcome.checks["loss at step 1"]
    if gelu is _WrongLater:
        assert outcome.checks["loss at step 1"] and outcome.checks["gradients at step 1"]


def test_a_loss_that_is_not_a_number_is_a_difference(tiny: dict[str, Task]) -> None:
    outcome = train_both(tiny["GPT"], 2)
    outcome.ours.losses[1] = outcome.stock.losses[1] = float("nan")
    assert max(outcome.differences) > CURVE_BOUND and not outcome.equal


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("A tale of two kernels and their gradients, told row by row. " * 120, encoding="utf-8")
    return str(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with models of toy size."""
    monkeypatch.setattr(demo, "make_tasks", partial(make_tasks, sizes=TINY))


@pytest.mark.usefixtures("small")
def test_the_command_prints_and_writes(tmp_path: Path, book: str) -> None:
    html = tmp_path / "page.html"
    result = run("--text", book, "--steps", "3", "--report", str(html))
    assert result.exit_code == 0, result.output
    for expected in ("skip-gram", "LSTM", "GPT", "Loss at step 1", "Peak memory", "scaled_dot_product_attention"):
        assert expected in result.stdout
    assert "DIFFERENT" not in result.stdout and html.exists()


@pytest.mark.usefixtures("small")
def test_json_is_all_there_is_on_stdout(tmp_path: Path, book: str) -> None:
    result = run("--text", book, "--steps", "3", "--report", str(tmp_path / "page.html"), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["equal"] is True
    assert [model["name"] for model in found["models"]] == ["skip-gram", "LSTM", "GPT"]
    for model in found["models"]:
        assert len(model["losses"]["stock"]) == 3
        assert model["step1"]["error"] <= model["step1"]["bound"]
        assert model["peak_bytes"]["ratio"] == model["peak_bytes"]["stock"] / model["peak_bytes"]["pykernels"]


@pytest.mark.usefixtures("small")
def test_unequal_losses_end_with_code_1(tmp_path: Path, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "train_both", partial(train_both, adopt=_patch_with(partial(torch.nn.GELU, "tanh"))))
    result = run("--text", book, "--steps", "2", "--report", str(tmp_path / "page.html"))
    assert result.exit_code == 1 and "DIFFERENT" in result.stdout
    assert "The losses of GPT differ" in (tmp_path / "page.html").read_text()


def test_the_page_stands_alone(tiny: dict[str, Task]) -> None:
    outcomes: list[Outcome] = [train_both(task, 3) for task in tiny.values()]
    html = page(outcomes, ["<script>alert(1)</script> & so on"])
    assert not re.search(r"https?:|//|\bsrc=|@import|url\(|<link|<script", html)
    assert "&lt;script&gt;" in html
    plots = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(plots) == 4 * len(outcomes)
    for plot in plots:
        drawn = {element.tag for element in ET.fromstring(plot).iter()}
        assert drawn & {"polyline", "rect"}
    lines = [ET.fromstring(plot).findall("polyline") for plot in plots[::4]]
    for stock, ours in lines:
        assert len(stock.get("points", "").split()) == len(ours.get("points", "").split()) == 3


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "the file is empty"),
        (b" \n\t ", "the file is empty"),
        (b"only a few words", "4 words is too short"),
        (b"latin \xe9t\xe9 " * 2000, "not UTF-8 text: byte 0xe9 at offset 6"),
        ("word ".encode("utf-16") * 2000, "not UTF-8 text: byte 0xff at offset 0"),
        (b"word \0 " * 2000, "not text: NUL byte at character 5"),
    ],
    ids=["missing", "empty", "blank", "short", "latin-1", "utf-16", "binary"],
)
def test_an_unusable_text_is_one_line_and_code_2(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    result = run("--text", str(path), "--report", str(tmp_path / "page.html"))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"Error: {path}: ") and complaint in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--steps", "x"], ["--report", "no/such/folder/p.html"], ["--text", "/"], ["--what"]],
)
def test_bad_options_end_with_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Error: " in result.stderr


def test_text_is_read_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbf" + "naïve words\r\n".encode() * MIN_WORDS)
    content = read_text(path).content
    assert content.startswith("naïve words\nnaïve") and "\r" not in content


def test_the_default_text_is_prose_from_python_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = default_text()
    assert len(whole.words().ids) > 100_000
    monkeypatch.setitem(sys.modules, "pydoc_data", None)  # some distributions split it off
    assert MIN_WORDS < len(default_text().content) < len(whole.content)


def test_tokens_stand_for_the_text(text: Text) -> None:
    words, characters = text.words(), text.characters()
    assert [words.vocabulary[i] for i in words.ids[:5]] == text.content.lower().split()[:5]
    assert "".join(characters.vocabulary[i] for i in characters.ids) == text.content
    assert int(characters.counts().sum()) == len(text.content)
    counts = words.counts().tolist()
    assert counts == sorted(counts, reverse=True)


def test_a_text_too_short_for_training_is_refused() -> None:
    with pytest.raises(TextError, match="too short"):
        Text("x", "word " * (MIN_WORDS - 1))
