"""pykernels as a kernel of the Hugging Face Hub: the folder that the `kernels` library loads.

    python -m pykernels.integrations.hub my-kernels

writes what is installed here as one build variant. Run it once for each torch and CUDA version into the same folder.
Then, here or wherever the folder was copied or uploaded to:

    kernel = kernels.get_local_kernel(Path("my-kernels"))
    kernel.functional.swiglu(gate, up)
    mapping = {"SiLU": {"cpu": kernels.LocalLayerRepository(Path("my-kernels"), layer_name="SiLU")}}

Our operators have one name in a process, so a process has one pykernels: the first that is imported, whichever way.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import torch

__all__ = ["export", "variant"]

_PACKAGE = Path(__file__).parents[2]


def variant() -> str:
    """The build variant of what is installed here, as the `kernels` library names it.

    With native code torch and CUDA versions count ("torch213-cxx11-cpu-x86_64-linux"), without it the device alone
    ("torch-cpu").
    """
    cuda = torch.version.cuda
    if not any(_PACKAGE.glob("_c*_ext.*so")):
        return "torch-cuda" if cuda else "torch-cpu"
    version = "".join(torch.__version__.split(".")[:2])
    device = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    return f"torch{version}-cxx11-{device}-{platform.machine()}-{platform.system().lower()}"


def export(folder: str | Path) -> Path:
    """Writes `folder/build/<variant>`: this package, an entry module and the metadata.

    Args:
        folder: the kernel repository; made where it does not exist. The variant is replaced, others stay.

    Returns:
        The variant's folder.
    """
    from ... import __version__

    where = Path(folder) / "build" / variant()
    shutil.rmtree(where, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "_emulator_ext*")
    shutil.copytree(_PACKAGE, where / "pykernels", ignore=left_out)  # _triton is a link in a checkout: what it shows
    shutil.copyfile(Path(__file__).parent / "entry.py", where / "__init__.py")
    metadata = {
        "id": f"pykernels_{__version__.replace('.', '_')}",
        "name": "pykernels",
        "version": int(__version__.split(".")[0]),
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda" if torch.version.cuda else "cpu"},
    }
    (where / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return where
