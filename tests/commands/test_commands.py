"""The commands end to end on tiny models: what they write and say; bad input is answered in one message."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_dist.__main__ import COMMANDS
from fine_dist.__main__ import main as fine_dist
from fine_dist.artifacts.load import load_model
from fine_dist.core.arguments import parse
from fine_dist.core.config import load
from fine_dist.core.yaml_files import load_yaml
from fine_dist.model.artifact import load_artifact
from tests.commands.conftest import ARCH, data
from tests.conftest import inputs

ROOT = Path(__file__).resolve().parents[2]
FAST = [
    "--steps",
    "6",
    "--batch",
    "16",
    "--engine.log-every",
    "2",
    "--engine.eval-every",
    "3",
    "--engine.device",
    "cpu",
]


@pytest.fixture(scope="module")
def condensed(digit_shards, tmp_path_factory):
    """A finished condense run."""
    run = tmp_path_factory.mktemp("runs") / "condense"
    assert fine_dist(["condense", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(run), "--launcher", "here"]) == 0
    return run


@pytest.fixture(scope="module")
def trained(condensed, digit_shards):
    """A model trained from the condensed learngene."""
    run = condensed.parent / "train"
    argv = [
        "train",
        "--parent",
        str(condensed),
        *FAST,
        *data(digit_shards),
        "--run-dir",
        str(run),
        "--launcher",
        "here",
    ]
    assert fine_dist(argv) == 0
    return run


def test_condense_writes_a_learngene_that_names_its_making(condensed):
    artifact = load_artifact(condensed / "learngene", "learngene")
    assert artifact.method["name"] == "fine" and artifact.extra["steps"] == 6
    assert {"genes.qkv.U", "blocks.2.adaln.sigma", "final.linear.weight"} <= set(artifact.tensors)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "DONE.json", "checkpoints"):
        assert (condensed / name).exists(), name
    rows = [json.loads(line) for line in (condensed / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out_loss" in row for row in rows) and any("loss" in row for row in rows)


def test_the_saved_config_reloads_equal(condensed):
    from fine_dist.condense import CondenseConfig

    config = load(CondenseConfig, condensed / "config.yaml")
    assert config.arch.hidden_size == 32 and config.steps == 6
    assert parse(CondenseConfig, ["--config", str(condensed / "config.yaml")], "x").config == config


def test_tensorboard_has_the_curves_the_sigmas_and_the_samples(condensed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(condensed), size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    for word in ("loss", "lr", "images_per_s", "held_out_loss"):
        assert any(word in tag for tag in tags["scalars"]), (word, tags["scalars"])
    assert any("sigma" in tag for tag in tags["histograms"])
    assert any("samples" in tag for tag in tags["images"]) and any("sigma" in tag for tag in tags["images"])


def test_the_same_command_again_does_nothing(condensed, digit_shards, capsys):
    before = (condensed / "learngene" / "tensors.safetensors").stat().st_mtime_ns
    argv = ["condense", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(condensed), "--launcher", "here"]
    assert fine_dist(argv) == 0
    assert "finished before" in capsys.readouterr().out
    assert (condensed / "learngene" / "tensors.safetensors").stat().st_mtime_ns == before


def test_train_starts_where_the_merged_learngene_is_and_moves_away(condensed, trained):
    start, _ = load_model(condensed)
    end, about = load_model(trained)
    assert end.arch == start.arch and about["origin"] == load_artifact(condensed / "learngene").hash
    moved = [n for (n, a), b in zip(start.state_dict().items(), end.state_dict().values()) if not torch.equal(a, b)]
    assert len(moved) > 30


def test_export_of_a_learngene_computes_what_the_learngene_does(condensed, tmp_path, capsys):
    assert fine_dist(["export", "--model", str(condensed), "--out", str(tmp_path / "dense")]) == 0
    dense, _ = load_model(tmp_path / "dense")
    composed, _ = load_model(condensed)
    batch = inputs(dense.arch)
    assert torch.equal(dense(*batch), composed(*batch))
    assert fine_dist(["export", "--model", str(condensed), "--out", str(tmp_path / "dense")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_sample_writes_latents_labels_and_a_picture(trained, tmp_path):
    argv = ["sample", "--model", str(trained), "--run-dir", str(tmp_path), "--classes", "3", "7", "--per-class", "2"]
    argv += ["--sampler.steps", "4", "--launcher", "here"]
    assert fine_dist(argv) == 0
    latents = np.load(tmp_path / "samples.npy", allow_pickle=False)
    assert latents.shape == (4, 1, 8, 8) and np.isfinite(latents).all()
    assert np.load(tmp_path / "labels.npy").tolist() == [3, 3, 7, 7]
    from PIL import Image

    assert min(Image.open(tmp_path / "samples.png").size) >= 64


def test_evaluate_measures_several_models_beside_each_other(condensed, trained, digit_shards, tmp_path, capsys):
    from fine_dist.data.small_images import digits
    from fine_dist.evaluation.classifier import save_classifier, train_classifier

    parts = [torch.as_tensor(part) for split in ("train", "held_out") for part in digits(split)]
    save_classifier(tmp_path / "features", train_classifier(parts[0], parts[1], (parts[2], parts[3]), epochs=1))
    argv = ["evaluate", "--models", str(condensed), str(trained), *data(digit_shards), "--run-dir", str(tmp_path)]
    argv += ["--features", str(tmp_path / "features"), "--samples", "40", "--sampler.steps", "4", "--launcher", "here"]
    assert fine_dist(argv) == 0
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert [row["model"] for row in found["rows"]] == [str(condensed), str(trained)]
    distances = [row["scores"]["fd_classifier"]["value"] for row in found["rows"]]
    assert all(row["held_out_loss"] > 0 for row in found["rows"])
    assert min(distances) > found["floors"]["fd_classifier"] > 0
    assert "held-out loss" in capsys.readouterr().out


def test_decomposing_a_trained_ancestor_prints_the_error_it_leaves(trained, digit_shards, tmp_path, capsys):
    argv = ["condense", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "c"), "--launcher", "here"]
    argv += ["--method.initial", "decompose", "--ancestor", str(trained), "--loss.output", "0.5", "--method.rank", "96"]
    assert fine_dist(argv) == 0
    assert "relative error" in capsys.readouterr().out
    extra = load_artifact(tmp_path / "c" / "learngene").extra
    assert extra["ancestor"]["hash"] == load_artifact(trained / "model").hash
    assert max(extra["decomposition_error"]["qkv"]) < 0.1  # 96 = L x D components can hold every layer's own SVD


# --- dry runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")), ids=str)
def test_every_published_config_loads_and_dry_runs(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    named = {"benchmark": ["study", "--config"]}
    argv = named.get(path.parts[1], [path.parts[1], "--config"])
    assert fine_dist([*argv, str(ROOT / path), "--dry-run", "--launcher", "slurm"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "nothing was done" in out
    assert not list(tmp_path.iterdir())  # and nothing was
    assert load_yaml(ROOT / path)


def test_a_dry_run_counts_parameters_memory_and_work(capsys):
    assert fine_dist(["condense", "--arch", "DiT-S/2-L3", "--arch.num-classes", "7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "DiT-S/2-L3" in out and "num_classes: 7" in out
    for word in ("gene", "scaler", "TFLOP a step", "optimizer", "GiB", "compute paths"):
        assert word in out, word


# --- bad input: exit 2, one message, no traceback -------------------------------------------------------------------


def refused(argv: list[str], capsys) -> str:
    """The message of a command that must refuse."""
    try:
        code = fine_dist(argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, f"exit {code}: {err}"
    assert "Traceback" not in err
    return " ".join(err.split())


def condense_argv(shards: Path, run: Path, *more: str) -> list[str]:
    base = ["condense", *ARCH, *FAST, *data(shards), "--run-dir", str(run), "--launcher", "here"]
    return [*base, *more]


def test_missing_shards_are_named(tmp_path, capsys):
    assert str(tmp_path / "none") in refused(condense_argv(tmp_path / "none", tmp_path / "run"), capsys)


def test_no_shards_at_all_says_which_key(tmp_path, capsys):
    argv = ["condense", *ARCH, *FAST, "--run-dir", str(tmp_path / "run"), "--launcher", "here"]
    assert "data.shards" in refused(argv, capsys)


def test_a_half_written_shard_is_named(digit_shards, tmp_path, capsys):
    shutil.copytree(digit_shards, tmp_path / "d")
    shard = sorted((tmp_path / "d" / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert shard.name in refused(condense_argv(tmp_path / "d", tmp_path / "run"), capsys)


def rewrite_first(folder: Path, suffix: str, content: bytes) -> None:
    """Replace the first entry with this suffix in the first shard, and its size and hash in the manifest."""
    import hashlib
    import io

    shard = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        entries = [(info, tar.extractfile(info).read()) for info in tar]
    done = False
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, payload in entries:
            if not done and info.name.endswith(suffix):
                payload, done = content, True
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    manifest = json.loads((folder / "manifest.json").read_text())
    info = next(s for s in manifest["shards"] if s["name"] == shard.name)
    info["bytes"] = shard.stat().st_size
    info["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    info["key_prefix"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))


def npy(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".cls", b"12", ["label", "12"]),
        (".latent.npy", npy(np.full((1, 8, 8), np.nan, np.float16)), ["NaN"]),
        (".latent.npy", npy(np.zeros((1, 4, 4), np.float16)), ["4"]),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(suffix, content, words, digit_shards, tmp_path, capsys):
    shutil.copytree(digit_shards, tmp_path / "d")
    rewrite_first(tmp_path / "d" / "train", suffix, content)
    argv = condense_argv(tmp_path / "d", tmp_path / "run", "--steps", "120", "--batch", "64")  # an epoch is 24 steps
    message = refused(argv, capsys)
    assert ".tar" in message and all(word in message for word in words), message


def test_latents_of_another_shape_than_the_models_are_refused_before_training(digit_shards, tmp_path, capsys):
    message = refused(condense_argv(digit_shards, tmp_path / "run", "--arch.input-size", "16"), capsys)
    assert "1x8x8" in message and "1x16x16" in message


def test_more_classes_than_the_model_has_are_refused(digit_shards, tmp_path, capsys):
    message = refused(condense_argv(digit_shards, tmp_path / "run", "--arch.num-classes", "5"), capsys)
    assert "10 classes" in message


def test_a_learngene_that_was_edited_is_refused(condensed, digit_shards, tmp_path, capsys):
    shutil.copytree(condensed / "learngene", tmp_path / "learngene")
    file = tmp_path / "learngene" / "tensors.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(bytes(blob))
    argv = ["train", "--parent", str(tmp_path), *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "r")]
    assert "edited or half copied" in refused([*argv, "--launcher", "here"], capsys)


def test_another_architecture_than_the_starts_is_refused(condensed, digit_shards, tmp_path, capsys):
    argv = ["train", "--parent", str(condensed), *data(digit_shards), "--run-dir", str(tmp_path / "r")]
    file = tmp_path / "c.yaml"
    file.write_text("arch: DiT-S/2\n")
    assert "leave arch out" in refused([*argv, "--config", str(file), "--launcher", "here"], capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method.rank", "0"], "rank"),
        (["--arch.num-heads", "5"], "num_heads 5 does not divide"),
        (["--optim.lrr", "1"], "optim.lrr: unknown key"),
        (["--method.name", "scratch"], "scratch has no stage 1"),
        (["--method.initial", "decompose"], "--ancestor"),
    ],
)
def test_impossible_settings_are_refused(more, words, digit_shards, tmp_path, capsys):
    assert words in refused(condense_argv(digit_shards, tmp_path / "run", *more), capsys)


def test_a_run_directory_of_another_config_says_what_differs(condensed, digit_shards, capsys):
    message = refused(condense_argv(digit_shards, condensed, "--optim.lr", "0.5"), capsys)
    assert "optim.lr: 0.0001 there, 0.5 now" in message


def test_a_place_one_may_not_write_to_is_said(digit_shards, tmp_path):
    tmp_path.chmod(0o555)
    # root may write everywhere, unless it gives that power up first
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    argv = [*drop, sys.executable, "-m", "fine_dist", *condense_argv(digit_shards, tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    tmp_path.chmod(0o755)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "Permission denied" in done.stderr and "choose a place" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_command_or_flag_is_answered_with_the_right_one(name, capsys):
    assert f"'{name}'" in refused([name + "x"], capsys)
    importlib.import_module(f"fine_dist.{name.replace(chr(45), chr(95))}")


def test_the_list_of_commands_names_them_all(capsys):
    assert fine_dist([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_every_benchmark_that_is_listed_is_there():
    from benchmarks.__main__ import NAMES

    assert {"speed", "data", "fanout", "scale", "metrics", "sample", "creative"} <= set(NAMES)
    assert all(callable(importlib.import_module(f"benchmarks.{name}").run) for name in NAMES)
