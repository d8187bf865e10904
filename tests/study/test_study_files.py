"""Files of studies: the benchmark of methods run once in small, and what the large ones would take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.methods import METHODS
from fine_dist.model.dit import DiT
from fine_dist.stages.train import with_fresh_shell
from fine_dist.study.command import main
from fine_dist.study.graph import plan
from fine_dist.study.report.__main__ import main as fill_in
from fine_dist.study.report.results import read_results
from fine_dist.study.report.tables import storage_of
from fine_dist.study.short_form import load_studies
from tests.conftest import lively, tiny_arch

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "benchmark"
pytestmark = pytest.mark.timeout(900)  # the quick cut is some seventy runs in one process
KEYS = {"method", "target", "seed", "steps", "held_out_loss", "fd_classifier", "stored", "trained", "flops"}
TRANSFERS = {"full", "scratch", "copied_shell", "difffit", "svdiff", "lora", "pissa", "oft", "boft", "vera", "kind",
             "kind_redraw", "fine"}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict]:
    """The quick cut of the digits' benchmark, in this process."""
    root = tmp_path_factory.mktemp("benchmark")
    argv = ["--config", str(CONFIGS / "digits.yaml"), "--quick", "--launcher", "here"]
    assert main([*argv, "--set", f"run_dir={root / 'run'}"]) == 0
    return root / "run", json.loads((root / "run" / "results.json").read_text())


def test_every_method_is_a_row_with_its_quality_and_its_costs(small):
    _, found = small
    assert all(row.keys() >= KEYS for row in found["rows"])
    depths = {row["method"]: row for row in found["rows"] if row["part"] == "depths"}
    classes = {row["method"]: row for row in found["rows"] if row["part"] == "classes"}
    assert classes.keys() == TRANSFERS
    studies = load_studies(CONFIGS / "digits.yaml")
    assert depths.keys() == {entry.name for entry in studies["depths"].rows}
    assert {entry.method["name"] for study in studies.values() for entry in study.rows} == set(METHODS)
    assert {row["steps"] for row in found["rows"] if row["method"] == "scratch"} == {3, 5, 6, 9}  # N, N+I, N+I+C/3, 3N
    # Everything behind a model is counted: stage 1, the ancestor that it imitates, and its forward passes.
    ancestor = depths["auto_lg"]["flops"] - depths["auto_lg"]["own_flops"]
    tleg = depths["tleg"]["flops"] - depths["tleg"]["own_flops"]
    assert depths["mimetic"]["flops"] == depths["mimetic"]["own_flops"] > 0
    assert tleg > 2 * ancestor and depths["tleg"]["steps_before"] == 4 and depths["auto_lg"]["steps_before"] == 2
    assert depths["fine"]["steps_init"] == 2 and depths["fine"]["own_flops"] > depths["tleg"]["own_flops"]
    # What trains in a transfer is little, and it is told.
    assert classes["vera"]["trained"] < classes["lora"]["trained"] < classes["full"]["trained"] / 2
    assert classes["difffit"]["own_flops"] < classes["full"]["own_flops"]


def test_a_fresh_shell_leaves_the_blocks_and_is_the_one_from_scratch():
    arch = tiny_arch()
    model, scratch = lively(DiT(arch)), DiT(arch, generator=torch.Generator().manual_seed(3))
    blocks = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("blocks.")}
    with_fresh_shell(model, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, blocks[name] if name in blocks else scratch.state_dict()[name]), name


def test_every_row_that_copies_a_shell_has_one_beside_it_that_does_not(small):
    run, found = small
    losses = {row["method"]: row["held_out_loss"] for row in found["rows"] if row["part"] == "depths"}
    added = [name for name in losses if name.endswith("_scratch_shell")]
    assert added == ["fine_scratch_shell", "tleg_scratch_shell"]
    assert all(losses[name] != losses[name.removesuffix("_scratch_shell")] for name in added)
    names = read_results(run / "depths" / "report").display_names
    assert names["tleg_scratch_shell"] == "TLEG, scratch shell"


