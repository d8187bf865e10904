"""The demo: once in small, and over three seeds at its own settings (slow), with what of the promises holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.demo import main as demo_command
from fine_dist.model.arch import Arch
from fine_dist.model.flops import forward_macs
from fine_dist.study.report.results import read_results
from tests.conftest import in_process

ROOT = Path(__file__).resolve().parents[1]


def demo(run_dir: Path, *argv: str, timeout_s: int = 420) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fine_dist", "demo", "--run-dir", str(run_dir), *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.timeout(900)
def test_a_small_demo_leaves_a_report_and_the_same_command_again_trains_nothing(tmp_path):
    small = ["--steps", "A=8", "C=8", "I=4", "N=5", "--samples", "20"]
    run = tmp_path / "demo"
    first = demo(run, *small)
    for text in (
        "condense-s0",
        "fine-L2-s0",
        "of 1,280 scalers: loss",
        "pruned ancestor",
        "samples.png",
        "report.html",
    ):
        assert text in first.stdout, text
    # what a user gets comes first and the verdicts last, in six lines of prose beside the table
    assert first.stdout.index("scalers: loss") < first.stdout.index("held-out") < first.stdout.index("claims hold")
    assert (run / "report" / "samples.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report" / "report.html").read_text()
    assert "<svg" in page and "data:image/png" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained: nothing is fetched
    results = read_results(run / "report")
    trained = {(m.method, m.target) for m in results.measurements if m.stage == "train"}
    assert trained == {(m, d) for m in ("fine", "pruned", "scratch") for d in (2, 4)}
    # step 0 is drawn beside the later ones for every series, and for FINE also before stage 2
    drawn = {(p.series, p.step) for p in results.pictures if p.target == 4 and p.method}
    assert {("scratch", 0), ("pruned", 0), ("fine", 0), ("fine:untrained", 0), ("fine", 5), ("scratch", 15)} <= drawn
    ancestor = results.ancestors["fine"]
    assert ancestor.stored < ancestor.params
    models = {p: p.stat().st_mtime_ns for p in run.glob("*/model/tensors.safetensors")}
    assert len(models) == 1 + 2 * (1 + 1 + 3)
    check_costs(run)
    measured = {p: p.stat().st_mtime_ns for p in (run / "measures").iterdir()}
    # in this process and without workers, because nothing is left for them to do
    argv = ["--run-dir", run, *small, "--launcher", "here", "--parallel", "1"]
    again = in_process(demo_command, argv)
    assert again.returncode == 0, again.stdout + again.stderr
    assert measured == {p: p.stat().st_mtime_ns for p in (run / "measures").iterdir()}
    assert models == {p: p.stat().st_mtime_ns for p in run.glob("*/model/tensors.safetensors")}


def test_the_demo_runs_under_either_process():
    """Every run of it is trained for the process that is asked for, and drawn by a solver of that process."""
    from fine_dist.demo import DemoConfig, study_of
    from fine_dist.study.graph import plan

    assert study_of(DemoConfig()).stages["train"].get("diffusion") is None
    study = study_of(DemoConfig(diffusion={"process": "flow"}))
    assert "--diffusion.process flow" in study.command and study.sampler.scheduler == "auto"
    trained = [run.config for run in plan(study).runs if run.module != "fine_dist.encode"]
    assert len(trained) > 5 and {config.diffusion.process for config in trained} == {"flow"}
    assert {config.sampler.scheduler for config in trained if hasattr(config, "sampler")} == {"auto"}


def check_costs(run: Path) -> None:
    """Every cost of a measurement is what the runs recorded: steps x batch x the FLOPs of each stage."""
    results = read_results(run / "report")
    arch = Arch.model_validate(json.loads((run / "scratch-L2-n5-s0" / "model" / "manifest.json").read_text())["arch"])
    macs, dense = forward_macs(arch), results.target_params[2]
    ancestor = 8 * 64 * 6.0 * forward_macs(arch.with_depth(6))
    [initialized] = [m for m in results.at("fine", 2, 0) if m.stage == "init" and not m.variant]
    assert (initialized.steps_condense, initialized.steps_init, initialized.steps_train) == (8 + 8, 4, 0)
    # In stage 2 no weight has a gradient, and factors cost something; stage 1 includes the ancestor's forward passes.
    assert 4 * 64 * 3 * macs < initialized.flops < 4 * 64 * 8 * macs
    assert initialized.flops_ancestor == ancestor and initialized.flops_condense > 2 * ancestor
    assert initialized.trained == 2 * 5 * 64 and initialized.trained <= initialized.stored < dense
    [trained] = results.at("fine", 2, 5)
    assert trained.flops == initialized.flops + 5 * 64 * 6.0 * macs and trained.stored == trained.trained == dense
    [longest] = results.at("scratch", 2, 15)
    assert longest.samples == 15 * 64 and longest.flops == 15 * 64 * 6.0 * macs and longest.steps_condense == 0
    [pruned] = results.at("pruned", 2, 5)
    assert pruned.steps_condense == 8 and pruned.steps_init == 0 and pruned.flops_condense == ancestor


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_over_three_seeds_fine_is_better_than_scratch_at_equal_steps(tmp_path):
    demo(tmp_path / "demo", "--seeds", "3", timeout_s=2900)
    found = json.loads((tmp_path / "demo" / "report" / "results.json").read_text())
    verdicts = {v["claim"]: v for v in found["verdicts"]}
    equal = verdicts["FINE is better than scratch at equal steps after initialization"]
    held = [c["held"] for c in equal["comparisons"] if c["measure"] == "held_out_loss"]
    assert len(held) == 2 and all(held), equal
    assert "FINE is better than pruning the ancestor" in verdicts  # whichever way it goes, it is reported
