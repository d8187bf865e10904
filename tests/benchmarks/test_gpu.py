"""`benchmark gpu` on a machine without one: it says so; its parts, run for real on the CPU, become one file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import gpu
from benchmarks.rows import BenchmarkRow

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

TEST = """
import pytest
@pytest.mark.gpu
def test_good(): pass
@pytest.mark.gpu
def test_bad(): assert False
@pytest.mark.gpu
def test_absent(): pytest.skip("none")
def test_of_the_cpu(): assert False
"""


@NO_GPU
def test_without_a_gpu_it_says_so_writes_nothing_and_ends_with_2(tmp_path: Path, capsys) -> None:
    out = tmp_path / "gpu.json"
    assert benchmark.main(["gpu", "--json", str(out)]) == 2
    assert "no GPU is at hand" in capsys.readouterr().err and not out.exists()


def test_every_part_runs_and_one_that_fails_costs_its_own_rows_alone(tmp_path: Path) -> None:
    cases = tmp_path / "test_cases.py"
    cases.write_text(TEST)
    programs = {
        "broken": gpu.benchmark_part("speed", "--arch", "DiT-Z/2"),
        "tests": gpu.tests_part(cases, "-c", "setup.cfg", "--rootdir", "."),
    }
    found = gpu.run(programs)
    rows = {row.measure: row for row in found.rows}
    assert [rows[f"tests on the GPU: {what}"].value for what in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found.failed.keys() == {"tests", "broken"}
    assert "exit code 2" in found.failed["broken"] and "DiT-Z/2" in found.failed["broken"]
    assert found.as_json()["seconds"].keys() == programs.keys()


def test_what_was_found_becomes_one_file_without_the_hosts_name(tmp_path: Path, capsys) -> None:
    cases, out = tmp_path / "test_cases.py", tmp_path / "figures" / "gpu.json"
    cases.write_text(TEST.replace("assert False", "pass"))
    found = gpu.run({"tests": gpu.tests_part(cases, "-c", "setup.cfg", "--rootdir", ".")})
    assert benchmark.report(found, out, quick=True) == 0
    written = json.loads(out.read_text())
    assert written["torch"] == torch.__version__ and written.keys() >= {"card", "driver", "cuda", "versions", "seconds"}
    assert "machine" not in written and [row["value"] for row in written["rows"]] == [2, 0, 1]
    assert "tests on the GPU: passed" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["gpu.json"]  # nothing half-written lies beside it
    found.failed["speed"] = "exit code 1: out of memory"
    assert benchmark.report(found, out, quick=True) == 1 and json.loads(out.read_text())["failed"]
    assert "speed failed: exit code 1: out of memory" in capsys.readouterr().err


def test_all_parts_together_end_in_their_time_and_those_that_did_not_are_named() -> None:
    endless = gpu.Part(["-c", "import time; time.sleep(60)"], lambda path: [])
    begun = time.monotonic()
    found = gpu.run({"first": endless, "second": endless}, total_s=2.0)
    assert time.monotonic() - begun < 20
    assert (
        all("when the time for all parts was over" in said for said in found.failed.values()) and len(found.failed) == 2
    )


def test_the_rows_are_a_table_for_the_docs() -> None:
    rows = [BenchmarkRow("dense, compiled: MFU", 41.23456, "%", 40.0), BenchmarkRow("step", 0.5, "s", None, "lower")]
    assert gpu.markdown(rows).splitlines()[2:] == [
        "| dense, compiled: MFU | 41.23 % | at least 40 | met |",
        "| step | 0.5 s |  |  |",
    ]


@pytest.mark.slow
def test_the_rows_of_a_benchmark_run_for_real_are_taken_over_by_its_name() -> None:
    words = ["--arch", "DiT-S/2-L1", "--batch", "1", "--quick"]
    found = gpu.run({"speed": gpu.benchmark_part("speed", *words, about="S: ")})
    assert not found.failed
    assert {"S: dense, bf16: images/s", "S: dense, fp32: images/s"} <= {row.measure for row in found.rows}


def test_the_parts_are_the_tests_both_sizes_and_packs() -> None:
    assert list(gpu.parts(quick=False)) == ["tests", "speed, DiT-XL/2", "speed, DiT-B/2", "fanout"]
    for name, part in gpu.parts(quick=False).items():
        if name != "tests":  # the commands' own parser takes the words
            command = [sys.executable, *part.words, "--help"]
            assert subprocess.run(command, cwd=gpu.ROOT, capture_output=True).returncode == 0, name


def test_sizes_are_the_speed_benchmarks_alone(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["fanout", "--arch", "DiT-B/2"])
    assert end.value.code == 2 and "belong to the speed benchmark" in capsys.readouterr().err
