"""A real Ray cluster of two nodes: what users type, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import (
    ROOT,
    TOY,
    ZERO2,
    Cluster,
    absent,
    checkpoints,
    digest,
    losses,
    results,
    starts,
    steps_of,
    targets,
    until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def ray() -> Iterator[Cluster]:
    if subprocess.run([sys.executable, "-c", "import ray.train"], capture_output=True, check=False).returncode:
        absent("Ray is not installed")
    cluster = Cluster("-m", "fine_dist.launchers.local_ray", "--pipe", "--gpus", "2")
    yield cluster
    cluster.close()


def task_dirs(run_dir: Path, count: int) -> list[Path]:
    return [run_dir / "out" / f"task{i}" for i in range(count)]


def workers_of(folder: Path) -> list[int]:
    """Processes of the toy or the engine that work for a run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and b"fine_dist.worker" in words:
            found.append(int(path.parent.name))
    return found


def test_a_fan_out_on_ray_runs_every_task_and_names_the_one_that_fails(ray, tmp_path):
    done = ray.python(TOY, "--run-dir", tmp_path, "--tasks", 6, "--bad", 2, check=False)
    assert done.returncode == 3, done.stderr
    assert "5 of 6 tasks done, 1 failed" in done.stdout and "task2: this task always fails" in done.stderr
    assert ray.python(TOY, "--run-dir", tmp_path, "--tasks", 6).returncode == 0
    assert [starts(d) for d in task_dirs(tmp_path, 6)] == [1, 1, 2, 1, 1, 1]
    rows = json.loads(ray.python("fine_dist.status", tmp_path, "--json").stdout)["tasks"]
    assert all(row["job"].startswith("ray ") for row in rows)


def test_tasks_at_the_same_time_never_share_an_accelerator_though_their_workers_are_reused(ray, tmp_path):
    words = ("--tasks", 8, "--sleep-s", 0.5, "--launch.gpus", 1, "--launch.ray", "node1", "1")
    ray.python(TOY, "--run-dir", tmp_path, *words)
    found = [result for folder in task_dirs(tmp_path, 8) for result in results(folder)]
    by_device: dict[str, list[list[float]]] = {}
    for result in found:
        by_device.setdefault(result["seen"]["CUDA_VISIBLE_DEVICES"], []).append(result["span"])
    assert by_device.keys() == {"0", "1"} and len(found) == 8
    for spans in by_device.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), by_device


def test_what_no_node_has_is_refused_where_no_autoscaler_could_add_it(ray, tmp_path):
    done = ray.python(TOY, "--run-dir", tmp_path, "--launch.gpus", 3, check=False)
    assert done.returncode == 2 and "1 processes, the nodes run 0 of (CPU 1, GPU 3)" in done.stderr
    assert not list(tmp_path.glob("starts-*"))


def test_a_second_fan_out_on_the_same_directory_is_refused_while_the_first_runs(ray, tmp_path):
    first = ray.popen(TOY, "--run-dir", tmp_path, "--tasks", 3, "--sleep-s", 4)
    until(lambda: starts(tmp_path / "out" / "task0"), 60, "the first task")
    second = ray.python(TOY, "--run-dir", tmp_path, "--tasks", 3, "--sleep-s", 4, check=False)
    assert second.returncode == 2 and "another fan-out is handing out its tasks" in second.stderr
    assert first.wait(60) == 0
    assert [starts(d) for d in task_dirs(tmp_path, 3)] == [1, 1, 1]


def test_a_driver_killed_and_started_again_loses_no_finished_task_and_repeats_none(ray, tmp_path):
    words = ("--run-dir", tmp_path, "--tasks", 5, "--launch.max-parallel", 2)
    driver = ray.popen(TOY, *words, "--sleep-first-s", 2.5)
    until(lambda: results(tmp_path / "out" / "task1"), 90, "two tasks")
    until(lambda: starts(tmp_path / "out" / "task2"), 30, "the third task")
    driver.kill()
    driver.wait()
    finished = [d for d in task_dirs(tmp_path, 5) if results(d)]
    again = ray.python(TOY, *words, "--sleep-first-s", 2.5)
    assert again.returncode == 0
    assert [starts(d) for d in finished] == [1] * len(finished)
    assert all(results(d) for d in task_dirs(tmp_path, 5))


def test_a_lost_node_loses_no_finished_task(ray, tmp_path):
    words = ("--run-dir", tmp_path, "--tasks", 8, "--sleep-s", 3, "--launch.max-parallel", 6)
    driver = ray.popen(TOY, *words)
    until(lambda: sum(starts(d) for d in task_dirs(tmp_path, 8)) >= 6, 90, "six tasks to run")
    ray.tell("kill", "node1")
    try:
        said, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
        assert all(results(d) for d in task_dirs(tmp_path, 8))
    finally:
        ray.tell("start", "node1")


