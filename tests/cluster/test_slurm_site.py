"""A site of its own ways, on a real SLURM cluster: set-up, scratch, another option for GPUs, no requeues."""

from __future__ import annotations

import json
import re

import pytest

from fine_dist.launchers.state_table import Submissions
from fine_dist.launchers.status import read
from tests.cluster.conftest import TOY, results, starts, until

pytestmark = pytest.mark.cluster


@pytest.fixture
def site(tmp_path):
    """A site file; each job that sources it leaves a line, and scratch folders are made on the nodes."""
    file = tmp_path / "site.sh"
    file.write_text(
        f'echo "${{SLURM_JOB_ID:-login}}" >> {tmp_path}/sourced\nGPU_FLAG=gres\nREQUEUE=resubmit\n'
        f"SCRATCH={tmp_path}/scratch-${{SLURM_JOB_ID:-login}}\n"
    )
    return {"FINE_DIST_SITE": str(file)}


def resolve_sampling(slurm, ready, what: str) -> None:
    until(lambda: ready() and not slurm.run("squeue", "-h", check=False).stdout.strip(), 90, what)


def test_a_script_that_may_not_requeue_submits_itself_again_and_ends(slurm, tmp_path, site):
    run_dir, config = tmp_path / "run", tmp_path / "toy.yaml"
    config.write_text("stop_times: 2\nlaunch: {gpus: 1}\n")
    words = ["sbatch", "--parsable", f"--output={tmp_path}/%j.out", "slurm/condense.sh", "--run-dir", str(run_dir)]
    job = slurm.run(*words, CONFIG=str(config), MODULE=TOY, **site).stdout.strip()
    resolve_sampling(slurm, lambda: results(run_dir), "the third start")
    logs = sorted((run_dir / "logs").glob("toy_stage-*.log"))
    assert starts(run_dir) == 3 and len(logs) == 3
    first = next(path for path in logs if path.name == f"toy_stage-{job}.log").read_text()
    [second] = re.findall(r"continues as job (\d+) \(restart 1 of at most 20\)", first)
    assert "=gres:gpu:1" in slurm.run("scontrol", "show", "job", second).stdout
    assert (tmp_path / f"scratch-{second}").is_dir() and second in (tmp_path / "sourced").read_text().split()


def test_a_script_that_always_stops_submits_itself_only_so_often(slurm, tmp_path, site):
    run_dir, config = tmp_path / "run", tmp_path / "toy.yaml"
    config.write_text("stop_times: 100\ntasks: 2\n")
    words = ["bash", "slurm/init.sh", "--run-dir", str(run_dir)]
    slurm.run(*words, CONFIG=str(config), MODULE=TOY, MAX_RESTARTS="1", SBATCH_EXPORT="NONE", **site)
    tasks = [run_dir / "out" / f"task{i}" for i in range(2)]
    resolve_sampling(slurm, lambda: all(starts(task) == 2 for task in tasks), "two starts of each task")
    assert [starts(task) for task in tasks] == [2, 2]
    said = [path.read_text() for path in (run_dir / "logs").glob("toy_stage-*.log")]
    assert sum("restarted 1 times already" in text for text in said) == 2


def test_a_job_that_submitted_itself_does_so_again_where_it_may_not_requeue(slurm, tmp_path, site):
    slurm.python(TOY, "--launcher", "slurm", "--run-dir", tmp_path / "run", "--stop-times", 2, **site)
    resolve_sampling(slurm, lambda: results(tmp_path / "run"), "the third start")
    assert starts(tmp_path / "run") == 3 and len(Submissions(tmp_path / "run").all()) == 3
    words = ("--tasks", 2, "--stop-times", 1)
    slurm.python(TOY, "--launcher", "slurm", "--run-dir", tmp_path / "many", *words, **site)
    resolve_sampling(
        slurm, lambda: all(results(tmp_path / "many" / "out" / f"task{i}") for i in range(2)), "both tasks"
    )
    assert [row["state"] for row in read(tmp_path / "many")] == ["done", "done"]


def test_the_doctor_finds_by_one_short_job_what_the_site_file_needs(slurm, tmp_path):
    words = ("--launcher", "slurm", "--launch.nodes", 2, "--run-dir", tmp_path / "run", "--json")
    said = slurm.python("fine_dist.doctor", *words, check=False, SBATCH_EXPORT="NONE", SCRATCH="/dev/shm").stdout
    report = json.loads(said[said.index("{") :])
    found = {finding["what"]: (finding["level"], finding["text"]) for finding in report["findings"]}
    assert "2 of 2 processes reported" in found["processes"][1]
    for what in ("environment", "storage", "locks", "cores", "network", "requeue"):
        assert found[what][0] == "ok", found
    assert "users may requeue" in found["requeue"][1]
    assert not [line for line in report["site"] if line.startswith(("REQUEUE", "GPU_FLAG"))]  # a plain SLURM
