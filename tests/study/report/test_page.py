"""The page of a report: self-contained, escaped, with sections, series and figures as its settings ask."""

from __future__ import annotations

import io
import re

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from fine_dist.study.report.canvas import color_of, marker_of
from fine_dist.study.report.measurements import Picture
from fine_dist.study.report.number_text import short
from fine_dist.study.report.render import write_report
from fine_dist.study.report.results import Results
from fine_dist.study.report.tables import rows, storage
from tests.study.report.making import CLAIMS, N, results, with_costs


def full_page(tmp_path, made: Results | None = None) -> str:
    made = made or results()
    for kind in ("qkv", "o"):
        made.add_table("learngene", kind, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        made.add_table("target 2", kind, torch.randn(2, 8))
    made.pictures.append(Picture(image=torch.rand(1, 9, 9), method="ours", target=2, step=N))
    made.fd_floor, made.classifier_accuracy = 2.0, 0.97
    return write_report(tmp_path, made, echo=False).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The page of the tests' usual results, drawn once."""
    return full_page(tmp_path_factory.mktemp("page"))


def test_the_page_needs_nothing_from_elsewhere(html):
    assert not re.findall(r'<(?:link|iframe)|<script src|(?:src|href)="(?!data:|#)|@import|url\((?!#)', html)
    assert html.count("<svg") == 6 and "data:image/png;base64," in html


def test_pictures_on_one_page_do_not_share_ids(html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_table_are_on_the_page(html):
    assert all(cell.text in html for row in rows(results()).rows for cell in row.cells)


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


def test_a_series_is_hidden_and_shown_by_its_number_in_figures_tables_and_key(html):
    for index in (0, 1):
        assert f'<button type="button" data-series="{index}"' in html  # the key
        assert f'class="series" data-series="{index}"' in html.replace(" strong", "")  # table rows and curves
        assert f'class="series mark" data-series="{index}"' in html  # points that answer to the mouse
    marks = re.findall(r'<circle class="series mark"[^>]*cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>(.*?)</title>', html)
    assert any("Ours, 2 layers, 100 steps: 0.1100 ± 0.0010" in text for _, _, text in marks)
    assert 'data-value="0.11' in html  # what a column is sorted by


def test_series_are_told_apart_by_colors_and_markers_alike():
    made = results()
    for i in range(12):
        made.add(method=f"m{i}", target=2, seed=0, stage="train", step=N, held_out_loss=0.1)
    looks = {(color_of(s, made), marker_of(s, made)) for s in made.series}
    assert len(looks) == len(made.series) and len({color_of(s, made) for s in made.series[:8]}) == 8
