"""Thirty faults in one night cost nothing: what is left in the morning is byte for byte a calm run's."""

from __future__ import annotations

import pytest

from tests.chaos.chaos import BETWEEN, STRIKES, calm_run, night


@pytest.mark.distributed
@pytest.mark.timeout(420)
def test_condense_and_a_family_under_thirty_random_faults_end_as_a_calm_run(tmp_path, digit_shards):
    calm = calm_run(tmp_path / "calm", digit_shards)
    assert len(calm) == 5  # the learngene's two sets of weights, and three targets
    found = night(3, 30, tmp_path / "night", digit_shards, calm)
    assert not found.differing and not found.hung
    assert sum(found.struck.values()) == 30
    assert found.struck.keys() >= {*STRIKES, *BETWEEN}  # this seed strikes every fault at least once
