"""`benchmark gpu` on a machine without one: it says so; its parts, run for real on the CPU, become one file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fine_dist import benchmark
from fine_dist.benchmarks import gpu

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


def test_every_part_runs_and_one_that_fails_costs_its_own_rows_alone(tmp_path: Path, monkeypatch) -> None:
    cases = tmp_path / "test_cases.py"
    cases.write_text(TEST)
    words = ["--arch", "DiT-S/2-L1", "--batch", "1", "--quick"]
    programs = {
        "tests": gpu.tests_part(cases, "-c", "setup.cfg", "--rootdir", "."),
        "broken": gpu.benchmark_part("speed", "--arch", "DiT-Z/2"),
        "speed": gpu.benchmark_part("speed", *words, about="S: "),
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = gpu.run(programs)
    rows = {row.measure: row for row in found.rows}
    assert [rows[f"tests on the GPU: {what}"].value for what in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found.failed.keys() == {"tests", "broken"}
    assert "exit code 2" in found.failed["broken"] and "DiT-Z/2" in found.failed["broken"]
    assert "S: dense, bf16: images/s" in rows
    written = json.loads(json.dumps(found.as_json()))
    assert written["torch"] == torch.__version__ and written.keys() >= {"card", "driver", "cuda", "seconds"}
    assert len(written["rows"]) == len(found.rows) and set(written["seconds"]) == set(programs)


def test_the_parts_are_the_tests_both_sizes_and_packs() -> None:
    assert list(gpu.parts(quick=False)) == ["tests", "speed, DiT-B/2", "speed, DiT-XL/2", "fanout"]
    for name, part in gpu.parts(quick=False).items():
        if name != "tests":  # the commands' own parser takes the words
            command = [sys.executable, *part.words, "--help"]
            assert subprocess.run(command, cwd=gpu.ROOT, capture_output=True).returncode == 0, name


def test_sizes_are_the_speed_benchmarks_alone(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        benchmark.main(["fanout", "--arch", "DiT-B/2"])
    assert end.value.code == 2 and "the speed benchmark's" in capsys.readouterr().err
