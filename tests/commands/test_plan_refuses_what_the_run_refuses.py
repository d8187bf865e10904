"""`plan` and `--dry-run` refuse what the run refuses, in the same words: one function of checks for all three."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fine_dist.__main__ import main as fine_dist
from fine_dist.condense import main as condense
from fine_dist.init import main as init
from fine_dist.plan import main as plan
from fine_dist.sampling import drawing
from fine_dist.train import main as train
from tests.commands.conftest import data

SMALL = "{hidden_size: 32, num_layers: 2, num_heads: 4, patch_size: 2, in_channels: 1, input_size: 8, num_classes: 10, learn_sigma: false}"  # noqa: E501
CPU = ("--engine.device", "cpu", "--engine.threads", "1", "--steps", "4")
COMMANDS = {"condense": condense, "train": train, "init": init}
REFUSALS = [
    ("train", ("--arch", "{hidden_size: 32, num_layers: 2, num_heads: 4, in_channels: 4}"), "latents are 1x8x8"),
    ("train", ("--arch", SMALL.replace("num_classes: 10", "num_classes: 5")), "labels have 10 classes"),
    ("condense", ("--arch", SMALL.replace("input_size: 8", "input_size: 16")), "latents are 1x8x8"),
    ("condense", ("--arch", SMALL, "--batch", "10", "--engine.micro-batch", "3"), "3"),
    ("condense", ("--arch", SMALL, "--sampler.steps", "7", "--sampler.scheduler", "ddim"), "ddim needs a divisor"),
    ("condense", ("--arch", SMALL, "--sampler.scheduler", "heun"), "does not sample a model of process ddpm"),
    ("condense", ("--arch", SMALL, "--method.name", "scratch"), "has no stage 1"),
    ("condense", ("--arch", SMALL, "--loss.output", "1"), "give its folder with --ancestor"),
    ("condense", ("--arch", SMALL, "--engine.backend", "deepspeed", "--engine.deepspeed.stage", "1",
                  "--engine.deepspeed.offload-params"), "offload_params needs stage 3"),
    ("train", (), "give an architecture"),
    ("train", ("--arch", SMALL, "--seed", "1", "--run-dir", "OTHER"), "belongs to another run"),
    ("train", ("--arch", SMALL, "--run-dir", "CONDENSED"), "holds a 'condense' run"),
    ("train", ("--arch", SMALL, "--parent", "MISSING"), "MISSING"),
    ("init", ("--parent", "MISSING", "--depths", "1"), "MISSING"),
    ("init", ("--parent", "CONDENSED", "--depths", "0"), "greater than or equal to 1"),
    ("init", ("--parent", "CONDENSED", "--depths", "1", "1"), "listed twice"),
    ("init", ("--parent", "CONDENSED", "--depths", "1", "--arch", "DiT-S/2"), "hidden_size is 32 in the parent"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, digit_shards) -> dict[str, str]:
    """Run directories that hold a run of another seed, and of another stage; and one that is not there."""
    root = tmp_path_factory.mktemp("places")
    data = ("--data.shards", str(digit_shards / "train"), "--launcher", "here")
    assert train(["--arch", SMALL, *CPU, *data, "--batch", "8", "--run-dir", str(root / "OTHER")]) == 0
    assert condense(["--arch", SMALL, *CPU, *data, "--batch", "8", "--run-dir", str(root / "CONDENSED")]) == 0
    return {name: str(root / name) for name in ("OTHER", "CONDENSED", "MISSING")}


@pytest.mark.parametrize(("stage", "words", "said"), REFUSALS)
def test_a_refusal_of_the_run_is_one_of_the_plan_and_of_the_dry_run(
    places, digit_shards, tmp_path, capsys, stage, words, said
):
    words = [places.get(word, word) for word in words]
    words = ["--data.shards", str(digit_shards / "train"), *CPU, *words]
    words += [] if "--batch" in words else ["--batch", "8"]
    words += [] if "--run-dir" in words else ["--run-dir", str(tmp_path / "run")]
    before = sorted(str(path) for path in Path(places["OTHER"]).parent.rglob("*"))
    errors = {}
    for how, call in {
        "plan": lambda: plan(["--stage", stage, *words, "--launcher", "local"]),
        "dry run": lambda: COMMANDS[stage]([*words, "--launcher", "local", "--dry-run"]),
        "run": lambda: COMMANDS[stage]([*words, "--launcher", "here"]),
    }.items():
        code = call()
        out, err = capsys.readouterr()
        absent = how == "dry run" and said in (
            "MISSING",
            "give an architecture",
        )  # a dry run may be typed before the parent is made
        assert code == (0 if absent else 2), f"{how} ended with {code}: {out}\n{err}"
        errors[how] = out + err
        assert "Traceback" not in err
    for how, text in errors.items():
        assert re.search(re.escape(said), text), f"{how}: {text}"
    assert sorted(str(path) for path in Path(places["OTHER"]).parent.rglob("*")) == before
    assert not (tmp_path / "run" / "checkpoints").exists() and json


BASE = ["--arch", "DiT-B/2", "--arch.in-channels", "1", "--arch.input-size", "8", "--arch.num-classes", "10"]
BASE += ["--arch.no-learn-sigma", "--steps", "1", "--engine.device", "cpu"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--batch", "1000000"], "at 1000000 samples"),
        (["--batch", "8", "--engine.threads", "4096"], "engine.threads 4096"),
    ],
)
@pytest.mark.parametrize("stage", ["condense", "train"])
def test_what_is_far_beyond_this_machine_is_refused_at_once_and_by_the_dry_run(
    digit_shards, tmp_path, capsys, stage, more, words
):
    argv = [stage, *BASE, *more, *data(digit_shards), "--run-dir", str(tmp_path / "run"), "--launcher", "here"]
    for extra in ([], ["--dry-run"]):
        assert fine_dist([*argv, *extra]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert fine_dist([*argv[:-2], "--dry-run"]) == 0  # it may be for another machine
    assert f"note: {'DiT-B' if 'samples' in words else words}" in capsys.readouterr().out


def test_a_batch_of_a_family_or_of_samples_that_no_memory_holds_is_refused(digit_shards, tmp_path, capsys):
    family = [
        "init",
        "--method.name",
        "scratch",
        "--arch",
        SMALL,
        "--depths",
        "2",
        "--steps",
        "1",
        "--batch",
        "1000000",
    ]
    family += [*data(digit_shards), "--run-dir", str(tmp_path / "family")]
    for extra in (["--launcher", "here"], ["--launcher", "local"], ["--dry-run"]):
        assert fine_dist([*family, *extra]) == 2
        said = capsys.readouterr().err
        assert "batch 1000000: L2" in said and "lower batch" in said, said


def test_a_sampling_batch_beyond_memory_is_refused(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing, "memory_bytes", lambda: 2**20)
    argv = ["sample", "--model", str(trained), "--count", "4096", "--sampler.batch", "4096", "--engine.device", "cpu"]
    for extra in (["--launcher", "here"], ["--dry-run"]):
        assert fine_dist([*argv, "--run-dir", str(tmp_path / "s"), *extra]) == 2
        said = capsys.readouterr().err
        assert "sampler.batch 4096" in said and "lower it" in said
