"""What each launcher holds, and that tasks are planned for the machines they will run on, not for this one."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fine_dist.core.errors import LaunchError
from fine_dist.core.limits import GIB
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers import launch_target, machine
from fine_dist.launchers.entry import check, launch
from fine_dist.launchers.launch_target import register
from fine_dist.launchers.local import LocalLauncher
from fine_dist.launchers.machine import Accelerators
from fine_dist.launchers.prepare import make_spec, tasks_of
from fine_dist.launchers.ray_cluster import copies, demand
from fine_dist.launchers.registry import names, pick, targets
from fine_dist.launchers.slurm_queue import Node, fits_on
from fine_dist.launchers.slurm_steps import StepLauncher
from fine_dist.launchers.spec import Capacity, Task
from fine_dist.launchers.worker import import_module
from tests.cluster.toy_stage import ToyConfig

TOY = "tests.cluster.toy_stage"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch):
    for key in ("RAY_ADDRESS", "SLURM_JOB_ID", "RANK", "WORLD_SIZE", "FINE_DIST_JOB"):
        monkeypatch.delenv(key, raising=False)


def spec(**launch):
    return make_spec(TOY, ToyConfig(run_dir="/r", launch=LaunchConfig(**launch)), write=False)


@pytest.fixture
def devices(monkeypatch):
    """Let torch see so many accelerators of 16 GiB, as its own process would report them."""

    def see(count: int, note: str = "torch is built for the CPU only") -> None:
        found = Accelerators((16 * GIB,) * count, "" if count else note)
        monkeypatch.setattr(machine, "_probe", lambda visible: found)

    see(0)
    return see


def test_every_launcher_is_registered_once_and_answers_to_its_name():
    assert names() == ["auto", "here", "local", "ray", "slurm"]
    assert len(set(targets())) == len(targets()) == 6


def test_a_launcher_of_another_package_registers_itself_and_is_chosen_by_its_affinity(monkeypatch):
    class Batch(LocalLauncher):
        name = "batch"

        @classmethod
        def affinity(cls, needs):
            return 99

    monkeypatch.setattr(launch_target, "_registered", [*launch_target._registered])
    register(Batch)
    targets.cache_clear()
    try:
        assert "batch" in names() and pick("batch") is Batch and pick("auto") is Batch
    finally:
        monkeypatch.undo()
        targets.cache_clear()
    assert pick("auto") is LocalLauncher


def test_devices_are_those_that_torch_sees_whatever_the_environment_names(monkeypatch):
    for value in ("NoDevFiles", "0,void"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        import torch

        assert len(machine.visible_devices()) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


# --- what fits ------------------------------------------------------------------------------------------------------


def test_a_partition_holds_what_its_nodes_hold():
    nodes = [Node(8, 16000, 4), Node(8, 16000, 0), Node(4, 4000, 2)]
    assert fits_on(nodes, spec(cpus=2)) == 4 + 4 + 2
    assert fits_on(nodes, spec(cpus=1, gpus=1)) == 4 + 2
    assert fits_on(nodes, spec(cpus=1, memory_gb=4)) == 3 + 3 + 0
    assert fits_on(nodes, spec(cpus=1, processes=4, nodes=2)) == 5 // 2
    assert fits_on(nodes, spec(cpus=64)) == 1  # it may wait for a node that is not here


def test_an_allocation_holds_what_it_was_given(monkeypatch):
    for key, value in {
        "SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "8(x2)", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_MEM_PER_NODE": "4096",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    steps = StepLauncher()
    assert steps.fits(spec(cpus=2)) == 8 and steps.fits(spec(gpus=1)) == 4
    assert steps.capacity(spec(cpus=2)) == Capacity(8, None, True, 2**30)


def test_a_ray_node_holds_tasks_by_every_resource():
    node = {"CPU": 8.0, "GPU": 2.0, "memory": 6 * 2**30}
    assert [copies(node, demand(spec(**d))) for d in ({"cpus": 2}, {"gpus": 0.5}, {"memory_gb": 2})] == [4, 4, 3]


def test_a_local_capacity_counts_this_machines_devices(devices):
    devices(2)
    pool = LocalLauncher(LaunchConfig(gpu_memory_gb=12))
    capacity = pool.capacity(spec(gpus=1))
    assert not capacity.cpu and capacity.accelerator_bytes == 12 * GIB and capacity.workers <= 2
    assert pool.capacity(spec()).cpu and pool.capacity(spec(), many=False).workers == 1


def test_tasks_are_planned_for_the_launchers_machines(monkeypatch, tmp_path):
    seen = []

    def tasks(config, capacity):
        seen.append(capacity)
        return [Task(f"t{i}", config.model_copy(update={"run_dir": f"{config.run_dir}/t{i}"})) for i in range(2)]

    monkeypatch.setattr(import_module(TOY), "tasks", tasks)
    monkeypatch.setattr(LocalLauncher, "fits", lambda self, spec: 1)
    assert launch(TOY, ToyConfig(run_dir=str(tmp_path)), "local") == 0
    assert isinstance(seen[0], Capacity) and seen[0].cpu
    assert len(tasks_of(TOY, ToyConfig(run_dir=str(tmp_path)), Capacity(9, 1e9, False, None))) == 2
    assert seen[1].workers == 9


# --- accelerators that are not here ---------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["local", "here", "auto"])
@pytest.mark.parametrize("fields", [{}, {"tasks": 2}, {"launch": {"processes": 2}}])
def test_a_gpu_that_is_not_here_is_an_error_with_the_remedy_and_nothing_runs(
    devices, tmp_path, launcher, fields, capsys
):
    needs = {"gpus": 1, **fields.get("launch", {})}
    config = ToyConfig(**{"run_dir": str(tmp_path), **fields, "launch": needs})
    with pytest.raises(LaunchError, match=r"launch\.gpus 1 .* shows no accelerator; .*--launch\.gpus 0"):
        launch(TOY, config, launcher)
    assert not list(tmp_path.rglob("starts-*"))
    capsys.readouterr()
    check(TOY, config, launcher)  # a dry run may be typed on a laptop
    assert "note: launch.gpus 1" in capsys.readouterr().out
    check(TOY, config, "slurm")  # this machine's accelerators do not matter there
    assert not capsys.readouterr().out


def test_two_gpus_where_there_is_one_are_refused_too(devices, tmp_path):
    devices(1)
    config = ToyConfig(run_dir=str(tmp_path), launch=LaunchConfig(gpus=1, processes=2))
    with pytest.raises(LaunchError, match=r"for 2 processes, and this machine has 1; lower launch\.gpus"):
        launch(TOY, config, "local")


def test_plan_says_that_a_gpu_is_not_here(devices, digit_shards, tmp_path, capsys):
    from fine_dist.plan import main

    words = ["--stage", "condense", "--run-dir", str(tmp_path), "--data.shards", str(digit_shards / "train")]
    assert main([*words, "--launch.gpus", "1", "--launcher", "local"]) == 0
    assert "note  gpus     launch.gpus 1 for 1 processes, and this machine shows no accel" in capsys.readouterr().out


# --- what Ray uploads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gitignore", [True, False])
def test_ray_uploads_neither_environment_nor_runs_nor_data(tmp_path, gitignore):
    code = f"""
