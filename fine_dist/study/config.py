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
    """Number of steps, or a formula of the study's symbols such as N, 3N or N+I."""
    name: str | None = None
    """Run directories are called NAME-sSEED. Default: STAGE-ENTRY-sSEED."""
    ancestor: str | None = None
    """Entry whose model stage 1 starts from or imitates. Required by methods that take an ancestor."""
    data: str | None = None
    """Data set of this stage. Default: the study's first data set for stage 1, the entry's for stage 2."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the stage's command, which override the study's settings of this stage."""
    final: bool = False
    """Whether stage 2 is the only training of a target; its steps then count as training steps."""


class StudyEntry(Config):
    """One row of a study's table: targets that are initialized and trained in the same way."""

    name: str
    """Series name; also the prefix of its run directories."""
    display_name: str | None = None
    """Name in the report. Default: the label of its method."""
    color: str | None = Field(None, pattern="^#[0-9a-fA-F]{6}$")
    """Color in the report as #rrggbb. Default: the next free color."""
    method: dict[str, Any] = Field(default_factory=dict)
    """Settings of the method, such as {name: tleg}. Required unless `source` is given."""
    source: str | None = None
    """An existing model or learngene that other entries start from: a folder or run of this project, DiT's `.pt`, a
    diffusers folder or a name on the hub. Its cost counts as zero in the report, and the entry has no targets."""
    parent: str | None = None
    """Entry whose learngene or model the targets start from. Default: the entry's own learngene if it has a stage 1,
    otherwise none."""
    condense: StudyStage | None = None
    """Stage 1. Default: the entry has none."""
    init: StudyStage | None = None
    """Stage 2, in which all depths of a seed form one family. Default: no stage 2; stage 3 starts from the targets as
    the method initializes them."""
    train: tuple[int | str, ...] = ("N",)
    """Lengths of stage 3. With a constant learning rate a longer run continues the shorter one; with a decaying
    schedule each length is a separate run."""
    teacher: str | None = None
    """Entry whose model is distilled during stage 3. Default: no distillation."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of stage 3, which override the study's settings of stage 3."""
    data: str | None = None
    """Data set of stages 2 and 3 and of the measurements. Default: the study's first data set."""
    labels: Literal["keep", "new"] = "keep"
    """Whether stage 2's data has the parent's classes (`keep`), or targets train their own label embedder (`new`)."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Embedders and final layer at the start of stage 3: as the method initialized them, or from scratch."""
    add_scratch_shell_row: bool = False
    """Whether to add a row NAME_scratch_shell, which differs only in `shell: scratch`."""
    depths: tuple[int, ...] = ()
    """Layers of the targets. Default: the study's depths."""
    untrained: bool = False
    """Whether every variant of the method's targets is also measured before any training."""
    shown: bool = True
    """Whether the targets are rows of the report. Turn it off for an entry that is only an ancestor."""
    control: bool = False
    """Whether the entry is a control, which `controls: false` leaves out."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyEntry:
        if self.shell == "scratch" and self.init and self.init.final:
            raise ValueError(
                f"entries.{self.name}: shell applies at the start of stage 3, and with init.final there is no stage 3; "
                "leave one of them out"
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
    """A study: entries x depths x seeds, each run once and measured in the same way."""

    title: str
    """Title of the report."""
    run_dir: str
    """Folder of all runs. The report is written to the subfolder `report/`."""
    dataset: str = ""
    """Description of the training data, for the report."""
    command: str = ""
    """The command that runs this study, for the report."""
    data: dict[str, dict[str, Any]]
    """Data sets by name: {shards: FOLDER, held_out: FOLDER} for existing shards, otherwise settings of
    `python -m fine_dist.encode`, which writes RUN_DIR/NAME."""
    stages: dict[str, dict[str, Any]]
    """Settings of `condense`, `init` and `train` that all entries share."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds of all stages of an entry, stage 1 included. An ordering of methods needs three or more."""
    depths: tuple[int, ...] = Field(min_length=1)
    """Layers of the targets."""
    steps: dict[str, int]
    """Values of the symbols in formulas of steps: N (training after initialization), I (initialization), C (stage 1),
    or any other capital letter."""
    entries: tuple[StudyEntry, ...] = Field(min_length=1)
    """The rows of the study."""
    main: str
    """Entry that the report is about."""
    baseline: str
    """Entry that the main entry is compared with first, usually training from scratch."""
    controls: bool = True
    """Whether to run the entries that are marked as controls."""
    tune: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Grid of settings of every row's last stage, by dotted key: {optim.lr: [5e-4, 1e-3, 2e-3]}. The point with the
    lowest held-out loss on `tune_seed` is used. Default: nothing is tuned."""
    tune_extend: int = Field(3, ge=0)
    """Maximum number of extensions of a row's grid while its best value lies at an end. A row whose best value still
    lies at an end is not published."""
    tune_seed: int = Field(1000, ge=0)
    """Seed of the trials of tuning, for all stages; it cannot be one of `seeds`."""
    tune_depth: int | None = Field(None, ge=1)
    """Layers of the targets that are tuned. Default: the first depth of each entry."""
    tuned: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Values from an earlier tuning, by entry, such as {fine: {optim.lr: 1e-3}}; these entries are not tuned again.
    Give in `tune` all values that the earlier tuning tried: a value at or beyond an end of that grid hides its row, as
    for any other entry. null: every entry is tuned."""
    features: str | None = "classifier"
    """Feature network of the Fréchet distance: `classifier` trains one on the study's data, a path names the folder of
    a trained one, null leaves the distance out."""
    samples: int = Field(500, ge=2)
    """Number of sampled images for each Fréchet distance."""
    frechet: tuple[str, ...] = ()
    """Entries whose models get a Fréchet distance. Default: all entries."""
    frechet_depths: tuple[int, ...] = ()
    """Depths whose models get a Fréchet distance. Default: all depths."""
    frechet_seeds: tuple[int, ...] = ()
    """Seeds whose models get a Fréchet distance. Default: all seeds."""
    sampler: SamplerConfig = SamplerConfig()
    """Sampler of the images for distances and sample grids."""
    pictures: int = Field(40, ge=0)
    """Number of images in a sample grid, cycling through the classes. 0 draws no grids."""
    sample_columns: int = Field(10, ge=1)
    """Columns of a sample grid."""
    sample_guidance: float = Field(1.0, ge=0)
    """Scale of classifier-free guidance in the sample grids; distances use `sampler.guidance`."""
    sample_entries: tuple[str, ...] = ()
    """Entries whose models, and whose parents, get sample grids. Default: all entries."""
    sample_depths: tuple[int, ...] = ()
    """Depths whose models get sample grids. Default: all depths."""
    invert_colors: bool = False
    """Whether sample grids are shown dark on white, for images such as handwriting."""
    display_names: dict[str, str] = Field(default_factory=dict)
    """Display names of further series, such as ENTRY:VARIANT."""
    tables_note: str = ""
    """A sentence that explains the numbers in the tables over depth."""
    claims: tuple[PublishedClaim, ...] = ()
    """Claims of papers and controls that the report checks."""
    sections: dict[str, str] = Field(default_factory=lambda: dict(SECTIONS))
    """Sections of the report in order, with their titles."""
    launch: LaunchConfig = LaunchConfig(retries=0)
    """Resources of a job, and the number of jobs that run at once (`max_parallel`)."""

    @field_validator("tune", "tuned", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value  # null is the only way for an override to clear a mapping

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
            raise ValueError(f"entries: two have the name {twice[0]!r}; rename one of them")
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
        """{setting: name of the entry that it refers to} of all settings that refer to an entry."""
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
        """Whether the study encodes this data set; otherwise its shards exist already."""
        return "shards" not in self.data[data]

    def shards_of(self, data: str) -> ShardFolders:
        """Folders of a data set's shards."""
        if self.encodes(data):
            return ShardFolders(str(self.root / data / "train"), str(self.root / data / "held_out"))
        return ShardFolders(str(self.data[data]["shards"]), str(self.data[data]["held_out"]))


def load_study(path: str | Path, **changes: Any) -> StudyConfig:
    """A study's file with some keys changed; mappings are merged, other values replaced.

    Raises:
        ConfigError: The file or the changes are not a legal study.
    """
    return validate(StudyConfig, merged(load_yaml(path), changes), str(path))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged into it, mapping by mapping.

    The settings of a method are replaced completely, because they belong to one method.
    """
    result = dict(base)
    for key, value in changes.items():
        mixed = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "method"
        result[key] = merged(result[key], value) if mixed else value
    return result
