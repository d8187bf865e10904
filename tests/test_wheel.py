"""A wheel in a clean virtual environment has everything that the commands need, and brings nothing but `fine_dist`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fine_dist.model.arch import Arch
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT

ROOT = Path(__file__).resolve().parents[1]
ARCH = "{hidden_size: 16, num_layers: 2, num_heads: 2, patch_size: 4, in_channels: 1, input_size: 8, num_classes: 10}"
STUDY = f"""
title: Tiny
run_dir: runs/tiny
data: {{data: {{source: digits, limit: 200}}}}
depths: [3]
seeds: [0]
steps: {{N: 2}}
main: fine
baseline: scratch
features: null
pictures: 0
stages:
  condense: {{arch: {ARCH}, batch: 8, engine: {{device: cpu, log_every: 1, eval_every: 1}}}}
  init: {{batch: 8, engine: {{device: cpu, log_every: 1}}}}
  train: {{arch: {ARCH}, batch: 8, engine: {{device: cpu, log_every: 1, eval_every: 1}}}}
entries:
  - {{name: fine, method: {{name: fine}}, condense: {{steps: 2}}, init: {{steps: 2}}, train: [2]}}
  - {{name: scratch, method: {{name: scratch}}, train: [2]}}
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A new virtual environment with the wheel of this checkout.

    The wheel's dependencies are those of the Python that runs the tests: a line of a `.pth` puts their folder on the
    path, and `.pth` files in there (an editable fine_dist) are not read.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an earlier build left there
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(ROOT)]
    done = subprocess.run(built, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel] = (folder / "dist").glob("fine_dist-*.whl")
    venv.create(folder / "venv", with_pip=False)
    [packages] = (folder / "venv" / "lib").glob("python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "venv" / "bin" / "python")
    install = [*pip, "--python", python, "install", "--no-deps", "--ignore-installed", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "venv"


def run(clean: Path, folder: Path, *words: str, program: str = "fine-dist") -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(clean / "bin" / program), *words],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nothing_but_the_package_is_installed(clean):
    [site] = (clean / "lib").glob("python3.*/site-packages")
    names = {path.name for path in site.iterdir()} - {"dependencies.pth"}
    assert names == {"fine_dist", *(path.name for path in site.glob("fine_dist-*.dist-info"))}
    assert (site / "fine_dist" / "launchers" / "slurm_submitit.py").is_file()
    for path in (ROOT / "fine_dist").rglob("*"):  # templates, word lists and recipes as well
        if path.suffix in (".yaml", ".txt", ".html", ".css", ".js", ".pyi", ".typed") and path.is_file():
            assert (site / path.relative_to(ROOT)).is_file(), path
    assert not list(site.rglob("site.sh")) and not (site / "fine_dist" / "launchers").is_symlink()


def test_commands_and_shipped_configs_work_from_any_folder(clean, tmp_path):
    where = run(clean, tmp_path, "-c", "import fine_dist; print(fine_dist.__file__)", program="python")
    assert where.startswith(str(clean)) and run(clean, tmp_path, "--version").startswith("fine_dist 0.2")
    assert "condense" in run(clean, tmp_path, "--help")
    run(clean, tmp_path, "condense", "--config", "configs/condense/dit_b.yaml", "--dry-run")
    run(clean, tmp_path, "demo", "--dry-run")


def test_a_study_runs_from_its_data_to_its_report(clean, tmp_path):
    (tmp_path / "tiny.yaml").write_text(STUDY)
    said = run(clean, tmp_path, "study", "--config", "tiny.yaml", "--launcher", "here")
    page = tmp_path / said.rpartition("report: ")[2].splitlines()[0]
    assert "scratch" in page.read_text() and "<style>" in page.read_text()


def test_a_job_runs_from_the_wheel_and_its_copy_of_the_code(clean, tmp_path):
    run(clean, tmp_path, "encode", "--out", "digits", "--limit", "64")
    words = ["--arch.hidden-size", "16", "--arch.num-layers", "1", "--arch.num-heads", "2", "--arch.patch-size", "4"]
    words += ["--data.shards", "digits/train", "--steps", "2", "--batch", "4", "--launcher", "local"]
    run(clean, tmp_path, "train", *words)
    assert (tmp_path / "runs" / "train" / "model" / "manifest.json").is_file()


def test_a_project_has_what_a_user_edits_and_its_example_runs_there(clean, tmp_path):
    from diffusers import AutoencoderKL

    run(clean, tmp_path, "init-project", "project")
    project = tmp_path / "project"
    assert (project / "slurm" / "site.sh").is_file() and (project / "configs" / "condense" / "dit_b.yaml").is_file()
    rng = np.random.default_rng(0)
    for i in range(12):
        photo = project / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photo)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **blocks).save_pretrained(
        project / "vae"
    )
    arch = Arch(hidden_size=64, num_layers=2, num_heads=1, patch_size=2, in_channels=4, input_size=8, num_classes=2)
    method, tensors = {"name": "scratch"}, DiT(arch).state_dict()
    save_artifact(project / "ancestor", kind="model", method=method, arch=arch, tensors=tensors)
    words = ["photos", "--vae", "vae", "--size", "16", "--ancestor", "ancestor", "--depths", "1", "--steps", "2"]
    words += ["--init-steps", "1", "--batch", "4", "--count", "2", "--sampler-steps", "1", "--held-out-fraction", "0.3"]
    run(clean, project, "examples/own_images/run.py", *words, program="python")
    assert (project / "runs" / "own_images" / "samples" / "samples.png").is_file()
