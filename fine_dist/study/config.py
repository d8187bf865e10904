"""A study as data: data sets, entries (what is initialised, from what, how long), targets, seeds and claims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fine_dist.core.config import Config, validate
from fine_dist.core.settings import LaunchConfig
from fine_dist.core.yaml_files import load_yaml
from fine_dist.diffusion.settings import SamplerConfig
from fine_dist.study.report.results import SECTIONS, Claim
from launchers.spec import check_name


class Stage(Config):
    """One stage of an entry."""

    steps: int | str
    """A number, or a formula of the study's symbols: N, 3N, N+I."""
    name: str | None = None
    """Run directories are called NAME-sSEED; none: STAGE-ENTRY."""
    ancestor: str | None = None
    """Entry whose model this stage learns from (stage 1 of methods that need an ancestor)."""
    data: str | None = None
    """Data set of this stage; none: the study's first for stage 1, the entry's for stage 2."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Laid over the study's settings of this stage."""
    final: bool = False
    """Stage 2 is all the training that a target has: its steps are counted as training steps."""


class Entry(Config):
    """One row of a study's table: targets made in one way."""

    name: str
    """Of the series, and the first word of its run directories."""
    label: str | None = None
    """How it is called in the report; none: as its method, else by its name."""
    colour: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    """In the report, as #rrggbb; none: one of its own."""
    method: dict[str, Any]
    """Settings of its method."""
    parent: str | None = None
    """Entry whose learngene or model targets come from; none: its own learngene when it condenses, else nothing."""
    condense: Stage | None = None
    """Stage 1."""
    init: Stage | None = None
    """Stage 2: all depths of a seed in one family; none: targets are trained as they descend."""
    train: tuple[int | str, ...] = ("N",)
    """Stage 3: lengths. A longer run continues the shorter one where the schedule allows, and repeats nothing."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Laid over the study's settings of stage 3."""
    data: str | None = None
    """Data set of stages 2 and 3, and of the measures; none: the study's first."""
    labels: Literal["keep", "new"] = "keep"
    """Whether the labels of stage 2's data mean what the parent's do, or targets learn labels of their own."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """What is outside the blocks when stage 3 begins: as the method has it, or from scratch."""
    bare: bool = False
    """Also a row NAME_bare: the same entry but for `shell: scratch`."""
    depths: tuple[int, ...] = ()
    """Layers of its targets; empty: the study's."""
    untrained: bool = False
    """Also measure every variant of the method's targets before any training."""
    shown: bool = True
    """Whether its targets are rows of the report; an ancestor need not be."""
    control: bool = False
    """Whether it can be left out by `controls: false`."""

    @model_validator(mode="after")
    def _one_shell(self) -> Entry:
        if self.shell == "scratch" and self.init and self.init.final:
            raise ValueError(f"entries.{self.name}: shell is where stage 3 begins, and init.final leaves it none")
        return self

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        return check_name(name)


