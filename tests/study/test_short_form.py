"""The short form of a study: data, depths, methods and a budget become a whole study."""

from __future__ import annotations

import pytest
import yaml

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError
from fine_dist.data.encoding import EncodeConfig
from fine_dist.data.encoding import run as encode
from fine_dist.study.command import main
from fine_dist.study.report.results import read_results
from fine_dist.study.short_form import hours_of, keep_plan, load_studies, studies_of
from fine_dist.study.study_file import StudyFile, seconds_of, template

ARCH = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4, "learn_sigma": False}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("shards")
    encode(EncodeConfig(source="digits", out=str(folder), limit=120))
    return {"shards": str(folder / "train"), "held_out": str(folder / "held_out")}


def short(shards, **changes) -> dict:
    values = {"data": shards, "arch": ARCH, "depths": [1, 2], "methods": ["fine", "pruned", "scratch"], "seeds": [0]}
    return {**values, "batch": 8, "budget": "1h", **changes}


def test_the_shape_comes_from_the_data_and_the_steps_from_the_budget(shards):
    small, large = (studies_of(validate(StudyFile, short(shards, budget=b)), "my.yaml")["study"] for b in ("6m", "24m"))
    arch = small.stages["train"]["arch"]
    assert (arch["in_channels"], arch["input_size"], arch["num_classes"], arch["hidden_size"]) == (1, 8, 10, 16)
    assert small.main == "fine" and small.baseline == "scratch" and small.entry("fine").condense.ancestor == "ancestor"
    assert not small.entry("ancestor").shown and small.entry("pruned").parent == "ancestor"
    assert 0.09 < hours_of(small) <= 0.1 and 0.36 < hours_of(large) <= 0.4 and large.steps["N"] > 2 * small.steps["N"]
    assert small.tune and small.stages["train"]["optim"]["schedule"] != "constant"
    fixed = studies_of(validate(StudyFile, short(shards)), "my.yaml", ["steps.N=7"])["study"]
    assert fixed.steps["N"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "2 weeks"}, "'2 weeks' is not a duration; write for example 30m, 2h or 1.5d"),
        ({"budget": "3s"}, "is too little: this study takes .* Give more time, fewer methods"),
        ({"methods": ["fine"]}, "give two or more different methods"),
        ({"methods": ["fine", "sratch"]}, "'sratch' is unknown; did you mean 'scratch'"),
        ({"methods": ["scratch", "fine"]}, "put scratch last: the last method is the baseline"),
        ({"methods": ["fine", "lora", "scratch"]}, "entries.lora: .* num_layers is 2 in the parent, 1 in the target"),
        ({"methods": ["fine", "kind", "scratch"]}, "entries.kind: .* is a model, and method kind takes: learngene"),
        ({"budget": 2}, "budget: 2 has no unit; write such as 2m or 2h"),
        ({"depths": []}, "depths: give 1 value or more"),
        ({"depths": [0, 2]}, "depths.0: input should be greater than or equal to 1"),
        ({"seeds": []}, "seeds: give 1 value or more"),
        ({"data": None}, "short form.*full form.*--template"),
    ],
)
def test_what_is_wrong_with_a_short_form_is_said(shards, changes, message):
    with pytest.raises(ConfigError, match=message):
        studies_of(validate(StudyFile, short(shards, **changes)), "my.yaml")


def test_what_is_trained_on_is_not_measured_on(shards):
    with pytest.raises(ConfigError, match="held_out and shards are both"):
        validate(StudyFile, short({**shards, "held_out": shards["shards"]}))


def test_steps_are_planned_once_so_that_the_same_command_resumes_at_another_measured_speed(shards, tmp_path):
    def planned(gflops, **changes):
        file = validate(StudyFile, short(shards, run_dir=str(tmp_path), budget="6m", **changes))
        return file, studies_of(file, "mine.yaml", gflops=gflops)["study"]

    file, first = planned(40.0)
    faster = planned(60.0)[1]
    assert faster.steps["N"] > first.steps["N"]  # nothing is kept yet
    keep_plan(first, file)
    assert planned(60.0)[1] == first
    assert planned(60.0, seeds=[0, 1], depths=[1])[1].steps == first.steps  # what is there already stays
    assert planned(60.0, batch=16)[1].steps != first.steps
    assert studies_of(file, "mine.yaml", ["steps.N=7"])["study"].steps["N"] == 7


def test_times_are_read_with_their_units():
    assert [seconds_of(text) for text in ("90s", "30m", "2h", "1.5d")] == [90, 1800, 7200, 129600]


def test_the_template_is_a_study_of_fifteen_lines(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["--template", str(path)]) == 0 and path.read_text() == template()
    assert len(template().splitlines()) <= 15 and validate(StudyFile, yaml.safe_load(template())).budget == "2h"
    assert main(["--template", str(path)]) == 2 and "exists already" in capsys.readouterr().err


def test_a_short_form_runs_to_a_recommendation(shards, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(short(shards, depths=[1], run_dir=str(tmp_path / "run"))))
    few = ["--set", "steps.N=4", "--set", "tune=null", "--set", "features=null", "--set", "pictures=0"]
    more = ["--set", "steps.I=2", "--set", "steps.C=2", "--set", "steps.A=2"]
    assert main(["--config", str(path), "--launcher", "here", *few, *more]) == 0
    assert load_studies(path, [*few[1::2], *more[1::2]])["study"].steps == {"N": 4, "I": 2, "C": 2, "A": 2}
    results = read_results(tmp_path / "run" / "study" / "report")
    assert {m.method for m in results.measurements} == {"fine", "pruned", "scratch"}
    assert all(m.flops_ancestor > 0 for m in results.measurements if m.method == "pruned")
    printed = capsys.readouterr().out
    assert "report: " in printed and "held-out" in printed
