"""Every launch that the contract makes, given to Triton's compiler as on a GPU; nothing runs.

    python tests/aot_launches.py                   the front end, on launches that show it something new (seconds)
    python tests/aot_launches.py --cubins 600      all launches to machine code for sm_90, for 600 seconds

Public functions are called with the cases of the contract on CPU tensors, and Triton itself specialises what kernels
are passed: None, integers equal to 1 and flags become constants, of which the interpreter knows nothing. So what it
lets pass and the compiler refuses is found: a method of an argument that became a constant, code behind a static
return, None or a constant returned from a function (Triton 3.6). Results are what torch.empty holds.

Prints a JSON object; exit code 1 where something does not compile or fits no multiprocessor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    triton.knobs.runtime.interpret = False  # kernels are compiled,
    os.environ["TRITON_INTERPRET"] = "1"  # and offered for CPU tensors all the same
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import pykernels.functional as pk  # noqa: E402
from pykernels.testing.aot.dryrun import FakeDriver, room  # noqa: E402
from pykernels.testing.aot.sass import DEVICES  # noqa: E402
from pykernels.testing.run import evaluate  # noqa: E402
from pykernels.testing.spec import load  # noqa: E402

TARGET = 90


class Reader:
    """Stands in for `JITFunction._do_compile`; `case` is what is running."""

    def __init__(self, cubins: float) -> None:
        self.deadline = time.monotonic() + cubins if cubins else None
        self.original = JITFunction._do_compile
        self.launches: set[Any] = set()
        self.facts: set[Any] = set()
        self.read: Counter[str] = Counter()
        self.faults: list[str] = []
        self.case = ""

    def __call__(
        self, kernel: JITFunction, key: str, signature: dict[str, Any], device: int, constants: dict[Any, Any],
        options: Any, attributes: Any, warmup: bool,
    ) -> None:  # fmt: skip
        if (kernel, key) in self.launches:
            return
        self.launches.add((kernel, key))
        facts = {(kernel, name, repr(kind)) for name, kind in signature.items()}
        # sizes of tiles are alike to the front end
        sizes = {path: "a size" if type(value) is int and value > 4 else value for path, value in constants.items()}
        facts |= {(kernel, path, repr(value)) for path, value in sizes.items()}
        if self.deadline is None and facts <= self.facts:
            return
        self.facts |= facts
        if self.deadline is not None and time.monotonic() > self.deadline:
            return
        name = kernel.fn.__name__
        self.read[name] += 1
        try:
            if self.deadline is None:
                self._front_end(kernel, signature, device, constants, options, attributes)
            else:
                compiled = self.original(kernel, key, signature, device, constants, options, attributes, warmup)
                most = DEVICES[TARGET].max_shared
                assert compiled.metadata.shared <= most, f"{compiled.metadata.shared} bytes of shared memory"
        except Exception as error:  # any failure of a compiler is a finding, whatever its class
            while error.__cause__ is not None:
                error = error.__cause__
            self.faults.append(f"{name} ({self.case}): {type(error).__name__}: {str(error).strip()[-400:]}")

    @staticmethod
    def _front_end(
        kernel: JITFunction, signature: Any, device: int, constants: Any, options: Any, attributes: Any
    ) -> None:
        _, _, target, backend, _ = kernel.device_caches[device]
        source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        source.make_ir(target, options, functions, modules, context)


def others() -> None:
    """Calls of what the contract's cases do not launch."""
    labels, ids, table = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.empty(4, 8200)
    for unique, classes in ((False, 1), (False, 9), (True, 1), (True, 9)):
        pk.log_uniform_candidate_sampler(labels, 1, 1, unique, classes, seed=1, backend="triton")
    pk.embedding_rowwise_adagrad_(table, torch.empty(4), ids, torch.empty(3, 8200), lr=0.1, backend="triton")
    q, ends = torch.empty(12, 2, 8, dtype=torch.float16), torch.tensor([0, 3, 12])
    pk.attention(q, q, q, cu_seqlens_q=ends, cu_seqlens_k=ends, backend="triton")


def kernels() -> set[str]:
    """Of all rooms: what is launched, by name."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"pykernels._triton.{path.stem}")
        found |= {n for n, value in vars(module).items() if isinstance(value, JITFunction) and n.endswith("_kernel")}
    return found


def read(only: str, dtypes: tuple[torch.dtype, ...], cubins: float) -> Reader:
    lib: Any = room("_lib")
    reader = Reader(cubins)
    JITFunction._do_compile = lambda self, *args, **named: reader(self, *args, **named)
    lib.unsupported_tensor, lib.interpreting = lambda x: None, lambda: False
    driver.set_active(FakeDriver(TARGET))
    with lib.override_device_properties(lib.DeviceProperties(TARGET, DEVICES[TARGET].sm_count)):
        for spec in load():
            for n, case in enumerate(spec.cases if "triton" in spec.kernels and only in spec.name else ()):
                for dtype in dtypes if cubins or n % 6 == 0 else dtypes[:1]:
                    reader.case = f"{spec.name}, {case.label}, {str(dtype)[6:]}"
                    evaluate(spec.function, case, case.make(dtype), backend="triton")
        if not only:
            reader.case = "others"
            others()
    return reader


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cubins", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--only", default="", metavar="NAME", help="operators whose name contains this")
    given = parser.parse_args()
    dtypes = (torch.float16, torch.float32, *((torch.bfloat16,) if given.cubins else ()))
    reader = read(given.only, dtypes, given.cubins)
    missed = sorted(kernels() - set(reader.read))
    report = {"triton": triton.__version__, "launches": len(reader.launches), "read": dict(reader.read)}
    print(json.dumps(report | {"never launched": missed, "faults": reader.faults}, indent=1))
    return 1 if reader.faults else 0


if __name__ == "__main__":
    sys.exit(main())
