"""A study as data becomes a graph in which nothing is run twice and everything comes after what it needs."""

from __future__ import annotations

import pytest

from fine_dist.core.errors import ConfigError
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.study import ancestor_copy, budget
from fine_dist.study.budget import estimate
from fine_dist.study.config import load_study, merged
from fine_dist.study.graph import Graph, StudyRun, plan
from tests.methods.making import artifact_for
from tests.study.studies import DIGITS, FINE, SCRATCH, study
from tests.study.toy import ToyConfig


def test_a_study_has_a_run_for_every_stage_depth_and_seed():
    graph = plan(load_study(DIGITS, seeds=[0, 1]))
    names = [run.name for run in graph.runs]
    assert len(names) == len(set(names)) == 1 + 2 * (1 + 6 + 1 + 6)
    assert names[:4] == ["data", "condense-s0", "scratch-L6-n400-s0", "scratch-L6-n1200-s0"]
    assert graph["fine-L4-s1"].after == ("init-s1",) and graph["init-s1"].after == ("condense-s1",)
    assert graph["shell-L4-s1"].after == ("condense-s1",)
    long = graph["scratch-L6-n1200-s0"]
    assert (
        long.steps == 3 * graph["fine-L6-s0"].steps
        and long.grows == "scratch-L6-n400-s0"
        and long.after == (long.grows,)
    )


def test_a_learngene_that_several_rows_need_is_condensed_once():
    """By name (`parent`), and by content: the same stage 1 written out twice is one run."""
    again = {**FINE, "name": "again", "init": {"steps": "I", "settings": {"optim": {"lr": 0.01}}}}
    control = {"name": "random", "method": {"name": "random_genes"}, "parent": "fine", "init": {"steps": "I"}}
    graph = plan(study(FINE, again, control, SCRATCH))
    assert [run.name for run in graph.runs if run.module == "fine_dist.condense"] == ["condense-fine-s0"]
    inits = [run for run in graph.runs if run.module == "fine_dist.init"]
    assert [run.name for run in inits] == ["init-fine-s0", "init-again-s0", "init-random-s0"]
    assert {run.after for run in inits} == {("condense-fine-s0",)}
    assert inits[1].config.optim.lr == 0.01 and inits[0].config.optim.lr == 0.03
    assert inits[2].config.method.name == "random_genes" and inits[0].config.method is None


def test_a_schedule_that_ends_at_its_last_step_is_not_continued():
    graph = plan(study(FINE, {**SCRATCH, "settings": {"optim": {"schedule": "cosine"}}}))
    assert graph["scratch-L6-n1200-s0"].grows is None and graph["scratch-L6-n1200-s0"].after == ("data",)


def test_a_trained_model_can_be_an_ancestor_and_need_not_be_a_row():
    old = {"name": "old", "method": {"name": "scratch"}, "train": ["2N"], "depths": [8], "shown": False}
    copied = {**FINE, "method": {"name": "fine", "initial": "decompose"}, "condense": {"steps": "C", "ancestor": "old"}}
    graph = plan(study(old, copied, SCRATCH))
    condense = graph["condense-fine-s0"]
    assert condense.after == ("old-L8-s0",) and graph["old-L8-s0"].steps == 800
    assert condense.config.ancestor == str(graph["old-L8-s0"].run_dir / "model")


def test_each_data_set_is_encoded_once_and_stages_read_their_own():
    other = {"digits": {"source": "digits"}, "few": {"source": "digits", "limit": 500}}
    graph = plan(study({**FINE, "data": "few"}, SCRATCH, data=other).model_copy(update={"data": other}))
    assert graph["digits"].run_dir.name == "digits" and graph["few"].config.limit == 500
    assert graph["condense-fine-s0"].after == ("digits",)
    assert graph["scratch-L2-n400-s0"].config.data.shards.endswith("digits/train")
    assert graph["fine-L2-s0"].config.data.shards.endswith("few/train")
    assert graph["init-fine-s0"].config.data.held_out.endswith("few/held_out")


def test_controls_can_be_left_out():
    names = [run.name for run in plan(load_study(DIGITS, controls=False)).runs]
    assert not [name for name in names if name.startswith("shell")] and "fine-L2-s0" in names


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (
            [FINE, {**SCRATCH, "parent": "fin"}],
            r"entries.scratch.parent: no entry is called 'fin'; there are fine, scratch",
        ),
        ([FINE, SCRATCH, SCRATCH], "two have the name 'scratch'"),
        ([FINE, {**SCRATCH, "data": "cats"}], "no data set is called 'cats'; there are data"),
        ([FINE, {**SCRATCH, "train": ["N", "2Q"]}], r"Q has no value; known are C = 1500, I = 300, N = 400"),
        ([FINE, {**SCRATCH, "train": ["0"]}], "is 0; a run has 1 step or more"),
        (
            [{**FINE, "parent": "scratch"}, {**SCRATCH, "method": {"name": "copied_shell"}, "parent": "scratch"}],
            "single trained depth",
        ),
        ([{**FINE, "name": "scratch"}, {"name": "fine", "method": {"name": "svm"}}], "svm"),
        ([FINE, {**SCRATCH, "settings": {"steps_": 4}}], "train of entry scratch: steps_: unknown key"),
    ],
)
def test_what_cannot_be_planned_is_named(entries, says):
    with pytest.raises(ConfigError, match=says):
        plan(study(*entries))


