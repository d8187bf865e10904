"""Following a graph: order, failure, and the same call again; with real processes of the local launcher."""

from __future__ import annotations

import os

import pytest

from fine_dist.core.errors import RunDirError, TrainingError
from fine_dist.launchers.state_table import StateTable
from fine_dist.study.config import load_study
from fine_dist.study.graph import Graph, StudyRun, plan
from fine_dist.study.running import run_study
from fine_dist.study.scheduler import _prepare, follow, inherit
from tests.study.studies import DIGITS, study
from tests.study.toy import ToyConfig


def graph_of(root, *runs: tuple[str, tuple[str, ...], bool]) -> Graph:
    """(name, after, fails) -> toy runs, each of which needs the notes of those before it."""
    graph = Graph(load_study(DIGITS, run_dir=str(root), launch={"max_parallel": 2}))
    for name, after, fails in runs:
        needs = tuple(str(root / before / "ran") for before in after)
        graph.runs.append(
            StudyRun(name, "tests.study.toy", ToyConfig(run_dir=str(root / name), needs=needs, fail=fails), 1, after)
        )
    return graph


def times(root, name: str) -> int:
    path = root / name / "ran"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("launcher", ["local", "here"])
def test_runs_come_after_what_they_need_and_are_never_repeated(tmp_path, launcher):
    """Listed in the wrong order; each would fail without the notes of what it needs."""
    rows = [
        ("last", ("middle", "other"), False),
        ("middle", ("first",), False),
        ("first", (), False),
        ("other", (), False),
    ]
    follow(graph_of(tmp_path, *rows), launcher)
    follow(graph_of(tmp_path, *rows), launcher)
    assert [times(tmp_path, name) for name in ("first", "middle", "other", "last")] == [1, 1, 1, 1]


def test_a_study_that_another_process_runs_is_refused_and_starts_nothing(tmp_path):
    small = study(run_dir=str(tmp_path / "study"))
    with StateTable(tmp_path / "study").driver("study"):
        # a lock on a file is the opened file's, so that this process stands for another one here
        with pytest.raises(RunDirError, match=f"study, process {os.getpid()} on .*wait for it, stop it"):
            run_study(small, "here")
        assert [path.name for path in (tmp_path / "study").iterdir()] == ["tasks"]


def test_a_failure_holds_up_only_what_needs_it_and_the_next_call_goes_on_from_there(tmp_path):
    rows = [("bad", (), True), ("after", ("bad",), False), ("free", (), False), ("later", ("free",), False)]
    with pytest.raises(TrainingError) as told:
        follow(graph_of(tmp_path, *rows), "local")
    text = str(told.value)
    assert "2 of 4 runs failed or could not start" in text
    assert "this toy fails: as asked" in text and "bad.log ends with" in text and "after: needs bad" in text
    assert [times(tmp_path, name) for name in ("bad", "after", "free", "later")] == [0, 0, 1, 1]
    mended = [(name, after, False) for name, after, _ in rows]
    follow(graph_of(tmp_path, *mended), "local")
    assert [times(tmp_path, name) for name in ("bad", "after", "free", "later")] == [1, 1, 1, 1]


def test_a_run_of_another_config_is_not_taken_for_done(tmp_path):
    follow(graph_of(tmp_path, ("one", (), False)), "here")
    graph = graph_of(tmp_path, ("zero", (), False), ("one", ("zero",), False))
    assert not graph["one"].done
    follow(graph, "here")
    assert times(tmp_path, "one") == 2 and graph["one"].done


def test_a_finished_run_of_other_settings_is_left_to_its_stage_to_refuse(tmp_path):
    """Its mark is not replaced by ours, or the next call would take it for this run."""
    digits = load_study(DIGITS, run_dir=str(tmp_path))
    run = plan(digits)["condense-s0"]
    other = StudyRun(run.name, run.module, run.config.model_copy(update={"steps": 7}), 7)
    other.stamp(done=True)
    (run.run_dir / "DONE.json").write_text("{}")
    _prepare(Graph(digits), run)
    assert other.done and not run.done


def test_how_jobs_are_launched_does_not_make_another_run(tmp_path):
    run = graph_of(tmp_path, ("one", (), False)).runs[0]
    moved = run.config.model_copy(update={"launch": run.config.launch.model_copy(update={"cpus": 7})})
    assert StudyRun("one", run.module, moved, 1).key == run.key


def test_a_longer_run_inherits_checkpoints_and_rows_but_no_end(tmp_path):
    graph = graph_of(tmp_path, ("short", (), False), ("long", ("short",), False))
    short, long = graph.runs
    (short.run_dir / "checkpoints").mkdir(parents=True)
    (short.run_dir / "events.out.tfevents.1.host").touch()
    (short.run_dir / "checkpoints" / "step-5").write_text("weights")
    (short.run_dir / "metrics.jsonl").write_text("{}\n")
    (short.run_dir / "DONE.json").write_text("{}")
    inherit(short, long)
    found = sorted(p.relative_to(long.run_dir).as_posix() for p in long.run_dir.rglob("*"))
    assert found == ["checkpoints", "checkpoints/step-5", "events.out.tfevents.1.host", "metrics.jsonl"]
