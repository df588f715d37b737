"""Writes the tables of the docs from the committed measurements, so that no figure there is written by hand.

python benchmarks/record.py activation  take a record again
python benchmarks/report.py             write the tables
python benchmarks/report.py --check     exit 1 when a page's table is not the record's
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import summary

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("activation", "attention", "recurrent", "embedding", "sampled_softmax")
KNOWN = ("pykernels", "eager", "compile", "copy")
SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


def _cell(row: dict[str, Any], provider: str) -> str:
    timing = row["seconds"].get(provider)
    return f"{timing['median'] * 1e3:.2f}" if timing else "–"


def _beside(row: dict[str, Any]) -> str:
    """Two cells: torch eager with a tuned malloc, and its time over ours."""
    timing = row.get("beside", {}).get("eager, tuned malloc")
    if not timing or not row["correct"]:
        return " – | – |"
    return f" {timing['median'] * 1e3:.2f} | {timing['median'] / row['seconds']['pykernels']['median']:.2f} |"


def _products(record: dict[str, Any]) -> str:
    """The matrix products of the run's own limits."""
    flops = (record.get("limits") or {}).get("flops", {})
    rates = (f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in flops.items())
    return f", matrix product {', '.join(rates)}; the limit is whichever of the two a row is nearer to" if flops else ""


def _limited(row: dict[str, Any]) -> str:
    """Two cells: the rate of what bounds the row, with its share of the limit; and peak memory."""
    limit, peak = row.get("limit"), row.get("peak") or {}
    name, unit = (
        ("flops_per_second", "GFLOP/s") if limit and limit["bound"] == "products" else ("bytes_per_second", "GB/s")
    )
    rate = f"{row[name] / 1e9:.3g} {unit}, {limit['fraction']:.0%}" if limit else "–"
    sides = (peak.get(side) for side in ("pykernels", "eager"))
    peaks = " / ".join("–" if size is None else f"{size / 2**20:.1f}" for size in sides) if peak else "–"
    return f" {rate} | {peaks} |"


