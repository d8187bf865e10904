"""The pool of local processes, and `launch` on it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fine_dist.core import logs
from fine_dist.core.errors import LaunchError, RunDirError
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.entry import launch
from fine_dist.launchers.launcher import joint_code
from fine_dist.launchers.local import Here, LocalLauncher
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.ray_jobs import RayJobs
from fine_dist.launchers.ray_launcher import RayLauncher
from fine_dist.launchers.registry import pick
from fine_dist.launchers.slurm_steps import StepLauncher
from fine_dist.launchers.slurm_submitit import SlurmLauncher
from fine_dist.launchers.state_table import StateTable
from tests.cluster.conftest import results, starts, until
from tests.cluster.toy_stage import ToyConfig

TOY = "tests.cluster.toy_stage"
ROOT = Path(__file__).resolve().parents[2]


def toy(run_dir: Path, **fields) -> ToyConfig:
    return ToyConfig(run_dir=str(run_dir), **fields)


def run(run_dir: Path, launcher: str = "local", **fields) -> int:
    return launch(TOY, toy(run_dir, **fields), launcher)


def command(run_dir: Path, *words: object) -> subprocess.Popen:
    line = [sys.executable, "-m", TOY, "--launcher", "local", "--run-dir", run_dir, *words]
    return subprocess.Popen([*map(str, line)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for key in ("RAY_ADDRESS", "SLURM_JOB_ID", "RANK", "WORLD_SIZE", "FINE_DIST_JOB"):
        monkeypatch.delenv(key, raising=False)
    logs.configure()  # as every command does: what is wrong with a task is a record on stderr


def test_a_fan_out_runs_every_task_and_says_which_failed(tmp_path, capsys):
    assert run(tmp_path, tasks=5, bad=(2,)) == 3
    said = capsys.readouterr()
    assert "4 of 5 tasks done, 1 failed" in said.out and "task2: this task always fails (attempts: 1)" in said.err
    assert "toy rank 0" in (tmp_path / "out" / "task0" / "logs" / "task0.log").read_text()
    assert run(tmp_path, tasks=5) == 0
    assert [starts(tmp_path / "out" / f"task{i}") for i in range(5)] == [1, 1, 2, 1, 1]


def test_a_crash_is_tried_again_as_often_as_asked_and_keeps_its_reason(tmp_path):
    assert run(tmp_path / "a", tasks=1, fail="crash", launch=LaunchConfig(retries=2)) == 3
    row = StateTable(tmp_path / "a").get("task0")
    assert (row.state, row.attempts, row.reason) == ("failed", 3, "ZeroDivisionError: crashed")
    assert run(tmp_path / "b", tasks=2, fail="first") == 0
    assert [row.attempts for row in StateTable(tmp_path / "b").rows()] == [2, 2]


def test_a_task_that_stops_early_is_started_again_until_it_is_done(tmp_path):
    assert run(tmp_path, tasks=2, stop_times=3) == 0
    assert [starts(tmp_path / "out" / f"task{i}") for i in range(2)] == [4, 4]


def test_a_task_that_is_killed_every_time_is_marked_by_the_launcher(tmp_path):
    assert run(tmp_path, tasks=1, fail="kill") == 3
    assert StateTable(tmp_path).get("task0").reason == "killed by signal 9"


def test_no_more_tasks_run_at_once_than_asked(tmp_path):
    begun = time.monotonic()
    assert run(tmp_path, tasks=4, sleep_s=0.4, launch=LaunchConfig(max_parallel=2)) == 0
    assert time.monotonic() - begun > 0.75
    spans = [(row.started, row.started + row.seconds) for row in StateTable(tmp_path).rows()]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) == 2


def test_the_processes_of_one_job_get_torchruns_words(tmp_path):
    assert run(tmp_path, launch=LaunchConfig(processes=2)) == 0
    seen = [r["seen"] for r in results(tmp_path)]
    assert [(s["RANK"], s["LOCAL_RANK"], s["WORLD_SIZE"]) for s in seen] == [("0", "0", "2"), ("1", "1", "2")]
    assert len({s["MASTER_PORT"] for s in seen}) == 1


def test_when_a_rank_dies_the_others_are_ended(tmp_path):
    assert run(tmp_path, sleep_first_s=0, fail="kill", launch=LaunchConfig(processes=2)) == 1


def test_one_process_runs_here_and_an_exit_code_of_a_stage_is_kept(tmp_path):
    assert run(tmp_path) == 0
    assert int((tmp_path / "starts-0").read_text()) == os.getpid()


def test_inside_a_worker_a_command_runs_here_whatever_launcher_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(tmp_path, launcher="slurm") == 0
    assert int((tmp_path / "starts-0").read_text()) == os.getpid()


def test_auto_chooses_by_where_it_is(monkeypatch):
    assert pick("auto") is LocalLauncher and pick("ray") is RayLauncher and pick("slurm") is SlurmLauncher
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert pick("auto") is pick("slurm") is StepLauncher
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert pick("auto") is RayLauncher
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert pick("auto") is pick("ray") is RayJobs
    assert pick("ray", LaunchConfig(address="127.0.0.1:1")) is RayLauncher
    assert pick("local") is LocalLauncher and pick("here") is Here


def test_a_misspelt_launcher_is_answered_with_the_nearest_one(tmp_path):
    with pytest.raises(LaunchError, match=r"did you mean 'slurm'\? legal: auto, here, local, ray, slurm"):
        run(tmp_path, launcher="slrum")


def test_several_nodes_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(LaunchError, match="local has one: use --launcher slurm or ray"):
        run(tmp_path, launch=LaunchConfig(nodes=2))


def test_a_pool_told_to_end_has_its_tasks_save_and_asks_to_be_started_again(tmp_path):
    driver = command(tmp_path, "--tasks", 2, "--sleep-first-s", 60, "--launch.max-parallel", 1)
    until(lambda: starts(tmp_path / "out" / "task0"), 30, "a task")
    driver.send_signal(signal.SIGTERM)
    # Some schedulers repeat themselves until a job has left; no later signal takes the code from the first.
    for _ in range(300):
        if driver.poll() is not None:
            break
        driver.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert driver.wait(30) == 75
    assert StateTable(tmp_path).get("task0").reason == "stopped: signal 15"


def test_an_interrupt_has_running_tasks_save_and_the_same_command_continues(tmp_path):
    driver = command(tmp_path, "--tasks", 2, "--sleep-first-s", 60, "--launch.max-parallel", 2)
    until(lambda: all(starts(tmp_path / "out" / f"task{i}") for i in range(2)), 30, "both tasks")
    driver.send_signal(signal.SIGINT)
    assert driver.wait(30) == 130
    rows = StateTable(tmp_path).rows()
    assert [(row.state, row.reason) for row in rows] == [("pending", "stopped: signal 15")] * 2
    assert run(tmp_path, tasks=2) == 0


def test_a_stop_file_of_a_fan_out_ends_it_for_good_until_the_user_starts_it_again(tmp_path):
    driver = command(tmp_path, "--tasks", 3, "--sleep-s", 0.2, "--stop-times", 10**6, "--launch.max-parallel", 1)
    until(lambda: starts(tmp_path / "out" / "task1"), 30, "the second task")
    (tmp_path / "STOP").touch()
    assert driver.wait(30) == 75
    assert "a file STOP was in" in driver.communicate()[0]
    begun = sum(starts(tmp_path / "out" / f"task{i}") for i in range(3))
    assert begun < 20 and {row.state for row in StateTable(tmp_path).rows()} == {"pending"}
    assert run(tmp_path, tasks=3) == 0 and not (tmp_path / "STOP").exists()


def test_a_run_that_saw_a_stop_file_is_not_started_again_by_its_launcher(tmp_path):
    (tmp_path / "STOPPED").touch()  # what the engine makes of STOP when it has seen it
    # a second of work, so that neither process is ended before it has begun
    assert run(tmp_path, stop_times=3, sleep_s=1, launch=LaunchConfig(processes=2)) == 75
    assert starts(tmp_path) == 1


def test_a_killed_driver_leaves_no_process_and_the_same_command_repeats_nothing(tmp_path):
    driver = command(tmp_path, "--tasks", 4, "--sleep-first-s", 1, "--launch.max-parallel", 1)
    until(lambda: starts(tmp_path / "out" / "task2"), 30, "the third task")
    driver.kill()
    driver.wait()
    table = StateTable(tmp_path)
    until(lambda: table.lost(table.get("task2")), 10, "the running task to end with its driver")
    assert run(tmp_path, tasks=4) == 0
    assert [starts(tmp_path / "out" / f"task{i}") for i in range(4)] == [1, 1, 2, 1]


def test_a_second_fan_out_on_one_directory_is_refused(tmp_path):
    driver = command(tmp_path, "--tasks", 1, "--sleep-s", 3)
    until(lambda: starts(tmp_path / "out" / "task0"), 30, "the first")
    with pytest.raises(RunDirError, match=re.escape(f"local fan-out, process {driver.pid}")):
        run(tmp_path, tasks=1)
    assert driver.wait(30) == 0
    assert starts(tmp_path / "out" / "task0") == 1


def test_jobs_can_be_followed_cancelled_and_their_logs_read(tmp_path):
    with LocalLauncher() as pool:
        long = pool.submit(make_spec(TOY, toy(tmp_path / "long", sleep_s=60), "long", code=str(ROOT)))
        short = pool.submit(make_spec(TOY, toy(tmp_path / "short"), "short", code=str(ROOT)))
        pool.wait([short])
        assert (pool.status(short), pool.status(long)) == ("done", "running")
        until(lambda: starts(tmp_path / "long"), 10)
        pool.cancel(long)
        assert pool.status(long) == "cancelled" and "stopped: signal 15" in pool.logs(long)


def test_environment_of_a_job_is_its_own(tmp_path):
    assert run(tmp_path, launch=LaunchConfig(processes=2, env={"MASTER_ADDR": "elsewhere"})) == 0
    assert {r["seen"]["MASTER_ADDR"] for r in results(tmp_path)} == {"elsewhere"}
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        *[((0, 0), 0), ((0, 75), 75), ((75, -9, 75), -9), ((0, 2), 2)],
        *[((75, -15), 75), ((-15, 2), 2), ((0, -15), -15), ((-15, -15), -15)],  # -15: ended because another was
    ],
)
def test_the_joint_code_of_a_job_is_its_first_real_failure(codes, code):
    assert joint_code(codes) == code


@pytest.mark.benchmark
def test_fifty_trivial_tasks_take_at_most_ten_seconds(tmp_path, capsys):
    begun = time.monotonic()
    driver = command(tmp_path, "--tasks", 50)
    assert driver.wait(60) == 0
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n50 trivial tasks, local: {seconds:.1f} s (bar 10)")
    assert seconds < 20
    assert json.loads((tmp_path / "out" / "task49" / "result-0.json").read_text())["value"] == 49


def test_a_process_that_leaves_keeps_its_promises_and_its_code():
    script = """
import atexit, threading, time
from fine_dist.core.processes import exit_process
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("body")
exit_process(7)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split("\n"), done.stderr) == (7, ["body", "thread", "exit function", ""], "")
