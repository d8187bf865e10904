"""What is sent to a Ray cluster and read of its status, without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fine_dist.condense import CondenseConfig
from fine_dist.core.config import validate
from fine_dist.core.errors import LaunchError
from fine_dist.launchers import ray_cluster
from fine_dist.launchers.ray_jobs import submit_command, with_absolute_paths
from tests.cluster.toy_stage import ToyConfig


def test_relative_paths_of_a_ray_job_are_those_of_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "fine").mkdir()  # a folder that is called as a method is no path of it
    config = validate(
        CondenseConfig,
        {
            "run_dir": "/shared/run", "ancestor": "../models/dit.pt", "method": {"name": "fine"},
            "data": {"shards": "data/train", "held_out": "data/still-to-be-made"}, "vae": "stabilityai/sd-vae-ft-ema",
        },
    )  # fmt: skip
    made = with_absolute_paths(config)
    assert made.ancestor == str(tmp_path.parent / "models/dit.pt")
    assert made.data.shards == f"{tmp_path}/data/train" and made.data.held_out == f"{tmp_path}/data/still-to-be-made"
    assert (made.vae, made.method.name, made.run_dir) == ("stabilityai/sd-vae-ft-ema", "fine", "/shared/run")
    home = config.model_copy(update={"ancestor": "$MODELS/dit.pt"})
    assert with_absolute_paths(home).ancestor == "$MODELS/dit.pt"  # the cluster expands it


def test_a_relative_run_dir_is_refused_before_anything_is_submitted_with_the_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match=rf"run_dir 'runs/a'.*such as {Path.cwd()}/runs/a if the cluster mounts it"):
        submit_command("tests.cluster.toy_stage", ToyConfig(run_dir="runs/a"), "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("types", "grows"),
    [
        ({"node_" + "0f" * 28: 1, "node_" + "a1" * 28: 1}, False),  # Ray's monitor on a cluster that nobody scales
        ({"ray.head.default": 1, "ray.worker.gpu": 2}, True),
        ({"headgroup": 1}, True),
    ],
)
def test_a_cluster_grows_if_its_node_types_have_names_of_their_own(monkeypatch, types, grows):
    status = json.dumps({"autoscaler_report": {"active_nodes": types, "pending_launches": {}}}).encode()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: status)
    assert ray_cluster.grows() is grows
