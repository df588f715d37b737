"""The ahead-of-time lint: rules fail on planted bad kernels and pass on their twins; drift is seen; real kernels pass.

Triton is interpreted in this process, so whatever compiles does so in another one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pykernels.testing.aot import cuda, measure, roofline, rules, sass
from pykernels.testing.aot.rules import Row

ROOT = Path(__file__).parents[1]
PLANTED = str(ROOT / "tests" / "aot_planted.py")


def lint(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "pykernels.testing.aot", "--kind", "triton", "--jobs", "1", *arguments],
        env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> dict[str, list[dict]]:
    """Rows of the planted kernels by entry."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    result = lint("--entries", PLANTED, "--json", str(path))
    assert result.returncode == 1, result.stdout + result.stderr
    rows: dict[str, list[dict]] = {}
    for row in json.loads(path.read_text()):
        rows.setdefault(row["entry"], []).append(row)
        for fault in row["faults"]:
            assert f"FAIL  {row['entry']} | {row['kernel']} | sm_{row['target']}: {fault}" in result.stdout
    return rows


def test_good_kernels_keep_every_rule(planted):
    for name in ("good", "kept", "good matrix", "good tuned"):
        assert [row["faults"] for row in planted[name]] == [[]] * len(planted[name]), name


@pytest.mark.parametrize(
    "name, fault",
    [
        ("narrow", "no 128-bit loads and stores"),
        ("narrow", "16 accesses of 8 or 16 bits"),
        ("heavy", "instructions a byte, allowed 6.0"),
        ("spilling", "spills"),
        ("no tensor cores", "no HGMMA instructions"),
        ("crowded", "needed 5"),
        ("refused", "does not compile"),
        ("nothing", "launched no kernel"),
    ],
)
def test_a_planted_fault_is_named(planted, name, fault):
    assert any(fault in text for row in planted[name] for text in row["faults"])


def test_figures_of_a_kernel_whose_code_is_known(planted):
    (good,) = planted["good"]
    assert good["warps"] == 4 and good["grid"] == [977]
    assert (good["loads_128"], good["stores_128"], good["narrow"]) == (1, 1, 0)
    assert good["path"] < good["instructions"]  # the masked tail is left out
    assert good["instructions_per_byte"] == pytest.approx(good["path"] * 977 * 128 / 4000012)
    assert planted["spilling"][0]["spill_bytes"] > 0
    ampere, hopper = planted["good matrix"]
    assert (ampere["target"], hopper["target"]) == (80, 90)
    assert ampere["mma"] > 0 and hopper["mma"] > 0 and hopper["loop"] > 0
    assert hopper["mma_efficiency"] == 1.0 and 0 < hopper["roofline"] < 1


def test_an_autotuner_has_every_configuration_compiled(planted):
    assert [row["kernel"] for row in planted["good tuned"]] == ["tuned_kernel#0", "tuned_kernel#1"]


def test_the_lint_refuses_to_run_interpreted():
    result = lint(TRITON_INTERPRET="1")
    assert result.returncode == 2 and "unset it" in result.stderr


def test_a_real_kernel_is_gated_by_its_baseline(tmp_path):
    """Clean as it is; with a baseline that had fewer registers it fails with the row and the rule."""
    only = ("--only", "unary_forward gelu bfloat16 1024x4096", "--target", "90")
    made = tmp_path / "baseline.json"
    assert lint(*only, "--baseline", str(made), "--update-baseline").returncode == 0  # written, then compared
    document = json.loads(made.read_text())
    ((key, figures),) = document["rows"].items()
    document["rows"][key] = {**figures, "registers": figures["registers"] // 2}
    made.write_text(json.dumps(document))
    result = lint(*only, "--baseline", str(made))
    assert result.returncode == 1
    assert f"FAIL  {key}: registers {figures['registers'] // 2} -> {figures['registers']}" in result.stdout


def test_notes_of_serialised_wgmma_are_faults():
    """ptxas prints them above all its reports, as information; those of device functions count for the file."""
    text = (
        "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized in the "
        "function '_Z6secondv'\nptxas info    : (C7519) Potential Performance Loss: warpgroup.arrive is injected\n"
        "ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'\nptxas info    : Used 58 registers\n"
    )
    first, second = cuda.noted(text, ["_Z5firstv", "_Z6secondv"])
    assert ["C7519" in note for note in first] == [True] and ["C7518" in note for note in second] == [True]
    assert cuda.noted("ptxas info : Used 75 registers, 0 bytes C6500", ["_Z5firstv"]) == [[]]


ROW = Row("e", "k", 90, registers=100, instructions=1000, loop=200, shared=1024, spill_bytes=0, blocks=2, occupancy=0.5)
BEFORE = {ROW.key: {"registers": 100, "instructions": 1000, "loop": 200, "shared": 1024, "spill_bytes": 0}}


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"registers": 110}, None),
        ({"registers": 111}, "registers 100 -> 111"),
        ({"loop": 221}, "loop 200 -> 221"),
        ({"instructions": 1101}, "instructions 1000 -> 1101"),
        ({"spill_bytes": 4}, "spill_bytes 0 -> 4"),
        ({"registers": 10}, None),
        ({"kernel": "new"}, "has no baseline"),
    ],
)
def test_drift_of_more_than_a_tenth(change, fault):
    found = rules.drift(dataclasses.replace(ROW, **change), BEFORE)
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


