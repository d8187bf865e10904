"""The report says what the rows say, and nothing else."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.study.report.__main__ import fill
from fine_dist.study.report.claims import linearity, verdicts
from fine_dist.study.report.measurements import Picture, PublishedClaim, steps_of
from fine_dist.study.report.number_text import number
from fine_dist.study.report.posters import save_poster
from fine_dist.study.report.render import markdown, write_report
from fine_dist.study.report.results import Results, read_results
from fine_dist.study.report.tables import rows, tuning
from tests.study.report.making import INIT, N, results, with_costs


def of(made: Results, words: str):
    return next(v for v in verdicts(made) if words in v.claim)


def printed(made: Results, tmp_path) -> str:
    console = Console(file=io.StringIO(), width=80)
    write_report(tmp_path, made, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("ours", "plain", "plain_3n", "equal_steps", "three_times"),
    [
        (0.11, 0.13, 0.12, "held", "held"),
        (0.11, 0.13, 0.10, "held", "did not hold"),
        (0.14, 0.13, 0.12, "did not hold", "did not hold"),
        (0.12, 0.12, 0.12, "within noise", "held"),
        (0.1201, 0.12, 0.12, "within noise", "within noise"),
    ],
)
def test_claims_are_decided_by_means_and_spread(ours, plain, plain_3n, equal_steps, three_times):
    """Spread 0.001: equal means are "no worse", not "better"; a difference of 0.0001 decides nothing."""
    made = results(ours, plain, plain_3n)
    assert of(made, "equal steps").outcome == equal_steps
    assert of(made, "3N").outcome == three_times


def test_one_depth_that_fails_is_enough_for_a_claim_not_to_hold():
    made = results()
    for row in made.measurements:
        if row.method == "plain" and row.target == 4 and row.step == N:
            row.held_out_loss = 0.05
    verdict = of(made, "equal steps")
    assert verdict.outcome == "did not hold"
    assert [c.held for c in verdict.of("held_out_loss")] == [True, False]


def test_what_was_not_measured_is_never_decided():
    words = {v.claim: v.outcome for v in verdicts(results())}
    assert words["A third is between"] == words["Equal total steps"] == words["Numbers follow depth"] == "not measured"


def test_a_step_beside_the_right_one_is_not_taken_for_it():
    made = results()
    for row in made.measurements:
        if row.method == "plain" and row.step == 3 * N:
            row.step += 1
    assert of(made, "3N").outcome == "not measured"


def test_controls_are_compared_at_equal_total_steps():
    made = results()
    for target in (2, 4):
        made.add(method="plain", target=target, seed=0, stage="train", step=N + INIT, held_out_loss=0.125)
    assert of(made, "Equal total steps").outcome == "held"


def test_a_difference_smaller_than_the_seeds_spread_is_marked():
    near, far = results(0.11, 0.1105), results(0.11, 0.13)
    assert all(c.within_spread for c in of(near, "equal steps").of("held_out_loss"))
    assert not any(c.within_spread for c in of(far, "equal steps").of("held_out_loss"))


def test_the_least_favourable_comparison_decides_a_claim():
    """Depth 2 holds, depth 4 lies within the spread; then depth 4 is worse."""
    made = results()
    for row in made.measurements:
        if row.method == "plain" and row.target == 4 and row.step == N:
            row.held_out_loss -= 0.0198
    assert of(made, "equal steps").outcome == "within noise"
    for row in made.measurements:
        if row.method == "plain" and row.target == 4 and row.step == N:
            row.held_out_loss -= 0.02
    assert of(made, "equal steps").outcome == "did not hold"


@pytest.mark.parametrize("step", [0, N])
def test_a_chain_of_variants_is_compared_link_by_link(step):
    made = results(targets=(4,))
    order = ("ours", "ours:near", "ours:far", "ours:random")
    made.claims = [PublishedClaim(text="order", source="A paper", chain=tuple((s, step) for s in order))]
    base = made.mean("ours", 4, step).mean
    for variant, more in (("near", 0.005), ("far", 0.01), ("random", 0.008)):
        stage = "train" if step else "init"
        made.add(method="ours", variant=variant, target=4, seed=0, stage=stage, step=step, held_out_loss=base + more)
    verdict = of(made, "order")
    assert [c.held for c in verdict.of("held_out_loss")] == [True, True, False]
    assert verdict.outcome == "did not hold"


def test_means_and_spreads_are_over_seeds():
    mean = results().mean("ours", 2, N)
    assert (mean.mean, mean.num) == (pytest.approx(0.11), 3)
    assert mean.spread == pytest.approx(np.std([0.109, 0.11, 0.111], ddof=1))


def test_the_end_of_initialization_stands_at_step_zero():
    made = results()
    made.add(method="ours", target=2, seed=0, stage="init", step=0, held_out_loss=0.9, steps_init=10)
    assert made.points("ours", 2)[0] == [0.2, 0.2, 0.2]


def test_a_table_linear_in_depth_is_found_so_and_a_scrambled_one_is_not():
    g = torch.Generator().manual_seed(0)
    slope, base = torch.randn(32, generator=g), torch.randn(32, generator=g)
    straight = base + torch.linspace(0, 1, 8)[:, None] * slope
    made = results()
    made.add_table("learngene", "qkv", straight)
    fit = linearity(straight)
    assert fit.correlation == pytest.approx(1) and fit.r_squared == pytest.approx(1)
    assert of(made, "follow depth").outcome == "held"
    made.add_table("learngene", "o", straight[torch.randperm(8, generator=g)])
    assert of(made, "follow depth").outcome == "did not hold"


def test_the_sign_of_a_component_follows_depth():
    table_ = -np.linspace(0, 1, 5)[:, None] * np.ones(3)
    assert np.all(np.diff(linearity(table_).score) > 0)


def test_formulas_of_steps_are_computed_and_what_cannot_be_is_named():
    symbols = {"N": 400, "I": 300, "C": 1500}
    found = [steps_of(f, symbols) for f in ("N", "3N", "N + I", "N+C/3", "2N+10", 7, "0")]
    assert found == [400, 1200, 700, 900, 810, 7, 0]
    with pytest.raises(ConfigError, match=r"Q has no value; known are N = 400"):
        steps_of("N+Q", symbols)
    with pytest.raises(ConfigError, match="is not a term"):
        steps_of("N-I", symbols)


def test_the_table_has_a_row_for_each_measured_milestone():
    made = rows(results())
    assert made.heads[:5] == ["depth", "method", "init steps", "train steps", "held-out loss"]
    shown = [(row.group, row.series, row.cells[3].text) for row in made.rows]
    assert shown == [
        (t, s, n)
        for t in (2, 4)
        for s, n in (("ours", "0"), ("ours", "100"), ("plain", "0"), ("plain", "100"), ("plain", "300"))
    ]
    assert made.rows[1].cells[4].text == "0.1100 ± 0.0010" and made.rows[1].cells[4].value == pytest.approx(0.11)


def test_a_terminal_of_80_columns_shows_every_number_whole(tmp_path):
    text = printed(results(), tmp_path)
    assert "0.1100 ± 0.0010" in text and "…" not in text
    assert "Ours is better at equal steps: held" in text


def test_results_json_has_every_row_and_reads_back_equal(tmp_path):
    made = results()
    made.add_table("learngene", "qkv", torch.randn(4, 8))
    made.pictures.append(Picture(image=torch.rand(1, 5, 7), method="ours", target=2, step=N))
    made.pictures.append(Picture(image=torch.rand(3, 5, 7), caption="real"))
    write_report(tmp_path, made, echo=False)
    assert len(json.loads((tmp_path / "results.json").read_text())["measurements"]) == len(made.measurements)
    back = read_results(tmp_path)
    assert back.model_dump() == made.model_dump()
    np.testing.assert_allclose(back.pictures[0].image, made.pictures[0].image, atol=0.5 / 255)  # 8 bits
    assert back.pictures[1].image.shape == (3, 5, 7)


def test_figures_are_pngs_and_what_cannot_be_drawn_is_said(tmp_path):
    from PIL import Image

    made = with_costs()
    for name in ("ours", "plain"):
        for step in (0, N):
            made.pictures.append(Picture(image=torch.rand(1, 9, 19), method=name, target=4, step=step))
    for name in ("curves", "samples", "break_even"):
        image = Image.open(save_poster(name, made, tmp_path / "docs" / f"{name}.png"))
        assert image.format == "PNG" and image.width > 600
    with pytest.raises(ConfigError, match="no target was measured"):
        save_poster("curves", Results(), tmp_path / "none.png")
    with pytest.raises(ConfigError, match="no such series: nobody; there are ours, plain"):
        save_poster("curves", made, tmp_path / "none.png", ["nobody"])


@pytest.mark.parametrize("bad", [{"held_out_loss": float("nan")}, {"stage": "later"}, {"step": -1}, {"losss": 1}])
def test_a_row_that_cannot_be_is_refused(bad):
    with pytest.raises(ValidationError):
        Results().add(
            **{"method": "plain", "target": 2, "seed": 0, "stage": "train", "step": 1, "held_out_loss": 1, **bad}
        )


def test_a_folder_without_a_report_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="no readable report"):
        read_results(tmp_path)


def test_numbers_have_four_decimals_or_four_digits():
    assert [number(x) for x in (0.11049, 1.0, 12.345, 99999.0)] == ["0.1105", "1.000", "12.35", "99999"]


def test_a_series_whose_tuned_value_is_the_last_of_its_grid_is_not_published(tmp_path):
    made = results()
    tried = [{"values": {"optim.lr": lr}, "held_out_loss": loss, "chosen": lr == 4e-3} for lr, loss in
             ((1e-3, 0.3), (2e-3, 0.2), (4e-3, 0.1))]  # fmt: skip
    made.tuning = {"plain": tried}
    assert made.series == ["ours"] and of(made, "equal steps").outcome == "not measured"
    assert "Not published" in tuning(made).caption and "scratch" in tuning(made).caption
    assert "scratch |" not in markdown(made).split("Verdicts")[0].replace("Ours", "")
    made.tuning = {"plain": [*tried, {"values": {"optim.lr": 8e-3}, "held_out_loss": 0.4, "chosen": False}]}
    assert made.series == ["ours", "plain"] and of(made, "equal steps").outcome == "held"


def test_a_documents_table_is_replaced_between_its_comments():
    text = "a\n<!-- x table: begin -->\nold\n<!-- x table: end -->\nb\n"
    assert fill(text, "x", "new\n") == text.replace("old", "new")
    with pytest.raises(ArtifactError, match="no place for the y table"):
        fill(text, "y", "new")
