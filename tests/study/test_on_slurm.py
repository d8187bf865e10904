"""A study on a real SLURM cluster: every run is a job of its own, submitted when what it needs is done."""

from __future__ import annotations

import pytest

from tests.cluster.conftest import slurm, slurm_cluster  # noqa: F401 (fixtures)

pytestmark = pytest.mark.cluster


def test_a_study_submits_jobs_in_order_and_the_same_command_submits_nothing(slurm, tmp_path):  # noqa: F811
    words = ("tests.study.toy", tmp_path, "slurm")
    slurm.python(*words, timeout=200)
    assert [(tmp_path / name / "ran").read_text() for name in ("one", "two", "three")] == ["once\n"] * 3
    jobs = sorted((tmp_path / "jobs" / ".submitted").iterdir())
    assert len(jobs) == 3
    slurm.python(*words, timeout=200)
    assert sorted((tmp_path / "jobs" / ".submitted").iterdir()) == jobs