import pathlib, sys
from ray._private.runtime_env.packaging import create_package
create_package(sys.argv[1], pathlib.Path(sys.argv[2]), include_gitignore={gitignore}, excludes=[])
"""
    checkout = tmp_path / "checkout"
    for name in (".venv/lib/torch.so", "runs/a/model.safetensors", "data/train/latents-000000.tar"):
        (checkout / name).parent.mkdir(parents=True)
        with open(checkout / name, "wb") as file:
            file.truncate(101 * 2**20)
    for name in ("fine_dist/data/stream.py", "slurm/env.sh", "tests/data/making.py"):
        (checkout / name).parent.mkdir(parents=True)
        (checkout / name).write_text("#")
    for name in (".rayignore", ".gitignore"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    package = tmp_path / "package.zip"
    words = [sys.executable, "-c", code, checkout, package]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    inside = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert inside == {".rayignore", ".gitignore", "fine_dist/data/stream.py", "slurm/env.sh", "tests/data/making.py"}


def test_the_code_of_this_checkout_is_far_below_what_ray_takes():
    from fine_dist.launchers.preflight import check_upload

    found = check_upload("fine_dist.init")
    assert found.level == "ok", found.text


def test_an_unknown_launcher_is_one_line_with_the_nearest(capsys):
    from fine_dist.condense import main

    assert main(["--launcher", "slrm", "--arch", "DiT-S/2"]) == 2
    assert "--launcher 'slrm': no such launcher; did you mean 'slurm'?" in capsys.readouterr().err
