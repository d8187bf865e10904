"""The demo: once in small, and over three seeds at its own settings (slow), with what of the promises holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.artifacts.targets import descend
from fine_dist.methods import from_manifest, parent_of
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import load_artifact
from fine_dist.model.flops import forward_macs
from fine_dist.study.report.results import read_results

ROOT = Path(__file__).resolve().parents[1]


def demo(run_dir: Path, *argv: str, timeout_s: int = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fine_dist", "demo", "--run-dir", str(run_dir), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_small_demo_leaves_a_report_and_the_same_command_again_trains_nothing(tmp_path):
    small = [
        "--depths",
        "1",
        "2",
        "--condense-steps",
        "8",
        "--init-steps",
        "4",
        "--train-steps",
        "5",
        "--samples",
        "20",
    ]
    run = tmp_path / "demo"
    first = demo(run, *small)
    for word in ("held-out accuracy", "condense-s0", "fine-L2-s0", "report.html", "What the method promises"):
        assert word in first.stdout, word
    page = (run / "report" / "report.html").read_text()
    assert "<svg" in page or "data:image/png" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained: nothing is fetched
    results = read_results(run / "report")
    assert {(row.method, row.target) for row in results.rows if row.stage == "train"} == {
        (m, d) for m in ("fine", "scratch", "copied_shell") for d in (1, 2)
    }
    assert results.classifier_accuracy >= 0.95
    ancestor = results.ancestors["fine"]
    assert ancestor.stored < ancestor.params
    for depth in (1, 2):  # 3N steps are the run of N steps, continued
        logs = [(run / f"scratch-L{depth}-n{n}-s0" / "metrics.jsonl").read_text() for n in (5, 15)]
        assert logs[1].startswith(logs[0]) and json.loads(logs[1].splitlines()[-1])["step"] == 15
    models = {p: p.stat().st_mtime_ns for p in run.glob("*/model/tensors.safetensors")}
    assert len(models) == 8
    check_costs(run)
    measured = {p: p.stat().st_mtime_ns for p in (run / "measures").iterdir()}
    # a loss and distances of eight trained models, two initialised ones and the ancestor; what is not trained
    assert len(measured) == 2 * 11 + 2
    demo(run, *small)
    assert measured == {p: p.stat().st_mtime_ns for p in (run / "measures").iterdir()}
    assert models == {p: p.stat().st_mtime_ns for p in run.glob("*/model/tensors.safetensors")}


def check_costs(run: Path) -> None:
    """Every cost of a row is steps x batch x the architecture's own arithmetic, stage by stage."""
    results = read_results(run / "report")
    arch = Arch.model_validate(json.loads((run / "scratch-L2-n5-s0" / "model" / "manifest.json").read_text())["arch"])
    dense = results.target_params[2]
    macs, large = forward_macs(arch), forward_macs(arch.with_depth(8))
    [initialised] = [row for row in results.at("fine", 2, 0) if row.stage == "init"]
    assert (initialised.steps_condense, initialised.steps_init, initialised.steps_train) == (8, 4, 0)
    # Stages 1 and 2 are counted as the method does: no weight has a gradient in stage 2, and factors cost something.
    parent = parent_of(load_artifact(run / "condense-s0" / "learngene"))
    method = from_manifest(parent.artifact.method)
    stage_2 = method.cost(descend(method, parent, arch, 0).model, 64).training
    assert initialised.samples == 4 * 64 and initialised.flops == 4 * 64 * stage_2 and 3 * macs < stage_2 < 8 * macs
    stage_1 = method.cost(parent.module.requires_grad_(True), 64).training
    assert initialised.samples_condense == 8 * 64 and initialised.flops_condense == 8 * 64 * stage_1
    assert 6.0 * large < stage_1 < 1.5 * 6.0 * large
    assert initialised.trained == 2 * 5 * 64  # sigma
    assert initialised.stored == 2 * 5 * 64 + 2 * 15 * 64 < dense  # and what else is not the learngene's: biases
    [trained] = results.at("fine", 2, 5)
    assert trained.flops == initialised.flops + 5 * 64 * 6.0 * macs and trained.stored == trained.trained == dense
    assert trained.seconds > initialised.seconds
    [longest] = results.at("scratch", 2, 15)
    assert longest.samples == 15 * 64 and longest.flops == 15 * 64 * 6.0 * macs and longest.steps_condense == 0
    [control] = results.at("copied_shell", 2, 5)
    assert control.steps_condense == 8 and control.steps_init == 0  # its parent's cost is counted to it as well


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_over_three_seeds_fine_is_better_than_scratch_at_equal_steps_each_at_its_own_rate(tmp_path):
    demo(tmp_path / "demo", "--seeds", "3", timeout_s=2900)
    found = json.loads((tmp_path / "demo" / "report" / "results.json").read_text())
    verdicts = {v["claim"]: v for v in found["verdicts"]}
    equal = verdicts["FINE is better than scratch at equal steps after initialisation"]
    held = [c["held"] for c in equal["comparisons"] if c["measure"] == "held_out_loss"]
    assert len(held) == 3 and all(held), equal
    # scratch after three times the steps is a claim of the paper that does not hold here: reported, not hidden
    assert "FINE after N steps is no worse than scratch after 3N" in verdicts