def test_the_reports_hold_tables_verdicts_and_storage_for_n_models(small, tmp_path):
    run, found = small
    text = (run / "results.md").read_text()
    assert "| TLEG |" in text and "Numbers to keep for n initialized models" in text and "Verdicts:" in text
    page = (run / "report.html").read_text()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- x table: begin -->\n<!-- x table: end -->\n")
    report = str(run / "depths" / "report")
    picture = [report, "--figure", "curves", "--out", str(tmp_path / "curves.png"), "--series"]
    assert fill_in([*picture, "fine", "scratch"]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert fill_in([*picture, "nobody"]) == 2
    assert fill_in([report, "--into", str(readme), "--name", "x", "--table", "brief"]) == 0
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    losses = [float(row.split("|")[2].split("±")[0]) for row in rows[2:]]
    assert len(losses) > 25 and losses == sorted(losses)
    assert "learngene of KIND" in page  # its classes' samples, before and after
    assert "to classes 6-9" in page and "Storage" in page and "http" not in page.replace("http://www.w3.org", "")
    verdicts = {v["claim"]: v["verdict"] for v in found["verdicts"]["depths"]}
    assert len(verdicts) == 28
    words = {"held", "did not hold", "within noise", "held where measured"}
    assert set(verdicts.values()) <= {"not measured", *(f"{word} on one seed" for word in words)}
    assert verdicts["FINE is better than TLEG and TLEG than scratch"] != "not measured"
    kept = {part.series: part for part in storage_of(read_results(run / "depths" / "report"))}
    # sigma of five matrices and two layers, and the biases that are not a layer of the learngene's own
    assert 2 * 5 * 32 <= kept["fine"].own <= 2 * (5 + 15) * 32
    assert "tleg_scratch_shell" not in kept and len({k.label for k in kept.values()}) == len(kept)
    assert kept["tleg"].own == 0 and kept[""].shared == 0
    assert kept["fine"].total(10) == kept["fine"].shared + 10 * kept["fine"].own < kept[""].total(10)


def test_the_same_command_again_trains_nothing(small, capsys):
    run, _ = small
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/*/DONE.json")}
    argv = ["--config", str(CONFIGS / "digits.yaml"), "--quick", "--launcher", "here"]
    assert main([*argv, "--set", f"run_dir={run}"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("*/*/DONE.json")}
    assert "FINE is better than TLEG" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits", "fashion", "imagenet_b", "imagenet_l"])
def test_every_benchmark_is_planned_and_its_hours_are_told(name, capsys):
    assert main(["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    unit = "GPU-hours" if name.startswith("imagenet") else "core-hours"
    hours = [float(x) for x in re.findall(rf"([\d.e+]+) {unit}", told)]
    # Two parts, and the tuning that the config does not give: none of digits', one of fashion's. ImageNet is not tuned.
    assert len(hours) == {"digits": 2, "fashion": 3}.get(name, 1) and "dry run: nothing was done" in told
    least, most = {"digits": (0.3, 2.5), "fashion": (1, 5)}.get(name, (400, 3000))
    assert least < sum(hours) < most


def test_ancestors_are_trained_once_for_all_that_come_from_them():
    graph = plan(load_studies(CONFIGS / "digits.yaml")["depths"])
    names = [run.name for run in graph.runs]
    assert len(names) == len(set(names)) and names.count("ancestor-L8-s0") == 1
    assert sum(name.startswith("condense-") for name in names) == 3 * 12
    copied, fresh = (graph[f"{name}-L4-s0"].config for name in ("tleg", "tleg_scratch_shell"))
    assert (copied.shell, fresh.shell) == ("inherited", "scratch") and copied.parent == fresh.parent


def test_settings_are_changed_by_word(tmp_path):
    changes = ["seeds=[4]", "steps.N=7", f"run_dir={tmp_path}"]
    studies = load_studies(CONFIGS / "digits.yaml", changes)
    assert all(study.seeds == (4,) and study.steps["N"] == 7 for study in studies.values())
    assert studies["classes"].root == tmp_path / "classes" and studies["depths"].steps["C"] == 400
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        load_studies(CONFIGS / "digits.yaml", ["seeds"])
    with pytest.raises(ConfigError, match="part depths: step_: unknown key"):
        load_studies(CONFIGS / "digits.yaml", ["step_=3"])
