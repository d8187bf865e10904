"""A study on real clusters: every run is a job of its own, submitted when what it needs is done."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import slurm, slurm_cluster, until  # noqa: F401 (fixtures)
from tests.cluster.test_ray import ray  # noqa: F401 (a fixture)

pytestmark = pytest.mark.cluster


def ran(root) -> list[str]:
    return [(root / name / "ran").read_text() for name in ("one", "two", "three")]


def test_a_study_submits_jobs_in_order_and_the_same_command_submits_nothing(slurm, tmp_path):  # noqa: F811
    words = ("tests.study.toy", tmp_path, "slurm")
    slurm.python(*words, timeout=200)
    assert ran(tmp_path) == ["once\n"] * 3
    jobs = sorted((tmp_path / "jobs" / ".submitted").iterdir())
    assert len(jobs) == 3
    slurm.python(*words, timeout=200)
    assert sorted((tmp_path / "jobs" / ".submitted").iterdir()) == jobs


def test_a_killed_studys_jobs_are_waited_for_and_not_submitted_again(slurm, tmp_path):  # noqa: F811
    words = ("tests.study.toy", tmp_path, "slurm", 6)
    driver = slurm.popen(*words)
    submitted = tmp_path / "jobs" / ".submitted"
    until(lambda: submitted.is_dir() and list(submitted.iterdir()), 60, "the first submission")
    driver.kill()
    driver.communicate()
    assert not (tmp_path / "one" / "ran").exists()
    slurm.python(*words, timeout=200)
    assert ran(tmp_path) == ["once\n"] * 3 and len(list(submitted.iterdir())) == 3


@pytest.mark.slow
def test_a_study_runs_on_ray(ray, tmp_path):  # noqa: F811
    ray.python("tests.study.toy", tmp_path, "ray", timeout=280)
    assert ran(tmp_path) == ["once\n"] * 3