def test_a_ray_worker_killed_while_condensing_is_replaced_and_the_weights_are_the_same(
    ray, condense_config, undisturbed, tmp_path
):
    driver = ray.popen("fine_dist.condense", "--config", condense_config, "--run-dir", tmp_path)
    until(lambda: checkpoints(tmp_path) >= 60, 120, "a checkpoint")
    [ours] = workers_of(tmp_path)
    status = Path(f"/proc/{ours}/status").read_text()
    os.kill(int(re.search(r"PPid:\s*(\d+)", status)[1]), signal.SIGKILL)
    until(lambda: ours not in workers_of(tmp_path), 10, "our process to end with Ray's")
    said, _ = driver.communicate(timeout=180)
    assert driver.returncode == 0, said
    assert digest(tmp_path) == undisturbed


def test_a_node_that_ray_will_take_away_makes_the_engine_save(ray, tmp_path):
    driver = ray.popen(TOY, "--run-dir", tmp_path, "--launch.ray", "node1", "1", "--sleep-first-s", 25, "--await-save")
    until(lambda: starts(tmp_path), 120, "the rank")
    drain = (
        "import ray, sys; from ray._raylet import GcsClient; from ray.core.generated import autoscaler_pb2 as pb\n"
        "import time; ray.init(address=sys.argv[1], logging_level='ERROR')\n"
        "node = next(n['NodeID'] for n in ray.nodes() if n['Alive'] and 'node1' in n['Resources'])\n"
        "why = pb.DrainNodeReason.Value('DRAIN_NODE_REASON_PREEMPTION')\n"
        "said = GcsClient(address=sys.argv[1]).drain_node(node, why, 'taken away', int((time.time() + 60) * 1000))\n"
        "print(said)"
    )
    said = ray.run(sys.executable, "-c", drain, ray.env["RAY_ADDRESS"], check=False)
    try:
        out, _ = driver.communicate(timeout=120)
        assert (tmp_path / "saved").exists(), (said.stdout, said.stderr, out)
    finally:
        ray.tell("kill", "node1")
        ray.tell("start", "node1")


def test_a_ray_job_submitted_from_elsewhere_runs_the_fan_out_in_the_cluster(ray, tmp_path):
    words = ("--run-dir", tmp_path, "--tasks", 3, "--launch.address", ray.about["api"], "--launch.wait")
    done = ray.python(TOY, "--launcher", "ray", *words, RAY_ADDRESS="")
    assert "3 of 3 tasks done" in done.stdout, done.stdout
    assert all(results(d) for d in task_dirs(tmp_path, 3))


def test_inside_ray_job_submit_a_command_finds_its_cluster_by_itself(ray, tmp_path):
    (tmp_path / "upload").mkdir()
    (tmp_path / "upload" / "config.yaml").write_text("tasks: 2\n")
    env = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    words = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", ray.about["api"]]
    words += ["--working-dir", str(tmp_path / "upload"), "--runtime-env-json", env, "--"]
    words += [sys.executable, "-m", TOY, "--config", "config.yaml", "--run-dir"]
    done = ray.run(*words, str(tmp_path / "run"), check=False)
    for _ in range(10):  # a busy head answers "No available agent to submit job, please try again later"
        if "No available agent" not in done.stderr:
            break
        done = ray.run(*words, str(tmp_path / "run"), check=False)
    assert "2 of 2 tasks done" in done.stdout, done.stdout + done.stderr
    lost = ray.run(*words, "relative", check=False)
    assert lost.returncode and "a folder that Ray deletes" in lost.stdout


def test_without_a_cluster_the_message_says_how_to_get_one(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    words = [
        sys.executable,
        "-m",
        TOY,
        "--launcher",
        "ray",
        "--run-dir",
        str(tmp_path),
        "--launch.address",
        "127.0.0.1:1",
    ]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "no Ray cluster at 127.0.0.1:1" in done.stderr


def test_a_family_initialised_by_ray_tasks_is_the_one_that_a_single_process_makes(
    ray, family_config, family_digests, tmp_path
):
    ray.python("fine_dist.init", "--config", family_config, "--run-dir", tmp_path)
    assert targets(tmp_path) == family_digests
    said = ray.python("fine_dist.init", "--config", family_config, "--run-dir", tmp_path, "--steps", 24).stdout
    assert "0 done before, 3 to run" in said and steps_of(tmp_path) == {24}


def test_two_processes_with_zero_2_have_torchruns_losses_under_ray_train(
    ray, condense_config, torchrun_losses, tmp_path
):
    words = ("--config", condense_config, "--run-dir", tmp_path, *ZERO2, "--launch.processes", 2)
    ray.python("fine_dist.condense", *words, timeout=200)
    assert losses(tmp_path) == torchrun_losses
    pointers = [json.loads(p.read_text()) for p in sorted((tmp_path / "ray").glob("*/checkpoint_*/rank*.json"))]
    assert [(p["rank"], p["run_dir"]) for p in pointers] == [(0, str(tmp_path)), (1, str(tmp_path))]


@pytest.mark.benchmark
def test_fifty_trivial_tasks_take_at_most_fifteen_seconds_on_a_running_ray(ray, tmp_path, capsys):
    begun = time.monotonic()
    ray.python(TOY, "--run-dir", tmp_path, "--tasks", 50)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n50 trivial tasks on a running Ray: {seconds:.1f} s (bar 15); cluster {ray.start_s:.1f} s")
    assert seconds < 40
