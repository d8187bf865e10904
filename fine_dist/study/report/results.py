"""The data behind a report: measurements, the ancestors they start from, sample grids, and the claims to be checked.

A program fills a `Results` and passes it to `write_report`:

    results = Results(title="Digits", main="ours", baseline="plain", steps={"N": 400})
    results.add(method="ours", target=4, seed=0, stage="init", step=0, held_out_loss=0.125, steps_init=300, seconds=9.1)
    results.add(method="ours", target=4, seed=0, stage="train", step=400, held_out_loss=0.110, steps_init=300, ...)
    results.tables["learngene"] = {"qkv": table}                       # [L, R] tensors, one per matrix
    results.pictures.append(Picture(image=grid(images, 8), method="ours", target=4, step=400))
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fine_dist.core.config import Config
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.json_files import as_record, read_json

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

_TERM = re.compile(r"(?P<factor>\d+)?(?P<symbol>[A-Z])(?:/(?P<divisor>[1-9]\d*))?|(?P<number>\d+)")


def steps_of(formula: int | str, symbols: Mapping[str, int]) -> int:
    """The number of steps that a formula such as `N`, `3N`, `N+C/3` or `400` stands for.

    Args:
        formula: Terms joined by `+`; a fraction is rounded to the nearest step.
        symbols: Value of each symbol, one capital letter each.

    Raises:
        ConfigError: The formula cannot be read, or a symbol in it has no value.
    """
    if isinstance(formula, int):
        return formula
    total = 0.0
    for part in formula.replace(" ", "").split("+"):
        term = _TERM.fullmatch(part)
        if term is None:
            raise ConfigError(
                f"steps {formula!r}: {part!r} is not a term; write terms such as N, 3N, C/4 or 400, joined by +"
            )
        if term["number"]:
            total += int(term["number"])
            continue
        if term["symbol"] not in symbols:
            known = ", ".join(f"{name} = {value}" for name, value in symbols.items()) or "none"
            raise ConfigError(f"steps {formula!r}: {term['symbol']} has no value; known are {known}")
        total += int(term["factor"] or 1) * symbols[term["symbol"]] / int(term["divisor"] or 1)
    return round(total)


class PublishedClaim(Config):
    """One ordering that a paper claims or a control demands. Exactly one of `chain` and `on_a_line` is given."""

    text: str
    """The claim as a sentence without its full stop."""
    source: str
    """Paper and table, or the kind of control."""
    chain: tuple[tuple[str, int | str], ...] = ()
    """Pairs (series, training steps), each with a lower value than the next. Steps are a number or a formula: N, 3N."""
    or_equal: bool = False
    """Whether each pair may also be equal to the next ("no worse") instead of lower ("better")."""
    on_a_line: str | None = None
    """Key of `Results.tables` whose tables should follow a straight line over depth."""
    bound: float = Field(0.9, gt=0, le=1)
    """Least correlation with depth that the first principal component of every matrix needs (`on_a_line`)."""
    note: str = ""
    """What a reader should know to judge the verdict."""


class _ReportModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class TargetMeasurement(_ReportModel):
    """The quality of one target at one point of its training, and what it had cost by then."""

    method: str
    """Name of the series: how the target was initialized."""
    variant: str = ""
    """A second setting of the same series, such as where an untrained target starts; empty for the series itself."""
    target: int = Field(ge=1)
    """Depth of the target in layers."""
    seed: int
    stage: Literal["init", "train"]
    """`init`: at the end of initialization; `train`: after `step` ordinary training steps."""
    step: int = Field(ge=0)
    """Training steps after initialization (0 in stage `init`)."""
    held_out_loss: float = Field(allow_inf_nan=False)
    """Mean squared error of the predicted noise on held-out data, at fixed timesteps and noise."""
    fd_classifier: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Squared Fréchet distance between samples and training data on the classifier's features; None: not measured."""
    accuracy: float | None = Field(None, ge=0, le=1)
    """Share of samples that the classifier assigns to the class they were drawn for; None: not measured."""
    steps_condense: int = Field(0, ge=0)
    """Steps of stage 1 and of every ancestor's training behind this target; paid once for all targets."""
    steps_init: int = Field(0, ge=0)
    """Initialization steps (stage 2) of this target so far."""
    end: bool = False
    """Whether a run ended here: these are the weights it saved, at the end of its learning-rate schedule."""
    steps_train: int = Field(0, ge=0)
    """Ordinary training steps (stage 3) of this target so far."""
    samples: int = Field(0, ge=0)
    """Training samples that this target's own stages have seen so far."""
    samples_condense: int = Field(0, ge=0)
    """Training samples of stage 1 and of the ancestors' training."""
    flops: float = Field(0.0, ge=0)
    """FLOPs of this target's own stages so far, forward and backward."""
    flops_condense: float = Field(0.0, ge=0)
    """FLOPs of stage 1 (its teacher's forward passes included) and of the ancestors' training."""
    flops_ancestor: float = Field(0.0, ge=0)
    """The part of `flops_condense` spent on training ancestors; a free public checkpoint would save it."""
    stored: int = Field(0, ge=0)
    """Numbers in this target's own file, without what it shares with other targets."""
    trained: int = Field(0, ge=0)
    """Numbers that the last stage trained."""
    seconds: float = Field(0.0, ge=0)
    """Wall-clock seconds of this target's own stages so far."""
    seconds_condense: float = Field(0.0, ge=0)
    """Wall-clock seconds of stage 1 and of the ancestors' training."""

    @property
    def series(self) -> str:
        return f"{self.method}:{self.variant}" if self.variant else self.method


