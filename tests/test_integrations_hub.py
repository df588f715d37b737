"""The package as a kernel repository, loaded by the Hugging Face `kernels` library in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
import kernels
from torch import nn

folder = Path(sys.argv[1])
assert "pykernels" not in sys.modules
kernel = kernels.get_local_kernel(folder)
assert str(folder) in kernel.package.__file__, kernel.package.__file__
assert kernels.get_loaded_kernels()[0].metadata.name.python_name == "pykernels"
torch.manual_seed(0)
gate, up = torch.randn(2, 5, 7).unbind()
expected = nn.functional.silu(gate) * up
torch.testing.assert_close(kernel.functional.swiglu(gate, up), expected)
torch.testing.assert_close(kernel.layers.SiluAndMul()(torch.cat([gate, up], -1)), expected)
print("backend", kernel.explain(kernel.functional.swiglu, gate, up).backend)
import pykernels
assert pykernels is kernel.package

class Activation(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x, approximate="tanh")

kernels.replace_kernel_forward_from_hub(Activation, "GeluTanh")
model = nn.Sequential(nn.Linear(4, 4), Activation())
x = torch.randn(3, 4, requires_grad=True)
before = model(x)
grad, = torch.autograd.grad(before.sum(), x)
repository = kernels.LocalLayerRepository(folder, layer_name="GeluTanh")
with kernels.use_kernel_mapping({"GeluTanh": {"cpu": repository}}):
    model = kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
assert model[1].forward.__func__ is kernel.layers.GeluTanh.forward
after = model(x)
torch.testing.assert_close(after, before)
torch.testing.assert_close(torch.autograd.grad(after.sum(), x)[0], grad)

from kernels.layer.layer import _validate_layer
for name in kernel.layers.__all__:
    _validate_layer(check_cls=Activation, cls=getattr(kernel.layers, name), repo=repository)
print("loaded")
"""


SPEC = importlib.util.find_spec("kernels")  # our folder of that name is no package: it has no file


@pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="the `kernels` library is not installed")
def test_loaded_by_the_kernels_library(tmp_path: Path) -> None:
    from pykernels.integrations import hub

    folder = tmp_path / "repository"
    where = hub.export(folder)
    assert where == hub.export(folder) == folder / "build" / hub.variant()  # again: replaced
    assert not list(where.rglob("_emulator_ext*")) and (where / "pykernels" / "_triton" / "activation.py").is_file()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout
    native = any(where.glob("pykernels/_cpu_ext*.so"))
    assert ("backend cpu" in done.stdout) == native, done.stdout
