"""What goes wrong on a SLURM cluster, made to happen on a real one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, TOY, Slurm, checkpoints, digest, results, starts, until

pytestmark = pytest.mark.cluster


def submit(slurm: Slurm, module: str, run_dir: Path, *words: object) -> str:
    said = slurm.python(module, "--launcher", "slurm", "--run-dir", run_dir, *words).stdout
    return re.search(r"jobs? (\d+)", said)[1]


def test_a_node_that_loses_power_while_condensing_costs_nothing_but_time(slurm, condense_config, undisturbed, tmp_path):
    job = submit(slurm, "fine_dist.condense", tmp_path, "--config", condense_config)
    until(lambda: checkpoints(tmp_path) >= 60, 60, "a checkpoint")
    node = slurm.field(job, "NodeList")
    slurm.tell("kill", node)
    slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
    assert slurm.ends(job, 120) == "COMPLETED"
    assert slurm.field(job, "Restarts") == "1" and slurm.field(job, "NodeList") != node
    slurm.tell("start", node)
    assert digest(tmp_path) == undisturbed


def test_a_preempted_script_saves_and_goes_on_when_the_urgent_job_is_over(
    slurm, condense_config, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    words = ["sbatch", "--parsable", f"--output={tmp_path}/%j.out", "slurm/condense.sh", "--run-dir", str(run_dir)]
    job = slurm.run(*words, CONFIG=str(condense_config)).stdout.strip()
    until(lambda: checkpoints(run_dir) >= 60, 60, "a checkpoint")
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    other = slurm.run("sbatch", "--parsable", *urgent).stdout.strip()
    assert slurm.ends(other, 90) == "COMPLETED"
    assert slurm.ends(job, 120) == "COMPLETED"
    log = (run_dir / "logs" / f"condense-{job}.log").read_text()
    assert "SIGUSR1" in log and "saved; requeued" in log
    assert digest(run_dir) == undisturbed


@pytest.mark.slow  # SLURM's time limits are whole minutes
def test_a_job_at_its_time_limit_saves_and_is_put_back_into_the_queue(slurm, tmp_path):
    job = submit(slurm, TOY, tmp_path, "--launch.minutes", 1, "--sleep-first-s", 300)
    assert slurm.ends(job, 170) == "COMPLETED"
    assert starts(tmp_path) == 2 and slurm.field(job, "Restarts") == "1"


def test_a_script_that_always_stops_early_is_not_restarted_for_ever(slurm, tmp_path):
    config = tmp_path / "toy.yaml"
    config.write_text("stop_times: 100\n")
    words = ["sbatch", "--parsable", f"--output={tmp_path}/%j.out", "slurm/train.sh", "--run-dir", f"{tmp_path}/run"]
    job = slurm.run(*words, CONFIG=str(config), MODULE=TOY, MAX_RESTARTS="1", PROCS="2").stdout.strip()
    assert slurm.ends(job, 90) == "FAILED"
    assert starts(tmp_path / "run") == 2
    assert "restarted 1 times already" in (tmp_path / "run" / "logs" / f"toy_stage-{job}.log").read_text()


@pytest.mark.parametrize("way", ["submitit", "script"])
def test_a_cancelled_job_saves_stays_cancelled_and_the_same_command_continues_it(slurm, tmp_path, way):
    run_dir = tmp_path / "run"
    if way == "submitit":
        job = submit(slurm, TOY, run_dir, "--sleep-first-s", 300)
    else:
        words = ["sbatch", "--parsable", f"--output={tmp_path}/%j.out", "slurm/train.sh", "--run-dir", str(run_dir)]
        (tmp_path / "toy.yaml").write_text("sleep_first_s: 300\n")
        job = slurm.run(*words, CONFIG=f"{tmp_path}/toy.yaml", MODULE=TOY).stdout.strip()
    until(lambda: starts(run_dir), 30, "the job to start")
    slurm.run("scancel", job)
    assert slurm.ends(job) == "CANCELLED"
    logs = "".join(path.read_text() for end in ("log", "out") for path in run_dir.glob(f"logs/**/*.{end}"))
    assert "stopped: signal 15" in logs and "saved; requeued" not in logs
    assert starts(run_dir) == 1
    again = submit(slurm, TOY, run_dir, "--sleep-first-s", 300)
    assert slurm.ends(again) == "COMPLETED" and starts(run_dir) == 2


def test_a_fan_out_submitted_twice_runs_every_task_once(slurm, tmp_path):
    words = ("--tasks", 4, "--sleep-s", 2, "--launch.max-parallel", 2)
    first = submit(slurm, TOY, tmp_path, *words)
    said = slurm.python(TOY, "--launcher", "slurm", "--run-dir", tmp_path, *words).stdout
    assert "4 in the queue already, 0 to run" in said
    slurm.ends(first)
    assert [starts(tmp_path / "out" / f"task{i}") for i in range(4)] == [1, 1, 1, 1]


def test_a_second_submission_of_a_running_job_is_refused(slurm, tmp_path):
    first = submit(slurm, TOY, tmp_path, "--sleep-s", 5)
    again = slurm.python(TOY, "--launcher", "slurm", "--run-dir", tmp_path, check=False)
    assert again.returncode == 2 and f"slurm job {first} works on it already" in again.stderr
    slurm.ends(first)


def test_a_task_that_always_fails_leaves_the_others_alone_and_is_named_by_status(slurm, tmp_path):
    words = ("--launcher", "slurm", "--launch.wait", "--run-dir", tmp_path, "--tasks", 5, "--bad", 1)
    assert slurm.python(TOY, *words, check=False).returncode == 3
    assert [len(results(tmp_path / "out" / f"task{i}")) for i in range(5)] == [1, 0, 1, 1, 1]
    said = slurm.python("fine_dist.status", tmp_path, check=False)
    assert said.returncode == 3
    assert re.search(r"task1 +failed.*this task always fails", said.stdout)


def test_a_task_killed_without_a_word_is_tried_again_and_then_named(slurm, tmp_path):
    words = ("--launcher", "slurm", "--launch.wait", "--tasks", 2)
    assert slurm.python(TOY, *words, "--run-dir", tmp_path / "a", "--fail", "first").returncode == 0
    done = slurm.python(TOY, *words, "--run-dir", tmp_path / "b", "--fail", "kill", check=False)
    assert done.returncode == 3 and "task0: " in done.stderr
    assert starts(tmp_path / "b" / "out" / "task0") == 2


def test_what_sbatch_refuses_is_told_in_its_words_and_leaves_nothing_submitted(slurm, tmp_path):
    for words in (("--launch.partition", "nosuch"), ("--launch.slurm", "nodelist", "n9")):
        done = slurm.python(TOY, "--launcher", "slurm", "--run-dir", tmp_path, "--tasks", 3, *words, check=False)
        assert done.returncode == 2 and ("nosuch" in done.stderr or "Invalid node name" in done.stderr)
        assert "Traceback" not in done.stderr
    assert not slurm.run("squeue", "-h").stdout
    assert not [p for p in (tmp_path / "logs" / "slurm").glob("*")]


def test_jobs_and_those_who_wait_for_them_outlive_a_restart_of_the_controller(slurm, tmp_path):
    words = ("--launcher", "slurm", "--launch.wait", "--run-dir", tmp_path, "--sleep-s", 4, "--launch.nodes", 2)
    waiting = slurm.popen(TOY, *words)
    until(lambda: starts(tmp_path), 30, "the job to start")
    slurm.tell("stop", "slurmctld")
    subprocess.run(["sleep", "2"], check=True)
    slurm.tell("start", "slurmctld")
    said, _ = waiting.communicate(timeout=90)
    assert waiting.returncode == 0, said
    assert len(results(tmp_path)) == 2 and starts(tmp_path) == 1


def test_a_killed_test_run_leaves_no_process_no_host_name_and_no_file(slurm):
    """`slurm` is here so that this runs where a cluster can; the one under test is its own."""
    code = "import json, os; from tests.cluster.conftest import Slurm; cluster = Slurm()"
    code += "; print(json.dumps(cluster.about), flush=True); os.kill(os.getpid(), 9)"
    child = subprocess.run(
        [slurm.env["PYTHON"], "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    folder = re.search(r'"folder": "([^"]+)"', child.stdout)[1]
    until(lambda: not Path(folder).exists(), 20, "the folder to go")
    assert folder not in Path("/etc/hosts").read_text()
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not [c for c in commands if folder.encode() in c]
