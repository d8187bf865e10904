"""What a submission writes down: config, code, job files, tickets for the scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.core.config import load, run_dir_of
from fine_dist.core.errors import ConfigError, LaunchError
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.code_snapshot import snapshot
from fine_dist.launchers.prepare import launch_of, make_spec, make_specs, tasks_of
from fine_dist.launchers.sbatch import sbatch_flags
from fine_dist.launchers.spec import JobSpec, Task
from fine_dist.launchers.state_table import StateTable
from fine_dist.launchers.worker import config_class, import_module, run_job
from tests.cluster.toy_stage import ToyConfig

TOY = "tests.cluster.toy_stage"
ROOT = Path(__file__).resolve().parents[2]


def test_a_job_carries_what_its_config_asks_for_and_the_config_reloads_equal(tmp_path):
    launch = LaunchConfig(nodes=2, processes=4, gpus=1, cpus=3, memory_gb=64, minutes=30, slurm={"qos": "high"})
    config = ToyConfig(run_dir=str(tmp_path), value=3, launch=launch)
    spec = make_spec(TOY, config)
    assert load(ToyConfig, spec.config) == config
    assert (spec.name, spec.world_size, spec.accelerators_per_node, spec.cwd) == ("toy_stage", 8, 4, os.getcwd())
    assert sbatch_flags(spec, launch) == [
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=4", "--mem=65536M", "--time=30",
        "--qos=high",
    ]  # fmt: skip


def test_another_submission_does_not_touch_the_files_of_the_first(tmp_path):
    first = make_spec(TOY, ToyConfig(run_dir=str(tmp_path), value=1))
    second = make_spec(TOY, ToyConfig(run_dir=str(tmp_path), value=2))
    assert first.config != second.config
    assert load(ToyConfig, first.config).value == 1


def test_planning_a_job_writes_nothing(tmp_path):
    make_spec(TOY, ToyConfig(run_dir=str(tmp_path / "run")), write=False)
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_code_is_made_once_per_content_and_runs(tmp_path):
    code = snapshot(tmp_path, TOY)
    assert snapshot(tmp_path, TOY) == code and len(list((tmp_path / "code").iterdir())) == 1
    assert (code / "slurm" / "env.sh").exists() and (code / "tests" / "cluster" / "toy_stage.py").exists()
    assert not list(code.rglob("*.pyc")) and json.loads((code / "SNAPSHOT.json").read_text())["version"]
    spec = make_spec(TOY, ToyConfig(run_dir=str(tmp_path / "run")), code=str(code))
    file = spec.save(tmp_path / "job.json")
    words = [sys.executable, "-c", "import fine_dist; print(fine_dist.__file__)"]
    assert str(code) in subprocess.run(words, cwd=code, capture_output=True, text=True, check=True).stdout
    subprocess.run([sys.executable, "-m", "fine_dist.worker", str(file)], cwd=code, check=True)
    assert (tmp_path / "run" / "result-0.json").exists()


def test_tasks_of_one_name_are_refused(tmp_path, monkeypatch):
    module = import_module(TOY)
    twice = [Task("a", ToyConfig()), Task("b", ToyConfig(), rows=("a",))]
    monkeypatch.setattr(module, "tasks", lambda config: twice)
    with pytest.raises(LaunchError, match="two tasks are named 'a'"):
        tasks_of(TOY, ToyConfig())


def test_a_pack_has_a_row_for_each_of_its_members(tmp_path):
    config = ToyConfig(run_dir=str(tmp_path))
    [spec] = make_specs(TOY, config, [Task("pack", ToyConfig(run_dir=str(tmp_path / "p")), rows=("x", "y"))])
    assert spec.rows == ("x", "y")
    assert run_job(str(spec.save(tmp_path / "job.json"))) == 0
    from fine_dist.launchers.state_table import StateTable

    assert [(row.name, row.state) for row in StateTable(tmp_path).rows()] == [("x", "done"), ("y", "done")]


def test_a_config_without_run_directory_is_refused():
    with pytest.raises(ConfigError, match="give --run-dir PATH"):
        run_dir_of(LaunchConfig())
    assert launch_of(ToyConfig()) == LaunchConfig()


def test_a_module_that_cannot_be_a_job_is_named():
    with pytest.raises(LaunchError, match="no_such_module"):
        import_module("no_such_module")
    with pytest.raises(LaunchError, match=r"has no run\(config\)"):
        import_module("fine_dist.core.errors")
    assert config_class(import_module(TOY)) is ToyConfig


def test_a_job_done_already_is_not_run_again(tmp_path):
    config = ToyConfig(run_dir=str(tmp_path))
    [spec] = make_specs(TOY, config, [Task("t", ToyConfig(run_dir=str(tmp_path / "t")))])
    file = str(spec.save(tmp_path / "job.json"))
    assert run_job(file) == 0 and run_job(file) == 0
    assert len((tmp_path / "t" / "starts-0").read_text().splitlines()) == 1


def test_a_task_that_another_process_runs_is_left_to_it(tmp_path, capsys):
    from fine_dist.launchers.state_table import StateTable

    config = ToyConfig(run_dir=str(tmp_path))
    [spec] = make_specs(TOY, config, [Task("t", ToyConfig(run_dir=str(tmp_path / "t")))])
    with StateTable(tmp_path).claim(["t"]):
        words = [sys.executable, "-m", "fine_dist.worker", str(spec.save(tmp_path / "job.json"))]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 76 and "another live process runs this task" in done.stderr


def test_the_worker_answers_a_wrong_call_and_a_broken_job_with_one_message(tmp_path):
    for words, said in (([], "usage"), ([tmp_path / "no.json"], "no.json")):
        line = [sys.executable, "-m", "fine_dist.worker", *map(str, words)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_every_script_is_clean_for_shellcheck():
    import shutil

    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(path) for path in (ROOT / "slurm").glob("*.sh") if path.name != "site.sh")
    assert len(scripts) == 10
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stdout


def test_every_stage_script_requeues_appends_and_is_warned_before_its_limit():
    for stage in ("encode", "condense", "init", "train", "evaluate", "ray_on_slurm"):
        text = (ROOT / "slurm" / f"{stage}.sh").read_text()
        for line in ("--requeue", "--open-mode=append", "--signal=B:USR1@120"):
            assert f"#SBATCH {line}\n" in text
        assert "set -euo pipefail" in text and JobSpec


def test_more_steps_reopen_finished_tasks_and_results_of_another_launcher_are_done(tmp_path):
    """The one rule of what is left: `Task.complete`, which a module fills where it can tell."""
    config, table = ToyConfig(run_dir=str(tmp_path)), StateTable(tmp_path)
    part = ToyConfig(run_dir=str(tmp_path / "p"))
    make_specs(TOY, config, [Task("pack", part, rows=("x", "y"))])
    table.finish("x", "done")
    [spec] = make_specs(TOY, config, [Task("pack", part, ("x", "y"), complete=("y",))])
    assert [(row.name, row.state) for row in table.rows()] == [("x", "pending"), ("y", "done")]
    assert run_job(str(spec.save(tmp_path / "job.json"))) == 0
    assert [(row.name, row.state) for row in table.rows()] == [("x", "done"), ("y", "done")]


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x7fb"])
def test_a_run_directory_that_no_script_can_name_is_refused_before_submission(tmp_path, name):
    with pytest.raises(LaunchError, match="control character"):
        make_spec(TOY, ToyConfig(run_dir=str(tmp_path / name)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["50%j", "a\\b"])
def test_a_run_directory_whose_name_slurm_would_change_is_refused(tmp_path, name):
    from fine_dist.launchers.sbatch import prepare

    with pytest.raises(LaunchError, match="choose a name without it"):
        prepare(TOY, ["--run-dir", str(tmp_path / name)])


def test_site_files_may_read_unset_variables_and_a_clusters_own_scratch_is_left_alone(tmp_path):
    site = tmp_path / "site.sh"
    code = 'set -euo pipefail; source slurm/env.sh; TMPDIR=/t; eval "$ON_NODE"; echo "$TMPDIR" "$SCRATCH" "$-"'

    def run(text: str) -> list[str]:
        site.write_text(text)
        env = {**os.environ, "FINE_DIST_SITE": str(site), "SCRATCH": "/lustre/me", "SLURM_SUBMIT_DIR": str(ROOT)}
        done = subprocess.run(["bash", "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert run("export X=/opt:$NOT_SET_ANYWHERE\n")[:2] == ["/t", "/lustre/me"]
    assert run(f"SCRATCH={tmp_path}/node\n")[:2] == [f"{tmp_path}/node", "/lustre/me"]
    assert "u" in run("")[2]


def test_a_script_without_an_environment_says_in_one_line_what_to_set(tmp_path):
    env = {"PATH": os.environ["PATH"], "PYTHON": "/usr/bin/env", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "slurm/condense.sh"], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "PYTHON=/usr/bin/env" in done.stderr and "slurm/site.sh" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_on_a_site_with_scratch_and_a_network_has_both(tmp_path, monkeypatch):
    from fine_dist.launchers.site import SlurmSite

    site = tmp_path / "site.sh"
    site.write_text(f"IFNAME=ib0\nSCRATCH={tmp_path}/scratch\n")
    monkeypatch.setenv("FINE_DIST_SITE", str(site))
    assert SlurmSite.here().environment()["GLOO_SOCKET_IFNAME"] == "ib0"
    script = "\n".join([*SlurmSite.here().setup_lines(), 'echo "$NCCL_SOCKET_IFNAME $FINE_DIST_SCRATCH $SCRATCH"'])
    env = {**os.environ, "SCRATCH": "/lustre/me"}
    done = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ib0", f"{tmp_path}/scratch", "/lustre/me"]
    spec = make_spec(TOY, ToyConfig(run_dir=str(tmp_path / "run")))
    job = str(spec.save(tmp_path / "j.json"))
    code = f"import tempfile; from fine_dist.launchers.worker import run_job; run_job({job!r})"
    words = [sys.executable, "-c", f"{code}; print(tempfile.gettempdir())"]
    env = {**os.environ, "FINE_DIST_SCRATCH": f"{tmp_path}/scratch"}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == f"{tmp_path}/scratch"


def test_one_rank_where_two_were_asked_for_is_refused_inside_a_shell_of_srun(tmp_path, monkeypatch):
    from fine_dist.launchers.entry import launch

    shell = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for key, value in shell.items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "WORLD_SIZE", "FINE_DIST_JOB"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(LaunchError, match="asks for 2 processes, and this process is the only one"):
        launch(TOY, ToyConfig(run_dir=str(tmp_path), launch=LaunchConfig(processes=2)))
    assert launch(TOY, ToyConfig(run_dir=str(tmp_path))) == 0
