"""What is said to SLURM and understood of its answers: fakes in place of its commands, and a golden script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.config import LaunchConfig
from fine_dist.errors import LaunchError
from fine_dist.jobs.prepare import make_spec
from launchers import slurm_queue, slurm_submitit
from launchers.slurm_queue import job_states, limits, scheduler_words
from launchers.slurm_steps import _counts
from launchers.slurm_submitit import SlurmLauncher
from tests.cluster.toy_stage import ToyConfig

TOY = "tests.cluster.toy_stage"
FAKES = {
    "scontrol": """
if [ "$2" = config ]; then echo "MaxArraySize            = 2"; fi
if [ "$2" = partition ]; then
echo "PartitionName=gpu Default=NO DefaultTime=NONE MaxTime=2-00:00:00 TotalNodes=9"
echo "PartitionName=cpu Default=YES DefaultTime=00:30:00 MaxTime=UNLIMITED TotalNodes=3"
fi""",
    "sbatch": """
echo "$@" >> $FAKE/sbatch.calls; cat "$1" >> $FAKE/script 2>/dev/null
n=$(wc -l < $FAKE/sbatch.calls)
if [ "$n" -gt "${ACCEPT:-9}" ]; then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi
echo "Submitted batch job $n\"""",
    "scancel": 'echo "$@" >> $FAKE/scancel.calls',
    "srun": "exit 1",
    "squeue": 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
    "sacct": "echo '7_0|COMPLETED|0:0'; echo '7_1|FAILED|3:0'; echo '7_2|CANCELLED by 0|0:15'; echo '8|NODE_FAIL|0:0'",
}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/sh\n{body.strip()}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def specs(folder: Path, count: int, **launch):
    needs = LaunchConfig(**launch)
    configs = [ToyConfig(run_dir=str(folder / f"t{i}"), launch=needs) for i in range(count)]
    return needs, [make_spec(TOY, c, f"t{i}", code="/the/code", table=folder) for i, c in enumerate(configs)]


def test_a_fan_out_is_cut_into_arrays_that_the_cluster_takes(fake):
    needs, jobs = specs(fake / "run", 5, max_parallel=2)
    made = SlurmLauncher(needs).submit_many(jobs, 2)
    assert [job.id for job in made] == ["1_0", "1_1", "2_0", "2_1", "3"]


def test_when_a_later_array_is_refused_the_earlier_ones_are_taken_back(fake, monkeypatch):
    monkeypatch.setenv("ACCEPT", "1")
    needs, jobs = specs(fake / "run", 5)
    with pytest.raises(LaunchError, match=r"sbatch refused t2: sbatch: error: QOSMaxSubmitJobPerUserLimit$"):
        SlurmLauncher(needs).submit_many(jobs)
    assert (fake / "scancel.calls").read_text().split() == ["1_0", "1_1"]


def test_the_script_says_what_the_job_needs(fake):
    needs, jobs = specs(
        fake / "run", 2, nodes=2, processes=4, gpus=1, cpus=3, memory_gb=1.5, minutes=90, partition="gpu", account="us",
        slurm={"constraint": "a100"},
    )  # fmt: skip
    SlurmLauncher(needs).submit_many(jobs, 1)
    text = (fake / "script").read_text()
    for line in (
        "#SBATCH --account=us", "#SBATCH --array=0-1%1", "#SBATCH --chdir=/the/code", "#SBATCH --constraint=a100",
        "#SBATCH --cpus-per-task=3", "#SBATCH --gpus-per-node=4", "#SBATCH --mem=1536M", "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4", "#SBATCH --open-mode=append", "#SBATCH --partition=gpu", "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120", "#SBATCH --time=90", "export PYTHONPATH=/the/code${PYTHONPATH:+:$PYTHONPATH}",
    ):  # fmt: skip
        assert f"{line}\n" in text, line
    assert "srun --unbuffered" in text and "--kill-on-bad-exit=1" in text


def test_limits_are_those_of_the_partition(fake):
    assert (limits().partition, limits().minutes, limits().max_minutes) == ("cpu", 30, None)
    gpu = limits("gpu")
    assert (gpu.array, gpu.minutes, gpu.max_minutes, gpu.nodes) == (2, 2880, 2880, 9)


def test_jobs_that_left_the_queue_are_looked_up_in_the_accounts(fake):
    states = job_states(["7_0", "7_1", "7_2", "8", "9"])
    assert states["7_0"] == ("done", 0, "")
    assert states["7_1"] == ("failed", 3, "")
    assert states["7_2"][:2] == ("cancelled", 130)
    assert states["8"] == ("failed", None, "SLURM says NODE_FAIL")
    assert states["9"] == ("failed", None, "unknown to SLURM")


def test_a_job_that_only_the_accounting_believes_in_is_lost_after_a_while(fake, monkeypatch):
    (fake / "bin" / "sacct").write_text("#!/bin/sh\necho '1|RUNNING|0:0'\n")
    needs, jobs = specs(fake / "run", 1)
    launcher = SlurmLauncher(needs)
    job = launcher.submit(jobs[0])
    assert launcher.status(job) == "running"
    monkeypatch.setattr(slurm_submitit, "GHOST_S", -1.0)
    launcher._next_look = 0.0
    assert launcher.status(job) == "failed" and "forgotten" in job.reason


def test_a_controller_that_is_away_for_a_moment_is_asked_again(fake, monkeypatch):
    monkeypatch.setattr(slurm_queue.time, "sleep", lambda seconds: None)
    (fake / "bin" / "squeue").write_text(
        "#!/bin/sh\necho x >> $FAKE/tries\n[ $(wc -l < $FAKE/tries) -gt 2 ] && exec echo '7_0 RUNNING 0'\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    assert job_states(["7_0"])["7_0"][0] == "running"


def test_without_slurm_the_message_says_where_to_go(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="login node"):
        limits()


def test_only_the_schedulers_words_are_shown():
    text = "Traceback (most recent call last):\n  x\nsbatch: error: invalid partition specified: a\nsbatch: error: b\n"
    assert scheduler_words(text) == "sbatch: error: invalid partition specified: a; sbatch: error: b"
    assert scheduler_words("odd") == "odd"


def test_compressed_counts_are_read():
    assert _counts("8(x2),4") == [8, 8, 4]


def test_no_cluster_library_is_imported_by_a_local_command():
    code = "import sys, launchers, fine_dist.plan; print({'ray', 'submitit', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