@pytest.mark.parametrize(
    "change, rule, fault",
    [
        ({"shared": 300000}, rules.Rules(), "300000 bytes of shared memory"),
        ({"local_in_loop": 2}, rules.Rules(spill_bytes=64), "2 local-memory accesses in the hot loop"),
        ({"spill_bytes": 64}, rules.Rules(spill_bytes=64), None),
        ({"warnings": ["Potential Performance Loss: wgmma"]}, rules.Rules(), "Potential Performance Loss: wgmma"),
        ({"barriers": 1}, rules.Rules(barriers=0), "1 barriers, allowed 0"),
        ({"occupancy": 0.4}, rules.Rules(occupancy=0.5), "occupancy 0.40"),
        ({"mma_efficiency": 0.5}, rules.Rules(mma_efficiency=0.95), "0.50 of the matrix work"),
    ],
)
def test_rules_that_no_small_kernel_breaks(change, rule, fault):
    found = rules.check(dataclasses.replace(ROW, **change), rule)
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


CODE = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0  BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/             @!P1  LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0060*/             @!P1  STG.E.U16 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0070*/                   FFMA R1, R1, R1, R1 ;
        /*0080*/              @P2  BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_paths_and_loops_of_machine_code():
    (function,) = sass.parse(CODE)
    assert [i.base for i in function.full_path()] == ["S2R", "BRA", "LDG", "STG", "EXIT"]
    assert function.loops() == [(7, 8)] and [i.base for i in function.hot_loop()] == ["FFMA", "BRA"]
    assert sass.count(function.instructions)["LDG.16"] == 1
    (tail_only,) = sass.parse(CODE.replace(".128", ".U16"))
    assert sass.count(tail_only.full_path())["STG.16"] == 1


def test_a_kernel_that_is_only_a_trap_is_named():
    """What Triton 3.7 makes of float32 products from six bfloat16 ones for sm_100, without an error."""
    trap = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/                   BPT.TRAP 0x1 ;
.L_x_1:
        /*0020*/                   BRA `(.L_x_1) ;
"""
    for code, named in ((trap, True), (CODE, False)):
        row = Row("e", "k", 100)
        measure.from_function(row, sass.parse(code)[0], 4, 0, "")
        assert any("a trap" in fault for fault in rules.check(row, rules.Rules())) == named


def test_occupancy_is_limited_by_what_runs_out_first():
    assert sass.occupancy(90, 32, 0, 4) == (16, 1.0, "registers")
    assert sass.occupancy(90, 128, 0, 8) == (2, 0.25, "registers")
    assert sass.occupancy(90, 16, 100 << 10, 4) == (2, 0.125, "shared memory")
    assert sass.occupancy(80, 16, 0, 1) == (32, 0.5, "blocks")


LOOP = """
\t.section\t.text.kernel,"ax"
        /*0000*/ MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/ MUFU.EX2 R2, R3 ;
        /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/ @P0 BRA `(.L_x_2) ;
        /*0050*/ FSEL R3, R3, -INF , P1 ;
        /*0060*/ FSEL R4, R4, -INF , P1 ;
.L_x_2:
        /*0070*/ MUFU.EX2 R5, R6 ;
        /*0080*/ MUFU.EX2 R5, R6 ;
        /*0090*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/ MUFU.EX2 R5, R6 ;
        /*00b0*/ @P2 BRA `(.L_x_1) ;
        /*00c0*/ EXIT ;
"""


def test_exponentials_beside_a_product_are_counted_along_the_quick_path():
    (function,) = sass.parse(LOOP)
    assert len(function.hot_loop()) == 11 and len(function.hot_path()) == 9
    assert not any(i.base == "FSEL" for i in function.hot_path())
    assert roofline.beside(function.hot_path()) == 0.5
    row = dataclasses.replace(ROW, beside=0.5, overlapped=0.9)
    assert not rules.check(row, rules.Rules(beside=0.5, tensor_share=0.9))
    assert [f.split(" 0.")[0] for f in rules.check(row, rules.Rules(beside=0.6, tensor_share=0.95))] == [
        "tensor-core share where all overlaps", "exponentials beside a product"
    ]  # fmt: skip


def test_every_launch_of_the_contract_passes_the_compilers_front_end():
    """With the constants that a launch on a GPU has, of which the interpreter knows nothing: None, 1, flags."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "tests/aot_launches.py"], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0 and not report["faults"], report["faults"]
    assert report["never launched"] == ["check_ends_kernel"]  # it is in the lint
    assert report["launches"] > 1000 and sum(report["read"].values()) > 300
