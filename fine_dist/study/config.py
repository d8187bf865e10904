"""A study as data: data sets, entries (what is initialized, from what, for how long), targets, seeds and claims."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from fine_dist.core.config import Config, validate
from fine_dist.core.settings import LaunchConfig
from fine_dist.core.yaml_files import load_yaml
from fine_dist.diffusion.settings import SamplerConfig
from fine_dist.launchers.spec import check_name
from fine_dist.study.report.measurements import PublishedClaim
from fine_dist.study.report.results import SECTIONS

SCRATCH_SHELL = "scratch_shell"
"""Ending of the name of a row that `add_scratch_shell_row` adds."""


class StudyStage(Config):
    """One stage of an entry."""

    steps: int | str
    """Steps as a number, or as a formula of the study's symbols: N, 3N, N+I."""
    name: str | None = None
    """Run directories are called NAME-sSEED. Default: STAGE-ENTRY-sSEED."""
    ancestor: str | None = None
    """Entry whose model stage 1 starts from or imitates. Needed by methods that take an ancestor."""
    data: str | None = None
    """Data set of this stage. Default: the study's first data set for stage 1, the entry's for stage 2."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the stage's command, laid over those that the study gives for this stage."""
    final: bool = False
    """Whether stage 2 is all the training that a target has; its steps then count as training steps."""


class StudyEntry(Config):
    """One row of a study's table: targets that are initialized and trained in one way."""

    name: str
    """Series name; also the prefix of its run directories."""
    display_name: str | None = None
    """Name in the report. Default: the label of its method."""
    color: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    """Color in the report as #rrggbb. Default: the next free color."""
    method: dict[str, Any] = Field(default_factory=dict)
    """Settings of its method, such as {name: tleg}. Needed unless `source` is given."""
    source: str | None = None
    """An existing model that other entries start from: a folder or run of this project, DiT's `.pt`, a diffusers
    folder or a name on the hub. It costs nothing in the report, and such an entry has no targets."""
    parent: str | None = None
    """Entry whose learngene or model the targets start from. Default: the entry's own learngene if it has a stage 1,
    else nothing."""
    condense: StudyStage | None = None
    """Stage 1. Default: the entry has none."""
    init: StudyStage | None = None
    """Stage 2, in which all depths of a seed form one family. Default: targets are trained as the method makes them."""
    train: tuple[int | str, ...] = ("N",)
    """Lengths of stage 3. With a constant learning rate a longer run continues the shorter one; with a schedule that
    decays each length is a run of its own."""
    teacher: str | None = None
    """Entry whose model stage 3 imitates while it trains (distillation). Default: stage 3 learns from data alone."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 3, laid over those that the study gives for it."""
    data: str | None = None
    """Data set of stages 2 and 3 and of the measurements. Default: the study's first."""
    labels: Literal["keep", "new"] = "keep"
    """Whether the labels of stage 2's data mean what the parent's do (`keep`), or targets learn labels of their own."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Embedders and final layer when stage 3 begins: as the method made them, or initialized from scratch."""
    add_scratch_shell_row: bool = False
    """Whether there is also a row NAME_scratch_shell, which differs in `shell: scratch` alone."""
    depths: tuple[int, ...] = ()
    """Layers of its targets. Default: the study's depths."""
    untrained: bool = False
    """Whether every variant of the method's targets is also measured before any training."""
    shown: bool = True
    """Whether its targets are rows of the report. An ancestor need not be."""
    control: bool = False
    """Whether the entry is a control, which `controls: false` leaves out."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyEntry:
        if self.shell == "scratch" and self.init and self.init.final:
            raise ValueError(
                f"entries.{self.name}: shell applies when stage 3 begins, and with init.final there is none"
            )
        if bool(self.source) == bool(self.method):
            raise ValueError(f"entries.{self.name}: give either method or source")
        return self

    @field_validator("name")
    @classmethod
    def _legal_name(cls, name: str) -> str:
        return check_name(name)


class ShardFolders(NamedTuple):
    """Folders of a data set's shards."""

    train: str
    held_out: str


