"""What a start is worth: steps of scratch that it saves, total costs of several models, and what to take."""

from __future__ import annotations

import pytest

from fine_dist.study.report.figures import FIGURES
from fine_dist.study.report.posters import save_poster
from fine_dist.study.report.results import Results
from fine_dist.study.report.tables import TABLES
from fine_dist.study.report.worth import break_even, cheapest, recommendation, saved_steps
from tests.study.report.making import N, results


def lengths() -> Results:
    """Scratch falls by 0.01 with each doubling of its steps; ours is where scratch is after four times as many."""
    made = Results(main="ours", baseline="plain", steps={"N": 100}, display_names={"ours": "Ours", "plain": "scratch"})
    for step, loss in ((100, 0.2), (200, 0.19), (400, 0.18), (800, 0.17)):
        own = step * 2.0
        made.add(method="plain", target=4, seed=0, stage="train", step=step, held_out_loss=loss, end=True, flops=own)
        shared = {"flops_condense": 5000.0, "flops_ancestor": 4000.0}
        made.add(method="ours", target=4, seed=0, stage="train", step=step, held_out_loss=loss - 0.02, end=True,
                 flops=own, **shared)  # fmt: skip
    return made


def test_saved_steps_are_read_off_the_curve_of_scratch():
    [line] = saved_steps(lengths())
    assert line.saved[100].steps == pytest.approx(300) and line.saved[200].steps == pytest.approx(600)
    assert line.text(400) == "> 400"  # scratch never got there in 800 steps
    assert TABLES["saved"](lengths()).rows[0].cells[2].text == "300"


def test_break_even_counts_shared_cost_once_and_a_free_ancestor_not_at_all():
    found = break_even(lengths())
    assert found.steps == 800 and found.losses == {4: pytest.approx(0.17)}
    by = {(line.series, line.free): line for line in found.lines}
    assert by["plain", False].total(1) == 1600 and by["plain", False].total(10) == 16000
    assert by["ours", False].steps == pytest.approx(200) and by["ours", False].total(1) == pytest.approx(5400)
    assert by["ours", True].total(1) == pytest.approx(1400)
    # 5,000 + 400 n < 1,600 n from n = 5 on
    assert [(first, line.series) for first, _, line in cheapest(found, free=False)] == [(1, "plain"), (5, "ours")]
    assert [(first, line.series) for first, _, line in cheapest(found, free=True)] == [(1, "ours")]
    advice = "\n".join(recommendation(lengths()))
    assert "1-4 models: scratch, 800 training steps each" in advice and "5 models or more: Ours, 200" in advice


def test_a_loss_that_nothing_reaches_is_said():
    made = lengths()
    for m in made.measurements:
        m.held_out_loss += 0.5 * (m.method == "ours")
    assert break_even(made) is None and TABLES["break_even"](made).rows == []


def test_break_even_falls_back_to_the_best_quality_that_another_series_reaches():
    """Scratch after 3N is better than everything here, so that totals are those of its loss after N."""
    made = results(plain_3n=0.05)
    for row in made.measurements:
        row.flops = 1e9 * (row.step + 1)
    found = break_even(made)
    assert found.steps == N and {line.series for line in found.lines} == {"ours", "plain"}
    assert break_even(made, 3 * N) is None
    advice = "\n".join(recommendation(made))
    assert f"At the quality of scratch after {N} steps" in advice
    assert f"The quality of scratch after {3 * N} steps was reached by no other series" in advice


def test_what_each_start_saves_is_a_figure_with_a_bar_for_each_series_and_length(tmp_path):
    made = results()
    section = FIGURES["saved"](made)
    assert 'aria-label="Steps of training from scratch that each start saves"' in section
    lines = {line.target: line for line in saved_steps(made)}
    for target, line in lines.items():
        for length in line.saved:
            assert f"Ours, after {length:,} steps, {target} layers: {line.text(length)}".replace(">", "&gt;") in section
    assert save_poster("saved", made, tmp_path / "saved.png").is_file()