def table(record: dict[str, Any]) -> str:
    """Milliseconds by provider, and the best peer's time over ours with the spread of the rounds."""
    machine = record["machine"]
    lines = [
        f"{machine['cpu']} ({', '.join(machine['features'])}), torch {machine['torch']}, one thread, CPU time, medians "
        f"of interleaved rounds; copy bandwidth in the same run {record['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        f"{_products(record)}.",
        "",
        "| op | shape | dtype | direction | ours, ms | eager | torch.compile | copy of as many bytes "
        "| best peer / ours (p20–p80); other peers, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with_beside = any(row.get("beside") for row in record["rows"])
    if with_beside:
        lines[-2] = lines[-2].replace("copy of as many bytes", "copy of as many bytes (its time / ours)")
        lines[-2] += " eager, tuned malloc | tuned / ours |"
        lines[-1] += "---|---|"
    with_limits = any(row.get("limit") for row in record["rows"])
    if with_limits:
        lines[-2] += " rate, share of the limit | peak MiB, ours / eager |"
        lines[-1] += "---|---|"
    for row in record["rows"]:
        if not row["correct"]:
            ratio = "check failed: no speed"
        elif row["ratio"]:
            ratio = f"**{row['ratio']['median']:.2f}** ({row['ratio']['p20']:.2f}–{row['ratio']['p80']:.2f})"
        else:
            ratio = "–"
        others = {name: _cell(row, name) for name in row["seconds"] if name not in KNOWN}
        ratio += "".join(f"; {name} {time}" for name, time in others.items())
        providers = " | ".join(_cell(row, p) for p in KNOWN)
        if with_beside and row["fraction_of_copy_limit"]:
            providers += f" ({row['fraction_of_copy_limit']:.0%})"
        direction = SHORT.get(row["direction"], row["direction"])
        line = f"| {row['op']} | {row['shape']} | {row['dtype']} | {direction} | {providers} | {ratio} |"
        if with_beside:
            line += _beside(row)
        if with_limits:
            line += _limited(row)
        lines.append(line)
    # Hundreds of rows: closed until somebody wants them, so that the text around can be read.
    lines[2:2] = ['<details markdown="1">', f"<summary>Every row: {len(record['rows'])}</summary>", ""]
    lines += ["", "</details>"]
    if record.get("call_overhead"):
        lines += ["", "Cost of a call with next to nothing to compute, microseconds (ours / eager):", ""]
        lines += ["| op | no grad | forward with grad | forward + backward |", "|---|---|---|---|"]
        for op, kinds in record["call_overhead"].items():
            cells = []
            for kind in kinds.values():
                ours, eager = kind["pykernels"]["median"] * 1e6, kind["eager"]["median"] * 1e6
                cells.append(f"{ours:.1f} / {eager:.1f} ({ours - eager:+.1f})")
            lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sizes(row: dict[str, Any]) -> str:
    fixed = f"d = {row['width']}" if row["axis"] == "n" else f"n = {row['length']}"
    return f"{row['axis']} = {row['sizes'][0]} to {row['sizes'][-1]}, {fixed}"


def cost_table(record: dict[str, Any]) -> str:
    """A layer's cost by the book and its measured exponents; then the figures behind them."""
    machine = record["machine"]
    by_layer: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        by_layer.setdefault(row["name"], {})[row["axis"]] = row
    lines = [
        f"{machine['cpu']}, torch {machine['torch']}, one thread, float32, one sequence, forward and backward.",
        "",
        "| layer | called | cost | time, measured | memory, measured | serial steps | path between positions |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, axes in by_layer.items():
        n, d = axes["n"], axes["d"]
        powers = (f"n^{n[f'{what}_exponent']:.2f} d^{d[f'{what}_exponent']:.2f}" for what in ("time", "memory"))
        said = (n["call"], n["cost"], *powers, n["serial"], n["path"])
        lines.append(f"| {name} | `{said[0]}` | {' | '.join(said[1:])} |")
    lines += ["", "| layer | sizes | milliseconds | peak MiB above the inputs |", "|---|---|---|---|"]
    for row in record["rows"]:
        times = ", ".join(f"{t * 1e3:.3g}" for t in row["seconds"])
        peaks = ", ".join(f"{b / 2**20:.3g}" for b in row["peak_bytes"])
        lines.append(f"| {row['name']} | {_sizes(row)} | {times} | {peaks} |")
    return "\n".join(lines)


def word2vec_table(record: dict[str, Any]) -> str:
    """Words a CPU second against gensim, and what was learnt for them."""
    about, facts = record["machine"], record["text"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}; {facts['words']:,} words of English technical prose in "
        f"{facts['sentences']:,} sentences, vocabulary {facts['vocabulary']:,}, {facts['size']} columns, window "
        f"{facts['window']}, {facts['negatives']} negatives, one epoch; medians of {facts['rounds']} rounds in turns. "
        f"Turning words into ids, which we do once for all epochs, took {facts['encode_seconds']:.1f} s of CPU and is "
        "not in our time; gensim does it in every epoch, within its time.",
        "",
        "| variant | ours, k words a CPU second | gensim | ratio (p20-p80) | target | held-out loss, ours / gensim "
        "| neighbours shared | two threads, wall, ours / gensim | their held-out loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        speed, loss, both = row["words_per_cpu_second"], row["held_out_loss"], row["two_threads_wall_speedup"]
        ratio, target, shared = row["ratio"], row["target"], row.get("two_threads_held_out_loss")
        lines.append(
            f"| {row['variant']} | {speed['pykernels'] / 1e3:,.0f} | {speed['gensim'] / 1e3:,.0f} "
            f"| **{ratio['median']:.1f}** ({ratio['p20']:.1f}–{ratio['p80']:.1f}) | {target or '–'} "
            f"| {loss['pykernels']:.4f} / {loss['gensim']:.4f} | {row['neighbours_shared']:.2f} "
            f"| {'{pykernels:.2f}x / {gensim:.2f}x'.format(**both) if both else 'not measured'} "
            f"| {'{pykernels:.4f} / {gensim:.4f}'.format(**shared) if shared else 'not measured'} |"
        )
    return "\n".join(lines)


def patched_table(record: dict[str, Any]) -> str:
    """Training steps of patched models; then what patching and a call cost."""
    about, patch = record["machine"], record["patch"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}, one thread, float32, CPU time of a whole training step (forward, "
        "backward, optimizer), medians of interleaved rounds. Every row's losses and first gradients are equal by the "
        "rule of `pykernels/testing/compare.py`, checked in the same run.",
        "",
        "| model | size of a step | what is ours | stock, ms | ours, ms | stock / ours (p20–p80) "
        "| peak memory, stock / ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        times = (f"{row['seconds_a_step'][name] * 1e3:.1f}" for name in ("torch", "pykernels"))
        ratio = row["ratio"]
        speed = f"**{ratio['median']:.2f}** ({ratio['p20']:.2f}–{ratio['p80']:.2f})" if row["equal"] else "check failed"
        size = f"{row['shape']}" + (" (8x)" if row["size"] == "8x" else "")
        cells = (row["model"], size, row["ours"], *times, speed, f"{row['memory_ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"`patch` of a model of {patch['modules']} modules, half of them swapped: {patch['patch'] * 1e3:.1f} ms, "
        f"`unpatch` {patch['unpatch'] * 1e3:.1f} ms. What a step costs where there is next to nothing to compute "
        "(width 4, two tokens), and what the first step of a process costs:",
        "",
        "| model | modules swapped | step, stock / ours, µs | a swapped module adds, µs a step "
        "| first step, stock / ours, ms |",
        "|---|---|---|---|---|",
    ]
    for row in record["overhead"]:
        stock, ours = (row["seconds_a_step"][name] * 1e6 for name in ("torch", "pykernels"))
        first = (f"{row['first_step'][name] * 1e3:.1f}" for name in ("torch", "pykernels"))
        each = f"{(ours - stock) / row['swapped']:+.0f}"
        lines.append(f"| {row['model']} | {row['swapped']} | {stock:.0f} / {ours:.0f} | {each} | {' / '.join(first)} |")
    return "\n".join(lines)


def story_table(record: dict[str, Any]) -> str:
    """The story's trainings: both losses, whether they are equal, and the ratios."""
    about, steps = record["machine"], record["training_steps"]
    lines = [
        f"{about['cpu']}, torch {about['torch']}, one thread, float32; {steps} steps over the {record['text']}. The "
        "last loss is the mean of the last five. Time: CPU time of whole steps, medians of turns.",
        "",
        "| script | model | a step | first loss | last loss, stock / ours | equal | time, stock / ours (p20–p80) "
        "| peak memory, stock / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        first = row["losses"]["torch"][0]
        stock, ours = (fmean(row["losses"][side][-5:]) for side in ("torch", "pykernels"))
        speed = memory = "check failed"
        if row["equal"]:
            ratio, memory = row["ratio"], f"{row['memory_ratio']:.2f}"
            speed = f"**{ratio['median']:.2f}** ({ratio['p20']:.2f}–{ratio['p80']:.2f})"
        losses = f"{first:.3f} | {stock:.3f} / {ours:.3f} | {'yes' if row['equal'] else 'no'}"
        lines.append(f"| `{row['script']}.py` | {row['title']} | {row['shape']} | {losses} | {speed} | {memory} |")
    return "\n".join(lines)


def story_plot(record: dict[str, Any]) -> str:
    """The loss curves of the language models over characters, whose losses are of one kind."""
    sys.path.insert(0, str(ROOT / "examples"))
    from _curves import page, panel

    shown = ("lstm_lm", "gated_conv", "gpt", "prefix_lm")
    curves = {row["title"]: row["losses"]["pykernels"] for row in record["rows"] if row["script"] in shown}
    return page([panel(curves, "Loss of a character, natural logarithm", "step")])


TABLES = (
    *((f"{room}.md", f"cpu-{room}.json", table) for room in ROOMS),
    ("attention.md", "cpu-cost.json", cost_table),
    ("word2vec.md", "cpu-word2vec.json", word2vec_table),
    ("drop_in.md", "cpu-patched.json", patched_table),
    ("story.md", "cpu-story.json", story_table),
)


def _write(path: Path, new: str, check: bool, source: str) -> int:
    """Writes the file; or says that it is another, and returns 1."""
    if not check:
        path.parent.mkdir(exist_ok=True)
        path.write_text(new)
        return 0
    if path.exists() and path.read_text() == new:
        return 0
    print(f"{path.relative_to(ROOT)}: not what {source} says; run python benchmarks/report.py")
    return 1


def _summaries(check: bool) -> int:
    """Blocks made from several records, in any page that has their marks."""
    stale = 0
    for page in summary.PAGES:
        path = ROOT / page
        text = new = path.read_text()
        for name, write in summary.BLOCKS.items():
            begin, end = f"<!-- generated: {name} -->", "<!-- end of generated -->"
            if begin in new:
                before, rest = new.split(begin)
                new = f"{before}{begin}\n{write()}\n{end}{rest.split(end, 1)[1]}"
        if new != text:
            stale |= _write(path, new, check, "benchmarks/results")
    for name, plot in summary.growth_plots().items():
        stale |= _write(ROOT / "docs" / "growth" / name, plot, check, "benchmarks/results/cpu-scaling.json")
    return stale


def main(check: bool) -> int:
    stale = _summaries(check)
    for name, record, write in TABLES:
        source, page = ROOT / "benchmarks" / "results" / record, ROOT / "docs" / name
        begin, end = f"<!-- measured: benchmarks/results/{record} -->", "<!-- end of measured -->"
        if not source.exists() or not page.exists() or begin not in page.read_text():
            continue
        text = page.read_text()
        before, rest = text.split(begin)
        after = rest.split(end, 1)[1]
        new = f"{before}{begin}\n{write(json.loads(source.read_text()))}\n{end}{after}"
        if new != text:
            stale |= _write(page, new, check, str(source.relative_to(ROOT)))
    source, plot = ROOT / "benchmarks" / "results" / "cpu-story.json", ROOT / "docs" / "story.svg"
    drawn = story_plot(json.loads(source.read_text()))
    return stale | _write(plot, drawn, check, str(source.relative_to(ROOT)))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