def test_entries_that_come_from_each_other_are_refused():
    one = {"name": "fine", "method": {"name": "copied_shell"}, "parent": "scratch", "depths": [2], "train": ["N"]}
    two = {**one, "name": "scratch", "parent": "fine"}
    with pytest.raises(ConfigError, match=r"fine -> scratch|scratch -> fine"):
        plan(study(one, two))


def test_two_runs_of_one_name_are_refused():
    same = {"steps": "C", "name": "condense"}
    other = {**FINE, "name": "other", "condense": {**same, "settings": {"batch": 8}}}
    with pytest.raises(ConfigError, match="two different runs have the name condense-s0"):
        plan(study({**FINE, "condense": same}, other, SCRATCH))


def test_settings_are_laid_over_but_a_methods_are_never_mixed():
    base = {"optim": {"lr": 1, "eps": 2}, "method": {"name": "a", "rank": 3}}
    made = merged(base, {"optim": {"lr": 5}, "method": {"name": "b"}})
    assert made == {"optim": {"lr": 5, "eps": 2}, "method": {"name": "b"}} and base["optim"]["lr"] == 1


def test_a_teacher_is_trained_before_what_imitates_it_and_counts_as_shared_cost():
    old = {"name": "old", "method": {"name": "scratch"}, "train": ["2N"], "depths": [4], "shown": False}
    taught = {"name": "taught", "method": {"name": "scratch"}, "teacher": "old", "train": ["N"]}
    graph = plan(study(old, {**SCRATCH, "train": ["N"]}, taught, main="taught"))
    run = graph["taught-L2-s0"]
    assert run.after == ("old-L4-s0",) and run.config.ancestor == str(graph["old-L4-s0"].run_dir / "model")
    assert [r.name for r in graph.lineage(graph.study.entry("taught"), 0)] == ["old-L4-s0"]
    assert graph.lineage(graph.study.entry("scratch"), 0) == []


def test_a_learngene_that_exists_is_copied_as_a_learngene(tmp_path):
    made = artifact_for("fine")
    run = tmp_path / "run"
    save_artifact(run / "learngene", kind=made.kind, method=made.method, arch=made.arch, tensors=made.tensors)
    out = ancestor_copy.run(ancestor_copy.AncestorCopyConfig(source=str(run), run_dir=str(tmp_path / "copy")))
    source, copy = load_artifact(run / "learngene"), load_artifact(out)
    assert (copy.kind, copy.hash, copy.method) == ("learngene", source.hash, source.method)


def test_a_model_that_exists_is_copied_once_and_costs_nothing():
    given = {"name": "old", "source": "models/old.pt"}
    pruned = {"name": "pruned", "method": {"name": "copied_shell"}, "parent": "old", "train": ["N"]}
    graph = plan(study(given, SCRATCH, pruned, main="pruned"))
    assert graph["old"].module == "fine_dist.study.ancestor_copy" and graph["old"].config.source == "models/old.pt"
    assert graph["pruned-L2-s0"].after == ("old", "data") and graph["pruned-L2-s0"].config.parent.endswith("old/model")
    assert graph.lineage(graph.study.entry("pruned"), 0) == []
    with pytest.raises(ConfigError, match="give either method or source"):
        study({**given, "method": {"name": "scratch"}}, SCRATCH)


# hours of each run and the run it waits for
CHAIN = {"free": (2, None), "ancestor": (4, None), "stage 1": (3, "ancestor"), "also free": (2, None),
         "target": (1, "stage 1")}  # fmt: skip
LATE_CHAIN = {"one": (2, None), "two": (2, None), "first": (3, None), "second": (3, "first")}


@pytest.mark.parametrize(
    ("runs", "wide", "hours"),
    # with two at once, half of all hours of the late chain would be 5, and its longest chain 6
    [(CHAIN, 1, 12), (CHAIN, 2, 8), (CHAIN, 3, 8), (CHAIN, None, 8), (LATE_CHAIN, 2, 8)],
)
def test_the_estimated_time_is_that_of_runs_started_as_the_scheduler_starts_them(monkeypatch, runs, wide, hours):
    graph = Graph(study(launch={"max_parallel": wide}))
    for name, (_, before) in runs.items():
        after = (before,) if before else ()
        graph.runs.append(StudyRun(name, "tests.study.toy", ToyConfig(run_dir=name), 1, after))
    monkeypatch.setattr(budget, "OVERHEAD_S", 0.0)
    monkeypatch.setattr(budget, "run_flops", lambda study, graph, run, counted: runs[run.name][0] * 3600 * 1e9)
    found = estimate(graph.study, graph, gflops=1.0)
    assert found.hours == pytest.approx(hours)
    assert found.machine_hours == pytest.approx(sum(own for own, _ in runs.values()))
