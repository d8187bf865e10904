"""Tuning: the same values for every row, on a seed of its own, and the lowest held-out loss is used."""

from __future__ import annotations

import json

import pytest

from fine_dist.core.errors import ConfigError, TrainingError
from fine_dist.data.settings import DataConfig
from fine_dist.engine import dist
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.study.budget import tuning_estimate
from fine_dist.study.config import load_study
from fine_dist.study.graph import plan
from fine_dist.study.report.render import markdown
from fine_dist.study.report.results import read_results
from fine_dist.study.running import run_study
from fine_dist.study.tune import FILE, Trial, choose, extended, given, trials, tune_study, with_choices
from tests.study.studies import DIGITS, FINE, SCRATCH, SMALL


def test_trials_share_what_comes_before_and_differ_in_the_last_stage(tmp_path):
    study = load_study(DIGITS, run_dir=str(tmp_path), entries=[FINE, SCRATCH], **SMALL)
    graph, tried = trials(study)
    assert [(trial.entry, trial.values["optim.lr"]) for trial in tried] == [
        ("fine", 1e-5), ("fine", 1e-2), ("scratch", 1e-5), ("scratch", 1e-2)
    ]  # fmt: skip
    assert [run.name for run in graph.runs if run.depths != (2,)] == ["data", "condense-fine-s1000"]
    assert [run.config.optim.lr for run in graph.runs if run.name.startswith("tune-")] == [1e-5, 1e-2, 1e-5, 1e-2]
    assert all(trial.run.config.seed == 1000 and trial.run.steps == 4 for trial in tried)


def test_a_choice_that_the_file_gives_is_used_and_not_tried_again(tmp_path):
    chosen = {"fine": {"optim.lr": 1e-2}}
    changes = {**SMALL, "run_dir": str(tmp_path), "entries": [FINE, SCRATCH]}
    study = load_study(DIGITS, **changes, tuned=chosen)
    assert {trial.entry for trial in trials(study)[1]} == {"scratch"}
    rows = given(study)
    assert [(row["values"]["optim.lr"], row["chosen"]) for row in rows["fine"]] == [(1e-5, False), (1e-2, True)]
    runs = plan(with_choices(study, rows)).runs
    assert [run.config.optim.lr for run in runs if run.name.startswith("fine-L")] == [1e-2, 1e-2]
    # where the values of every row are given nothing is left to try, and null tries all again
    whole = load_study(DIGITS, **changes, tuned={**chosen, "scratch": {"optim.lr": 1e-5}})
    assert tuning_estimate(whole) is None and tune_study(whole, "here")[1].keys() == {"fine", "scratch"}
    assert len(trials(load_study(DIGITS, **changes, tuned=None))[1]) == 4
    with pytest.raises(ConfigError, match=r"tuned\.fine: optim\.lr has no value"):
        load_study(DIGITS, **changes, tuned={"fine": {"lr": 0.5}})
    with pytest.raises(ConfigError, match=r"tuned\.nobody: no entry is called 'nobody'"):
        load_study(DIGITS, **changes, tuned={"nobody": {"optim.lr": 1e-2}})


def test_a_grid_is_extended_by_its_own_step_while_the_best_value_is_at_an_end(tmp_path):
    study = load_study(DIGITS, run_dir=str(tmp_path), entries=[SCRATCH], **{**SMALL, "main": "scratch"})

    def best(chosen: float, *tried: float) -> list[float]:
        rows = [{"values": {"optim.lr": lr}, "held_out_loss": 0.1, "chosen": lr == chosen} for lr in tried]
        return [point["optim.lr"] for point in extended(study, rows)]

    assert best(2e-3, 5e-4, 1e-3, 2e-3) == [4e-3] and best(5e-4, 5e-4, 1e-3, 2e-3) == [2.5e-4]
    assert best(1e-3, 5e-4, 1e-3, 2e-3) == [] and best(1e-3, 1e-3) == []
    # run for real: in four steps 1e-2 beats 1e-5, and 10 may be next; the search ends after the extensions allowed
    small = study.model_copy(update={"tune_extend": 2, "depths": (1,), "tune_depth": 1})
    _, tried = tune_study(small, "here")
    values = [row["values"]["optim.lr"] for row in tried["scratch"]]
    assert values[:3] == [1e-5, 1e-2, 10.0] and len(values) in (3, 4)
    assert sum(row["chosen"] for row in tried["scratch"]) == 1


