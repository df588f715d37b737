"""What is made of a benchmark's record: targets, comparison, report, pytest-benchmark's form; limits and growth."""

from __future__ import annotations

import copy
import importlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pykernels.cli import _loglog, main
from pykernels.cli.bench import compare, exchange, page, take
from pykernels.testing import limits
from pykernels.testing.bench import Row
from pykernels.testing.spec import ROOMS, load
from pykernels.testing.step import Provider, Step, load_steps
from pykernels.testing.targets import TARGETS, result
from pykernels.testing.timing import Timing, one_thread

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"cpu-{name}.json").read_text())
    return found


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(name)


# limits


def test_limits_are_those_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MEMORY", 1 << 24)
    monkeypatch.setitem(limits._PRODUCTS, "cpu", (64,))
    found = limits.probe(seconds=0.01)
    assert found.read and found.copy and found.triad and found.first_touch
    assert set(found.flops) == {"float32", "bfloat16"} and min(found.flops.values()) > 1e8
    recorded, plain = (found.dispatch[f"torch operator{more}"] for more in (", recorded", ""))
    assert found.dispatch["torch operator in a Python autograd.Function"] > recorded > plain > 1e-8
    text = "\n".join(found.lines())
    assert "GB/s" in text and "GFLOP/s" in text and "microseconds" in text
    assert limits.Limits(**json.loads(json.dumps(found.as_dict()))) == found


def test_a_row_is_held_against_the_nearer_limit() -> None:
    row = Row("op", "1", "float32", "forward", "cpu", flops=10**9, moved=10**6)
    row.seconds = {name: Timing.of([t, t]) for name, t in (("pykernels", 0.02), ("eager", 0.03), ("copy", 0.001))}
    machine = limits.Limits("cpu", flops={"float32": 1e11})
    assert row.limited(machine) == ("products", pytest.approx(0.5)) and row.limited(None) == ("memory", 0.05)
    assert row.as_dict(machine)["limit"] == {"bound": "products", "fraction": pytest.approx(0.5)}
    assert row.as_dict(machine)["flops_per_second"] == pytest.approx(5e10)


# targets


def test_every_target_names_a_row_that_is_measured() -> None:
    plan = take.quick([spec for spec in load() if spec.bench], load_steps(), None)
    rows = {(job.name, str(job.dtype)[6:], way) for job in plan.jobs for way in job.directions}
    rows |= {(f"{step.name} {step.shape}", "float32", "step") for step in plan.steps}
    rows |= {(name, "float32", way) for name in plan.words for way in ("epoch", "two threads")}
    calls = {spec.name for spec in plan.calls}
    for target in TARGETS:
        name = f"{target.op} {target.shape}".strip()
        assert target.op in calls if target.of_call else (name, target.dtype, target.direction) in rows, target
    assert len(plan.jobs) < 45 and all(set(job.modes) <= {"default"} for job in plan.jobs)


def test_calls_of_one_name_are_timed_once() -> None:
    specs = [spec for spec in load("recurrent") if spec.bench]
    plan = take.everything(specs, [torch.float32], [], None)
    names = [take.label(spec) for spec in plan.calls]
    assert len(names) == len(set(names)) < len(specs) and all(spec.peer for spec in plan.calls)


def test_a_run_of_steps_and_words_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any, **options: Any) -> Any:
        raise ModuleNotFoundError("no gensim", name="gensim")

    def make() -> dict[str, Provider]:
        x = torch.ones(1 << 12)
        return {name: Provider(lambda: x.exp(), lambda: [x]) for name in ("pykernels", "eager")}

    monkeypatch.setattr(take.words, "measure", gone)
    monkeypatch.setattr(
        take, "probe", lambda device, seconds: limits.Limits(device, copy=1e10, flops={"float32": 1e11})
    )
    steps = [Step("s", "1", make, flops=lambda: 1 << 12), Step("fbgemm's", "1", gone)]
    found, rows = take.record(take.Plan([], steps, [], ["CBOW, negative sampling"]), take.Effort(5, 0.0), "cpu", None)
    first, second = json.loads(json.dumps(found))["rows"]
    assert (
        first["correct"]
        and first["limit"]["bound"] == "products"
        and first["peak"] == {"pykernels": 1 << 14, "eager": 1 << 14}
    )
    assert second["seconds"] == {} and second["failures"] == ["gensim is not installed"] and len(rows) == 2
    assert found["word2vec"] == {"rows": [], "failures": ["word2vec: gensim is not installed"]}


def test_every_page_that_explains_a_target_has_the_place() -> None:
    places = {target.page for target in TARGETS}
    for place in places | set(re.findall(r"\]\((\w+\.md#[\w-]+)\)", " ".join(t.why for t in TARGETS))):
        name, anchor = place.split("#")
        titles = re.findall(r"^#+ (.+)$", (ROOT / "docs" / name).read_text(), re.M)
        assert anchor in {re.sub(r"[^\w]+", "-", title.lower()).strip("-") for title in titles}, place


