"""The report of a study: `results.json`, a self-contained `report.html`, and the same table in the terminal.

    from fine_dist.study.report import Results, write_report

Nothing here trains or samples; every number shown is computed from the measurements in `Results`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fine_dist.study.report.results import (
    SECTIONS,
    Ancestor,
    Mean,
    Picture,
    PublishedClaim,
    Results,
    TargetMeasurement,
    read_results,
)

if TYPE_CHECKING:
    from rich.console import Console


def write_report(
    folder: str | Path, results: Results, *, echo: bool = True, console: Console | None = None, claims: bool = True
) -> Path:
    """Write `results.json`, `report.html` and `pictures/*.png` into a folder.

    Args:
        folder: Where they go.
        results: The results.
        echo: Whether to print the table as well.
        console: Where to print; None: stdout.
        claims: Whether the verdicts are printed.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder cannot be written.
    """
    # drawing needs matplotlib, which `--help` and planning a study do not
    from fine_dist.study.report.canvas import picture_png
    from fine_dist.study.report.claims import verdicts
    from fine_dist.study.report.render import page, print_report

    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(results.pictures):
        parts = [picture.series if picture.method else "real" if picture.target is None else "parent"]
        parts += [f"L{picture.target}"] if picture.target is not None else []
        parts += [f"step{picture.step}"] if picture.step is not None else []
        picture.file = f"pictures/{i:02d}-{'-'.join(parts).replace(':', '-')}.png"
        (folder / picture.file).write_bytes(picture_png(picture, width=1))
    data = results.model_dump(mode="json")
    data["verdicts"] = [verdict.as_json() for verdict in verdicts(results)]
    (folder / "results.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")
    if echo:
        print_report(results, console, claims)
    return folder / "report.html"


__all__ = [
    "SECTIONS",
    "Ancestor",
    "Mean",
    "Picture",
    "PublishedClaim",
    "Results",
    "TargetMeasurement",
    "read_results",
    "write_report",
]
