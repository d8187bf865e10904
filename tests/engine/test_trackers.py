"""A run is shown where its settings say, under one name, and by trackers that cannot end it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from fine_dist.core import retry
from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError, guard
from fine_dist.engine import dist, trackers
from fine_dist.engine.settings import LoopConfig
from fine_dist.engine.tracker_services import TensorBoardTracker
from fine_dist.engine.trackers import TrackedRun, Trackers, check_installed
from tests.engine.toy import ToyConfig, engine, toy_fit, toy_program

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"stage": "train", "lr": 0.1, "method.scope": None}
LOSSES = {"loss": 0.5, "loss_output": 0.2, "held_out_loss": 0.25, "raw_held_out_loss": 0.3}


def show(folder: Path, *names: str, step: int = 0) -> None:
    """A short run, from `step` to two steps later."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = Trackers(TrackedRun(folder, step, "steps: 4\nmodel: {depth: 2}\n"), names)
    for each in (step + 1, step + 2):
        shown.scalars(each, {"train/loss": 1 / each})
    shown.images(step + 2, {"samples": torch.full((1, 8, 8), 0.5)})
    shown.histograms(step + 2, {"sigma/qkv": torch.arange(4.0)})
    shown.texts(step + 2, {"nearest": "`word` <b>"})
    shown.finish(step + 2, SETTINGS, LOSSES)
    shown.close()


def test_a_name_a_list_and_none_are_settings_and_another_name_is_answered_with_the_legal_ones():
    assert validate(LoopConfig, {}).tracker == ("tensorboard",)
    assert validate(LoopConfig, {"tracker": "wandb"}).tracker == ("wandb",)
    assert validate(LoopConfig, {"tracker": ["tensorboard", "mlflow"]}).tracker == ("tensorboard", "mlflow")
    assert validate(LoopConfig, {"tracker": "none"}).tracker == ()
    with pytest.raises(ConfigError, match=r"tracker.*'tensorboard', 'wandb', 'mlflow'.*'tensorbord'"):
        validate(LoopConfig, {"tracker": "tensorbord"})


def test_an_absent_library_is_one_line_with_the_extra_to_install(monkeypatch, capsys):
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    assert guard(lambda: check_installed(["wandb"])) == 2
    assert "pip install 'fine_dist[wandb]'" in capsys.readouterr().err


def test_tensorboard_calls_a_run_by_its_folder_and_has_its_config_a_layout_and_a_row_of_the_table(tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    for stage in ("condense", "init", "train"):
        show(tmp_path / "runs" / stage, "tensorboard")
    boards = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert set(boards.Runs()) == {"condense", "init", "train"}
    for run in boards.Runs():
        tags = boards.GetAccumulator(run)
        assert tags.Scalars("final/held_out_loss")[0].value == pytest.approx(0.25)  # one name in every stage
        assert "_hparams_/session_end_info" in tags.summary_metadata
        text = tags.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.startswith("```yaml\nsteps: 4\n") and text.endswith("```")
        layout = tags.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
        assert b"held-out loss" in layout and b"train/loss_diffusion$" in layout
        assert tags.Tags()["images"] == ["samples"]


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: LevelDB's log format, in blocks of 32 KiB, after 7 bytes of their own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768  # a block's last bytes hold no header
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def test_wandb_offline_keeps_numbers_and_pictures_in_the_run_directory_and_a_resumed_run_is_the_same(
    tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    show(tmp_path / "run", "wandb")
    time.sleep(1.1)  # W&B names the files of a start by the second
    show(tmp_path / "run", "wandb", step=2)
    found: list[Record] = []
    until = time.monotonic() + 20  # W&B's own process writes the last records a moment after the run has ended
    while sum(record.HasField("exit") for record in found) < 2 and time.monotonic() < until:
        files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        found = [Record.FromString(data) for file in files for data in records(file.read_bytes())]
    ids, steps, final, config = set(), [], {}, {}
    for record in found:
        if record.HasField("run"):
            ids.add(record.run.run_id)
            config |= {item.key: item.value_json for item in record.run.config.update}
        values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "train/loss" in values:
            steps.append(record.history.step.num)
        final |= {item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update}
    assert len(ids) == 1 and sorted(steps) == [1, 2, 3, 4]
    assert json.loads(config["model"]) == {"depth": 2} and json.loads(final["final/held_out_loss"]) == 0.25
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/samples_*.png"))) == 2


def test_mlflow_keeps_numbers_settings_and_pictures_in_files_and_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    show(tmp_path / "runs" / "one", "mlflow")
    show(tmp_path / "runs" / "one", "mlflow", step=2)
    from mlflow.tracking import MlflowClient

    killed, family = (Trackers(TrackedRun(tmp_path, config=text), ["mlflow"]) for text in ("steps: 4", ""))
    killed.close()
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fine_dist").experiment_id
    other, run = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert other.info.status == "KILLED"  # it ended before it had finished
    family.close()  # a run that only shows a figure has no such end
    assert client.get_run(other.info.run_id).info.status == "FINISHED"
    assert run.info.run_name == "runs/one" and run.info.status == "FINISHED"
    assert run.data.params["stage"] == "train" and run.data.metrics["final/held_out_loss"] == 0.25
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id, "samples")}
    assert artifacts == {"samples/step_00000002.png", "samples/step_00000004.png"}


