"""What a report is made of: measured rows, what they were measured on, and what is claimed of them. All of it is data.

A program fills a `Results` and hands it to `write_report`:

    results = Results(title="Digits", main="ours", baseline="scratch", steps={"N": 400}, labels={"ours": "Our method"})
    results.add(method="ours", target=4, seed=0, stage="init", step=0, held_out_loss=0.125, steps_init=300, seconds=9.1)
    results.add(method="ours", target=4, seed=0, stage="train", step=400, held_out_loss=0.110, steps_init=300, ...)
    results.tables["learngene"] = {"qkv": table}                       # [L, R] tensors, one a matrix
    results.pictures.append(Picture(image=tile_images(images, 8), method="ours", target=4, step=400))
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fine_dist.core.config import Config
from fine_dist.core.errors import ArtifactError

SECTIONS = {
    "claims": "What the method promises, and what held",
    "curves": "Held-out loss",
    "rows": "All targets",
    "bars": "Fréchet distance",
    "depths": "Quality against depth",
    "costs": "Quality against cost",
    "storage": "Storage",
    "pictures": "Samples",
    "tables": "Tables over depth",
    "tuning": "What was tuned",
    "setup": "How it was made",
}
"""A page's sections in order, and their titles. Those without data are left out."""


class Claim(Config):
    """One ordering that a source claims or a control demands. Either `chain` or `on_a_line` is given."""

    text: str
    """The claim, as a sentence without its full stop."""
    source: str
    """Paper and table, or what kind of control it is."""
    chain: tuple[tuple[str, int | str], ...] = ()
    """(series, steps) in order, each lower than the next. Steps are a number or a formula: N, 3N, N+I."""
    or_equal: bool = False
    """Each is no higher than the next, instead of lower."""
    on_a_line: str | None = None
    """Whose tables (a key of `Results.tables`) move along a straight line over depth."""
    bound: float = Field(0.9, gt=0, le=1)
    """Correlation with depth that every matrix's first principal component needs (`on_a_line`)."""
    note: str = ""
    """What a reader should know to judge the verdict."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Row(_Part):
    """One measurement of one target. `held_out_loss` and `frechet` are of the weights at this point."""

    method: str
    """Name of the series: what was initialised, and how."""
    variant: str = ""
    """Told apart from the series itself: another setting, such as where an untrained target begins."""
    target: int = Field(ge=1)
    """Depth of the target, in layers."""
    seed: int
    stage: Literal["init", "train"]
    """"init": during or right after initialisation; "train": after `step` ordinary training steps."""
    step: int = Field(ge=0)
    """Training steps after initialisation (0 in stage "init")."""
    held_out_loss: float = Field(allow_inf_nan=False)
    """Mean squared error of the predicted noise on data never trained on, at fixed timesteps and noise."""
    frechet: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Squared Fréchet distance of samples to real data, if measured here."""
    fd_efflite: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The same on EfficientNet-lite0's ImageNet features, if measured here."""
    train_loss: float | None = None
    steps_condense: int = Field(0, ge=0)
    """Steps of stage 1 behind what this target came from; paid once for all its targets."""
    steps_init: int = Field(0, ge=0)
    """Initialisation steps this target has spent so far."""
    steps_train: int = Field(0, ge=0)
    """Ordinary training steps this target has spent so far."""
    samples: int = Field(0, ge=0)
    """Training samples this target has seen so far, in its own stages."""
    samples_condense: int = Field(0, ge=0)
    """Training samples of stage 1."""
    flops: float = Field(0.0, ge=0)
    """FLOPs this target has spent so far in its own stages, forward and backward."""
    flops_condense: float = Field(0.0, ge=0)
    """FLOPs of stage 1, a teacher's included."""
    stored: int = Field(0, ge=0)
    """Numbers in this target's own file, beside what it shares with others."""
    trained: int = Field(0, ge=0)
    """Numbers that the last stage trained."""
    seconds: float = Field(0.0, ge=0)
    """Wall time this target has spent so far, all its own stages."""
    seconds_condense: float = Field(0.0, ge=0)
    """Wall time of stage 1."""

    @property
    def series(self) -> str:
        return f"{self.method}:{self.variant}" if self.variant else self.method


