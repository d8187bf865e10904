"""Random faults of a night cost nothing: what is left in the morning is byte for byte a calm run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.chaos import BETWEEN, STRIKES, Night, calm_run, night

pytestmark = pytest.mark.distributed


def struck_by(faults: int, seed: int, folder: Path, shards: Path) -> Night:
    """A night of so many faults, which has cost nothing."""
    calm = calm_run(folder / "calm", shards)
    assert len(calm) == 5  # the learngene's two sets of weights, and three targets
    found = night(seed, faults, folder / "night", shards, calm)
    assert not found.differing and not found.hung
    assert sum(found.struck.values()) == faults
    return found


@pytest.mark.timeout(420)
def test_condense_and_a_family_under_ten_random_faults_end_as_a_calm_run(tmp_path, digit_shards):
    found = struck_by(10, 3, tmp_path, digit_shards)
    assert len({*STRIKES, *BETWEEN} & found.struck.keys()) >= 5  # most kinds of faults


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_condense_and_a_family_under_thirty_random_faults_end_as_a_calm_run(tmp_path, digit_shards):
    found = struck_by(30, 3, tmp_path, digit_shards)
    assert found.struck.keys() >= {*STRIKES, *BETWEEN}  # this seed strikes every fault at least once
