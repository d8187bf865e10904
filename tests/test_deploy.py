"""What installs and deploys the project is consistent with it: pinned versions, images, the manifest for KubeRay."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fine_dist.core.arguments import parse
from fine_dist.family.config import InitConfig

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
EXTRAS = re.findall(r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
IMAGES = ["docker/Dockerfile", "docker/fine_dist.def"]


def pins(python: str) -> dict[str, Version]:
    text = (ROOT / "constraints" / f"py{python.replace('.', '')}.txt").read_text(encoding="utf-8")
    assert "://" not in text  # where packages come from is the user's own setting
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def requirements() -> list[Requirement]:
    """Every direct requirement of the package and its extras."""
    tables = PYPROJECT.partition("dependencies = [")[2].partition("[project.urls]")[0]
    found = [Requirement(text) for text in re.findall(r'"([^"]+)"', tables)]
    return [each for each in found if each.name != "fine_dist"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_supported_python_has_a_version_of_every_requirement_within_its_range(python):
    known = pins(python)
    for each in requirements():
        assert each.specifier.contains(known[canonicalize_name(each.name)]), f"{each} on Python {python}"


def test_the_workflow_tries_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS


def test_the_constraints_of_this_python_are_chosen_and_another_python_is_refused(capsys, monkeypatch):
    choose = str(ROOT / "constraints" / "choose.py")
    runpy.run_path(choose)
    assert capsys.readouterr().out.strip().endswith(f"constraints/py3{sys.version_info.minor}.txt")
    monkeypatch.setattr(sys, "version_info", type(sys)("old"))
    sys.version_info.major, sys.version_info.minor = 3, 9
    with pytest.raises(SystemExit, match=r"Python 3\.9 has no set .*use one of 3\.10, 3\.11, 3\.12, 3\.13"):
        runpy.run_path(choose)


@pytest.mark.parametrize("image", IMAGES)
def test_files_and_extras_that_an_image_names_are_there(image):
    text = (ROOT / image).read_text(encoding="utf-8")
    for path in re.findall(r"(?:constraints|docker|slurm|configs)/[\w./]+", text):
        assert (ROOT / path).exists(), path
    named = {word for group in re.findall(r"(?:\.|fine_dist)\[([\w,]+)\]", text) for word in group.split(",")}
    assert named and named <= set(EXTRAS)


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed: make install")
    done = subprocess.run([hadolint, str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kuberay_manifest_runs_a_command_that_this_version_takes_on_volumes_that_it_mounts():
    job = yaml.safe_load((ROOT / "docker" / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "fine_dist.init"]
    config = parse(InitConfig, words[3:], "init").config
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == str(pins("3.12")["ray"])  # the image's Python
    assert "python:3.12" in (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    workers = cluster["workerGroupSpecs"]
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in workers)
    for group in (cluster["headGroupSpec"], *workers):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes and container["image"].startswith("fine_dist:")
            for path in (config.run_dir, config.parent, config.data.shards):
                assert any(str(path).startswith(f"{mount}/") for mount in mounts), f"{path} is on no volume"
