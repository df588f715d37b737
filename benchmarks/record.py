"""Takes committed records again, each with the command that belongs to it. Wants an idle machine.

python benchmarks/record.py                       all of them
python benchmarks/record.py recurrent scaling     some
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _room(name: str, *more: str) -> list[str]:
    return ["-m", "pykernels", "bench", name, "--device", "cpu", "--json", *more]


HALF = ("--dtype", "float32", "--dtype", "bfloat16")
COMMANDS = {
    "activation": _room("activation", *HALF, "--dtype", "float16", "--rounds", "7", "--seconds", "0.3"),
    "attention": _room("attention", *HALF),
    "recurrent": _room("recurrent", *HALF),
    "embedding": _room("embedding"),
    "sampled_softmax": _room("sampled_softmax", *HALF),
    "word2vec": ["benchmarks/word2vec.py", "--json", "--two-threads", "--sentences", "114000"],
    "cost": ["benchmarks/cost.py"],
    "patched": ["benchmarks/patched.py"],
    "scaling": ["benchmarks/scaling.py"],
    "story": ["benchmarks/story.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; default: all")
    names = parser.parse_args().names or list(COMMANDS)
    if unknown := set(names) - COMMANDS.keys():
        parser.error(f"no such record: {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    for name in names:
        start, before = time.monotonic(), os.times()
        done = subprocess.run([sys.executable, *COMMANDS[name]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        spent = os.times()
        cpu = sum(getattr(spent, kind) - getattr(before, kind) for kind in ("children_user", "children_system"))
        print(f"{name}: {time.monotonic() - start:.0f} s, {cpu:.0f} s of CPU", file=sys.stderr, flush=True)
        if done.returncode:  # the old record stays
            print(f"{name}: exit code {done.returncode}; its record is left as it was", file=sys.stderr)
            return done.returncode
        (RESULTS / f"cpu-{name}.json").write_text(done.stdout)
    return subprocess.run([sys.executable, "benchmarks/report.py"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
