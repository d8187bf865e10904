"""The report says what the rows say, and nothing else."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.study.report.__main__ import fill
from fine_dist.study.report.canvas import color_of, marker_of
from fine_dist.study.report.claims import linearity, verdicts
from fine_dist.study.report.posters import save_poster
from fine_dist.study.report.render import markdown, write_report
from fine_dist.study.report.results import (
    Picture,
    PublishedClaim,
    Results,
    number,
    read_results,
    short,
    steps_of,
)
from fine_dist.study.report.tables import rows, storage, tuning
from tests.study.report.making import CLAIMS, INIT, N, results


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


def full_page(tmp_path, made: Results | None = None) -> str:
    made = made or results()
    for kind in ("qkv", "o"):
        made.add_table("learngene", kind, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        made.add_table("target 2", kind, torch.randn(2, 8))
    made.pictures.append(Picture(image=torch.rand(1, 9, 9), method="ours", target=2, step=N))
    made.fd_floor, made.classifier_accuracy = 2.0, 0.97
    return write_report(tmp_path, made, echo=False).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html = full_page(tmp_path)
    assert not re.findall(r'<(?:link|iframe)|<script src|(?:src|href)="(?!data:|#)|@import|url\((?!#)', html)
    assert html.count("<svg") == 6 and "data:image/png;base64," in html


def test_pictures_on_one_page_do_not_share_ids(tmp_path):
    ids = re.findall(r'\bid="([^"]+)"', full_page(tmp_path))
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_table_are_on_the_page(tmp_path):
    made = results()
    html = full_page(tmp_path, made)
    assert all(cell.text in html for row in rows(made).rows for cell in row.cells)


def test_text_from_outside_cannot_become_markup(tmp_path):
    made = results()
    attack = "</script><script>alert(1)</script> $\\nothing_{$"
    made.title, made.config, made.command, made.dataset = attack, {attack: attack}, attack, attack
    made.display_names = {"ours": attack, "plain": attack}
    made.claims = [claim.model_copy(update={"text": attack, "source": attack, "note": attack}) for claim in CLAIMS]
    made.pictures.append(Picture(image=torch.rand(1, 5, 7), caption=attack))
    made.tuning["ours"] = [{"values": {attack: attack}, "held_out_loss": 0.1, "chosen": True}]
    html = full_page(tmp_path, made)
    assert html.count("<script>") == 1 and "alert(1)</script>" not in html and "&lt;script&gt;" in html


def test_a_run_with_one_seed_and_one_row_still_makes_a_page(tmp_path):
    made = Results()
    made.add(method="plain", target=2, seed=0, stage="train", step=10, held_out_loss=0.5)
    html = write_report(tmp_path, made, console=Console(file=io.StringIO())).read_text(encoding="utf-8")
    assert "0.5000" in html and "±" not in html and "one seed" in html.lower()


def test_an_empty_run_makes_a_page_that_says_so(tmp_path):
    assert "compare no main series" in write_report(tmp_path, Results(), echo=False).read_text(encoding="utf-8")


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


def with_costs() -> Results:
    """`ours` pays 1e9 FLOPs once and 1e6 a step; `plain` 2e6 a step."""
    made = results()
    for row in made.measurements:
        row.flops = row.step * (1e6 if row.method == "ours" else 2e6) + 1.0
        row.flops_condense = 1e9 if row.method == "ours" else 0.0
        row.stored = 50 if row.step == 0 and row.method == "ours" else 4000
    return made


def test_costs_and_storage_have_columns_and_figures(tmp_path):
    made = with_costs()
    assert {"FLOPs", "stored"} <= set(rows(made).heads)
    html = full_page(tmp_path, made)
    assert html.count("<svg") == 8 and "Quality against cost" in html and "Storage" in html
    assert [short(x) for x in (134660, 1.5e9, 12.0)] == ["135 K", "1.5 G", "12"]
    kept = {row.series: [cell.text for cell in row.cells] for row in storage(made).rows}
    assert kept["ours"][1:5] == ["1,000", "50", "1,050", "1,150"] and kept[""][1:4] == ["0", "4,000", "4,000"]


def test_sections_can_be_left_out_renamed_and_reordered_and_others_are_refused(tmp_path):
    made = results()
    made.sections = {"rows": "Everything", "claims": "Promises"}
    html = write_report(tmp_path, made, echo=False).read_text(encoding="utf-8")
    assert [title for title in re.findall("<h2>(.*?)</h2>", html) if title != "Recommendation"] == [
        "Everything",
        "Promises",
    ]
    with pytest.raises(ValidationError, match="legal are curves"):
        Results(sections={"rowz": "Everything"})


def test_names_colors_and_the_order_of_series_are_data(tmp_path):
    made = results()
    made.display_names = {"plain": "Scratch!", "ours": "Theirs"}
    made.main, made.baseline = "plain", "ours"
    made.colors = {"ours": "#123456"}
    assert made.series == ["plain", "ours"] and made.name_of("ours:near") == "Theirs near"
    html = full_page(tmp_path, made)
    assert "initialized by Scratch! have no lower" in html and "#123456" in html


def test_a_series_is_hidden_and_shown_by_its_number_in_figures_tables_and_key(tmp_path):
    html = full_page(tmp_path)
    for index in (0, 1):
        assert f'<button type="button" data-series="{index}"' in html  # the key
        assert f'class="series" data-series="{index}"' in html.replace(" strong", "")  # table rows and curves
        assert f'class="series mark" data-series="{index}"' in html  # points that answer to the mouse
    marks = re.findall(r'<circle class="series mark"[^>]*cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>(.*?)</title>', html)
    assert any("Ours, 2 layers, 100 steps: 0.1100 ± 0.0010" in text for _, _, text in marks)
    assert 'data-value="0.11' in html  # what a column is sorted by


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


def test_series_are_told_apart_by_colors_and_markers_alike():
    made = results()
    for i in range(12):
        made.add(method=f"m{i}", target=2, seed=0, stage="train", step=N, held_out_loss=0.1)
    looks = {(color_of(s, made), marker_of(s, made)) for s in made.series}
    assert len(looks) == len(made.series) and len({color_of(s, made) for s in made.series[:8]}) == 8
