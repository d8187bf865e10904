"""A family beside what it comes from and what it is compared with."""

from __future__ import annotations

import json

import pytest

from fine_dist.family.config import InitConfig
from fine_dist.family.family_plan import Family
from tests.commands.conftest import ARCH, FAST, command, data, refused


@pytest.fixture(scope="module")
def learngene(digit_shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("gene") / "c"
    words = ["condense", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(run), "--method.rank", "4"]
    assert command(words) == 0
    return run


def init(learngene, digit_shards, run, *more: str) -> list[str]:
    words = ["init", "--parent", str(learngene), *data(digit_shards), "--run-dir", str(run), "--depths", "2", "4"]
    return [*words, "--steps", "4", "--batch", "16", "--engine.device", "cpu", "--engine.eval-every", "2", *more]


def test_a_target_has_a_held_out_curve_and_the_figure_its_parents_and_the_baselines_loss(
    learngene, trained, digit_shards, tmp_path
):
    more = ["--baselines", str(trained)]
    assert command(init(learngene, digit_shards, tmp_path, *more)) == 0
    for target in tmp_path.glob("L*"):
        rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
        assert {0, 2, 4} <= {row["step"] for row in rows if "held_out_loss" in row}
    assert (tmp_path / "family.png").stat().st_size > 1000
    config = InitConfig(parent=str(learngene), baselines=(str(trained),), depths=(2, 4))
    beside = Family(config).baseline_losses
    losses = [json.loads((run / "DONE.json").read_text())["losses"]["held_out_loss"] for run in (learngene, trained)]
    assert list(beside) == ["its parent", "scratch, 4 steps"]
    assert [points[0] for points in beside.values()] == [(3, losses[0]), (3, losses[1])]


def test_the_axis_of_depth_has_whole_numbers_and_a_line_a_baseline(learngene, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from fine_dist.family import summary as table

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    monkeypatch.setattr(table, "result_of", lambda folder: {"held_out_loss": 0.5})
    family = Family(InitConfig(parent=str(learngene), depths=(2, 3), run_dir=str(tmp_path)))
    table.draw_family(tmp_path, family.members, baselines={"its parent": [(3, 0.4)], "scratch": [(2, 0.6), (3, 0.5)]})
    axes = drawn[0].axes[0]
    assert all(tick == int(tick) for tick in axes.get_xticks())
    [legend] = drawn[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert "its parent (3 layers)" in labels and "scratch" in labels
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())  # no curve lies under it


def test_a_baseline_that_is_no_model_is_refused_before_anything_trains(learngene, digit_shards, tmp_path, capsys):
    words = init(learngene, digit_shards, tmp_path / "i", "--baselines", str(tmp_path))
    assert "holds no model" in refused(words, capsys)
    assert not list((tmp_path / "i").glob("L*"))


def test_a_run_directory_is_a_parent(learngene, digit_shards, tmp_path):
    assert command(init(learngene, digit_shards, tmp_path, "--depths", "2")) == 0
