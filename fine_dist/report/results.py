"""What a report is made of: measured rows, and what they were measured on. Everything shown is computed from these.

A program fills a `Results` and hands it to `write_report`:

    results = Results(title="FINE on digits", machine={"cpu": "2 cores"}, config={"rank": 64})
    results.add(method="fine", target=4, seed=0, stage="init", step=0, held_out_loss=0.125, steps_init=300, seconds=9.1)
    results.add(method="fine", target=4, seed=0, stage="train", step=400, held_out_loss=0.110, steps_init=300, ...)
    results.sigmas["learngene"] = {"qkv": sigma}                       # [L, R] tensors, a kind each
    results.pictures.append(Picture(image=grid(images, 8), method="fine", target=4, step=400))
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fine_dist.errors import ArtifactError

LABELS = {
    "fine": "FINE",
    "he": "scratch",
    "tleg": "TLEG",
    "svd": "per-layer SVD",
    "outside": "copied shell",
    "random_genes": "random genes",
    "fine:linear": "sigma linear",
    "fine:identical": "sigma identical",
    "fine:random": "sigma random",
    "fine:aligned": "sigma aligned",
    "fine:segment": "sigma segment",
}
"""How series are called in text and pictures; others go by their own name."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Row(_Part):
    """One measurement of one target. `held_out_loss` and `frechet` are of the weights at this point."""

    method: str
    """A name in `METHODS`: "fine", "he" (scratch), ..."""
    variant: str = ""
    """Told apart from the method itself; for FINE the start at which sigma was left: "linear", "identical", ..."""
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
    train_loss: float | None = None
    steps_init: int = Field(0, ge=0)
    """Initialisation steps (sigma only) this target has spent so far."""
    steps_train: int = Field(0, ge=0)
    """Ordinary training steps this target has spent so far."""
    seconds: float = Field(0.0, ge=0)
    """Wall time this target has spent so far, all its stages."""

    @property
    def series(self) -> str:
        return f"{self.method}:{self.variant}" if self.variant else self.method


class Ancestor(_Part):
    """What stage 1 made, and what it cost."""

    name: str
    """The architecture's name, `DiT-D64/2-L8`."""
    layers: int
    steps: int
    seconds: float
    held_out_loss: float | None = None
    params: int | None = None
    """Numbers in the ancestor as an ordinary dense model."""
    learngene_params: int | None = None
    """Numbers in the learngene's file."""
    frechet: float | None = None


class Picture(_Part):
    """A picture beside the numbers: samples of a model, or real data (`method` None)."""

    image: Any = Field(exclude=True)
    """[1 or 3, H, W] float in 0..1 (`diffusion.sample.grid` makes one)."""
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

    title: str = "FINE: one learngene, every depth"
    created: str = ""
    """When, as text (ISO 8601); the caller's clock."""
    rows: list[Row] = []
    ancestor: Ancestor | None = None
    target_params: dict[int, int] = {}
    """Numbers in a full model of each depth."""
    sigmas: dict[str, dict[str, Any]] = {}
    """Of "learngene", and of targets ("target 4"): kind -> [L, R] (tensors and arrays become nested lists)."""
    pictures: list[Picture] = []
    samples_note: str = ""
    """What a reader should know of the samples: what they share, how they were drawn."""
    classifier_accuracy: float | None = None
    """Held-out accuracy (0..1) of the classifier whose features the Fréchet distance uses."""
    frechet_floor: float | None = None
    """The Fréchet distance of held-out real data to the same reference: no model is expected to be below it."""
    frechet_samples: int | None = None
    """Samples behind each Fréchet distance."""
    config: dict[str, Any] = {}
    machine: dict[str, Any] = {}

    @field_validator("sigmas")
    @classmethod
    def _plain(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
        return {who: {kind: _array(table).tolist() for kind, table in kinds.items()} for who, kinds in value.items()}

    def add(self, **fields: Any) -> Row:
        """Append a `Row`. Raises pydantic's `ValidationError` for a loss that is not finite or an unknown field."""
        row = Row(**fields)
        self.rows.append(row)
        return row

    def add_sigma(self, who: str, kind: str, sigma: Any) -> None:
        """Keep a table [L, R] of "learngene" or "target N"."""
        self.sigmas.setdefault(who, {})[kind] = _array(sigma).tolist()

    # --- looking things up -----------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[int]:
        return sorted({row.target for row in self.rows})

    @property
    def series(self) -> list[str]:
        """FINE first, scratch second, then the others by name."""
        first = ["fine", "he"]
        found = {row.series for row in self.rows}
        return [s for s in first if s in found] + sorted(found - set(first))

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

    def budget(self, target: int) -> int | None:
        """N: the most training steps that FINE's target of this depth got after initialisation."""
        steps = [r.step for r in self.rows if r.series == "fine" and r.target == target and r.stage == "train"]
        return max(steps, default=None) or None

    def init_steps(self, target: int) -> int:
        """Steps that initialising FINE's target of this depth took."""
        return max((r.steps_init for r in self.rows if r.series == "fine" and r.target == target), default=0)

    def seconds(self, series: str, target: int, step: int) -> float | None:
        """Mean wall time over seeds until this step."""
        found = [r.seconds for r in self.rows if (r.series, r.target, r.step) == (series, target, step)]
        return float(np.mean(found)) if found else None


def label(series: str) -> str:
    return LABELS.get(series, series)


def read_results(folder: str | Path) -> Results:
    """What `write_report` wrote to `folder`, pictures included. `ArtifactError` when there is none."""
    from PIL import Image

    folder = Path(folder)
    try:
        data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        data.pop("orderings", None)  # computed, not measured
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