class StudyConfig(Config):
    """A study: entries x depths x seeds, run once each and measured alike."""

    title: str
    """Of the report."""
    run_dir: str
    """Where everything is written; the report lands in its `report/`."""
    dataset: str = ""
    """What is trained on, in words."""
    command: str = ""
    """The command that makes this study, for the report."""
    data: dict[str, dict[str, Any]]
    """Data sets: name -> settings of `fine_dist.encode`. Folders are RUN_DIR/NAME."""
    stages: dict[str, dict[str, Any]]
    """Settings of `condense`, `init` and `train` that all entries share."""
    seeds: tuple[int, ...] = (0,)
    """Of the whole chain, stage 1 included."""
    depths: tuple[int, ...] = Field(min_length=1)
    """Layers of the targets."""
    steps: dict[str, int]
    """Symbols of formulas: N (training after initialisation), I (initialisation), C (stage 1), or any capital."""
    entries: tuple[Entry, ...] = Field(min_length=1)
    """The rows."""
    main: str
    """Entry that the report is about."""
    baseline: str
    """Entry that it is held against first."""
    controls: bool = True
    """Run the entries that are marked as controls."""
    tune: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings of the last stage of every row, dotted, and the values to choose from: `{optim.lr: [5e-4, 1e-3]}`. The
    held-out loss chooses, entry by entry, on a seed that is not reported."""
    tune_seed: int = Field(1000, ge=0)
    """That seed, of the whole chain."""
    tune_depth: int | None = Field(None, ge=1)
    """Layers of the targets on which it is chosen; none (or not of the entry): the entry's first."""
    chosen: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What tuning has chosen before, entry by entry, each one of `tune`'s combinations: nothing is tried again for
    these; null: everything is tried."""
    features: str | None = "classifier"
    """`classifier`: one trained on the study's own data; a folder with one; none: no Fréchet distance."""
    samples: int = Field(500, ge=2)
    """Images drawn for each Fréchet distance."""
    frechet_seeds: tuple[int, ...] = ()
    """Seeds whose models have a Fréchet distance; empty: all."""
    frechet_depths: tuple[int, ...] = ()
    """Layers of the models that have one; empty: any."""
    frechet: tuple[str, ...] = ()
    """Entries whose models have one; empty: all."""
    sampler: SamplerConfig = SamplerConfig()
    """How they are drawn."""
    pictures: int = Field(40, ge=0)
    """Images of a sample grid, a column a class; none at 0."""
    pictured: tuple[str, ...] = ()
    """Entries that have pictures, and what they come from too; empty: all of them."""
    ink: bool = False
    """Show pictures dark on white: scans of writing."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Further labels, such as those of `ENTRY:VARIANT`."""
    tables_note: str = ""
    """What is drawn over depth, in words."""
    claims: tuple[Claim, ...] = ()
    """What the report decides."""
    sections: dict[str, str] = Field(default_factory=lambda: dict(SECTIONS))
    """Sections of the report in order, and their titles."""
    launch: LaunchConfig = LaunchConfig(retries=0)
    """What a job needs, and how many run at once (`max_parallel`)."""

    @field_validator("tune", "chosen", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        return {} if value is None else value  # what a mapping that is laid over another cannot say

    @model_validator(mode="before")
    @classmethod
    def _with_bare_rows(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("entries"), (list, tuple)):
            return values
        entries: list[Any] = []
        for entry in values["entries"]:
            if not isinstance(entry, dict) or entry.get("bare") is not True:
                entries.append(entry)
                continue
            more = {"name": f"{entry.get('name')}_bare", "shell": "scratch", "untrained": False}
            entries += [{**entry, "bare": False}, {**entry, "bare": False, **more}]
        return {**values, "entries": entries}

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        names = [entry.name for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"entries: two are called {twice[0]!r}")
        named = {"main": self.main, "baseline": self.baseline}
        named |= {f"frechet.{i}": name for i, name in enumerate(self.frechet)}
        named |= {f"chosen.{name}": name for name in self.chosen}
        named |= {f"pictured.{i}": name for i, name in enumerate(self.pictured)}
        for entry in self.entries:
            named[f"entries.{entry.name}.parent"] = entry.parent or entry.name
            if entry.condense and entry.condense.ancestor:
                named[f"entries.{entry.name}.condense.ancestor"] = entry.condense.ancestor
            for stage in (entry, entry.condense, entry.init):
                if stage and stage.data and stage.data not in self.data:
                    known = ", ".join(self.data)
                    raise ValueError(f"entries.{entry.name}: no data set is called {stage.data!r}; there are {known}")
        for where, name in named.items():
            if name not in names:
                raise ValueError(f"{where}: no entry is called {name!r}; there are {', '.join(names)}")
        if self.tune and self.tune_seed in self.seeds:
            raise ValueError(f"tune_seed {self.tune_seed} is one of seeds, whose results are reported; choose another")
        empty = [key for key, values in self.tune.items() if not values]
        if empty:
            raise ValueError(f"tune.{empty[0]}: give one value or more")
        for name, values in self.chosen.items():
            wrong = [key for key in self.tune if values.get(key) not in self.tune[key]]
            if wrong:
                tried = ", ".join(map(str, self.tune[wrong[0]]))
                raise ValueError(f"chosen.{name}: {wrong[0]} {values.get(wrong[0])} is none of tune's values, {tried}")
        if not self.data:
            raise ValueError("data: a study needs one data set or more")
        missing = [stage for stage in ("condense", "init", "train") if stage not in self.stages]
        if missing:
            raise ValueError(f"stages: {missing[0]} is missing")
        return self

    @property
    def root(self) -> Path:
        """Its folder."""
        return Path(os.path.expandvars(os.path.expanduser(self.run_dir)))

    @property
    def used(self) -> tuple[Entry, ...]:
        """The entries that are run."""
        return tuple(entry for entry in self.entries if self.controls or not entry.control)

    def entry(self, name: str) -> Entry:
        """The entry of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def rows(self) -> tuple[Entry, ...]:
        """The entries that are run and shown."""
        return tuple(entry for entry in self.used if entry.shown)

    def depths_of(self, entry: Entry) -> tuple[int, ...]:
        """Layers of an entry's targets."""
        return entry.depths or self.depths


def load_study(path: str | Path, **changes: Any) -> StudyConfig:
    """A study's file with some keys changed; mappings are laid over, other values replaced. `ConfigError` names what
    is wrong."""
    return validate(StudyConfig, merged(load_yaml(path), changes), str(path))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping; settings of a method are replaced as a whole, never mixed."""
    made = dict(base)
    for key, value in changes.items():
        mixed = isinstance(value, dict) and isinstance(made.get(key), dict) and key != "method"
        made[key] = merged(made[key], value) if mixed else value
    return made
