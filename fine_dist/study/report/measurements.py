"""The records in a report: measurements of targets, their ancestors, sample grids, and the claims to be checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError

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
    """An ordering that a paper claims or that a control requires. Exactly one of `chain` and `on_a_line` is set."""

    text: str
    """The claim as a sentence without its full stop."""
    source: str
    """Paper and table, or the kind of control."""
    chain: tuple[tuple[str, int | str], ...] = ()
    """Pairs (series, training steps) in ascending order of their values. Steps are a number or a formula: N, 3N."""
    or_equal: bool = False
    """Whether values may also be equal ("no worse" instead of "better")."""
    on_a_line: str | None = None
    """Key of `Results.tables` whose tables should follow a straight line over depth."""
    bound: float = Field(0.9, gt=0, le=1)
    """Minimum correlation with depth of the first principal component of every matrix (`on_a_line`)."""
    note: str = ""
    """A note for the reader about the verdict."""


class ReportRecord(BaseModel):
    """Base class of the records; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class TargetMeasurement(ReportRecord):
    """The quality of one target at one step of its training, and its cost up to that step."""

    method: str
    """Name of the series: how the target was initialized."""
    variant: str = ""
    """A variant of the series, such as another start of an untrained target; empty for the series itself."""
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
    """Fraction of samples that the classifier assigns to the class of their label; None: not measured."""
    steps_condense: int = Field(0, ge=0)
    """Steps of stage 1 and of the training of all ancestors, which all targets share."""
    steps_init: int = Field(0, ge=0)
    """Initialization steps (stage 2) of this target so far."""
    end: bool = False
    """Whether a run ended at this step, so that these are its saved weights, at the end of its schedule."""
    steps_train: int = Field(0, ge=0)
    """Ordinary training steps (stage 3) of this target so far."""
    samples: int = Field(0, ge=0)
    """Training samples of this target's own stages so far."""
    samples_condense: int = Field(0, ge=0)
    """Training samples of stage 1 and of the ancestors' training."""
    flops: float = Field(0.0, ge=0)
    """FLOPs of this target's own stages so far, forward and backward."""
    flops_condense: float = Field(0.0, ge=0)
    """FLOPs of stage 1 (its teacher's forward passes included) and of the ancestors' training."""
    flops_ancestor: float = Field(0.0, ge=0)
    """The part of `flops_condense` for training ancestors, which a free public checkpoint would save."""
    stored: int = Field(0, ge=0)
    """Numbers in this target's own file, without those that it shares with other targets."""
    trained: int = Field(0, ge=0)
    """Number of parameters that the last stage trained."""
    seconds: float = Field(0.0, ge=0)
    """Wall-clock seconds of this target's own stages so far."""
    seconds_condense: float = Field(0.0, ge=0)
    """Wall-clock seconds of stage 1 and of the ancestors' training."""

    @property
    def series(self) -> str:
        return f"{self.method}:{self.variant}" if self.variant else self.method


class Ancestor(ReportRecord):
    """The model that a series' targets start from, and its cost. Means over seeds."""

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


class Picture(ReportRecord):
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
    def _asas_array(cls, value: Any) -> np.ndarray:
        image = as_array(value)
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"a grid of samples is [1 or 3, H, W], not {list(image.shape)}")
        return image


class Mean(NamedTuple):
    """A mean over seeds. `spread` is the standard deviation (n - 1), 0 for one seed."""

    mean: float
    spread: float
    num: int


def as_array(value: Any) -> np.ndarray:
    """A tensor or array as float64 in host memory. `ValueError` when an entry is NaN or infinite."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    array = np.asarray(value, dtype=np.float64)
    if not all(map(math.isfinite, (array.min(initial=0), array.max(initial=0)))):
        raise ValueError("NaN or infinite values")
    return array
