"""The file of a study, in its short form (data, depths, methods, budget) or its full form (parts of entries)."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from fine_dist.core.config import Config, Depth, Seed
from fine_dist.core.errors import nearest
from fine_dist.core.settings import LaunchConfig
from fine_dist.methods import METHODS, SCRATCH


class StudyData(Config):
    """The latent shards of a study, as `python -m fine_dist.encode` writes them."""

    shards: str
    """Folder or pattern of the shards that models are trained on."""
    held_out: str
    """Folder of the shards that the held-out loss is measured on; never trained on."""


class StudyFile(Config):
    """Compare initialization methods on your own data: run every method at every depth over several seeds, tune all of
    them on the same grid, and report quality, cost and a recommendation. The same command resumes a study."""

    run_dir: str = "runs/study"
    """Folder of all runs and of the report. If methods, depths or seeds are added later, only the new runs start."""
    title: str = ""
    """Title of the report. Default: made from the data and the depths."""
    data: StudyData | None = None
    """Shards to train on and to measure on. Required in the short form."""
    ancestor: str = "train"
    """The trained model that methods start from: a folder, a `.pt` file or a name on the hub. `train`: a model of
    architecture `arch` is trained as part of the study, and its cost is counted."""
    arch: dict[str, Any] = Field(default_factory=lambda: {"name": "DiT-S/2"})
    """Architecture of the models, such as {name: DiT-S/2}. Input size, channels and classes are those of the data. Only
    used if the ancestor is trained."""
    depths: tuple[Depth, ...] = Field((4, 6, 8), min_length=1)
    """Layers of the models to initialize. The ancestor is trained with the largest depth."""
    methods: tuple[str, ...] = ()
    """Methods to compare, by name. The report is about the first one. The last one, usually training from scratch, is
    the baseline. Required in the short form."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of all stages. An ordering of methods needs three or more; one is enough for a first try."""
    batch: int = Field(64, ge=1)
    """Samples per training step, the same for every method and stage."""
    budget: str = "2h"
    """Time for the complete study on an otherwise idle machine, such as 30m, 2h or 1.5d. The number of steps and tuning
    are planned to fit; the estimate is printed first. Steps are planned once for a run directory: adding methods,
    depths or seeds keeps them, and the study then takes longer."""
    launch: LaunchConfig = LaunchConfig(retries=0)
    """Resources of one job, and the number of jobs that run at once (`max_parallel`)."""
    study: dict[str, Any] = Field(default_factory=dict)
    """Full form: settings that all parts share. Short form: settings that override those of the generated study."""
    parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Full form: studies by name, each of which overrides `study`, as in configs/benchmark. A file with `entries` at
    the top is a single study, as configs/study/digits_demo.yaml."""
    quick_settings: dict[str, Any] = Field(default_factory=dict)
    """Full form: overrides of every part with `--quick`, for a smoke test of small sizes."""
    quick_part_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Full form: overrides of single parts with `--quick`, applied after `quick_settings`."""

    @model_validator(mode="before")
    @classmethod
    def _one_study(cls, values: Any) -> Any:
        """Read a file of a single study, with `entries` at the top, as a file with one part."""
        if not isinstance(values, dict) or "entries" not in values:
            return values
        part = {key: value for key, value in values.items() if key != "run_dir"}
        return {"parts": {"study": part}, **({"run_dir": values["run_dir"]} if "run_dir" in values else {})}

    @field_validator("arch", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        if isinstance(value, (int, float)):
            raise ValueError(f"{value} has no unit; write such as {value:g}m or {value:g}h")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> StudyFile:
        if bool(self.parts) == bool(self.data):
            raise ValueError(
                "data: give `data: {shards: FOLDER, held_out: FOLDER}` (short form) or `parts` (full form), and only "
                "one of them; --template FILE writes an example"
            )
        if self.data:
            seconds_of(self.budget)
            if len(set(self.methods)) < len(self.methods) or len(self.methods) < 2:
                raise ValueError("methods: give two or more different methods; the last one is the baseline")
            for name in self.methods:
                if name not in recipes() and name not in METHODS:
                    raise ValueError(f"methods: {name!r} is unknown; {nearest(name, [*recipes(), *METHODS])}")
            if SCRATCH.name in self.methods[:-1]:
                raise ValueError(f"methods: put {SCRATCH.name} last: the last method is the baseline")
            if self.data.shards == self.data.held_out:
                raise ValueError(f"data: held_out and shards are both {self.data.held_out}; give other held-out shards")
        return self


def template() -> str:
    """An example of the short form, with comments."""
    return files("fine_dist.study").joinpath("template.yaml").read_text(encoding="utf-8")


def recipes() -> dict[str, dict[str, Any]]:
    """Entries of the full form by the names in `methods` of the short form."""
    text = files("fine_dist.study").joinpath("recipes.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def seconds_of(text: str) -> float:
    """Seconds of a duration such as `90s`, `30m`, `2h` or `1.5d`.

    Raises:
        ValueError: The text is not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", text.strip())
    if not match or float(match[1]) == 0:
        raise ValueError(f"budget: {text!r} is not a duration; write for example 30m, 2h or 1.5d")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}[match[2]]
