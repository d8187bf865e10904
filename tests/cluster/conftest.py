"""Real clusters on this machine, one a session: `slurm/local_cluster.py` and `launchers/local_ray.py` keep them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SharedFolder, logged_losses

ROOT = Path(__file__).resolve().parents[2]
ARRAY_LIMIT = 33
"""Largest array of the cluster under test, so that 50 tasks need two."""
TOY = "tests.cluster.toy_stage"


def absent(reason: str) -> None:
    """Skip for want of a cluster, or fail where clusters are required."""
    if os.environ.get("FINE_DIST_REQUIRE_CLUSTERS") == "1":
        pytest.fail(f"FINE_DIST_REQUIRE_CLUSTERS=1 and {reason}")
    pytest.skip(reason)


def until(condition: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """The first true answer; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds} s for {what or condition}")
        time.sleep(0.1)


class Cluster:
    """A cluster that another program keeps; it ends when its input closes, so even a killed test run leaves nothing."""

    def __init__(self, *command: str) -> None:
        begun = time.monotonic()
        self._server = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._server.stdin and self._server.stdout
        line = self._server.stdout.readline()
        if not line:
            pytest.fail(f"{' '.join(command)} did not start a cluster (exit code {self._server.wait()})")
        self.about = json.loads(line)
        self.start_s = time.monotonic() - begun
        self.folder = Path(self.about["folder"])
        self.env = {**os.environ, **self.about["env"], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.env = {k: v for k, v in self.env.items() if k not in ("RANK", "WORLD_SIZE", "PYTEST_CURRENT_TEST")}

    def tell(self, verb: str, name: str) -> dict[str, Any]:
        assert self._server.stdin and self._server.stdout
        print(verb, name, file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def run(self, *command: str, check: bool = True, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
        """A command as a user types it in the project's folder."""
        done = subprocess.run(
            command, env={**self.env, **env}, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, module: str, *args: object, **options: Any) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", module, *map(str, args), **options)

    def popen(self, module: str, *args: object, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)], env={**self.env, **env}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


class Slurm(Cluster):
    """The SLURM cluster, in words of tests."""

    def __init__(self) -> None:
        super().__init__("slurm/local_cluster.py", "--pipe", "--conf", f"MaxArraySize={ARRAY_LIMIT}")

    def state(self, job: str) -> str:
        """The scheduler's word for a job, such as RUNNING or COMPLETED."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").stdout.split("\n")[0]

    def field(self, job: str, name: str) -> str:
        said = self.run("scontrol", "show", "job", "-o", job).stdout
        return next(word.split("=", 1)[1] for word in said.split() if word.startswith(f"{name}="))

    def ends(self, job: str, seconds: float = 60) -> str:
        """Wait until a job (all of an array) is out of the queue; the last state."""
        until(lambda: not self.run("squeue", "-h", "-j", job, check=False).stdout.strip(), seconds, f"job {job} to end")
        return self.state(job)

    def restore(self) -> None:
        """An idle cluster again, whatever a test did."""
        self.run("scancel", "-u", "root", "--full", check=False)
        for name in ("n1", "n2", "n3", "n4"):
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        until(lambda: not self.run("squeue", "-h", check=False).stdout.strip(), 60, "an empty queue")
        until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle").stdout.count("\n") == 4, 60, "idle nodes"
        )


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    probe = subprocess.run(
        [sys.executable, "-c", "import local_cluster; print(local_cluster.missing() or '')"],
        cwd=ROOT / "slurm", capture_output=True, text=True, check=True,
    )  # fmt: skip
    if probe.stdout.strip():
        absent(probe.stdout.strip())
    cluster = Slurm()
    yield cluster
    cluster.close()


@pytest.fixture
def slurm(slurm_cluster: Slurm) -> Iterator[Slurm]:
    yield slurm_cluster
    slurm_cluster.restore()


@pytest.fixture(scope="session")
def condense_config(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A condense that takes some seconds on one core, with a checkpoint several times a second."""
    config = {
        "run_dir": "unset",
        "arch": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "patch_size": 2, "in_channels": 1, "input_size": 8,
                 "num_classes": 10, "learn_sigma": False},
        "method": {"name": "fine"},
        "steps": 400,
        "batch": 16,
        "data": {"shards": str(digit_shards / "train"), "streams": 4},
        "optim": {"lr": 1e-3},
        "engine": {"device": "cpu", "ema_decay": 0.9, "checkpoint_every": 20, "log_every": 1, "preview_every": 100000,
                   "eval_every": 100000, "threads": 1},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("condense") / "condense.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def undisturbed_run(condense_config: Path, shared_folder: SharedFolder) -> Path:
    """What `condense_config` gives when nothing happens."""
    command = ("fine_dist.condense", "--config", condense_config, "--run-dir")
    return shared_folder("undisturbed", lambda folder: here(*command, folder / "run")) / "run"


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run: Path) -> str:
    """Digest of that learngene."""
    return digest(undisturbed_run)


@pytest.fixture(scope="session")
def family_config(undisturbed_run: Path, digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of three targets in two packs."""
    config = {
        "parent": str(undisturbed_run / "learngene"), "depths": [1, 2, 4], "steps": 20, "batch": 16,
        "data": {"shards": str(digit_shards / "train"), "streams": 4}, "engine": {"device": "cpu", "threads": 1},
        "pack": {"max_jobs": 2},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("init") / "family.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def family_digests(family_config: Path, shared_folder: SharedFolder) -> dict[str, str]:
    """Digest of every target when one process trains them all."""
    command = ("fine_dist.init", "--config", family_config, "--run-dir")
    return targets(shared_folder("family", lambda folder: here(*command, folder / "run")) / "run")


def targets(run_dir: Path) -> dict[str, str]:
    """Digest of every target in a family's folder."""
    from fine_dist.model.artifact import load_artifact

    return {path.parent.name: load_artifact(path).hash for path in sorted(run_dir.glob("*/target"))}


def steps_of(run_dir: Path) -> set[int]:
    """Updates of every target in a family's folder, as their results say."""
    return {json.loads(path.read_text())["steps"] for path in run_dir.glob("L*/DONE.json")}


def here(module: str, *words: object) -> None:
    """A command in one process of this machine."""
    line = [sys.executable, "-m", module, *map(str, words), "--launcher", "here"]
    done = subprocess.run(
        line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


ZERO2 = ("--steps", "20", "--engine.backend", "deepspeed", "--engine.deepspeed.stage", "2")
"""Over `condense_config`: what two processes do with DeepSpeed."""


@pytest.fixture(scope="session")
def torchrun_losses(condense_config: Path, shared_folder: SharedFolder) -> list[float]:
    """Losses of a ZeRO-2 condense by torchrun's two processes, update by update."""

    def make(folder: Path) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
        words += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "-m", "fine_dist.condense"]
        done = subprocess.run(
            [*words, "--config", str(condense_config), "--run-dir", str(folder / "run"), *ZERO2], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    return losses(shared_folder("torchrun", make) / "run")


def losses(run_dir: Path) -> list[float]:
    """The loss of every update that a run has logged, to five decimals."""
    return [round(loss, 5) for loss in logged_losses(run_dir)]


def digest(run_dir: Path) -> str:
    """What a run has made: the hash of its learngene's tensors."""
    from fine_dist.model.artifact import load_artifact

    return load_artifact(run_dir / "learngene").hash


def checkpoints(run_dir: Path) -> int:
    """The number of updates that a run has kept."""
    steps = [int(match[0]) for p in (run_dir / "checkpoints").glob("*") if (match := re.findall(r"\d+", p.name))]
    return max(steps, default=0)


def results(run_dir: Path) -> list[dict[str, Any]]:
    """What the toy's ranks have written."""
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("result-*.json"))]


def starts(run_dir: Path, rank: int = 0) -> int:
    """How often the toy's rank was started."""
    path = run_dir / f"starts-{rank}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A scheduler's timers are coarse and its daemons share two cores with all else: a cluster test that fails is run
    once more, and the summary says that it was. What fails twice fails."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1, reruns_delay=5))