class StudyConfig(Config):
    """A study: entries x depths x seeds, each run once and measured alike."""

    title: str
    """Title of the report."""
    run_dir: str
    """Folder of all runs. The report is written to its `report/`."""
    dataset: str = ""
    """The training data in words, for the report."""
    command: str = ""
    """The command that makes this study, for the report."""
    data: dict[str, dict[str, Any]]
    """Data sets by name: {shards: FOLDER, held_out: FOLDER} for existing shards, else settings of
    `python -m fine_dist.encode`, which then writes RUN_DIR/NAME."""
    stages: dict[str, dict[str, Any]]
    """Settings of `condense`, `init` and `train` that all entries share."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds of the whole chain, stage 1 included. An ordering needs three or more."""
    depths: tuple[int, ...] = Field(min_length=1)
    """Layers of the targets."""
    steps: dict[str, int]
    """Symbols of the formulas of steps: N (training after initialization), I (initialization), C (stage 1), or any
    other capital letter."""
    entries: tuple[StudyEntry, ...] = Field(min_length=1)
    """The rows of the study."""
    main: str
    """Entry that the report is about."""
    baseline: str
    """Entry that it is compared with first, usually training from scratch."""
    controls: bool = True
    """Whether the entries that are marked as controls are run."""
    tune: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Grid of settings of every row's last stage, by dotted key: {optim.lr: [5e-4, 1e-3, 2e-3]}. The held-out loss
    chooses for each entry on a seed that is not reported. Default: nothing is tuned."""
    tune_extend: int = Field(3, ge=0)
    """How often a row's grid of numbers is extended while its best value lies at an end. A row whose best value still
    lies at an end is not published."""
    tune_seed: int = Field(1000, ge=0)
    """Seed of the whole chain on which tuning chooses; it cannot be one of `seeds`."""
    tune_depth: int | None = Field(None, ge=1)
    """Layers of the targets that are tuned. Default: the first depth of each entry."""
    tuned: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Values that an earlier tuning chose, by entry, such as {fine: {optim.lr: 1e-3}}; these entries are not tuned
    again. null: every entry is tuned."""
    features: str | None = "classifier"
    """Feature network of the Fréchet distance: `classifier` trains one on the study's data, a folder holds one, null
    leaves the distance out."""
    samples: int = Field(500, ge=2)
    """Images drawn for each Fréchet distance."""
    frechet: tuple[str, ...] = ()
    """Entries whose models get a Fréchet distance. Default: all."""
    frechet_depths: tuple[int, ...] = ()
    """Depths whose models get a Fréchet distance. Default: all."""
    frechet_seeds: tuple[int, ...] = ()
    """Seeds whose models get a Fréchet distance. Default: all."""
    sampler: SamplerConfig = SamplerConfig()
    """Sampler of the images behind distances and sample grids."""
    pictures: int = Field(40, ge=0)
    """Images in a sample grid, the classes in turn. 0 draws none."""
    sample_columns: int = Field(10, ge=1)
    """Columns of a sample grid."""
    sample_guidance: float = Field(1.0, ge=0)
    """Scale of classifier-free guidance of the sample grids; distances use the sampler's own."""
    sample_entries: tuple[str, ...] = ()
    """Entries whose models, and whose parents, get sample grids. Default: all."""
    sample_depths: tuple[int, ...] = ()
    """Depths whose models get sample grids. Default: all."""
    invert_colors: bool = False
    """Whether sample grids are shown dark on white, as scans of writing are."""
    display_names: dict[str, str] = Field(default_factory=dict)
    """Display names of further series, such as ENTRY:VARIANT."""
    tables_note: str = ""
    """What the tables over depth hold, as a sentence."""
    claims: tuple[PublishedClaim, ...] = ()
    """Claims of papers and controls that the report checks."""
    sections: dict[str, str] = Field(default_factory=lambda: dict(SECTIONS))
    """Sections of the report in order, with their titles."""
    launch: LaunchConfig = LaunchConfig(retries=0)
    """What a job needs, and how many run at once (`max_parallel`)."""

    @field_validator("tune", "tuned", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value  # a mapping laid over another cannot say "nothing" otherwise

    @model_validator(mode="before")
    @classmethod
    def _with_scratch_shell_rows(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("entries"), (list, tuple)):
            return values
        key, entries = "add_scratch_shell_row", []
        for entry in values["entries"]:
            if not isinstance(entry, dict) or entry.get(key) is not True:
                entries.append(entry)
                continue
            more = {"name": f"{entry.get('name')}_{SCRATCH_SHELL}", "shell": "scratch", "untrained": False}
            entries += [{**entry, key: False}, {**entry, key: False, **more}]
        return {**values, "entries": entries}

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        names = [entry.name for entry in self.entries]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"entries: two are called {twice[0]!r}")
        if not self.data:
            raise ValueError("data: a study needs one data set or more")
        for where, name in self._references().items():
            if name not in names:
                raise ValueError(f"{where}: no entry is called {name!r}; there are {', '.join(names)}")
        for entry in self.entries:
            for stage in (entry, entry.condense, entry.init):
                if stage and stage.data and stage.data not in self.data:
                    known = ", ".join(self.data)
                    raise ValueError(f"entries.{entry.name}: no data set is called {stage.data!r}; there are {known}")
        if self.tune and self.tune_seed in self.seeds:
            raise ValueError(f"tune_seed {self.tune_seed} is one of seeds, whose results are reported; choose another")
        empty = [key for key, values in self.tune.items() if not values]
        if empty:
            raise ValueError(f"tune.{empty[0]}: give one value or more")
        for name, values in self.tuned.items():
            missing = [key for key in self.tune if key not in values]
            if missing:
                raise ValueError(f"tuned.{name}: {missing[0]} has no value, and it is one of tune's keys")
        missing = [stage for stage in ("condense", "init", "train") if stage not in self.stages]
        if missing:
            raise ValueError(f"stages: {missing[0]} is missing")
        return self

    def _references(self) -> dict[str, str]:
        """Every place that names an entry, and the name."""
        named = {"main": self.main, "baseline": self.baseline}
        for key in ("frechet", "tuned", "sample_entries"):
            named |= {
                f"{key}.{name}" if key == "tuned" else f"{key}.{i}": name for i, name in enumerate(getattr(self, key))
            }
        for entry in self.entries:
            named[f"entries.{entry.name}.parent"] = entry.parent or entry.name
            named[f"entries.{entry.name}.teacher"] = entry.teacher or entry.name
            if entry.condense and entry.condense.ancestor:
                named[f"entries.{entry.name}.condense.ancestor"] = entry.condense.ancestor
        return named

    @property
    def root(self) -> Path:
        """Folder of the study."""
        return Path(os.path.expandvars(os.path.expanduser(self.run_dir)))

    @property
    def used(self) -> tuple[StudyEntry, ...]:
        """The entries that are run."""
        return tuple(e for e in self.entries if not e.source and (self.controls or not e.control))

    @property
    def rows(self) -> tuple[StudyEntry, ...]:
        """The entries that are run and shown in the report."""
        return tuple(entry for entry in self.used if entry.shown)

    def entry(self, name: str) -> StudyEntry:
        """The entry of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    def depths_of(self, entry: StudyEntry) -> tuple[int, ...]:
        """Layers of an entry's targets."""
        return entry.depths or self.depths

    def encodes(self, data: str) -> bool:
        """Whether a data set is made by the study (and not given as shards)."""
        return "shards" not in self.data[data]

    def shards_of(self, data: str) -> ShardFolders:
        """Folders of a data set's shards."""
        if self.encodes(data):
            return ShardFolders(str(self.root / data / "train"), str(self.root / data / "held_out"))
        return ShardFolders(str(self.data[data]["shards"]), str(self.data[data]["held_out"]))


def load_study(path: str | Path, **changes: Any) -> StudyConfig:
    """A study's file with some keys changed; mappings are laid over, other values replaced.

    Raises:
        ConfigError: The file or the changes are no legal study.
    """
    return validate(StudyConfig, merged(load_yaml(path), changes), str(path))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, mapping by mapping.

    Settings of a method are replaced as a whole, never mixed: they belong to one method.
    """
    result = dict(base)
    for key, value in changes.items():
        mixed = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "method"
        result[key] = merged(result[key], value) if mixed else value
    return result