class Ancestor(_ReportModel):
    """The model that a series' targets start from, and what it cost. Means over seeds."""

    name: str
    """Name of the architecture, such as `DiT-D64/2-L8`."""
    layers: int
    steps: int
    seconds: float
    held_out_loss: float | None = None
    params: int | None = None
    """Numbers in it as an ordinary dense model."""
    stored: int | None = None
    """Numbers in its file."""
    samples: int = 0
    flops: float = 0.0
    fd_classifier: float | None = None


class Picture(_ReportModel):
    """A grid of samples from one model, or of real data (`method` None)."""

    image: Any = Field(exclude=True)
    """[1 or 3, H, W] floats in 0..1."""
    method: str | None = None
    variant: str = ""
    target: int | None = None
    step: int | None = None
    caption: str = ""
    """Text below the grid; empty: made from the fields above."""
    file: str | None = None
    """Path of its PNG below the report folder, set when the report is written."""

    @property
    def series(self) -> str:
        return f"{self.method}:{self.variant}" if self.variant else str(self.method)

    @field_validator("image")
    @classmethod
    def _as_array(cls, value: Any) -> np.ndarray:
        image = _array(value)
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"a picture is [1 or 3, H, W], not {list(image.shape)}")
        return image


class Mean(NamedTuple):
    """A mean over seeds. `spread` is the standard deviation (n - 1), 0 for one seed."""

    mean: float
    spread: float
    num: int


