"""Every example at toy size: trained with stock PyTorch and with pykernels from one start, the losses are the same."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pykernels.testing.text import Text, default_text
from pykernels.testing.training import train_both

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
TASKS = [(name, task) for name in SCRIPTS for task in vars(importlib.import_module(name)) if task.startswith("task")]


@pytest.fixture(scope="module")
def text() -> Text:
    """The first part of Python's own prose: real text, short enough to tokenise in no time."""
    whole = default_text()
    return Text(whole.source, whole.content[:60_000])


@pytest.mark.parametrize(("script", "task"), TASKS)
def test_trained_with_ours_as_with_stock_pytorch(text: Text, script: str, task: str) -> None:
    made = getattr(importlib.import_module(script), task)(text, small=True)
    once = made.batches(1)
    outcome = train_both(replace(made, batches=lambda steps: once * steps), 8)
    assert outcome.equal, (outcome.checks, outcome.first.why, outcome.gradient.why, max(outcome.differences))
    assert max(outcome.differences) < 1e-5
    assert (outcome.stock.evaluation is None) == (made.evaluate is None)
    if made.evaluate:
        assert outcome.ours.evaluation == pytest.approx(outcome.stock.evaluation, rel=1e-5)
    assert outcome.ours.losses[-1] < outcome.ours.losses[0], "one batch seen eight times was not learnt"


def test_a_script_runs_from_the_command_line(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A tale of two kernels and their gradients, told row by row.\n" * 200, encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "gpt.py"), "--small", "--steps", "2", "--text"]
    run = partial(
        subprocess.run, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    done = run([*command, str(book)])
    assert done.returncode == 0, done.stderr
    assert "GPT (" in done.stdout and "gradients at step 1: equal" in done.stdout and "DIFFERENT" not in done.stdout
    done = run([*command, str(tmp_path / "none.txt")])
    assert done.returncode == 2 and "cannot be read" in done.stderr


def test_word2vec_in_its_four_variants(text: Text) -> None:
    models = importlib.import_module("word2vec").train(text, size=16, epochs=3)
    assert len(models) == 4
    for name, model in models.items():
        assert model.losses[-1] < model.losses[0], name
    again = importlib.import_module("word2vec").train(text, size=16, epochs=3)
    assert all(torch.equal(models[name].vectors, again[name].vectors) for name in models)


def test_every_activation_learns_and_gradients_vanish_or_explode(text: Text) -> None:
    example = importlib.import_module("feed_forward")
    outcomes = []
    for activation in (*example.PLAIN, *example.GATED):
        made = example.with_activation(activation)(text, small=True)
        once = made.batches(1)
        outcomes.append(train_both(replace(made, batches=lambda steps, once=once: once * steps), 3))
        assert outcomes[-1].equal and outcomes[-1].ours.losses[-1] < outcomes[-1].ours.losses[0], activation
    ours, stock = (example.gradient_norms(text, True, kind) for kind in ("pykernels", "torch"))
    first_to_last = {name: values[0] / values[-1] for name, values in ours.items()}
    assert first_to_last["sigmoid"] < 1e-6 and first_to_last["relu, weights x2"] > 1e3
    assert all(1e-3 < first_to_last[name] < 1e3 for name in ("relu", "elu"))
    for name, values in ours.items():
        assert values == pytest.approx(stock[name], rel=1e-3)
    drawing = ElementTree.fromstring(example.plot(outcomes, text, True))
    assert sum(1 for e in drawing.iter() if e.tag.endswith("polyline")) == len(outcomes) + len(ours)


def test_requests_served_together_get_what_they_get_alone(text: Text) -> None:
    example = importlib.import_module("continuous_batching")
    model = example.trained(text, True, 10)
    requests = example.requests_for(model, text.characters().ids, 7)
    prompts = [list(request.tokens) for request in requests]
    server = example.Server(model, blocks=20, block_size=4, most=3)
    batches = list(server.run(requests))
    assert max(batches) == 3 and min(batches) < 3 and sorted(server.free) == list(range(20))
    assert len({tuple(request.blocks) for request in requests}) > 3 and len(requests[0].blocks) > 1
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.tokens == example.alone(model, prompt, request.wanted)
    with pytest.raises(ValueError, match="does not fit in the cache"):
        list(server.run([example.Request([1, 2], 500)]))


def test_gated_convolutions_see_no_later_character(text: Text) -> None:
    made = importlib.import_module("gated_conv").task(text, small=True)
    model, ((tokens, _),) = made.build(None), made.batches(1)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 7
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :20], after[:, :20]) and not torch.equal(before[:, 20:], after[:, 20:])


def test_adapters_start_as_nothing_and_leave_the_pretrained_weights(text: Text) -> None:
    example = importlib.import_module("fine_tune")
    made, plain = example.task_adapters(text, small=True), example.task_token(text, small=True)
    (batch,) = made.batches(1)
    models = []
    for task in (made, plain):
        torch.manual_seed(0)
        models.append(task.build(task.functions("torch")))
    adapted, whole = models
    assert torch.equal(adapted.body.vectors(*batch[:2]), whole.body.vectors(*batch[:2]))
    frozen = {name: value.clone() for name, value in adapted.body.named_parameters() if not value.requires_grad}
    assert frozen and {value.shape for value in frozen.values()} >= {value.shape for value in whole.body.parameters()}
    optimizer = made.optimizer(adapted)
    for _ in range(3):
        adapted(*batch).mean().backward()
        optimizer.step()
    now = dict(adapted.body.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(bool(layer.bottleneck[2].weight.count_nonzero()) for layer in adapted.body.layers)
