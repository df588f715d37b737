"""Drops every synchronisation of the emulated kernels in turn and reports whether the tests notice.

    python tests/mutants.py [file ...]     # after PYKERNELS_BUILD=emulator python setup.py build_ext --inplace

Each barrier, wait, commit, fence and arrival of the files in SUBJECTS is replaced by an empty statement; the one object
file is compiled again, linked with those of the build, and the file's tests run on the result. Exits non-zero if a
mutant survives that is not in REDUNDANT. Not collected by pytest: about five seconds a mutant.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUGS, COLLECTIVES = "tests/test_emulator.py", "tests/test_emulator_collectives.py"
# with the suite's fixtures, which --noconftest leaves out; terms: sums over more than one piece
RECURRENT = ["tests/test_recurrent_kernels.py", "-p", "tests.conftest", "-k"]
LOOPS = [*RECURRENT, "emulator and lstm and (ragged or sixteen) or terms"]
CLUSTERS = ["tests/test_recurrent_cluster.py", "-p", "tests.conftest", "-k", "ragged or fits or registers"]

# on the emulator whatever the machine; one test for each path through a kernel
ATTENTION = ["tests/test_attention_cuda.py", "-p", "tests.conftest", "-k"]
TILES = [*ATTENTION, "differ or (masks_by_position and 64) or wide_heads or any_order"]

WARPGROUPS = ["tests/test_attention_sm90.py", "-p", "tests.conftest", "-k"]
FORWARD = [*WARPGROUPS, "masks_by_position and 64 or padding or any_order"]
GRADIENTS = [*WARPGROUPS, "gradients and 64 or packed_sequences and 64 or any_order"]

DECODE = ["tests/test_attention_decode.py", "-p", "tests.conftest", "-k", "emulator and (many_keys or parts_and)"]

SAMPLED = ["tests/test_sampled_kernels.py", "-p", "tests.conftest", "-k"]
SHARED = [*SAMPLED, "emulator and (chunks or wide)"]
DRAWS = ["tests/test_samplers.py", "-p", "tests.conftest", "-k", "emulator and (bitwise or any_size)"]

# file -> (the source to compile again, the tests that run its kernels)
SUBJECTS = {
    "csrc/emulator/selftest_attention.cu": ("selftest_attention.cu", [BUGS, "-k", "test_attention"]),
    "csrc/emulator/selftest_lstm.cu": ("selftest_lstm.cu", [BUGS, "-k", "test_lstm"]),
    "csrc/cuda/attention_dbias.cu": ("attention_dbias.cu", [*ATTENTION, "bias_over"]),
    "csrc/cuda/attention_decode.cu": ("attention_decode.cu", DECODE),
    "csrc/cuda/attention_dkdv.cu": ("attention_dkdv.cu", TILES),
    "csrc/cuda/attention_dq.cu": ("attention_dq.cu", TILES),
    "csrc/cuda/attention_forward.cu": ("attention_forward.cu", TILES),
    "csrc/cuda/attention_forward_sm90.cu": ("attention_forward_sm90.cu", FORWARD),
    "csrc/cuda/attention_sm90.h": ("attention_forward_sm90.cu", FORWARD),
    "csrc/cuda/attention_dkdv_sm90.cu": ("attention_dkdv_sm90.cu", GRADIENTS),
    "csrc/cuda/attention_dq_sm90.cu": ("attention_dq_sm90.cu", GRADIENTS),
    "csrc/cuda/attention_head.h": ("attention_forward.cu", TILES),
    "csrc/cuda/products.h": ("attention_dq.cu", TILES),
    "csrc/cuda/collectives.cu": ("collectives.cu", [COLLECTIVES, "-k", "ldmatrix or cp_async or grid_sync"]),
    "csrc/cuda/collectives_sm90.cu": (
        "collectives_sm90.cu",
        [COLLECTIVES, "-k", "wgmma or tma or cluster or multicast"],
    ),
    "csrc/cuda/recurrent_forward.cu": ("recurrent_forward.cu", LOOPS),
    "csrc/cuda/recurrent_backward.cu": ("recurrent_backward.cu", LOOPS),
    "csrc/cuda/recurrent_cluster_forward_sm90.cu": ("recurrent_cluster_forward_sm90.cu", CLUSTERS),
    "csrc/cuda/recurrent_cluster_backward_sm90.cu": ("recurrent_cluster_backward_sm90.cu", CLUSTERS),
    "csrc/cuda/recurrent_tile.h": ("recurrent_forward.cu", LOOPS),
    "csrc/cuda/sampled_softmax_draw.cu": ("sampled_softmax_draw.cu", DRAWS),
    "csrc/cuda/sampled_softmax_product.cu": ("sampled_softmax_product.cu", SHARED),
    "csrc/cuda/sampled_softmax_rows.cu": ("sampled_softmax_rows.cu", [*SAMPLED, "emulator and wide"]),
    "csrc/cuda/sampled_softmax_tiles.h": ("sampled_softmax_logits.cu", SHARED),
    "csrc/cuda/reduce.h": ("collectives.cu", [COLLECTIVES, "-k", "block_reductions or last_block"]),
}
SYNCHRONISATION = re.compile(
    r"\b(__syncthreads|__syncwarp|__threadfence|grid_sync|cp_async_commit|cp_async_wait<[^>]*>|named_barrier_\w+|mbar_\w+"
    r"|fence_proxy_async|cluster_(?:sync|arrive|wait)|wgmma_(?:fence|commit|wait<\d>)|tma_store_(?:commit|wait_read<\d>)|await|arrive)\([^;{]*\);"
)
# "file: statement" -> why it may be dropped
REDUNDANT = {
    "csrc/emulator/selftest_attention.cu: cp_async_wait<0>();": "the last group is empty: nothing is in flight",
}

RUN = """
import importlib.util, sys
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("pykernels._emulator_ext", {so!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["pykernels._emulator_ext"] = module  # before the package loads its own
import pytest
sys.exit(pytest.main(["-q", "-x", "--noconftest", "--rootdir", {root!r}, *{arguments!r}]))
"""


def build_folder() -> Path:
    folders = sorted(ROOT.glob("build/ninja-*/emulator"), key=lambda p: p.stat().st_mtime)
    if not folders:
        sys.exit("build the emulator first: PYKERNELS_BUILD=emulator python setup.py build_ext --inplace")
    return folders[-1]


def flags_of(objects: Path, unit: str) -> str:
    text = (objects.parent / "build.ninja").read_text()
    found = re.search(rf"^build emulator/{re.escape(unit)}\.o: cxx .*\n flags = (.*)$", text, re.MULTILINE)
    if found is None:
        sys.exit(f"the last build has no {unit}")
    return found.group(1)


def linked(objects: Path) -> list[Path]:
    """What the last build made the module of; the folder may hold objects of earlier ones."""
    text = (objects.parent / "build.ninja").read_text()
    found = re.search(r"^build \S*_emulator_ext\S*: link (.*)$", text, re.MULTILINE)
    if found is None:
        sys.exit("the last build has no emulator")
    return [objects.parent / name for name in found.group(1).split()]


def verdict(objects: Path, file: str, text: str, work: Path) -> str:
    unit, arguments = SUBJECTS[file]
    (work / file).write_text(text)
    source = next((work / "csrc").glob(f"*/{unit}"))
    flags = flags_of(objects, unit).replace(str(ROOT / "csrc"), str(work / "csrc")).replace("-Werror", "-w")
    mutant, so = work / "mutant.o", work / "mutant.so"
    subprocess.run(["g++", *flags.split(), "-c", source, "-o", mutant], check=True)
    others = [o for o in linked(objects) if o.name != f"{unit}.o"]
    subprocess.run(["g++", "-shared", *others, mutant, "-ldl", "-o", so], check=True)
    code = RUN.format(root=str(ROOT), so=str(so), arguments=arguments)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        sys.exit(run.stdout + run.stderr)
    if run.returncode == 0:
        return "survived"
    message = re.search(r"^E +(?:RuntimeError|AssertionError): (.*)", run.stdout, re.MULTILINE)
    return "killed: " + (message.group(1)[:150] if message else "?")


def main(files: list[str]) -> int:
    objects = build_folder()
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(ROOT / "csrc", work / "csrc")
        for file in files or SUBJECTS:
            original = (ROOT / file).read_text()
            for match in SYNCHRONISATION.finditer(original):
                if original.rfind("//", 0, match.start()) > original.rfind("\n", 0, match.start()):
                    continue  # in a comment
                line = original.count("\n", 0, match.start()) + 1
                mutated = original[: match.start()] + ";" + original[match.end() :]
                result = verdict(objects, file, mutated, work)
                redundant = REDUNDANT.get(f"{file}: {match.group(0)}")
                survivors += result == "survived" and redundant is None
                print(f"{file}:{line}: {match.group(0)[:48]:48s} {result} {redundant or ''}", flush=True)
            (work / file).write_text(original)
    print(f"{survivors} unexpected survivors")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