def test_a_target_is_met_missed_or_within_the_spread() -> None:
    target = next(t for t in TARGETS if t.op == "swiglu" and t.peer is None and t.ratio == 3.0)
    row: dict[str, Any] = {"op": "swiglu", "shape": "256x8192", "dtype": "float32", "direction": "forward+backward"}
    row |= {"correct": True, "best_peer": "compile", "ratio": {"median": 2.9, "p20": 2.5, "p80": 3.1}}
    assert result(target, {"rows": [row]}).verdict(target) == "within the spread"  # type: ignore[union-attr]
    row["ratio"] = {"median": 3.0, "p20": 2.5, "p80": 3.1}
    assert result(target, {"rows": [row]}).verdict(target) == "met"  # type: ignore[union-attr]
    row["ratio"] = {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert result(target, {"rows": [row]}).verdict(target) == "missed"  # type: ignore[union-attr]
    assert result(target, {"rows": [{**row, "correct": False}]}) is None, "a wrong kernel has no speed"


# comparison


def slower(found: dict[str, Any], op: str, factor: float) -> dict[str, Any]:
    """The record with one operator slower by a factor, its peers as they were."""
    changed = copy.deepcopy(found)
    for row in changed["rows"]:
        if row["op"] == op:
            for name in ("median", "p20", "p80"):
                row["seconds"]["pykernels"][name] *= factor
                row["ratio"][name] /= factor
    return changed


def test_a_loss_is_told_and_noise_is_not() -> None:
    old = record("attention")
    assert {change.verdict for change in compare.compare(old, old)} == {"same"}
    lost = compare.compare(slower(old, "attention", 1.6), old)
    named = {change.verdict: {c.row.split()[0] for c in lost if c.verdict == change.verdict} for change in lost}
    assert named == {"worse": {"attention"}, "same": {row["op"] for row in old["rows"]} - {"attention"}}
    assert (
        lost[0].factor == pytest.approx(1 / 1.6)
        and compare.compare(slower(old, "attention", 1.6), old, 0.5)[0].verdict != "worse"
    )
    wide = slower(old, "attention", 1.6)
    for row in wide["rows"]:
        row["ratio"]["p80"] *= 2  # of the noise, the better fifth is as good as before
    assert {change.verdict for change in compare.compare(wide, old)} == {"same"}
    assert {change.verdict for change in compare.compare(old, slower(old, "attention", 1.6))} == {"better", "same"}


def test_a_peer_that_is_missing_is_no_change_of_ours() -> None:
    old = record("sampled_softmax")
    new = copy.deepcopy(old)
    for row in new["rows"]:
        if row["best_peer"] == "eager" and "compile" in row["seconds"]:
            row["best_peer"] = "compile"
    new["rows"] = [row for row in new["rows"] if row["op"] != "nce_loss"]
    verdicts = {change.verdict for change in compare.compare(new, old)}
    assert verdicts == {"same", "gone"}


def test_compare_ends_with_1_where_something_was_lost(tmp_path: Path) -> None:
    old, new = RESULTS / "cpu-attention.json", tmp_path / "new.json"
    new.write_text(json.dumps(slower(record("attention"), "attention", 1.6)))
    same = run("bench", "--from", str(old), "--compare", str(old))
    assert same.exit_code == 0 and re.search(r"^\d+ same$", same.stdout), same.output
    lost = run("bench", "--from", str(new), "--compare", str(old))
    assert lost.exit_code == 1 and "worse" in lost.stdout and "window-1024x64" in lost.stdout
    assert run("bench", "--from", str(new), "--compare", str(old), "--threshold", "0.5").exit_code == 0
    assert run("bench", "--from", str(new), "--compare", str(old), "--absolute").exit_code == 1
    quiet = run("bench", "--from", str(new), "--compare", str(old), "--json")
    assert quiet.exit_code == 1 and json.loads(quiet.stdout)["rows"] and "worse" in quiet.stderr
    wrong = record("attention")
    wrong["rows"][0] |= {"correct": False, "seconds": {}, "ratio": None, "failures": ["out: error"]}
    new.write_text(json.dumps(wrong))
    assert run("bench", "--from", str(new), "--compare", str(old)).exit_code == 1


def test_a_loss_does_not_hide_behind_another_backend_or_missing_rows(tmp_path: Path) -> None:
    """A build that was forgotten serves by the reference; records without a common row are no pass."""
    old, new = RESULTS / "cpu-attention.json", tmp_path / "new.json"
    found = slower(record("attention"), "attention", 1.6)
    for row in found["rows"]:
        row["backend"] = "reference"
    new.write_text(json.dumps(found))
    lost = run("bench", "--from", str(new), "--compare", str(old))
    assert lost.exit_code == 1 and "gone" not in lost.stdout and "worse" in lost.stdout
    nothing = run("bench", "--from", str(RESULTS / "cpu-embedding.json"), "--compare", str(old))
    assert nothing.exit_code == 2 and "no row with a figure in common" in nothing.output
    alone = {**found, "rows": [{**row, "seconds": {"pykernels": row["seconds"]["pykernels"]}, "ratio": None,
                                "best_peer": None} for row in found["rows"]]}  # fmt: skip
    assert {change.verdict for change in compare.compare(alone, record("attention"))} == {"gone"}


@pytest.mark.parametrize("option", ["--from", "--compare", "--growth"])
@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("cpu-*.json")))
def test_every_committed_record_is_read_or_refused(name: str, option: str) -> None:
    """By one line, not by a traceback."""
    more = () if option == "--from" else ("--from", str(RESULTS / "cpu-embedding.json"))
    done = run("bench", option, str(RESULTS / f"{name}.json"), *more, "--json")
    readable = name == "cpu-scaling" if option == "--growth" else name.removeprefix("cpu-") in ROOMS
    assert isinstance(done.exception, (SystemExit, type(None))), done.exception
    assert readable or (done.exit_code == 2 and "not a record of" in done.stderr), done.output


