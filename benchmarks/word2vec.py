"""word2vec against gensim: words a CPU second, and what was learnt for them.

python benchmarks/word2vec.py                       print the table
python benchmarks/word2vec.py --json > benchmarks/results/cpu-word2vec.json

Both train the same sentences with the same options on one thread, in turns, from scratch in every round; the time is
the process's CPU time, without reading the text. Beside the speed stands the held-out loss of the last round's vectors,
over fixed pairs (and fixed negatives), so that speed is not bought with skipped work, and how many of the ten nearest
words of frequent words both agree on. Needs gensim. The text is the docstrings of all installed Python packages, or
--text FILE (a sentence a line).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from report import word2vec_table

from pykernels.testing import machine
from pykernels.testing.words import Sentences, measure


def docstrings() -> Sentences:
    """The prose of every installed Python file, each docstring once."""
    seen: set[str] = set()
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}:
        for path in sorted(Path(root).rglob("*.py")):
            try:
                tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            seen.update(d for node in ast.walk(tree) if isinstance(node, documented) and (d := ast.get_docstring(node)))
    parts = (part for text in sorted(seen) for part in re.split(r"[.!?]\s|\n\s*\n", text.lower()))
    found = (re.findall(r"[a-z]+(?:'[a-z]+)?", part) for part in parts)
    return [words for words in found if len(words) > 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a sentence a line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, help="only the first so many")
    parser.add_argument("--two-threads", action="store_true", help="wall time of two too; on an idle machine only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    text = [line.split() for line in options.text.read_text().splitlines()] if options.text else docstrings()
    report = lambda name: print(f"{name} ...", file=sys.stderr, flush=True)
    found = measure(text[: options.sentences], options.rounds, options.two_threads, step=report)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {"machine": machine.describe().as_dict(), "commit": commit, **found}
    print(json.dumps(record, indent=1) if options.json else word2vec_table(record))


if __name__ == "__main__":
    main()
