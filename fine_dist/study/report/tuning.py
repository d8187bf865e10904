"""What tuning chose for every series, and where the values it could choose from ended too soon."""

from __future__ import annotations

from typing import Any

from fine_dist.study.report.results import Results

MARK = "†"
"""Stands behind a chosen value beyond which nothing was tried."""


def chosen(results: Results, series: str) -> dict[str, Any]:
    """The values that a series was given, by key; none where nothing was tuned."""
    return next((row["values"] for row in results.tuning.get(series, []) if row["chosen"]), {})


def at_an_end(results: Results, series: str) -> bool:
    """Whether a series chose the least or the greatest of the numbers that it tried: beyond may be better ones."""
    for key, value in chosen(results, series).items():
        tried = {row["values"][key] for row in results.tuning[series]}
        numbers = all(isinstance(x, (int, float)) for x in tried)
        if numbers and len(tried) > 1 and value in (min(tried), max(tried)):
            return True
    return False


def ends(results: Results) -> str:
    """A sentence about the series that chose an end of what was tried; empty where none did."""
    cut = [series for series in results.tuning if at_an_end(results, series)]
    if not cut:
        return ""
    return (
        f"{len(cut)} of {len(results.tuning)} rows chose the least or the greatest value that was tried ({MARK}); "
        "beyond it they may be better than is shown."
    )
