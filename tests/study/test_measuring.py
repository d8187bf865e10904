"""Models measured several at a time: the numbers of one process, kept, and a killed process told."""

from __future__ import annotations

import json
import os
import signal

import pytest

from fine_dist.core.errors import ConfigError, TrainingError
from fine_dist.core.limits import num_cores
from fine_dist.study import measuring
from fine_dist.study.config import load_study
from fine_dist.study.graph import plan
from fine_dist.study.measuring import Measuring, measure_ahead
from fine_dist.study.scheduler import follow
from tests.study.studies import DIGITS, FINE, SCRATCH, SMALL

pytestmark = pytest.mark.skipif(num_cores() < 2, reason="measuring in two processes takes two cores")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A finished study of two models."""
    folder = tmp_path_factory.mktemp("measured")
    changes = {
        **SMALL,
        "tune": {},
        "depths": [1],
        "seeds": [0, 1],
        "steps": {"C": 2, "I": 2, "N": 2},
        "main": "scratch",
    }
    entry = {**SCRATCH, "train": ["N"]}
    study = load_study(DIGITS, run_dir=str(folder), entries=[entry], launch={"max_parallel": 2}, **changes)
    graph = plan(study)
    follow(graph, "here")
    return graph


def test_two_processes_measure_what_one_does(graph):
    one = Measuring(graph)
    measure_ahead(one)
    [entry] = graph.study.rows
    for seed in graph.study.seeds:
        [model] = one.models(entry, 1, seed)
        file = graph.study.root / "measures" / f"{model.name}.loss.json"
        apart = json.loads(file.read_text())["numbers"]
        before = file.stat().st_mtime_ns
        assert one.numbers(model) == {**apart, "fd_classifier": None, "accuracy": None}
        assert file.stat().st_mtime_ns == before  # not measured again
        file.unlink()
        # products of fewer threads are summed in another order
        assert one.numbers(model)["held_out_loss"] == pytest.approx(apart["held_out_loss"], rel=1e-5)


def test_distances_are_of_the_entries_depths_and_seeds_that_are_asked_for(tmp_path):
    changes = {**SMALL, "tune": {}, "run_dir": str(tmp_path), "seeds": [0, 1]}
    few = {"frechet": ["fine"], "frechet_depths": [2], "frechet_seeds": [0]}
    study = load_study(DIGITS, **changes, entries=[FINE, SCRATCH], **few)
    measuring = Measuring(plan(study))
    wanted = {
        (entry.name, depth, seed)
        for seed in study.seeds for entry in study.rows for depth in study.depths
        for model in measuring.models(entry, depth, seed) if model.distances
    }  # fmt: skip
    assert wanted == {("fine", 2, 0)}
    with pytest.raises(ConfigError, match=r"frechet\.0: no entry is called 'nobody'"):
        load_study(DIGITS, **changes, entries=[FINE, SCRATCH], frechet=["nobody"])


def _killed(model: measuring.MeasuredModel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told_and_nothing_hangs(graph, monkeypatch):
    monkeypatch.setattr(measuring, "_numbers", _killed)
    with pytest.raises(TrainingError, match=r"was killed .* run the same command to resume"):
        measure_ahead(Measuring(graph))
