"""Training loops of other packages, and torchrun, with patched models: the losses are those of the loops alone."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykernels.testing.text import Text, default_text

pytestmark = pytest.mark.xdist_group("transformers")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text() -> Text:
    whole = default_text()
    return Text(whole.source, whole.content[:60_000])


@pytest.mark.parametrize(
    ("example", "packages"),
    [("accelerate_llama", ("transformers", "accelerate")), ("lightning_lstm", ("lightning",))],
)
def test_a_training_loop_of_another_package(example: str, packages: tuple[str, ...], text: Text) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (pip install 'pykernels[integrations]')")
    train = importlib.import_module(example).train
    stock, ours = (train(text, steps=6, patched=patched) for patched in (False, True))
    assert len(ours) == 6 and ours == pytest.approx(stock, rel=1e-4)
    assert ours[-1] < ours[0]


@pytest.mark.skipif(sys.platform != "linux", reason="starts processes over gloo")
def test_torchrun() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "STEPS": "2", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "torchrun_gpt.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    module = importlib.import_module("torchrun_gpt")
    alone = module.train(module.prose(), 2)
    assert [float(loss) for loss in done.stdout.split()] == pytest.approx(alone, abs=2e-4)
    assert len(alone) == 2
