"""The machine and the versions that a result was obtained with."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX BF16",
}


@dataclass(frozen=True)
class Machine:
    """Versions and devices; `triton` and `cuda` are None where there are none."""

    python: str
    pykernels: str
    torch: str
    triton: str | None
    cuda: str | None
    system: str
    cpu: str
    features: tuple[str, ...]
    threads: int
    gpus: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: versions, then devices."""
        versions = [f"pykernels {self.pykernels}", f"torch {self.torch}", f"Python {self.python}"]
        versions += [f"triton {self.triton}"] if self.triton else []
        cpu = f"{self.cpu} ({', '.join(self.features) or 'no AVX2'}), {self.threads} threads"
        return [", ".join(versions), cpu, *self.gpus]


def describe() -> Machine:
    """This machine, now."""
    from .. import __version__

    name, features = _cpu()
    return Machine(
        python=platform.python_version(),
        pykernels=__version__,
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=name,
        features=features,
        threads=torch.get_num_threads(),
        gpus=tuple(_gpu(i) for i in range(torch.cuda.device_count())),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, tuple[str, ...]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        pass
    flags = set(fields.get("flags", "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(text for flag, text in _FEATURES.items() if flag in flags)


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
