"""Tuning: the same values for every row, on a seed of its own, and the lowest held-out loss is used."""

from __future__ import annotations

import json

import pytest

from fine_dist.core.errors import ConfigError, TrainingError
from fine_dist.data.settings import DataConfig
from fine_dist.engine import dist
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.study import run_study
from fine_dist.study.budget import tuning_estimate
from fine_dist.study.config import load_study
from fine_dist.study.graph import plan
from fine_dist.study.report.markdown import markdown
from fine_dist.study.report.results import read_results
from fine_dist.study.tune import FILE, Trial, choose, known, trials, tuned, with_choices
from tests.study.test_plan import DEMO

SMALL = {
    "seeds": [0],
    "depths": [1, 2],
    "steps": {"C": 2, "I": 2, "N": 4},
    "features": None,
    "pictures": 0,
    "claims": [],
    "stages": {stage: {"batch": 8} for stage in ("condense", "init", "train")},
    "tune": {"optim.lr": [1e-5, 1e-2]},
    "tune_depth": 2,
}
FINE = {"name": "fine", "method": {"name": "fine"}, "condense": {"steps": "C"}, "init": {"steps": "I"}}
SCRATCH = {"name": "scratch", "method": {"name": "scratch"}, "train": ["N", "3N"]}


def test_trials_share_what_comes_before_and_differ_in_the_last_stage(tmp_path):
    study = load_study(DEMO, run_dir=str(tmp_path), entries=[FINE, {**SCRATCH, "bare": False}], **SMALL)
    graph, tried = trials(study)
    assert [(trial.entry, trial.values["optim.lr"]) for trial in tried] == [
        ("fine", 1e-5), ("fine", 1e-2), ("scratch", 1e-5), ("scratch", 1e-2)
    ]  # fmt: skip
    assert [run.name for run in graph.runs if run.depths != (2,)] == ["data", "condense-fine-s1000"]
    assert [run.config.optim.lr for run in graph.runs if run.name.startswith("tune-")] == [1e-5, 1e-2, 1e-5, 1e-2]
    assert all(trial.run.config.seed == 1000 and trial.run.steps == 4 for trial in tried)


def test_a_choice_that_the_file_gives_is_used_and_not_tried_again(tmp_path):
    given = {"fine": {"optim.lr": 1e-2}}
    changes = {**SMALL, "run_dir": str(tmp_path), "entries": [FINE, SCRATCH]}
    study = load_study(DEMO, **changes, chosen=given)
    assert {trial.entry for trial in trials(study)[1]} == {"scratch"}
    said = known(study)
    assert [(row["values"]["optim.lr"], row["chosen"]) for row in said["fine"]] == [(1e-5, False), (1e-2, True)]
    runs = plan(with_choices(study, said)).runs
    assert [run.config.optim.lr for run in runs if run.name.startswith("fine-L")] == [1e-2, 1e-2]
    # where every row's is given nothing is left to try, and null tries all again
    whole = load_study(DEMO, **changes, chosen={**given, "scratch": {"optim.lr": 1e-5}})
    assert tuning_estimate(whole) is None and tuned(whole, "here")[1].keys() == {"fine", "scratch"}
    assert len(trials(load_study(DEMO, **changes, chosen=None))[1]) == 4
    with pytest.raises(ConfigError, match=r"chosen\.fine: optim\.lr 0\.5 is none of tune's values, 1e-05, 0\.01"):
        load_study(DEMO, **changes, chosen={"fine": {"optim.lr": 0.5}})
    with pytest.raises(ConfigError, match=r"chosen\.nobody: no entry is called 'nobody'"):
        load_study(DEMO, **changes, chosen={"nobody": {"optim.lr": 1e-2}})