@pytest.mark.parametrize(
    "arguments",
    [("--from", "{}", "--quick"), ("--quick", "--dtype", "float32"), ("--compare", "{}"), ("--compare", "no")],
)
def test_bench_refuses_options_that_do_not_go_together(arguments: tuple[str, ...], tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}" if "--compare" in arguments else '{"rows": []}')
    result = run("bench", *(part.format(empty) for part in arguments))
    assert result.exit_code == 2 and not result.stdout, result.output


# the report


class Tags(HTMLParser):
    """Every element that is opened is closed; nothing is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bad: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.bad += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href") or (v and ("nan" in v or "http" in v))]
        if tag in ("script", "link", "img"):
            self.bad.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_row_and_loads_nothing(tmp_path: Path) -> None:
    found = record("attention")
    found["limits"] = limits.Limits("cpu", 1e10, 1e10, 2e10, {"float32": 2e11, "bfloat16": 1e12}, 3e9).as_dict()
    for row in found["rows"]:
        row |= {"flops": 10**9, "flops_per_second": 1e9 / row["seconds"]["pykernels"]["median"], "room": "attention"}
    found["rows"][1] |= {"correct": False, "seconds": {}, "ratio": None, "op": "<b>&wrong", "flops_per_second": None}
    source, html = tmp_path / "found.json", tmp_path / "page.html"
    source.write_text(json.dumps(found))
    assert run("bench", "--from", str(source), "--html", str(html)).exit_code == 1, "a check failed"
    tags = Tags()
    tags.feed(html.read_text())
    assert not tags.bad and not tags.open
    assert tags.text.count("1 rows failed") == 1 and "<b>&wrong" in tags.text
    for row in found["rows"]:
        assert f"{row['op']} {row['shape']} {row['direction']}" in tags.text
    shown = html.read_text()
    assert shown.count('class="goal"') == sum(t.record == "attention" for t in TARGETS)
    assert shown.count("<circle") == len(found["rows"]) - 1 and shown.count("stroke-dasharray") >= 4


@pytest.mark.parametrize(
    "points", [[], [(1.0, 0.0)], [(1.0, 2.0)], [(1.0, 1e-9), (1e6, 1e12)], [(3.0, 5.0), (4.0, 5.0)]]
)
def test_loglog_plots_are_well_formed_whatever_the_values(points: list[tuple[float, float]]) -> None:
    curves = [_loglog.Curve("<a & b>", points), _loglog.Curve("dots", points, "c1", dots=True, titles=["<t>"])]
    root = ET.fromstring(_loglog.loglog(curves, "<label>", "x & y", "ms"))
    assert len(root.findall("circle")) == 2 * sum(y > 0 for _, y in points) and "nan" not in ET.tostring(
        root, "unicode"
    )
    ET.fromstring(_loglog.standalone_panels("a & b", "<c>", "<x>", [("ms", curves), ("MiB", curves)]))
    assert _loglog.key([*curves, *curves]).count("<span>") == 2


# pytest-benchmark


def test_pytest_benchmark_reads_a_run(tmp_path: Path) -> None:
    row = Row("op", "8x8", "float32", "forward", "cpu", moved=512, room="activation")
    samples = {"pykernels": [1e-6, 2e-6, 3e-6, 2e-6, 9e-6], "eager": [4e-6, 5e-6, 6e-6, 5e-6, 5e-6]}
    row.seconds = {name: Timing.of(found) for name, found in samples.items()}
    about = {**record("attention"), "limits": None, "datetime": "2026-01-01T00:00:00+00:00"}
    found = exchange.document([row], about)
    stats = {one["param"]: one["stats"] for one in found["benchmarks"]}
    assert stats["pykernels"]["median"] == 2e-6 and stats["pykernels"]["outliers"] == "1;1"
    assert stats["eager"]["rounds"] == 5 and stats["eager"]["iqr"] == 0 and stats["eager"]["hd15iqr"] == 5e-6
    path = tmp_path / "run.json"
    path.write_text(json.dumps(found))
    command = [Path(sys.executable).parent / "pytest-benchmark", "compare", str(path), "--group-by", "group"]
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "op 8x8 float32 forward" in done.stdout, done.stdout + done.stderr


class Benchmark:
    """What pytest-benchmark hands to a test."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.calls = "", {}, 0

    def __call__(self, function: Any) -> None:
        self.calls += 1
        function()