class Ancestor(_Part):
    """What a series' targets come from, and what it cost. Means over seeds."""

    name: str
    """The architecture's name, `DiT-D64/2-L8`."""
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
    frechet: float | None = None


class Picture(_Part):
    """A picture beside the numbers: samples of a model, or real data (`method` None)."""

    image: Any = Field(exclude=True)
    """[1 or 3, H, W] float in 0..1 (`sampling.image_grid.tile_images` makes one)."""
    method: str | None = None
    variant: str = ""
    target: int | None = None
    step: int | None = None
    caption: str = ""
    """What it shows, if that is not plain from the fields above."""
    file: str | None = None
    """Its PNG below the report folder, set when it is written."""

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
    """Over seeds. `spread` is the standard deviation (n - 1), 0 for one seed."""

    mean: float
    spread: float
    num: int


class Results(_Part):
    """All that a report shows. Fields left empty are left out of the page, or said not to be measured."""

    title: str = "Initialised targets"
    created: str = ""
    """When, as text (ISO 8601); the caller's clock."""
    dataset: str = ""
    """What the models were trained on, in words."""
    command: str = ""
    """The command that makes these results."""
    main: str = ""
    """The series that the report is about."""
    baseline: str = ""
    """The series it is held against first."""
    steps: dict[str, int] = {}
    """Values of the symbols in formulas of steps: N (training steps), I (initialisation), C (stage 1), ..."""
    labels: dict[str, str] = {}
    """How series are called in text and pictures; others go by their own name."""
    colours: dict[str, str] = {}
    """Colours of series as #rrggbb; others get one of their own."""
    claims: list[Claim] = []
    sections: dict[str, str] = SECTIONS
    """Sections of the page in order, by key, and their titles."""
    rows: list[Row] = []
    ancestors: dict[str, Ancestor] = {}
    """By series."""
    tuning: dict[str, list[dict[str, Any]]] = {}
    """By series: what was tried on a seed that is not here, as {values, held_out_loss, chosen}."""
    target_params: dict[int, int] = {}
    """Numbers in a full model of each depth."""
    tables: dict[str, dict[str, Any]] = {}
    """Who ("learngene", "target 4") -> matrix -> [L, R] (tensors and arrays become nested lists). The first is the one
    that the others are compared with."""
    tables_note: str = ""
    """What the numbers in `tables` are."""
    pictures: list[Picture] = []
    classifier_accuracy: float | None = None
    """Held-out accuracy (0..1) of the classifier whose features the Fréchet distance uses."""
    frechet_floor: float | None = None
    """The Fréchet distance of held-out real data to the same reference: no model is expected to be below it."""
    frechet_samples: int | None = None
    """Samples behind each Fréchet distance."""
    config: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    @field_validator("sections")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(value) - set(SECTIONS))
        if unknown:
            raise ValueError(f"no such section: {', '.join(unknown)}; legal are {', '.join(SECTIONS)}")
        return value

    @field_validator("tables")
    @classmethod
    def _plain(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
        return {
            who: {matrix: _array(table).tolist() for matrix, table in tables.items()} for who, tables in value.items()
        }

    def add(self, **fields: Any) -> Row:
        """Append a `Row`. Raises pydantic's `ValidationError` for a loss that is not finite or an unknown field."""
        row = Row(**fields)
        self.rows.append(row)
        return row

    def add_table(self, who: str, matrix: str, table: Any) -> None:
        """Keep a table [L, R]."""
        self.tables.setdefault(who, {})[matrix] = _array(table).tolist()

    # --- looking things up -----------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[int]:
        return sorted({row.target for row in self.rows})

    @property
    def series(self) -> list[str]:
        """The main one first, the baseline second, then the others in the order of `labels`, then by name."""
        order = [self.main, self.baseline, *self.labels]
        found = {row.series for row in self.rows}
        return [s for s in dict.fromkeys(order) if s in found] + sorted(found - set(order))

    def label(self, series: str) -> str:
        """How a series is called."""
        name, _, variant = series.partition(":")
        known = self.labels.get(name, name)
        return self.labels.get(series, f"{known} {variant}" if variant else known)

    @property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.rows})

    def points(self, series: str, target: int, measure: str = "held_out_loss") -> dict[int, list[float]]:
        """step -> one value a seed. Step 0 is the end of initialisation, when no row of stage "train" gives it."""
        values: dict[int, dict[int, float]] = {}
        ranked = sorted(self.rows, key=lambda r: (r.stage == "train", r.steps_init))
        for row in ranked:
            value = getattr(row, measure)
            if row.series == series and row.target == target and value is not None:
                values.setdefault(row.step, {})[row.seed] = value
        return {step: list(by_seed.values()) for step, by_seed in sorted(values.items())}

    def mean(self, series: str, target: int, step: int, measure: str = "held_out_loss") -> Mean | None:
        """Mean and spread over seeds at exactly this step, or None where it was not measured."""
        values = self.points(series, target, measure).get(step)
        if not values:
            return None
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return Mean(float(np.mean(values)), spread, len(values))

    @property
    def budget(self) -> int | None:
        """N: training steps after initialisation at which series are compared. None where none were said."""
        return self.steps.get("N")

    def trained_steps(self, series: str, target: int) -> int:
        """The most training steps that a target of this series had."""
        found = (r.step for r in self.rows if (r.series, r.target, r.stage) == (series, target, "train"))
        return max(found, default=0)

    def told_steps(self, series: str, target: int) -> list[int]:
        """Training steps of a series at which a table tells of it: N, its last, and what a claim names."""
        from fine_dist.study.report.formula import steps_of

        named = {steps_of(at, self.steps) for claim in self.claims for name, at in claim.chain if name == series}
        wanted = {self.budget, self.trained_steps(series, target), *named}
        found = {r.step for r in self.rows if (r.series, r.target, r.stage) == (series, target, "train")}
        return sorted(found & wanted)

    def init_steps(self, series: str, target: int) -> int:
        """Steps that initialising a target of this series took."""
        return max((r.steps_init for r in self.rows if (r.series, r.target) == (series, target)), default=0)

    def at(self, series: str, target: int, step: int) -> list[Row]:
        """The rows, one or more a seed, of a state."""
        return [r for r in self.rows if (r.series, r.target, r.step) == (series, target, step)]

    def seconds(self, series: str, target: int, step: int) -> float | None:
        """Mean wall time over seeds until this step."""
        found = [r.seconds for r in self.at(series, target, step)]
        return float(np.mean(found)) if found else None


def read_results(folder: str | Path) -> Results:
    """What `write_report` wrote to `folder`, pictures included. `ArtifactError` when there is none."""
    from PIL import Image

    folder = Path(folder)
    try:
        data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        data.pop("verdicts", None)  # computed, not measured
        for picture in data.get("pictures", []):
            pixels = np.asarray(Image.open(folder / picture["file"]), dtype=np.float64) / 255
            picture["image"] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return Results.model_validate(data)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder} holds no report that can be read: {error}") from None


def _array(value: Any) -> np.ndarray:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    array = np.asarray(value, dtype=np.float64)
    if not all(map(math.isfinite, (array.min(initial=0), array.max(initial=0)))):
        raise ValueError("NaN or infinite values")
    return array


def number(value: float, like: float | None = None) -> str:
    """Four decimals below 1, else four significant digits; `like`: with as many decimals as that number has."""
    size = abs(value if like is None else like)
    return f"{value:.4f}" if size < 1 else f"{value:.{max(0, 3 - int(math.log10(size)))}f}"
