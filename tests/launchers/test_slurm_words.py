"""What is said to SLURM and understood of its answers: fakes in place of its commands, and a golden script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.core.errors import LaunchError
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers import slurm_queue, slurm_submitit
from fine_dist.launchers.prepare import make_spec
from fine_dist.launchers.sbatch import sbatch_flags
from fine_dist.launchers.site import SlurmSite
from fine_dist.launchers.slurm_queue import job_states, limits, scheduler_message
from fine_dist.launchers.slurm_steps import _counts
from fine_dist.launchers.slurm_submitit import SlurmLauncher
from fine_dist.launchers.spec import Capacity
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
if [ "$1" = --test-only ]; then shift; echo "$@" > $FAKE/asked; cp "$1" $FAKE/asked.sh 2>/dev/null; exit 0; fi
echo "$@" >> $FAKE/sbatch.calls; cat "$1" >> $FAKE/script 2>/dev/null
n=$(wc -l < $FAKE/sbatch.calls)
if [ "$n" -gt "${ACCEPT:-9}" ]; then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi
echo "Submitted batch job $n\"""",
    "scancel": 'echo "$@" >> $FAKE/scancel.calls',
    "srun": "exit 1",
    "sinfo": "echo '8|16000|gpu:a100:4(S:0-1)|idle'; echo '8|16000|(null)|mixed'; echo '64|9|gpu:8|down*'",
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


def test_a_fan_out_is_planned_for_the_nodes_of_the_partition(fake):
    needs, [job, *_] = specs(fake / "run", 1, gpus=1, cpus=2, gpu_memory_gb=40)
    launcher = SlurmLauncher(needs)
    assert launcher.fits(job) == 4
    assert launcher.capacity(job) == Capacity(4, 40 * 2**30, False, None)
    needs, [job, *_] = specs(fake / "run", 1, cpus=2)
    assert SlurmLauncher(needs).fits(job) == 8


@pytest.mark.parametrize("many", [False, True])
def test_the_preflight_asks_about_the_very_script_that_is_submitted(fake, many):
    needs, jobs = specs(fake / "run", 2, nodes=2, gpus=1, cpus=3, memory_gb=1.5, slurm={"constraint": "a100"})
    launcher = SlurmLauncher(needs)
    assert launcher.findings(jobs[0], many)[-1].level == "ok"
    launcher.submit_many(jobs) if many else launcher.submit(jobs[0])

    def request(path):
        text = path.read_text().replace("--array=0-1%", "--array=0-0%").replace("%2", "%1")
        return [line for line in text.splitlines() if line.startswith("#SBATCH") and "put=" not in line
                and "--job-name" not in line and "error=" not in line]  # fmt: skip

    asked, submitted = request(fake / "asked.sh"), request(fake / "script")
    assert [line for line in asked if "array" not in line] == [line for line in submitted if "array" not in line]
    assert any("array" in line for line in asked) == any("array" in line for line in submitted) == many
    assert "#SBATCH --constraint=a100" in asked and "#SBATCH --gpus-per-node=1" in asked


SITE = """
echo "loading modules"
GPU_FLAG=gres
CONTAINER_SRUN="--container-image=/i.sqsh --container-mounts=/a:/a"
CONTAINER_EXEC="apptainer exec --nv /i.sif"
"""


def test_a_sites_facts_are_in_the_script(fake, monkeypatch):
    site = fake / "site.sh"
    site.write_text(SITE)
    monkeypatch.setenv("FINE_DIST_SITE", str(site))
    needs, jobs = specs(fake / "run", 1, processes=2, gpus=1)
    SlurmLauncher(needs).submit(jobs[0])
    text = (fake / "script").read_text()
    assert "#SBATCH --gres=gpu:2\n" in text and "gpus-per-node" not in text
    assert f"\nsource {site}\n" in text and f"apptainer exec --nv /i.sif {sys.executable} -u" in text
    assert "#SBATCH --export=ALL\n" in text and "srun --unbuffered" in text and " --export=ALL " in text
    assert "--container-image=/i.sqsh --container-mounts=/a:/a" in text
    assert "--gres=gpu:2" in sbatch_flags(jobs[0], needs)
    needs, jobs = specs(fake / "run", 1, gpus=1, slurm={"gres": "gpu:h100:1"})
    assert "--gres=gpu:h100:1" in sbatch_flags(jobs[0], needs)  # what a config says is not said twice
    assert len([flag for flag in sbatch_flags(jobs[0], needs) if "gpu" in flag]) == 1


def test_a_site_file_that_is_wrong_is_named_with_what_is_legal(fake, monkeypatch):
    site = fake / "site.sh"
    monkeypatch.setenv("FINE_DIST_SITE", str(site))
    with pytest.raises(LaunchError, match=r"no such file .*; copy slurm/site\.example\.sh"):
        SlurmSite.here()
    site.write_text("GPU_FLAG=gpus_per_node\n")
    with pytest.raises(LaunchError, match="did you mean 'gpus-per-node'"):
        SlurmSite.here()
    site.write_text("no_such_command\n")
    with pytest.raises(LaunchError, match=r"cannot be sourced.*no_such_command"):
        SlurmSite.here()
    site.write_text("REQUEUE=resubmit\n")
    assert not SlurmSite.here().requeues
    assert SlurmSite().gpu_flag(4, 4) == "--gpus-per-node=4"
    assert SlurmSite(gpu_style="gpus-per-task").gpu_flag(4, 2) == "--gpus-per-task=2"


def test_the_example_of_a_site_says_nothing_as_it_is(monkeypatch):
    example = Path(__file__).resolve().parents[2] / "slurm" / "site.example.sh"
    monkeypatch.setenv("FINE_DIST_SITE", str(example))
    assert SlurmSite.here() == SlurmSite(example)


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
    monkeypatch.setattr(slurm_submitit, "LOST_AFTER_S", -1.0)
    launcher._next_poll = 0.0
    assert launcher.status(job) == "failed" and "does not know it" in job.reason


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
    assert scheduler_message(text) == "sbatch: error: invalid partition specified: a; sbatch: error: b"
    assert scheduler_message("odd") == "odd"


def test_compressed_counts_are_read():
    assert _counts("8(x2),4") == [8, 8, 4]


def test_no_cluster_library_is_imported_by_a_local_command():
    code = "import sys, fine_dist.launchers, fine_dist.plan; print({'ray', 'submitit', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