def test_where_stage_2_is_all_the_training_it_is_tuned(tmp_path):
    parent = {"name": "old", "method": {"name": "scratch"}, "depths": [2], "shown": False}
    lora = {"name": "lora", "method": {"name": "lora"}, "parent": "old", "init": {"steps": "N", "final": True},
            "depths": [2]}  # fmt: skip
    changes = {**SMALL, "main": "lora", "baseline": "lora"}
    study = load_study(DIGITS, run_dir=str(tmp_path), entries=[parent, lora], **changes)
    _, tried = trials(study)
    assert [trial.run.config.optim.lr for trial in tried] == [1e-5, 1e-2] and all(trial.final for trial in tried)
    rows = {"lora": [{"values": {"optim.lr": 1e-2}, "chosen": True}]}
    graph = plan(with_choices(study, rows))
    assert graph["init-lora-s0"].config.optim.lr == 1e-2
    assert not [run.name for run in graph.runs if run.name.startswith("lora-L")]  # no stage 3


def test_the_lowest_loss_is_chosen_and_used_for_every_reported_run(tmp_path):
    study = load_study(DIGITS, run_dir=str(tmp_path / "run"), entries=[SCRATCH], **{**SMALL, "main": "scratch"})
    run_study(study, "here")
    tried = json.loads((study.root / FILE).read_text())["scratch"]
    best = min(tried, key=lambda row: row["held_out_loss"])
    assert best["chosen"] and best["values"] == {"optim.lr": 1e-2}  # 1e-5 moves nothing in four steps
    results = read_results(study.root / "report")
    assert results.tuning["scratch"] == tried and {row.seed for row in results.measurements} == {0}
    assert results.config["tuned on seed"] == 1000
    page = (study.root / "report" / "report.html").read_text()
    for run in plan(with_choices(study, {"scratch": tried})).runs[1:]:
        assert run.config.optim.lr == 1e-2 and run.done
    assert "http" not in page.replace("http://www.w3.org", "")
    # the greatest value that was tried was the best: the row is not published, and the report says so
    assert results.series == [] and "Not published" in markdown(results)
    results.tuning["scratch"].append({"values": {"optim.lr": 0.1}, "held_out_loss": 9.0, "chosen": False})
    assert "lr 0.01 |" in markdown(results) and "Not published" not in markdown(results)


def test_a_value_that_comes_to_no_loss_is_never_chosen():
    class Known(Trial):
        loss = None  # type: ignore[assignment]

    bad = Known("scratch", {"optim.lr": 10.0}, None, 2, False)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"tuning of scratch: no value of optim\.lr has a finite loss"):
        choose([bad])


def test_the_seed_that_is_tuned_on_is_never_reported():
    with pytest.raises(ConfigError, match="tune_seed 0 is one of seeds"):
        load_study(DIGITS, tune={"optim.lr": [1e-3]}, tune_seed=0)


def test_a_final_loss_is_of_the_whole_held_out_set_also_where_runs_ask_a_part_of_it(tmp_path):
    he, few = {**SCRATCH, "train": ["N"]}, {"data": {"held_out_samples": 16}, "engine": {"eval_every": 2}}
    stages = {**SMALL["stages"], "train": {"batch": 8, **few}}
    changes = {**SMALL, "tune": {}, "depths": [1], "main": "scratch", "stages": stages}
    study = load_study(DIGITS, run_dir=str(tmp_path / "run"), entries=[he], **changes)
    run_study(study, "here")
    rows = read_results(study.root / "report").measurements
    assert [row.step for row in rows if row.stage == "train"] == [4]  # no point of a curve that asked something else
    folder = study.root / "scratch-L1-s0"
    asked = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    data = study.root / "data"
    config = EvaluateConfig(data=DataConfig(shards=str(data / "train"), held_out=str(data / "held_out")))
    assert rows[-1].held_out_loss == Evaluator(config, dist.single_process())(str(folder))["held_out_loss"]
    assert rows[-1].held_out_loss not in [row.get("held_out_loss") for row in asked]
