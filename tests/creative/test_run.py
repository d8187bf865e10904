"""A token's training on the engine: files, resuming, fan-out, what TensorBoard shows."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from fine_dist.core.config import load
from fine_dist.core.errors import FineDistError, ResumeLater, RunDirError, TrainingError
from fine_dist.creative import command as creative
from fine_dist.creative.config import CreativeConfig, Template
from fine_dist.creative.saving import read_token
from fine_dist.creative.training import train
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.launchers.code_snapshot import code_files
from fine_dist.launchers.prepare import make_specs
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import run_job
from tests.conftest import logged_losses
from tests.creative.conftest import TOKEN, tiny_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "creative"


def test_a_run_leaves_a_token_a_report_and_what_it_saw(tmp_path, encoders):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = creative.run(tiny_config(tmp_path / "run", steps=30))
    saved = read_token(folder)
    assert {key: tuple(row.shape) for key, row in saved.rows.items()} == {"clip_l": (1, 32), "clip_g": (1, 48)}
    facts = saved.manifest
    assert facts["encoder_sha256"] == {encoder.key: encoder.hash() for encoder in encoders}
    assert (facts["token"], facts["start"], facts["steps"], facts["seed"]) == (TOKEN, "creative", 30, 0)
    assert len(facts["held_out"]) == 27 and "own list of 60 nouns" in facts["word_list"]
    # what is saved is what was measured last, and what the last checkpoint holds
    done = json.loads((folder / "DONE.json").read_text())
    assert done["losses"]["held_out_cosine"] == pytest.approx(facts["cosines"]["the learned token"]["mean"], abs=1e-5)
    newest = CheckpointReader(folder / "checkpoints" / "step_00000030")
    assert torch.equal(newest.read_full("weight", "clip_l").view(2, 32)[:1], saved.rows["clip_l"])
    assert logged_losses(folder)[-1] < logged_losses(folder)[0]
    board = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/held_out_cosine", "train/norm_clip_l", "train/norm_clip_g"} <= set(
        board.Tags()["scalars"]
    )
    shown = [tag for tag in board.Tags()["tensors"] if tag.startswith("nearest/")]
    assert sorted(shown) == ["nearest/clip_g/text_summary", "nearest/clip_l/text_summary"]
    first = board.Tensors("nearest/clip_l/text_summary")[0].tensor_proto.string_val[0].decode()
    assert first.startswith("`creative` 0.") and len(first.splitlines()) == 5
    assert "the learned token" in (folder / "report.md").read_text()


def test_a_run_that_is_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "whole")
    whole = read_token(creative.run(config))
    stopped = config.model_copy(update={"run_dir": str(tmp_path / "stopped")})
    from fine_dist.creative import pairs

    draw = pairs.PairStream._draw

    def ask_to_stop(self, seed, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, seed, step)

    monkeypatch.setattr(pairs.PairStream, "_draw", ask_to_stop)
    with pytest.raises(ResumeLater, match=r"saved at step [56] of 8"):
        creative.run(stopped)
    assert not (tmp_path / "stopped" / "token").exists()
    monkeypatch.undo()
    again = read_token(creative.run(stopped))
    for key, row in whole.rows.items():
        assert torch.equal(again.rows[key], row) and torch.equal(again.control[key], whole.control[key])
    assert (
        logged_losses(tmp_path / "stopped") == logged_losses(tmp_path / "whole")
        and len(logged_losses(tmp_path / "whole")) == 8
    )


def test_a_token_is_not_saved_when_the_encoder_has_not_stayed_as_it_was(tmp_path, monkeypatch):
    from fine_dist.creative import training as room

    def meddling(program, **fields):
        fitted = fit(program, **fields)
        program.model.prompts_by_encoder[1].encoder.table[3] += 1e-3
        return fitted

    fit = room.fit
    monkeypatch.setattr(room, "fit", meddling)
    with pytest.raises(TrainingError, match="an encoder's weights changed"):
        creative.run(tiny_config(tmp_path, steps=1))
    assert not (tmp_path / "token").exists() and not (tmp_path / "DONE.json").exists()


def test_bf16_learns_nearly_the_same_token(tmp_path):
    """Autocast of the frozen encoder; the row, its moments and the cosines stay fp32."""
    whole = creative.run(tiny_config(tmp_path / "fp32", steps=20))
    engine = {**tiny_config(tmp_path).engine.model_dump(), "precision": "bf16"}
    half = creative.run(tiny_config(tmp_path / "bf16", steps=20, engine=engine))
    a, b = (read_token(folder).manifest["cosines"]["the learned token"]["mean"] for folder in (whole, half))
    assert a == pytest.approx(b, abs=0.02) and read_token(half).rows["clip_l"].dtype is torch.float32


def test_micro_batches_change_nothing(tmp_path):
    whole = read_token(creative.run(tiny_config(tmp_path / "whole")))
    engine = {**tiny_config(tmp_path).engine.model_dump(), "micro_batch": 1}  # the paper's batch 1, accumulated
    single = read_token(creative.run(tiny_config(tmp_path / "single", engine=engine)))
    for key, row in whole.rows.items():
        torch.testing.assert_close(single.rows[key], row, rtol=1e-5, atol=1e-5)


def test_several_seeds_and_templates_fan_out_packed_and_equal_runs_alone(tmp_path):
    """Through the job files and the worker that every launcher ends in."""
    templates = {"mix": {}, "blend": {"adaptive": "{token}, a creative blend", "restrictive": "an image of {t1} {t2}"}}
    config = tiny_config(tmp_path / "family", seeds=[0, 1], templates=templates, pack=3)
    tasks = creative.tasks(config)
    assert [task.rows for task in tasks] == [("mix-s0", "mix-s1", "blend-s0"), ("blend-s1",)]
    for spec in make_specs("fine_dist.creative.command", config, tasks):
        assert run_job(str(spec.save(tmp_path / "jobs" / f"{spec.name}.json"))) == 0
    assert {row.name: row.state for row in StateTable(tmp_path / "family").rows()} == dict.fromkeys(
        ("mix-s0", "mix-s1", "blend-s0", "blend-s1"), "done"
    )
    for key, template in templates.items():
        for seed in (0, 1):
            alone = read_token(creative.run(tiny_config(tmp_path / f"{key}-{seed}", seeds=[seed], template=template)))
            packed = read_token(tmp_path / "family" / f"{key}-s{seed}")
            assert packed.manifest["template"] == alone.manifest["template"] and packed.manifest["seed"] == seed
            for part in ("rows", "control"):
                for name, row in getattr(alone, part).items():
                    torch.testing.assert_close(getattr(packed, part)[name], row, rtol=1e-5, atol=1e-5)


def test_a_finished_family_is_left_alone_and_a_new_seed_is_added(tmp_path, capsys):
    config = tiny_config(tmp_path, seeds=[0, 1])
    creative.run(config)
    written = (tmp_path / "s0" / "token" / "manifest.json").stat().st_mtime_ns
    grown = config.model_copy(update={"seeds": (0, 1, 2)})
    assert [task.rows for task in creative.tasks(grown)] == [("s0", "s1"), ("s2",)]
    creative.run(grown)
    assert (tmp_path / "s0" / "token" / "manifest.json").stat().st_mtime_ns == written
    assert (tmp_path / "s2" / "token").is_dir() and "already finished" in capsys.readouterr().out
    assert [row.state for row in StateTable(tmp_path).rows()] == ["done"] * 3
    with pytest.raises(RunDirError, match=r"s0 was written with other settings:\n  steps: 8 there, 9 now"):
        creative.run(grown.model_copy(update={"steps": 9}))


def test_another_config_in_the_same_directory_is_refused(tmp_path):
    creative.run(tiny_config(tmp_path))
    with pytest.raises(RunDirError, match=r"max_cosine: 0.5 there, 0.3 now"):
        creative.run(tiny_config(tmp_path, max_cosine=0.3))
    creative.run(tiny_config(tmp_path, cache=False))  # how it is computed may change


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"template": {"adaptive": "a photo of a mixture"}}, r"template.adaptive: \{token\} is missing"),
        ({"template": {"adaptive": "a {token} {t3}"}}, r"\{t3\} is no placeholder; .*legal: t1, t2, token"),
        ({"template": {"restrictive": "a {t1}"}}, r"template.restrictive: \{t2\} is missing"),
        ({"template": {"adaptive": "a %Q {unknown} {token}"}}, r"\{unknown\} is no placeholder"),
        ({"template": {"adaptive": "a {token!z}"}}, r"template.adaptive: \{token\} takes no conversion"),
        ({"template": {"restrictive": "a {t1:%Q} {t2}"}}, r"template.restrictive: \{t1\} takes no conversion"),
        ({"template": {"restrictive": "a {t1:9999999999} {t2}"}}, r"template.restrictive: \{t1\} takes no conversion"),
        ({"template": {"adaptive": "a {token"}}, "template.adaptive: .*expected '}'"),
        ({"token": "my token"}, "token: .my token. is not one word"),
        ({"seeds": []}, "seeds: an empty list"),
        ({"seeds": [1, 1]}, "seeds: 1 is listed twice"),
        ({"seeds": [-1]}, r"seeds\.0: input should be greater than or equal to 0"),
        ({"encoders": []}, "encoders: an empty list"),
        ({"only": ["s7"]}, "only: no run is called 's7'"),
        ({"templates": {"a b": {}}}, "templates: a task name is"),
        ({"optim": {"clip_norm": 1.0}}, "optim.clip_norm: 1.0 would clip the rows of several runs"),
        ({"start": "creative mantis"}, "start: 'creative mantis' is not one token"),
        ({"token": "lettuce"}, "token: 'lettuce' is in the vocabulary"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key_and_writes_nothing_that_blocks_the_next(tmp_path, fields, words):
    from fine_dist.core.config import validate

    values = {**tiny_config(tmp_path / "run").model_dump(), **fields}
    with pytest.raises(FineDistError, match=words):
        creative.run(validate(CreativeConfig, values))
    if set(fields) <= {
        "start",
        "token",
    }:  # found only once the encoders are there: the directory is free for a mended config
        creative.run(tiny_config(tmp_path / "run", steps=1))


def test_the_published_configs_are_read_and_dry_run(capsys):
    sd3 = load(CreativeConfig, CONFIGS / "sd3.yaml")
    assert (sd3.steps, sd3.batch, sd3.optim.lr, sd3.optim.schedule, sd3.max_cosine) == (10_000, 16, 0.01, "cosine", 0.5)
    assert sd3 == CreativeConfig(run_dir=sd3.run_dir, launch=sd3.launch)  # the paper's settings are the defaults
    assert creative.main(["--config", str(CONFIGS / "tiny.yaml"), "--dry-run"]) == 0
    assert "4 rows of each encoder train in one batch, 300 steps of 16" in capsys.readouterr().out


def test_the_tiny_config_learns_in_seconds_and_beats_its_controls_on_pairs_it_never_saw(tmp_path):
    config = load(CreativeConfig, CONFIGS / "tiny.yaml").model_copy(update={"run_dir": str(tmp_path)})
    train(config)
    for seed in (0, 1):
        cosines = {
            what: values["mean"] for what, values in read_token(tmp_path / f"s{seed}").manifest["cosines"].items()
        }
        learned = cosines.pop("the learned token")
        assert len(cosines) == 4 and learned > max(cosines.values()) + 0.05, (learned, cosines)


def test_the_copy_of_the_code_that_a_cluster_runs_has_the_list_of_words():
    assert "fine_dist/creative/concepts.txt" in code_files("fine_dist.creative.command")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "one.csv").write_text("lettuce\nmantis\n")
    argv = ["--config", str(CONFIGS / "tiny.yaml"), "--launcher", "here", "--run-dir", str(tmp_path)]
    assert creative.main([*argv, "--pairs", str(tmp_path / "one.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "line 1: 1 column(s)" in said and len(said.splitlines()) == 1
    assert creative.main(["--evaluate", "x", "--images", "y"]) == 2
    assert "need each other and --evaluate" in capsys.readouterr().err
    assert creative.main([*argv, "--optim.clip-norm", "1"]) == 2
    assert "set it to none" in capsys.readouterr().err


@pytest.mark.parametrize(("clamp", "warned"), [(1e-6, True), (0.99, False)])
def test_a_loss_that_is_at_its_clamp_from_the_first_step_is_warned_about(tmp_path, caplog, clamp, warned):
    template = Template(adaptive="a {t1} {t2} {token}", restrictive="a {t1} {t2}")  # nearly the same prompt
    train(tiny_config(tmp_path / "run", steps=2, max_cosine=clamp, template=template))
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert ("the token will hardly move" in text and "raise --max-cosine above" in text) == warned