class Results(_ReportModel):
    """Everything a report shows. A field left empty is left out of the page."""

    title: str = "Initialized targets"
    created: str = ""
    """Time of creation as ISO 8601 text."""
    dataset: str = ""
    """The training data, in words."""
    command: str = ""
    """The command that reproduces these results."""
    main: str = ""
    """The series that the report is about."""
    baseline: str = ""
    """The series it is compared with first."""
    steps: dict[str, int] = {}
    """Values of the symbols in formulas of steps: N (training), I (initialization), C (stage 1)."""
    display_names: dict[str, str] = {}
    """How series are called in text and figures; others are called by their own name."""
    colors: dict[str, str] = {}
    """Colors of series as #rrggbb; the others get one of their own."""
    claims: list[PublishedClaim] = []
    sections: dict[str, str] = SECTIONS
    """Sections of the page in order, by key, with their titles."""
    measurements: list[TargetMeasurement] = []
    ancestors: dict[str, Ancestor] = {}
    """By series."""
    tuning: dict[str, list[dict[str, Any]]] = {}
    """By series, every value tried on the tuning seed: {values, held_out_loss, chosen}."""
    target_params: dict[int, int] = {}
    """Numbers in a dense model of each depth."""
    tables: dict[str, dict[str, Any]] = {}
    """Owner ("learngene", "target 4") -> matrix -> [L, R] (tensors and arrays become nested lists). The others are
    projected onto the first one's principal component."""
    tables_note: str = ""
    """What the numbers in `tables` are."""
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
            who: {matrix: _array(table).tolist() for matrix, table in tables.items()} for who, tables in value.items()
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
        self.tables.setdefault(who, {})[matrix] = _array(table).tolist()

    # --- look-ups ----------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[int]:
        """Depths of the targets, ascending."""
        return sorted({m.target for m in self.measurements})

    @property
    def series(self) -> list[str]:
        """The published series: main one, baseline, the others in the order of `display_names`, then by name."""
        order = [self.main, self.baseline, *self.display_names]
        present = {m.series for m in self.measurements} - self.unpublished
        return [s for s in dict.fromkeys(order) if s in present] + sorted(present - set(order))

    @property
    def unpublished(self) -> set[str]:
        """Series whose best tuned value is the least or greatest one tried: a better one may lie beyond the grid."""
        return {series for series in self.tuning if self.at_grid_end(series)}

    def tuned_values(self, series: str) -> dict[str, Any]:
        """The tuned values of a series by key; empty where nothing was tuned."""
        return next((row["values"] for row in self.tuning.get(series, []) if row["chosen"]), {})

    def at_grid_end(self, series: str) -> bool:
        """Whether a tuned value of a series is the least or the greatest of the numbers that were tried."""
        for key, value in self.tuned_values(series).items():
            tried = {row["values"][key] for row in self.tuning[series]}
            numeric = all(isinstance(x, (int, float)) for x in tried)
            if numeric and len(tried) > 1 and value in (min(tried), max(tried)):
                return True
        return False

    def name_of(self, series: str) -> str:
        """The display name of a series."""
        name, _, variant = series.partition(":")
        known = self.display_names.get(name, name)
        return self.display_names.get(series, f"{known} {variant}" if variant else known)

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
        """Mean and spread over seeds at exactly this step; None where it was not measured or is not published."""
        values = self.points(series, target, measure).get(step)
        if not values or series in self.unpublished:
            return None
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return Mean(float(np.mean(values)), spread, len(values))

    @property
    def budget(self) -> int | None:
        """N: the training steps after which series are compared; None where it has no value."""
        return self.steps.get("N")

    def trained_steps(self, series: str, target: int) -> int:
        """The most training steps that a target of this series had."""
        steps = (m.step for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train"))
        return max(steps, default=0)

    def reported_steps(self, series: str, target: int) -> list[int]:
        """Training steps at which tables show a series: N, its last step, and every step that a claim names."""
        named = {steps_of(at, self.steps) for claim in self.claims for name, at in claim.chain if name == series}
        wanted = {self.budget, self.trained_steps(series, target), *named}
        measured = {m.step for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train")}
        return sorted(measured & wanted)

    def ends(self, series: str, target: int) -> list[int]:
        """Training steps at which a run of this series ended: those with costs of the last training step."""
        full = [m for m in self.measurements if (m.series, m.target, m.stage) == (series, target, "train")]
        return sorted({m.step for m in full if m.end})

    def init_steps(self, series: str, target: int) -> int:
        """Initialization steps of a target of this series."""
        return max((m.steps_init for m in self.measurements if (m.series, m.target) == (series, target)), default=0)

    def at(self, series: str, target: int, step: int) -> list[TargetMeasurement]:
        """The measurements of one state, one or more per seed."""
        return [m for m in self.measurements if (m.series, m.target, m.step) == (series, target, step)]

    def seconds(self, series: str, target: int, step: int) -> float | None:
        """Mean wall-clock seconds over seeds until this step."""
        seconds = [m.seconds for m in self.at(series, target, step)]
        return float(np.mean(seconds)) if seconds else None


def read_results(folder: str | Path) -> Results:
    """Read what `write_report` wrote to `folder`, pictures included.

    Raises:
        ArtifactError: The folder holds no report, or one that cannot be read.
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


def _array(value: Any) -> np.ndarray:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    array = np.asarray(value, dtype=np.float64)
    if not all(map(math.isfinite, (array.min(initial=0), array.max(initial=0)))):
        raise ValueError("NaN or infinite values")
    return array


def number(value: float, like: float | None = None) -> str:
    """Text with four decimals below 1, else four significant digits; `like`: as many decimals as that number gets."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 else f"{value:.{max(0, 3 - int(math.log10(size)))}f}"


def short(value: float) -> str:
    """`134 K`, `1.2 G`, `3.1 T`: at most three significant digits and a unit."""
    for size, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def ratio(value: float) -> str:
    """`3`, `2.5`, `0.33`."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
