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

from fine_dist.errors import ArtifactError
from fine_dist.report import Ancestor, Picture, Results, read_results, summary_png, verdicts, write_report
from fine_dist.report.orderings import arithmetic, linearity, number
from fine_dist.report.table import table

N, INIT = 100, 50


def results(fine: float = 0.11, scratch: float = 0.13, scratch_3n: float = 0.12, targets=(2, 4), seeds=3) -> Results:
    """FINE and scratch on two depths; the mean over seeds is the number given, spread ±0.001."""
    made = Results(ancestor=Ancestor(name="DiT-D64/2-L8", layers=8, steps=1000, seconds=60, learngene_params=1000))
    made.target_params = {t: 1000 * t for t in targets}
    for target in targets:
        for seed in range(seeds):
            wobble = 0.001 * (seed - (seeds - 1) / 2)
            common = {"target": target, "seed": seed}
            made.add(method="fine", stage="init", step=0, held_out_loss=0.2, steps_init=INIT, seconds=5, **common)
            for step in (N // 2, N):
                made.add(
                    method="fine",
                    stage="train",
                    step=step,
                    held_out_loss=fine + wobble + 0.01 * (step < N),
                    frechet=8.0 + wobble if step == N else None,
                    steps_init=INIT,
                    steps_train=step,
                    seconds=5 + step / 10,
                    **common,
                )
            for step, loss in ((0, 1.0), (N, scratch), (3 * N, scratch_3n)):
                made.add(
                    method="he",
                    stage="train",
                    step=step,
                    held_out_loss=loss + wobble,
                    steps_train=step,
                    seconds=step / 10,
                    **common,
                )
    return made


def of(made: Results, words: str):
    return next(v for v in verdicts(made) if words in v.claim)


def printed(made: Results, tmp_path) -> str:
    console = Console(file=io.StringIO(), width=80)
    write_report(tmp_path, made, console=console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("fine", "scratch", "scratch_3n", "equal_steps", "three_times"),
    [
        (0.11, 0.13, 0.12, "held", "held"),
        (0.11, 0.13, 0.10, "held", "did not hold"),
        (0.14, 0.13, 0.12, "did not hold", "did not hold"),
        (0.12, 0.12, 0.12, "did not hold", "held"),
    ],
)
def test_the_two_main_claims_are_decided_by_the_means(fine, scratch, scratch_3n, equal_steps, three_times):
    """Equal means are "no worse", and not "better"."""
    made = results(fine, scratch, scratch_3n)
    assert of(made, "equal steps").word == equal_steps
    assert of(made, "3N").word == three_times


def test_one_depth_that_fails_is_enough_for_a_claim_not_to_hold():
    made = results()
    for row in made.rows:
        if row.method == "he" and row.target == 4 and row.step == N:
            row.held_out_loss = 0.05
    verdict = of(made, "equal steps")
    assert verdict.word == "did not hold"
    assert [c.held for c in verdict.of("held_out_loss")] == [True, False]


def test_what_was_not_measured_is_never_decided():
    words = {v.claim.partition(":")[0].split(",")[0]: v.word for v in verdicts(results())}
    assert words["After N steps"] == words["FINE is better than TLEG"] == "not measured"
    assert words["FINE is better than scratch at equal total steps"] == "not measured"
    assert words["Learned sigma is close to linear in depth"] == "not measured"


def test_a_step_beside_the_right_one_is_not_taken_for_it():
    made = results()
    for row in made.rows:
        if row.method == "he" and row.step == 3 * N:
            row.step += 1
    assert of(made, "3N").held is None


def test_controls_are_compared_at_equal_total_steps():
    made = results()
    for target in (2, 4):
        made.add(method="he", target=target, seed=0, stage="train", step=N + INIT, held_out_loss=0.125)
    assert of(made, "equal total steps").word == "held"


def test_a_difference_smaller_than_the_seeds_spread_is_marked():
    near, far = results(0.11, 0.1105), results(0.11, 0.13)
    assert all(c.within_spread for c in of(near, "equal steps").of("held_out_loss"))
    assert not any(c.within_spread for c in of(far, "equal steps").of("held_out_loss"))


@pytest.mark.parametrize(("step", "claim"), [(0, "Before any training"), (N, "After N steps")])
def test_the_order_of_sigma_starts_is_a_chain_over_variants(step, claim):
    made = results(targets=(4,))
    base = made.mean("fine", 4, step).mean
    for variant, more in (("linear", 0.005), ("identical", 0.01), ("random", 0.008)):
        stage = "train" if step else "init"
        made.add(method="fine", variant=variant, target=4, seed=0, stage=stage, step=step, held_out_loss=base + more)
    verdict = of(made, claim)
    assert [c.held for c in verdict.of("held_out_loss")] == [True, True, False]
    assert verdict.word == "did not hold"


def test_means_and_spreads_are_over_seeds():
    mean = results().mean("fine", 2, N)
    assert (mean.mean, mean.num) == (pytest.approx(0.11), 3)
    assert mean.spread == pytest.approx(np.std([0.109, 0.11, 0.111], ddof=1))


def test_the_end_of_initialisation_stands_at_step_zero():
    made = results()
    made.add(method="fine", target=2, seed=0, stage="init", step=0, held_out_loss=0.9, steps_init=10)
    assert made.points("fine", 2)[0] == [0.2, 0.2, 0.2]


def test_a_sigma_linear_in_depth_is_found_so_and_a_scrambled_one_is_not():
    g = torch.Generator().manual_seed(0)
    slope, base = torch.randn(32, generator=g), torch.randn(32, generator=g)
    straight = base + torch.linspace(0, 1, 8)[:, None] * slope
    made = results()
    made.add_sigma("learngene", "qkv", straight)
    fit = linearity(straight)
    assert fit.correlation == pytest.approx(1) and fit.r_squared == pytest.approx(1)
    assert of(made, "linear in depth").word == "held"
    made.add_sigma("learngene", "o", straight[torch.randperm(8, generator=g)])
    assert of(made, "linear in depth").word == "did not hold"


def test_sigmas_sign_on_its_component_follows_depth():
    table_ = -np.linspace(0, 1, 5)[:, None] * np.ones(3)
    assert np.all(np.diff(linearity(table_).score) > 0)


def test_steps_and_storage_are_counted():
    lines = dict(arithmetic(results()))
    assert "1,000 steps once, then 300 for all targets = 1,300" in lines["steps"]
    assert "3N each: 600" in lines["steps"]
    assert "1,000 numbers, the 2 full models 6,000 (6.00 times" in lines["storage"]


def test_the_table_has_a_line_for_each_measured_milestone():
    made = table(results())
    assert [head.replace("\n", " ") for head in made.heads][:5] == [
        "depth",
        "method",
        "init steps",
        "train steps",
        "held-out loss",
    ]
    lines = [(line.target, line.series, line.step) for line in made.lines]
    assert lines == [
        (t, s, n) for t in (2, 4) for s, n in (("fine", 0), ("fine", N), ("he", 0), ("he", N), ("he", 300))
    ]
    assert made.lines[1].cells[4] == "0.1100 ± 0.0010"


def test_a_terminal_of_80_columns_shows_every_number_whole(tmp_path):
    text = printed(results(), tmp_path)
    assert "0.1100 ± 0.0010" in text and "…" not in text
    assert "FINE is better than scratch at equal steps after initialisation: held" in text


def test_results_json_has_every_row_and_reads_back_equal(tmp_path):
    made = results()
    made.add_sigma("learngene", "qkv", torch.randn(4, 8))
    made.pictures.append(Picture(image=torch.rand(1, 5, 7), method="fine", target=2, step=N))
    made.pictures.append(Picture(image=torch.rand(3, 5, 7), caption="real"))
    write_report(tmp_path, made, echo=False)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == len(made.rows)
    back = read_results(tmp_path)
    assert back.model_dump() == made.model_dump()
    np.testing.assert_allclose(back.pictures[0].image, made.pictures[0].image, atol=0.5 / 255)  # 8 bits
    assert back.pictures[1].image.shape == (3, 5, 7)


def full_page(tmp_path, made: Results | None = None) -> str:
    made = made or results()
    for kind in ("qkv", "o"):
        made.add_sigma("learngene", kind, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        made.add_sigma("target 2", kind, torch.randn(2, 8))
    made.pictures.append(Picture(image=torch.rand(1, 9, 9), method="fine", target=2, step=N))
    made.frechet_floor, made.classifier_accuracy = 2.0, 0.97
    return write_report(tmp_path, made, echo=False).read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    html = full_page(tmp_path)
    assert not re.findall(r'<(?:script|link|iframe)|(?:src|href)="(?!data:|#)|@import|url\((?!#)', html)
    assert html.count("<svg") == 3 and "data:image/png;base64," in html


def test_pictures_on_one_page_do_not_share_ids(tmp_path):
    ids = re.findall(r'\bid="([^"]+)"', full_page(tmp_path))
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_table_are_on_the_page(tmp_path):
    made = results()
    html = full_page(tmp_path, made)
    assert all(cell in html for line in table(made).lines for cell in line.cells)


def test_text_from_outside_cannot_become_markup(tmp_path):
    made = results()
    made.title, made.config = "a <b>&", {"<i>": "<script>alert(1)</script>"}
    html = full_page(tmp_path, made)
    assert "<script>" not in html and "&lt;b&gt;&amp;" in html


def test_a_run_with_one_seed_and_one_row_still_makes_a_page(tmp_path):
    made = Results()
    made.add(method="he", target=2, seed=0, stage="train", step=10, held_out_loss=0.5)
    html = write_report(tmp_path, made, console=Console(file=io.StringIO())).read_text(encoding="utf-8")
    assert "0.5000" in html and "±" not in html and "three seeds or more" in html


def test_an_empty_run_makes_a_page_that_says_so(tmp_path):
    assert "Nothing here compares" in write_report(tmp_path, Results(), echo=False).read_text(encoding="utf-8")


def test_the_summary_is_one_png(tmp_path):
    from PIL import Image

    made = results()
    made.pictures += [Picture(image=torch.rand(1, 9, 19), method=m, target=4, step=N) for m in ("fine", "he")]
    image = Image.open(summary_png(made, tmp_path / "docs" / "summary.png"))
    assert image.format == "PNG" and image.width > 600
    with pytest.raises(ValueError, match="no curve"):
        summary_png(Results(), tmp_path / "none.png")


@pytest.mark.parametrize("bad", [{"held_out_loss": float("nan")}, {"stage": "later"}, {"step": -1}, {"losss": 1}])
def test_a_row_that_cannot_be_is_refused(bad):
    with pytest.raises(ValidationError):
        Results().add(
            **{"method": "he", "target": 2, "seed": 0, "stage": "train", "step": 1, "held_out_loss": 1, **bad}
        )


def test_a_folder_without_a_report_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="no report"):
        read_results(tmp_path)


def test_numbers_have_four_decimals_or_four_digits():
    assert [number(x) for x in (0.11049, 1.0, 12.345, 99999.0)] == ["0.1105", "1.000", "12.35", "99999"]