def test_where_stage_2_is_all_the_training_it_is_tuned(tmp_path):
    parent = {"name": "old", "method": {"name": "scratch"}, "depths": [2], "shown": False}
    lora = {"name": "lora", "method": {"name": "lora"}, "parent": "old", "init": {"steps": "N", "final": True},
            "depths": [2]}  # fmt: skip
    changes = {**SMALL, "main": "lora", "baseline": "lora"}
    study = load_study(DEMO, run_dir=str(tmp_path), entries=[parent, lora], **changes)
    _, tried = trials(study)
    assert [trial.run.config.optim.lr for trial in tried] == [1e-5, 1e-2] and all(trial.final for trial in tried)
    rows = {"lora": [{"values": {"optim.lr": 1e-2}, "chosen": True}]}
    graph = plan(with_choices(study, rows))
    assert graph["init-lora-s0"].config.optim.lr == 1e-2
    assert not [run.name for run in graph.runs if run.name.startswith("lora-L")]  # no stage 3


def test_the_lowest_loss_is_chosen_and_used_for_every_reported_run(tmp_path):
    study = load_study(DEMO, run_dir=str(tmp_path / "run"), entries=[SCRATCH], **{**SMALL, "main": "scratch"})
    run_study(study, "here")
    tried = json.loads((study.root / FILE).read_text())["scratch"]
    best = min(tried, key=lambda row: row["held_out_loss"])
    assert best["chosen"] and best["values"] == {"optim.lr": 1e-2}  # 1e-5 moves nothing in four steps
    results = read_results(study.root / "report")
    assert results.tuning["scratch"] == tried and {row.seed for row in results.rows} == {0}
    assert results.config["tuned on seed"] == 1000
    page = (study.root / "report" / "report.html").read_text()
    for run in plan(with_choices(study, {"scratch": tried})).runs[1:]:
        assert run.config.optim.lr == 1e-2 and run.done
    assert "http" not in page.replace("http://www.w3.org", "")
    # the greatest that was tried was the best: whoever reads the table is told that the grid may end too soon
    assert "lr 0.01†" in markdown(results) and "1 of 1 rows chose" in markdown(results)
    results.tuning["scratch"].append({"values": {"optim.lr": 0.1}, "held_out_loss": 9.0, "chosen": False})
    assert "lr 0.01 |" in markdown(results) and "†" not in markdown(results)


def test_a_value_that_comes_to_no_loss_is_never_chosen():
    class ModelFacts(Trial):
        loss = None  # type: ignore[assignment]

    bad = ModelFacts("scratch", {"optim.lr": 10.0}, None, 2, False)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"tuning of scratch: no value of optim\.lr came to a finite loss"):
        choose([bad])


def test_the_seed_that_is_tuned_on_is_never_reported():
    with pytest.raises(ConfigError, match="tune_seed 0 is one of seeds"):
        load_study(DEMO, tune={"optim.lr": [1e-3]}, tune_seed=0)


def test_a_final_loss_is_of_the_whole_held_out_set_also_where_runs_ask_a_part_of_it(tmp_path):
    row, few = {**SCRATCH, "train": ["N"]}, {"data": {"held_out_samples": 16}, "engine": {"eval_every": 2}}
    stages = {**SMALL["stages"], "train": {"batch": 8, **few}}
    changes = {**SMALL, "tune": {}, "depths": [1], "main": "scratch", "stages": stages}
    study = load_study(DEMO, run_dir=str(tmp_path / "run"), entries=[row], **changes)
    run_study(study, "here")
    rows = read_results(study.root / "report").rows
    assert [row.step for row in rows if row.stage == "train"] == [4]  # no point of a curve that asked something else
    folder = study.root / "scratch-L1-s0"
    asked = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    data = study.root / "data"
    config = EvaluateConfig(data=DataConfig(shards=str(data / "train"), held_out=str(data / "held_out")))
    assert rows[-1].held_out_loss == Evaluator(config, dist.alone())(str(folder))["held_out_loss"]
    assert rows[-1].held_out_loss not in [row.get("held_out_loss") for row in asked]
