"""The preflight: what it finds, and that a submission refuses what cannot work."""

from __future__ import annotations

import json

import pytest

from fine_dist.condense import CondenseConfig
from fine_dist.core.errors import LaunchError
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import EngineConfig
from fine_dist.launchers import preflight as preflight_module
from fine_dist.launchers.machine import local_capacity
from fine_dist.launchers.preflight import check_code_size, file_system, preflight, refuse
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.spec import Finding
from fine_dist.plan import main

CONDENSE = "fine_dist.condense"


def config(tmp_path, digit_shards, **fields) -> CondenseConfig:
    shards = {"data": DataConfig(shards=str(digit_shards / "train"))}
    return CondenseConfig(**{"run_dir": str(tmp_path / "run"), "steps": 100, "batch": 64, **shards, **fields})


def findings(made: CondenseConfig, **options) -> dict[str, Finding]:
    return {f.what: f for f in preflight(made, make_spec(CONDENSE, made, write=False), **options)}


def test_a_sound_job_has_no_objection_and_nothing_is_written(tmp_path, digit_shards):
    made = config(tmp_path, digit_shards)
    found = findings(made, capacity=local_capacity(make_spec(CONDENSE, made, write=False), many=False))
    assert {f.level for f in found.values()} <= {"ok", "note"}
    assert "1,500 samples" in found["data"].text and found["memory"].level == "ok"
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(tmp_path, digit_shards):
    found = findings(config(tmp_path, digit_shards, launch=LaunchConfig(processes=3)), light=True)
    made = config(tmp_path, digit_shards, launch=LaunchConfig(processes=3))
    stops = [f for f in preflight(made, make_spec(CONDENSE, made, write=False), light=True) if f.level == "stop"]
    assert "64 cannot be divided over 3" in stops[0].text and "63" in stops[0].text and found


def test_a_model_too_large_for_its_accelerator_is_refused_and_a_smaller_micro_batch_is_not(tmp_path, digit_shards):
    from fine_dist.model.arch import arch

    launch = LaunchConfig(gpus=1, processes=8, gpu_memory_gb=16)
    large = config(tmp_path, digit_shards, arch=arch("DiT-XL/2", input_size=32), batch=256, launch=launch)
    found = findings(large)["memory"]
    assert found.level == "stop" and "engine.micro_batch" in found.text
    smaller = large.model_copy(update={"engine": EngineConfig(micro_batch=4)})
    assert findings(smaller)["memory"].level == "ok"
    unknown = large.model_copy(update={"launch": LaunchConfig(gpus=1, processes=8)})
    assert findings(unknown)["memory"].level == "note"


def test_too_little_disk_is_refused(tmp_path, digit_shards, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda place: usage)
    assert findings(config(tmp_path, digit_shards))["disk"].level == "stop"


def test_hours_come_from_a_stated_rate_or_from_what_an_earlier_run_measured(tmp_path, digit_shards):
    made = config(tmp_path, digit_shards, steps=7200, launch=LaunchConfig(minutes=10, max_restarts=3))
    assert findings(made, light=True, rate=10)["time"].text.startswith("7,200 steps at 10 a second: 0.2 h, 1.2 times")
    assert findings(made, light=True, rate=1)["time"].level == "stop"
    assert "time" not in findings(made, light=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "steps_per_s": 4.0}\n{"step": 2, "lo')
    assert "at 4 a second: 0.5 h" in findings(made, light=True)["time"].text


def test_missing_shards_are_refused_before_anything_is_submitted(tmp_path, digit_shards):
    made = config(tmp_path, digit_shards, data=DataConfig(shards=str(tmp_path / "none")))
    assert findings(made, light=True)["missing"].level == "stop"
    from fine_dist.launchers.entry import launch

    with pytest.raises(LaunchError, match="no such folder of shards"):
        launch(CONDENSE, made.model_copy(update={"launch": LaunchConfig(processes=2)}), "local")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_objection_can_be_turned_into_a_warning(caplog):
    found = [Finding("disk", "stop", "too small"), Finding("data", "ok", "fine")]
    with pytest.raises(LaunchError, match="disk: too small"):
        refuse(LaunchConfig(), found)
    refuse(LaunchConfig(preflight="warn"), found)
    assert "disk: too small" in caplog.text


def test_code_too_large_to_upload_lists_its_largest_files():
    found = check_code_size({"a.py": 10, "big/data.json": 90 * 2**20, "mid.json": 20 * 2**20})
    assert found.level == "stop"
    lines = found.text.splitlines()[1:]
    assert [line.split()[-1] for line in lines] == ["big/data.json", "mid.json", "a.py"]


def test_the_type_of_a_file_system_is_told(tmp_path):
    assert file_system(tmp_path) == file_system(tmp_path / "not" / "there") != "an unknown file system"


def test_the_command_says_what_cannot_work_and_exits_with_2(tmp_path, digit_shards, capsys):
    words = ["--stage", "condense", "--run-dir", str(tmp_path / "run"), "--data.shards", str(digit_shards / "train")]
    assert main([*words, "--arch", "DiT-S/2", "--launcher", "local", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {f["what"] for f in found} >= {"data", "memory", "disk", "code"}
    assert main([*words, "--launch.processes", "7", "--launcher", "local"]) == 2
    assert "cannot be divided over 7 processes" in capsys.readouterr().out


def test_the_command_tells_the_stage_from_the_config(tmp_path, capsys):
    path = tmp_path / "condense" / "x.yaml"
    path.parent.mkdir()
    path.write_text(f"run_dir: {tmp_path}/run\nloss: {{output: 0.5}}\nancestor: models/none\n")
    assert main(["--config", str(path), "--launcher", "local"]) == 2
    assert "ancestor models/none does not exist" in capsys.readouterr().out
    other = tmp_path / "y.yaml"
    other.write_text(f"run_dir: {tmp_path}/run\nancestor: models/none\nancestor_licence: MIT\n")
    assert main(["--config", str(other), "--launcher", "local"]) == 2
    assert "data.shards is not set" in capsys.readouterr().out
    other.write_text("nonsense: 1\n")
    assert main(["--config", str(other)]) == 2
    assert "--stage" in capsys.readouterr().err
