"""The support matrix: which backend serves which function, and how that is checked. From the specs, never by hand.

python -m pykernels.testing.support                       print it
python -m pykernels.testing.support --write README.md     put it between the file's markers
python -m pykernels.testing.support --check README.md     exit 1 when the file's is another
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .spec import ROOMS, load

BEGIN, END = "<!-- support matrix: made by pykernels.testing.support -->", "<!-- end of support matrix -->"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def gpu_records() -> list[str]:
    """Names of the GPUs on which the whole contract has passed, by the committed records."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            continue
        tests = record.get("steps", {}).get("tests", {})
        if tests.get("exit_code") == 0:
            found.append(record["machine"]["gpu"])
    return sorted(set(found))


def matrix() -> str:
    """A Markdown table, a row for each public function."""
    gpus = gpu_records()
    on_gpu = f", {' and '.join(gpus)}" if gpus else ""
    how = {"cpu": "native", "triton": f"interpreted{on_gpu}", "cuda": f"emulated{on_gpu}"}
    lines = ["| room | function | reference | cpu | triton | cuda |", "|---|---|---|---|---|---|"]
    for room in ROOMS:
        served: dict[str, set[str]] = {}
        for spec in load(room):
            served.setdefault(spec.name, set()).update(spec.kernels)
        for name, kernels in sorted(served.items()):
            cells = [how[b] if b in kernels else "–" for b in ("cpu", "triton", "cuda")]
            lines.append(f"| {room} | `{name}` | native | {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(text: str) -> str:
    """The text with the matrix of today between the markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(matrix())
        return 0
    action, path = arguments[0], Path(arguments[1])
    text = path.read_text()
    new = replaced(text)
    if action == "--write":
        path.write_text(new)
        return 0
    if new != text:
        print(f"{path}: the support matrix is out of date; run python -m pykernels.testing.support --write {path}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
