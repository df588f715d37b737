"""What README.md and docs/ say is true: examples run, the support matrix is the specs', commands and links exist."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from pykernels.cli import main
from pykernels.testing.spec import ROOMS
from pykernels.testing.support import replaced

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run() -> None:
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    block = names["FeedForward"](6, 16)  # type: ignore[operator]
    x = torch.randn(3, 6, requires_grad=True)
    block(x).sum().backward()
    gate, up = torch.nn.functional.linear(x, block.gate_up.weight).chunk(2, -1)
    torch.testing.assert_close(block(x), block.down(torch.nn.functional.silu(gate) * up))


def test_the_support_matrix_is_of_today() -> None:
    assert replaced(README) == README, "run: python -m pykernels.testing.support --write README.md"


def test_the_commands_and_files_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets | {"a"}
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_make_without_a_gpu_says_so_and_recipes_name_files_that_exist() -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *words, f"PYTHON={sys.executable}"]
        apart = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True)

    if not torch.cuda.is_available():
        done = make("gpu")
        assert done.returncode == 2 and "no CUDA device" in done.stderr, done.stderr
    done = make("-n", "docs", "wheel", "bench", "lint", "test", "demo")
    scripts = re.findall(r"python\S* (\S+\.py)", done.stdout)
    assert done.returncode == 0 and len(scripts) > 2 and all((ROOT / script).exists() for script in scripts), done


def test_ci_runs_every_command_of_the_readme() -> None:
    """Each line of a block of commands: what of CI runs it, and that the options it names exist."""
    ran = (ROOT / ".ci" / "run").read_text()
    packaged = (ROOT / "tests" / "packaging.sh").read_text()
    blocks = re.findall(r"```\n(.*?)```", re.sub(r"```python\n.*?```", "", README, flags=re.S), re.S)
    lines = [line.split("#")[0].split() for block in blocks for line in block.splitlines()]
    assert len(lines) > 8
    for program, *words in filter(None, lines):
        if program == "make":
            assert f"make {words[0]}\n" in ran + "\n", words
        elif program == "pip":
            assert words == ["install", "."] and "pip wheel wheel -q" in packaged, words
        elif program == "python":
            assert Path(words[0]).stem in {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}, words
        else:
            command: click.Command = main
            while words and isinstance(command, click.Group):
                command = command.commands[words.pop(0)]
            known = {option for parameter in command.params for option in parameter.opts}
            assert program == "pykernels" and {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", ["index", "backends", "drop_in", *ROOMS, "word2vec"])
def test_the_examples_of_the_guides_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a guide's; of another page the one that it begins with (those in its text are cut out of programs)."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("the king and the queen\na man and a woman\n" * 20)
    names: dict[str, object] = {}
    for block in blocks if page in ("index", "backends", "drop_in") else blocks[:1]:
        exec(compile(block, f"docs/{page}.md", "exec"), names)


def test_the_site_has_every_page_and_every_link_a_target() -> None:
    named = set(re.findall(r"^ .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages
    for page in pages:
        text = re.sub(r"```.*?```", "", (ROOT / "docs" / page).read_text(), flags=re.S)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (ROOT / "docs" / page).parent.joinpath(link).exists(), (page, link)


def test_the_tables_of_the_docs_are_the_records() -> None:
    outcome = subprocess.run(
        [sys.executable, "benchmarks/report.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout


def test_the_pictures_are_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name, drawn in importlib.import_module("pictures").pictures().items():
        assert (ROOT / "docs" / name).read_text() == drawn, f"{name}: run python benchmarks/pictures.py"
        page = (ROOT / "docs" / f"{name.rpartition('_')[0]}.md").read_text()
        assert f"]({name})" in page, f"no page shows {name}"
