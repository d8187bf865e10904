"""A real SLURM cluster: what users type, end to end."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from fine_dist.launchers.status import read
from tests.cluster.conftest import TOY, ZERO2, Slurm, losses, results, starts, steps_of, targets, until

pytestmark = pytest.mark.cluster


def jobs_of(text: str) -> list[str]:
    return re.findall(r"job (\d+)", text) or re.findall(r"jobs (\d+)", text)


def sbatch(slurm: Slurm, script: str, tmp_path: Path, *flags: str, options: tuple[str, ...] = (), **env: str) -> str:
    """`sbatch slurm/SCRIPT` with the toy in place of the stage; the job id."""
    config = tmp_path / "toy.yaml"
    config.write_text("value: 7\n")
    words = ["sbatch", "--parsable", f"--output={tmp_path}/slurm-%j.out", *options, f"slurm/{script}", *flags]
    return slurm.run(*words, CONFIG=str(config), MODULE=TOY, **env).stdout.strip()


def test_a_job_that_submits_itself_runs_on_a_node_and_leaves_its_log_in_the_run_directory(slurm, tmp_path):
    words = ("--launcher", "slurm", "--run-dir", tmp_path / "run", "--value", 3)
    said = slurm.python(TOY, *words, SBATCH_EXPORT="NONE").stdout  # as the profiles of some sites set it for everybody
    [job] = jobs_of(said)
    assert slurm.ends(job) == "COMPLETED"
    assert [r["value"] for r in results(tmp_path / "run")] == [3]
    [log] = (tmp_path / "run" / "logs" / "slurm").glob(f"{job}_0_log.out")
    assert "toy rank 0 start 1" in log.read_text()


def test_waiting_for_a_job_gives_its_exit_code(slurm, tmp_path):
    words = ("--launcher", "slurm", "--launch.wait", "--run-dir", tmp_path, "--fail")
    assert slurm.python(TOY, *words, "user", check=False).returncode == 2
    assert slurm.python(TOY, *words, "crash", check=False).returncode == 1


def test_the_processes_of_a_job_on_two_nodes_find_each_other(slurm, tmp_path):
    words = ("--launch.nodes", 2, "--launch.processes", 2, "--launch.wait", "--launcher", "slurm")
    slurm.python(TOY, *words, "--run-dir", tmp_path)
    assert [r["rank"] for r in results(tmp_path)] == ["0", "1", "2", "3"]


def test_a_fan_out_becomes_arrays_within_the_clusters_limit_and_runs_only_what_is_not_done(
    slurm, tmp_path, monkeypatch
):
    words = ("--launcher", "slurm", "--launch.wait", "--run-dir", tmp_path, "--tasks", 6, "--launch.max-parallel", 3)
    done = slurm.python(TOY, *words, "--bad", 4, check=False)
    assert done.returncode == 3
    assert "task4: this task always fails" in done.stderr
    before = {i: starts(tmp_path / "out" / f"task{i}") for i in range(6)}
    assert slurm.python(TOY, *words).returncode == 0
    after = {i: starts(tmp_path / "out" / f"task{i}") for i in range(6)}
    assert {i for i in range(6) if after[i] > before[i]} == {4}


def test_a_submitted_job_runs_the_code_and_config_of_the_moment_it_was_submitted(slurm, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    toy = Path(__file__).with_name("toy_stage.py").read_text().replace("tests.cluster.toy_stage", "edited_toy")
    (code / "edited_toy.py").write_text(toy)
    config = tmp_path / "config.yaml"
    config.write_text(f"run_dir: {tmp_path}/run\nvalue: 5\n")
    words = ("--config", config, "--launcher", "slurm", "--launch.slurm", "begin", "now+4")
    said = slurm.python("edited_toy", *words, PYTHONPATH=str(code)).stdout
    (code / "edited_toy.py").write_text(toy.replace("as submitted", "edited afterwards"))
    config.write_text(f"run_dir: {tmp_path}/run\nvalue: 6\n")
    assert slurm.ends(*jobs_of(said)) == "COMPLETED"
    [result] = results(tmp_path / "run")
    assert (result["version"], result["value"]) == ("as submitted", 5)


def test_sbatch_of_a_script_runs_its_stage(slurm, tmp_path):
    job = sbatch(slurm, "condense.sh", tmp_path, "--run-dir", str(tmp_path / "run"))
    assert slurm.ends(job) == "COMPLETED"
    assert [r["value"] for r in results(tmp_path / "run")] == [7]
    assert "toy rank 0" in (tmp_path / "run" / "logs" / f"toy_stage-{job}.log").read_text()
    assert f"logs/toy_stage-{job}.log" in (tmp_path / f"slurm-{job}.out").read_text()


def test_a_script_asked_for_more_nodes_than_sbatch_gave_it_hands_over_to_a_job_that_has_them(slurm, tmp_path):
    job = sbatch(slurm, "condense.sh", tmp_path, "--run-dir", str(tmp_path / "run"), NODES="2", PROCS="2")
    slurm.ends(job)
    [second] = jobs_of((tmp_path / f"slurm-{job}.out").read_text())
    assert slurm.ends(second) == "COMPLETED"
    seen = [r["seen"] for r in results(tmp_path / "run")]
    assert [s["WORLD_SIZE"] for s in seen] == ["4"] * 4
    assert len({(s["MASTER_ADDR"], s["MASTER_PORT"]) for s in seen}) == 1


def test_a_mistake_in_the_config_is_told_in_the_scripts_output(slurm, tmp_path):
    job = sbatch(slurm, "condense.sh", tmp_path, "--run-dir", str(tmp_path / "run"), "--no-such-key", "1")
    assert slurm.ends(job) == "FAILED"
    assert "no_such_key" in (tmp_path / f"slurm-{job}.out").read_text()


def test_a_script_whose_run_was_stopped_by_a_file_does_not_go_back_into_the_queue(slurm, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOPPED").touch()  # the engine's mark that a file STOP was obeyed; without it, 75 means the queue
    job = sbatch(slurm, "condense.sh", tmp_path, "--run-dir", str(run_dir), "--stop-times", "1")
    assert slurm.ends(job) == "FAILED" and starts(run_dir) == 1
    assert "stopped by a file STOP" in (run_dir / "logs" / f"toy_stage-{job}.log").read_text()


def test_init_as_a_script_is_an_array_of_its_tasks(slurm, tmp_path):
    run_dir = tmp_path / "run"
    job = sbatch(slurm, "init.sh", tmp_path, "--run-dir", str(run_dir), "--tasks", "5", "--launch.max-parallel", "2")
    slurm.ends(job)
    [array] = jobs_of((tmp_path / f"slurm-{job}.out").read_text())
    slurm.ends(array)
    assert [results(run_dir / "out" / f"task{i}")[0]["value"] for i in range(5)] == [0, 1, 2, 3, 4]
    rows = json.loads(slurm.python("fine_dist.status", run_dir, "--json").stdout)["tasks"]
    assert [row["state"] for row in rows] == ["done"] * 5
    assert rows[1]["job"].startswith(f"slurm {array}_")


def test_inside_an_allocation_a_fan_out_runs_as_steps_of_it(slurm, tmp_path):
    command = f'"$PYTHON" -m {TOY} --run-dir {tmp_path}/run --tasks 4 --launch.max-parallel 2'
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--ntasks=2", f"--output={tmp_path}/out", "--wrap", command)
    assert slurm.ends(job.stdout.strip()) == "COMPLETED", (tmp_path / "out").read_text()
    assert "4 of 4 tasks done" in (tmp_path / "out").read_text()


def test_a_family_initialised_as_an_array_is_the_one_that_a_single_process_makes(
    slurm, family_config, family_digests, tmp_path
):
    words = ("--config", family_config, "--run-dir", tmp_path, "--launcher", "slurm", "--launch.wait")
    said = slurm.python("fine_dist.init", *words).stdout
    assert "3 of 3 tasks done" in said and len(family_digests) == 3
    assert targets(tmp_path) == family_digests
    said = slurm.python("fine_dist.init", *words, "--steps", 24).stdout
    assert "0 done before, 3 to run" in said and steps_of(tmp_path) == {24}
    assert "next: fine-dist train --parents" in said


def test_two_processes_with_zero_2_have_torchruns_losses_when_submitit_starts_them(
    slurm, condense_config, torchrun_losses, tmp_path
):
    words = ("--config", condense_config, "--run-dir", tmp_path, *ZERO2, "--launcher", "slurm", "--launch.wait")
    slurm.python("fine_dist.condense", *words, "--launch.nodes", 2)
    assert len(torchrun_losses) == 20
    assert losses(tmp_path) == torchrun_losses


def test_two_processes_with_zero_2_have_torchruns_losses_when_a_script_starts_them(
    slurm, condense_config, torchrun_losses, tmp_path
):
    words = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/%j.out", "slurm/condense.sh", "--run-dir"]
    job = slurm.run(*words, f"{tmp_path}/run", *ZERO2, CONFIG=str(condense_config)).stdout.strip()
    assert slurm.ends(job, 120) == "COMPLETED"
    assert losses(tmp_path / "run") == torchrun_losses


@pytest.mark.benchmark
def test_fifty_trivial_tasks_take_at_most_twenty_seconds_as_an_array(slurm, tmp_path, capsys):
    begun = time.monotonic()
    slurm.python(TOY, "--launcher", "slurm", "--launch.wait", "--run-dir", tmp_path, "--tasks", 50)
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n50 trivial tasks as a SLURM array: {seconds:.1f} s (bar 20); cluster {slurm.start_s:.1f} s (bar 5)")
    assert len({row["job"].partition("_")[0] for row in read(tmp_path)}) == 2, "two arrays under MaxArraySize"
    assert seconds < 40 and slurm.start_s < 10
    assert until(lambda: all(results(tmp_path / "out" / f"task{i}") for i in range(50)), 1)


def test_the_pipeline_chains_its_stages_and_prints_their_jobs(slurm, tmp_path):
    env = {}
    for number, stage in enumerate(("ENCODE", "CONDENSE", "INIT")):
        path = tmp_path / f"{stage}.yaml"
        fan_out = "tasks: 3\nlaunch: {max_parallel: 2}\n" if stage == "INIT" else ""
        path.write_text(f"run_dir: {tmp_path}/{stage}\nvalue: {number}\nsleep_s: 0.5\n{fan_out}")
        env[stage] = str(path)
    said = slurm.run("bash", "slurm/pipeline.sh", MODULE=TOY, TRAIN="", EVALUATE="", **env).stdout
    ids = dict(line.split() for line in said.splitlines())
    assert list(ids) == ["encode", "condense", "init"]
    assert slurm.field(ids["condense"], "Dependency").startswith(f"afterok:{ids['encode']}")
    assert slurm.ends(ids["init"], 90) == "COMPLETED"
    begun = [float(path.stat().st_mtime) for path in (tmp_path / s / "starts-0" for s in ("ENCODE", "CONDENSE"))]
    assert begun == sorted(begun)
    assert [results(tmp_path / "INIT" / "out" / f"task{i}")[0]["value"] for i in range(3)] == [0, 1, 2]


def test_a_stage_that_fails_stops_the_rest_of_the_pipeline(slurm, tmp_path):
    (tmp_path / "bad.yaml").write_text(f"run_dir: {tmp_path}/bad\nfail: crash\n")
    (tmp_path / "next.yaml").write_text(f"run_dir: {tmp_path}/next\n")
    env = {
        "CONDENSE": f"{tmp_path}/bad.yaml",
        "TRAIN": f"{tmp_path}/next.yaml",
        "ENCODE": "",
        "INIT": "",
        "EVALUATE": "",
    }
    said = slurm.run("bash", "slurm/pipeline.sh", MODULE=TOY, **env).stdout
    ids = dict(line.split() for line in said.splitlines())
    assert slurm.ends(ids["condense"]) == "FAILED"
    assert slurm.ends(ids["train"]) == "CANCELLED"
    assert not (tmp_path / "next" / "starts-0").exists()


def test_a_private_ray_cluster_in_an_allocation_runs_a_command(slurm, tmp_path):
    command = [slurm.env["PYTHON"], "-m", TOY, "--run-dir", f"{tmp_path}/run", "--tasks", "4"]
    words = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=2", f"--output={tmp_path}/out"]
    job = slurm.run(*words, "slurm/ray_on_slurm.sh", *command).stdout.strip()
    assert slurm.ends(job, 150) == "COMPLETED", (tmp_path / "out").read_text()
    assert "4 of 4 tasks done" in (tmp_path / "out").read_text()
    assert not list(Path("/tmp").glob(f"ray-{job}-*"))