FAILING = """
class Broken:
    def __init__(self, run):
        self.file = open(run.folder / "shown", "a")
    def scalars(self, step, values):
        print(step, sorted(values), file=self.file, flush=True)
        if step == 2:
            raise ConnectionError("the server has gone")
    def images(self, step, images): ...
    histograms = texts = images
    def hparams(self, step, settings, final): ...
    def close(self): ...
"""
DRIVE = """
import sys
from pathlib import Path
from tests.engine.toy import ToyConfig, engine, toy_fit
result = toy_fit(Path(sys.argv[1]), ToyConfig(steps=4, engine=engine(log_every=1, tracker=["broken", "tensorboard"])))
print("STEPS", result.step, len(result.rows))
"""


def test_a_tracker_of_another_package_that_fails_is_left_out_and_the_run_ends_well(tmp_path):
    (tmp_path / "broken.py").write_text(FAILING)
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fine_dist.trackers]\nbroken = broken:Broken\n")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", DRIVE, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert "STEPS 4 4" in done.stdout, done.stderr
    assert done.stderr.count("tracker broken failed") == 1 and "the server has gone" in done.stderr
    assert len((tmp_path / "run" / "shown").read_text().splitlines()) == 2  # nothing after it failed
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))  # the other tracker was not disturbed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE, errno.EIO])
def test_events_that_cannot_be_written_are_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any, number: int
) -> None:
    def failing(self: Any, name: Any, content: bytes, mode: str) -> None:
        raise OSError(number, os.strerror(number), str(name))

    monkeypatch.setattr(LocalFileSystem, "_write", failing)
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))
    config = ToyConfig(steps=8, engine=engine(eval_every=2, preview_every=2))
    looks = {
        "previews": lambda model, step, budget: {"samples": torch.zeros(1, 8, 8)},
        "histograms": lambda model: {"sigma/qkv": torch.arange(4.0)},
    }
    fitted = toy_fit(tmp_path / "run", config, toy_program(config, dist.single_process("cpu"), **looks))
    assert fitted.step == 8 and [row["step"] for row in fitted.rows if "loss" in row] == list(range(1, 9))
    warnings = [record.getMessage() for record in caplog.records if "tensorboard" in record.getMessage()]
    assert len(warnings) == 1 and os.strerror(number) in warnings[0] and "metrics.jsonl" in warnings[0]
    assert "Traceback" not in capfd.readouterr().err


def test_events_go_on_in_a_new_file_when_the_storage_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))
    write, state = LocalFileSystem._write, {"fails": False}

    def failing(self: Any, name: Any, content: bytes, mode: str) -> None:
        if state["fails"]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(name))
        write(self, name, content, mode)

    monkeypatch.setattr(LocalFileSystem, "_write", failing)
    tracker = TensorBoardTracker(TrackedRun(tmp_path, step=10))
    for step in range(11, 17):
        tracker.scalars(step, {"loss": float(step)})
        state["fails"] = step == 13
        with contextlib.suppress(OSError):
            tracker.board.flush()
        state["fails"] = False
    tracker.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in seen.Scalars("loss")] == [11, 12, 14, 15, 16]