@pytest.mark.parametrize("room", ROOMS)
def test_pytest_benchmark_drives_every_room(room: str, script: Any) -> None:
    module = script(f"benchmark_{room}")
    rows = script("rows")
    mark = next(one for one in module.test_speed.pytestmark if "row" in one.args[0])
    chosen, names = [row for row, _ in mark.args[1]], [f"{rows._name(row)}-{way}" for row, way in mark.args[1]]
    assert mark.kwargs["ids"] == names and len(names) == len(set(names))
    assert all(spec.room == room for spec, _, _ in chosen)
    assert hasattr(module, "test_step") == bool(load_steps(room))
    if room == "activation":
        row = chosen[names.index("relu-32x4096-float32-forward")]
        for provider in ("pykernels", "torch"):
            benchmark = Benchmark()
            with one_thread():
                module.test_speed(benchmark, row, "forward+backward", provider)
            assert benchmark.calls == 1 and benchmark.group.endswith("forward+backward")
            assert benchmark.extra_info["bytes"] == 5 * 32 * 4096 * 4


# growth


def test_exponents_and_crossings(script: Any) -> None:
    scaling: ModuleType = script("scaling")
    sizes = [2**i for i in range(6)]
    assert scaling.fit(sizes, [5.0, 5.0, 5.0, *(s**2.0 for s in sizes[3:])]) == pytest.approx(2.0)
    assert scaling.fit(sizes, [1.0, None, None, None, None, 2.0]) is None
    (found,) = scaling.cross(sizes, [4.0] * 6, [1.0, 2.0, 3.0, 8.0, 16.0, None])
    assert found["then"] == "pykernels" and 4 < found["size"] < 8
    assert not list(scaling.cross(sizes, [1.0] * 6, [2.0] * 6))


def test_a_study_is_taken_and_drawn(script: Any) -> None:
    scaling: ModuleType = script("scaling")
    study = scaling.Study("s", "SwiGLU", "rows", "64 columns", (1, 2, 4), lambda n: scaling.swiglu(n, 64))
    found = json.loads(json.dumps(scaling.take(study, 0.0)))
    assert set(found["providers"]) == {"pykernels", "torch"} and found["sizes"] == [1, 2, 4]
    assert all(t > 0 for p in found["providers"].values() for t in (*p["seconds"], *p["peak_bytes"]))
    drawn = page.growth_card(found)
    assert drawn.count("<svg") == 2 and "rows" in drawn
    assert len({study.name for study in scaling.STUDIES}) == len(scaling.STUDIES)
    for name, of in (("torch", 2), ("pykernels", 2)):
        assert found["providers"][name]["seconds"][of] > 0
    assert torch.get_num_threads() >= 1


def test_every_record_has_its_command(script: Any) -> None:
    commands = script("record").COMMANDS
    assert {path.stem.removeprefix("cpu-") for path in RESULTS.glob("cpu-*.json")} <= set(commands)
    for command in commands.values():
        assert command[0] == "-m" or (ROOT / command[0]).exists()


def test_a_gpu_is_timed_on_shapes_that_fill_it() -> None:
    specs = [spec for spec in load() if spec.bench]
    plan = take.everything(specs, [torch.bfloat16], [], None, "cuda")
    labels = {(job.spec.name, job.case.label) for job in plan.jobs}
    assert {("lstm", "T1024-B16-H768"), ("swiglu", "8192x8192"), ("embedding_bag", "1Mx128-16384x20")} <= labels
    assert ("scaled_dot_product_attention", "full-8192x128") in labels
    assert all(job.case in job.spec.gpu_bench for job in plan.jobs if job.spec.gpu_bench)
