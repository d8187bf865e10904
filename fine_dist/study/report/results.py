"""Everything that a report shows (`Results`), with look-ups of means and lengths, and reading it from disk.

A program fills a `Results` and passes it to `write_report`:

    results = Results(title="Digits", main="ours", baseline="plain", steps={"N": 400})
    results.add(method="ours", target=4, seed=0, stage="init", step=0, held_out_loss=0.125, steps_init=300, seconds=9.1)
    results.add(method="ours", target=4, seed=0, stage="train", step=400, held_out_loss=0.110, steps_init=300, ...)
    results.tables["learngene"] = {"qkv": table}                       # [L, R] tensors, one per matrix
    results.pictures.append(Picture(image=grid(images, 8), method="ours", target=4, step=400))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, field_validator

from fine_dist.core.errors import ArtifactError
from fine_dist.core.json_files import as_record, read_json
from fine_dist.study.report.measurements import (
    Ancestor,
    Mean,
    Picture,
    PublishedClaim,
    ReportRecord,
    TargetMeasurement,
    as_array,
    steps_of,
)

SECTIONS = {
    "curves": "Held-out loss during training",
    "pictures": "Samples",
    "rows": "All targets",
    "map": "Quality against training length",
    "saved": "What each start is worth in steps from scratch",
    "break_even": "Total cost for n models",
    "bars": "Fréchet distance",
    "depths": "Quality against depth",
    "costs": "Quality against cost",
    "storage": "Storage",
    "tables": "Scalers over depth",
    "claims": "Published claims checked on these runs",
    "tuning": "Tuning",
    "setup": "Settings and machine",
}
"""Sections of the page in order, by key, with their titles. A section without data is left out."""


class Results(BaseModel):
    """Everything that a report shows. A field left empty is left out of the page."""

    model_config = ReportRecord.model_config

    title: str = "Initialized targets"
    created: str = ""
    """Time of creation as ISO 8601 text."""
    dataset: str = ""
    """Description of the training data."""
    command: str = ""
    """The command that reproduces these results."""
    main: str = ""
    """The series that the report is about."""
    baseline: str = ""
    """The series that the main series is compared with first."""
    steps: dict[str, int] = {}
    """Values of the symbols in formulas of steps: N (training), I (initialization), C (stage 1)."""
    display_names: dict[str, str] = {}
    """Names of series in text and figures. Default: the series itself."""
    colors: dict[str, str] = {}
    """Colors of series as #rrggbb. Default: the next free color."""
    claims: list[PublishedClaim] = []
    sections: dict[str, str] = SECTIONS
    """Sections of the page in order, by key, with their titles."""
    measurements: list[TargetMeasurement] = []
    ancestors: dict[str, Ancestor] = {}
    """Ancestors by series."""
    tuning: dict[str, list[dict[str, Any]]] = {}
    """All points that were tried on the tuning seed, by series: {values, held_out_loss, chosen}."""
    target_params: dict[int, int] = {}
    """Numbers in a dense model of each depth."""
    tables: dict[str, dict[str, Any]] = {}
    """Owner ("learngene", "target 4") -> matrix -> [L, R] (tensors and arrays become nested lists). Tables of later
    owners are projected onto the principal component of the first owner."""
    tables_note: str = ""
    """Explanation of the numbers in `tables`."""
    pictures: list[Picture] = []
    classifier_accuracy: float | None = None
    """Held-out accuracy (0..1) of the classifier whose features the Fréchet distance uses."""
    fd_floor: float | None = None
    """Fréchet distance between held-out real images and the training data."""
    fd_floor_samples: int | None = None
    """Number of held-out real images behind `fd_floor`."""
    fd_samples: int | None = None
    """Number of samples behind each model's Fréchet distance."""
    config: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    @field_validator("sections")
    @classmethod
    def _known_sections(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - set(SECTIONS))
        if unknown:
            raise ValueError(f"no such section: {', '.join(unknown)}; legal are {', '.join(SECTIONS)}")
        return value

    @field_validator("tables")
    @classmethod
    def _nested_lists(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
        return {
            who: {matrix: as_array(table).tolist() for matrix, table in tables.items()} for who, tables in value.items()
        }

    def add(self, **fields: Any) -> TargetMeasurement:
        """Append a `TargetMeasurement`.

        Raises:
            pydantic.ValidationError: A loss is not finite, or a field is unknown.
        """
        measurement = TargetMeasurement(**fields)
        self.measurements.append(measurement)
        return measurement

    def add_table(self, who: str, matrix: str, table: Any) -> None:
        """Add a table [L, R] of `Results.tables`."""
        self.tables.setdefault(who, {})[matrix] = as_array(table).tolist()

    # --- look-ups ----------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[int]:
        """Depths of the targets, ascending."""
        return sorted({m.target for m in self.measurements})

    @property
    def series(self) -> list[str]:
        """The published series: main, baseline, the others in the order of `display_names`, then by name."""
        order = [self.main, self.baseline, *self.display_names]
        present = {m.series for m in self.measurements} - self.unpublished
        return [s for s in dict.fromkeys(order) if s in present] + sorted(present - set(order))

    @property
    def unpublished(self) -> set[str]:
        """Series whose best tuned value lies at an end of the grid: a better value may lie beyond it."""
        return {series for series in self.tuning if self.at_grid_end(series)}

    def tuned_values(self, series: str) -> dict[str, Any]:
        """The tuned values of a series by key; empty if nothing was tuned."""
        return next((row["values"] for row in self.tuning.get(series, []) if row["chosen"]), {})

    def at_grid_end(self, series: str) -> bool:
        """Whether a tuned value of a series is the smallest or the largest number that was tried."""
        for key, value in self.tuned_values(series).items():
            tried = {row["values"][key] for row in self.tuning[series]}
            numeric = all(isinstance(x, (int, float)) for x in tried)
            if numeric and len(tried) > 1 and value in (min(tried), max(tried)):
                return True
        return False

    def name_of(self, series: str) -> str:
        """The display name of a series."""
        name, _, variant = series.partition(":")
        display_name = self.display_names.get(name, name)
        return self.display_names.get(series, f"{display_name} {variant}" if variant else display_name)

    @property
    def seeds(self) -> list[int]:
        """Seeds that were measured, ascending."""
        return sorted({m.seed for m in self.measurements})

    def points(self, series: str, target: int, measure: str = "held_out_loss") -> dict[int, list[float]]:
        """Training step -> one value per seed. Step 0 is the end of initialization."""
        values: dict[int, dict[int, float]] = {}
        for m in sorted(self.measurements, key=lambda m: (m.stage == "train", m.steps_init)):
            value = getattr(m, measure)
            if m.series == series and m.target == target and value is not None:
                values.setdefault(m.step, {})[m.seed] = value
        return {step: list(by_seed.values()) for step, by_seed in sorted(values.items())}

    def mean(self, series: str, target: int, step: int, measure: str = "held_out_loss") -> Mean | None:
        """Mean and spread over seeds at exactly this step; None if it was not measured or is not published."""
        values = self.points(series, target, measure).get(step)
        if not values or series in self.unpublished:
            return None
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return Mean(float(np.mean(values)), spread, len(values))

    @property
    def budget(self) -> int | None:
        """N: the training steps after which series are compared; None if it has no value."""
        return self.steps.get("N")

    def trained_steps(self, series: str, target: int) -> int:
        """The maximum number of training steps of a target of this series."""
        steps = (m.step for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train"))
        return max(steps, default=0)

    def reported_steps(self, series: str, target: int) -> list[int]:
        """Training steps at which tables show a series: N, its last step, and every step that a claim names."""
        claimed = {steps_of(at, self.steps) for claim in self.claims for name, at in claim.chain if name == series}
        shown = {self.budget, self.trained_steps(series, target), *claimed}
        measured = {m.step for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train")}
        return sorted(measured & shown)

    def ends(self, series: str, target: int) -> list[int]:
        """Training steps at which runs of this series ended, ascending."""
        full = [m for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train")]
        return sorted({m.step for m in full if m.end})

    def init_steps(self, series: str, target: int) -> int:
        """Initialization steps of a target of this series."""
        return max((m.steps_init for m in self.measurements if (m.series, m.target) == (series, target)), default=0)

    def at(self, series: str, target: int, step: int) -> list[TargetMeasurement]:
        """The measurements at one step, one or more per seed."""
        return [m for m in self.measurements if (m.series, m.target, m.step) == (series, target, step)]

    def seconds(self, series: str, target: int, step: int) -> float | None:
        """Mean wall-clock seconds over seeds until this step."""
        seconds = [m.seconds for m in self.at(series, target, step)]
        return float(np.mean(seconds)) if seconds else None


def read_results(folder: str | Path) -> Results:
    """Read the report that `write_report` wrote to a folder, including its sample grids.

    Raises:
        ArtifactError: The folder has no report, or the report cannot be read.
    """
    folder = Path(folder)
    try:
        file, remedy = folder / "results.json", "run the study's command again"
        data = as_record(dict[str, Any], read_json(file, ArtifactError, remedy), file, ArtifactError, remedy)
        data.pop("verdicts", None)  # derived from the measurements
        for picture in data.get("pictures", []):
            pixels = np.asarray(Image.open(folder / picture["file"]), dtype=np.float64) / 255
            picture["image"] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return Results.model_validate(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder} holds no readable report: {error}") from None
