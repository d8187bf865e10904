"""The report of a run: `results.json`, a self-contained `report.html`, and the same table in the terminal.

    from fine_dist.report import Ancestor, Claim, Picture, Results, summary_png, write_report

`Results` says how it is filled: rows, series, claims, labels and colours are data. Nothing here trains or samples, and
every number shown is computed from the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.study.report.claims import Comparison, Verdict, verdicts
from fine_dist.study.report.formula import steps_of
from fine_dist.study.report.results import SECTIONS, Ancestor, Claim, Mean, Picture, Results, Row, read_results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


def write_report(folder: str | Path, results: Results, *, echo: bool = True, console: Console | None = None) -> Path:
    """Write `results.json`, `report.html` and `pictures/*.png` into `folder`; returns the path of the page.

    echo:    print the table and the verdicts as well.
    console: where to print (None: stdout).
    Raises `OSError` when the folder cannot be written.
    """
    from fine_dist.study.report.canvas import picture_png
    from fine_dist.study.report.page import page
    from fine_dist.study.report.terminal import print_report

    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(results.pictures):
        words = [picture.series if picture.method else "real" if picture.target is None else "model"]
        words += [f"L{picture.target}"] if picture.target is not None else []
        words += [f"step{picture.step}"] if picture.step is not None else []
        picture.file = f"pictures/{i:02d}-{'-'.join(words).replace(':', '-')}.png"
        (folder / picture.file).write_bytes(picture_png(picture, width=1))
    data = results.model_dump(mode="json")
    data["verdicts"] = [verdict.as_json() for verdict in verdicts(results)]
    (folder / "results.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")
    if echo:
        print_report(results, console)
    return folder / "report.html"


def summary_png(results: Results, path: str | Path, series: Sequence[str] | None = None) -> Path:
    """One picture for a README: curves for every depth, of some series or all, and samples; returns its path."""
    from fine_dist.study.report.figures import summary_png as draw

    return draw(results, path, series)


__all__ = [
    "SECTIONS",
    "Ancestor",
    "Claim",
    "Comparison",
    "Mean",
    "Picture",
    "Results",
    "Row",
    "Verdict",
    "read_results",
    "steps_of",
    "summary_png",
    "verdicts",
    "write_report",
]
