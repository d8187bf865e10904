"""Flow matching end to end: a SiT checkpoint is condensed, initialized, sampled, measured, exported and reloaded."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from fine_dist.artifacts.dit_pt import to_dit
from fine_dist.artifacts.load import load_model
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.artifact import read_manifest
from fine_dist.model.dit import DiT
from tests.commands.conftest import ARCH, FAST, command, data, refused
from tests.conftest import inputs, lively, tiny_arch

FLOW = ["--diffusion.process", "flow"]
HEADS = ["--hints.num-heads", "4"]


@pytest.fixture(scope="module")
def sit(tmp_path_factory):
    """A random checkpoint as SiT's training script writes it."""
    model = lively(DiT(tiny_arch(num_layers=3)), std=0.05)
    path = tmp_path_factory.mktemp("sit") / "0000100.pt"
    state = to_dit(model.arch, model.state_dict())
    torch.save({"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(model="SiT-S/2")}, path)
    return path


@pytest.fixture(scope="module")
def learngene(sit, digit_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("flow") / "condense"
    argv = ["condense", "--ancestor", str(sit), *HEADS, *FLOW, *FAST, *data(digit_shards), "--run-dir", str(run)]
    assert command([*argv, "--loss.output", "1", "--method.initial", "decompose", "--method.rank", "8"]) == 0
    return run


def test_a_sit_goes_through_every_stage_and_comes_back(learngene, digit_shards, tmp_path, capsys):
    init = ["init", "--parent", str(learngene), *FLOW, *data(digit_shards), "--run-dir", str(tmp_path / "i")]
    more = ["--depths", "2", "3", "--steps", "2", "--batch", "16", "--engine.device", "cpu"]
    assert command([*init, *more]) == 0  # a pack: both depths are one program
    target = next((tmp_path / "i").glob("L2*"))
    assert read_manifest(target / "target")["extra"]["diffusion"]["process"] == "flow"
    draw = ["sample", "--model", str(target), "--classes", "1", "2", "--per-class", "2", "--sampler.steps", "3"]
    for name in ("euler", "heun", "sde"):
        assert command([*draw, "--sampler.scheduler", name, "--run-dir", str(tmp_path / name)]) == 0
        assert np.isfinite(np.load(tmp_path / name / "samples.npy")).all()
    evaluate = ["evaluate", "--models", str(target), *data(digit_shards), "--run-dir", str(tmp_path / "e")]
    assert command([*evaluate, "--engine.device", "cpu"]) == 0
    [row] = json.loads((tmp_path / "e" / "evaluate.json").read_text())["rows"]
    done = json.loads((target / "DONE.json").read_text())
    assert row["held_out_loss"] == pytest.approx(done["held_out_loss"], rel=1e-4)
    for to, out in (("diffusers", tmp_path / "x"), ("dit", tmp_path / "x.pt"), ("fine_dist", tmp_path / "y")):
        assert command(["export", "--model", str(target), "--to", to, "--out", str(out)]) == 0
    before = load_model(target)[0]
    for out in (tmp_path / "x", tmp_path / "y"):
        after, about = load_model(out)
        assert DiffusionConfig.model_validate(about["diffusion"]) == DiffusionConfig(process="flow")
        torch.testing.assert_close(after(*inputs(after.arch)), before(*inputs(before.arch)), atol=1e-5, rtol=1e-5)


def test_a_run_of_another_process_than_its_parents_is_refused_with_the_remedy(
    learngene, sit, digit_shards, tmp_path, capsys
):
    where = [*data(digit_shards), "--run-dir", str(tmp_path / "r")]
    said = refused(["init", "--parent", str(learngene), *where, "--depths", "2", "--steps", "2"], capsys)
    assert "was trained with process flow" in said and "--diffusion.process flow" in said
    said = refused(["train", "--parent", str(sit), *HEADS, *FAST, *where], capsys)
    assert "--diffusion.process flow" in said
    wrong = [*FLOW, "--diffusion.direction", "data_to_noise"]
    said = refused(["train", "--parent", str(sit), *HEADS, *wrong, *FAST, *where], capsys)
    assert "--diffusion.direction noise_to_data" in said
    condense = ["condense", "--ancestor", str(sit), *HEADS, "--loss.output", "1", *FAST, *where]
    assert "--diffusion.process flow" in refused([*condense, "--method.initial", "decompose"], capsys)


def test_an_ancestor_that_is_only_imitated_may_predict_in_another_convention(sit, digit_shards, tmp_path):
    argv = ["condense", "--ancestor", str(sit), *HEADS, *FLOW, "--diffusion.direction", "data_to_noise", *FAST]
    argv += [*data(digit_shards), "--run-dir", str(tmp_path / "c"), "--method.initial", "joint", "--method.rank", "8"]
    assert command([*argv, "--loss.output", "1"]) == 0
    assert read_manifest(tmp_path / "c" / "learngene")["extra"]["diffusion"]["direction"] == "data_to_noise"


def test_both_processes_learn_digits(digit_shards, tmp_path):
    """The first and the last held-out loss of 60 steps of a tiny model, under each process."""
    for name, words in {
        "flow": FLOW,
        "v": ["--diffusion.prediction", "v", "--diffusion.zero-terminal-snr"],
    }.items():
        argv = ["train", *ARCH, *words, *data(digit_shards), "--run-dir", str(tmp_path / name), "--steps", "60"]
        argv += ["--batch", "32", "--optim.lr", "3e-3", "--engine.eval-every", "20", "--engine.device", "cpu"]
        assert command([*argv, "--sampler.steps", "2", "--engine.preview-every", "1000"]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--diffusion.process", "edm"], "diffusion.process: input should be 'ddpm' or 'flow' (got 'edm')"),
        (["--diffusion.process", "flow", "--diffusion.time-shift", "1000"], "time_shift: input should be less than"),
        (["--diffusion.process", "flow", "--diffusion.time-shift", "0"], "time_shift: input should be greater than"),
        (
            ["--diffusion.process", "flow", "--diffusion.prediction", "noise"],
            "prediction noise does not fit process flow; legal: velocity",
        ),
        (["--diffusion.zero-terminal-snr"], "zero_terminal_snr needs process ddpm and prediction v"),
        (["--diffusion.process", "flow", "--sampler.scheduler", "ddim"], "ddim"),
    ],
)
def test_what_is_no_process_is_one_line_from_the_command(flags, words, digit_shards, tmp_path, capsys):
    argv = ["train", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "r"), *flags]
    assert words in refused(argv, capsys)


def test_losses_of_models_of_both_processes_are_not_compared_without_a_word(
    sit, trained, digit_shards, tmp_path, capsys
):
    argv = ["evaluate", "--models", str(trained), str(sit), *HEADS, *data(digit_shards), "--engine.device", "cpu"]
    assert command([*argv, "--run-dir", str(tmp_path / "e")]) == 0
    assert "held-out losses of ddpm (noise) and flow (velocity) measure different things" in capsys.readouterr().out
