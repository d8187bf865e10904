"""A wheel holds everything that the commands need, and puts nothing but `fine_dist` into site-packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the wheel of this checkout is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(ROOT)]
    done = subprocess.run(built, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel] = (folder / "dist").glob("fine_dist-*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "site"


def run(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fine_dist", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )


def test_nothing_but_the_package_is_installed(site):
    assert {path.name for path in site.iterdir()} - {"bin"} == {
        "fine_dist",
        *(p.name for p in site.glob("fine_dist-*")),
    }
    assert (site / "fine_dist" / "launchers" / "slurm_submitit.py").is_file()
    assert (site / "fine_dist" / "py.typed").is_file() and (site / "fine_dist" / "creative" / "concepts.txt").is_file()
    assert not list(site.rglob("site.sh")) and not (site / "fine_dist" / "launchers").is_symlink()


def test_commands_and_shipped_configs_work_from_any_folder(site, tmp_path):
    done = run(site, tmp_path, "--version")
    assert done.stdout.startswith("fine_dist 0.2"), done.stderr
    for words in (
        ["condense", "--config", "configs/condense/dit_b.yaml", "--dry-run"],
        ["demo", "--dry-run"],
        ["init-project", "project"],
    ):
        done = run(site, tmp_path, *words)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert (tmp_path / "project" / "slurm" / "site.sh").is_file()


def test_a_job_runs_from_the_wheel_and_its_copy_of_the_code(site, tmp_path):
    done = run(site, tmp_path, "encode", "--out", "digits", "--limit", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["--arch.hidden-size", "16", "--arch.num-layers", "1", "--arch.num-heads", "2", "--arch.patch-size", "4"]
    words += ["--data.shards", "digits/train", "--steps", "2", "--batch", "4", "--launcher", "local"]
    done = run(site, tmp_path, "train", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "train" / "model" / "manifest.json").is_file()
