"""The graph of a study's runs and their dependencies; runs with the same config are one node."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError, RunDirError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.launchers.state_table import StateTable
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig, StudyEntry
from fine_dist.study.report.measurements import steps_of

_STAMP = "study.json"


@dataclass
class StudyRun:
    """One job of a study and the runs that it depends on."""

    name: str
    module: str
    config: Any
    steps: int
    after: tuple[str, ...] = ()
    grows: str | None = None
    """The shorter run that this run continues; up to its end both are bitwise equal."""
    depths: tuple[int, ...] = ()
    """Layers of the models that it trains; empty for stage 1, where the method decides."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def key(self) -> str:
        """sha256 of the config without the launch settings."""
        return hashlib.sha256(_content(self.module, self.config, {"launch"}).encode()).hexdigest()

    def stamp(self, done: bool) -> None:
        """Record in the run's directory which config it was started with, and whether it succeeded."""
        write_atomic(self.run_dir / _STAMP, json.dumps({"key": self.key, "done": done}) + "\n")

    @property
    def done(self) -> bool:
        """Whether this run has finished with the same config, and its result still exists."""
        try:
            stamp = read_json(self.run_dir / _STAMP, RunDirError, "delete it to check the run again")
        except FileNotFoundError:
            return False
        if not isinstance(stamp, dict) or stamp.get("key") != self.key:
            return False
        # The record of the stage itself takes precedence over the stamp, because the result may have been deleted.
        finished = settings.finished(self.module, self.config)
        return bool(stamp.get("done") or self._succeeded()) if finished is None else finished

    def _succeeded(self) -> bool:
        """Whether the worker recorded success in the state table."""
        # The process that would have written the stamp may have ended (a session on a login node) before the job did.
        row = StateTable(self.run_dir.parent).get(self.name)
        return row is not None and row.state == "done"


@dataclass
class Graph:
    """All runs of a study in order of priority; `scheduler.follow` runs them and `collect_results` reads them."""

    study: StudyConfig
    runs: list[StudyRun] = field(default_factory=list)
    _by_content: dict[str, StudyRun] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> StudyRun:
        return next(run for run in self.runs if run.name == name)

    # --- the runs of an entry, each added when it is first needed ----------------------------------------------------

    def data(self, name: str) -> StudyRun:
        """The run that encodes a data set."""
        return self._add(StudyRun(name, settings.MODULES["encode"], settings.encode_config(self.study, name), 0))

    def condense(self, entry: StudyEntry, seed: int) -> StudyRun:
        """The run of stage 1.

        Raises:
            ConfigError: The entry has no stage 1.
        """
        stage = entry.condense
        if stage is None:
            raise ConfigError(f"entry {entry.name} has no condense stage, so it cannot be the parent of other entries")
        name = f"{stage.name or f'condense-{entry.name}'}-s{seed}"
        ancestor = self.parent(self.study.entry(stage.ancestor), seed) if stage.ancestor else None
        changes = settings.condense_settings(entry, seed, self.steps(stage.steps), ancestor[1] if ancestor else None)
        after = (ancestor[0].name,) if ancestor else ()
        return self._stage("condense", name, entry, changes, after)

    def init(self, entry: StudyEntry, seed: int) -> StudyRun:
        """The run of stage 2, which initializes the targets of one seed."""
        stage = entry.init
        if stage is None:
            raise ConfigError(f"entry {entry.name} has no init stage")
        name = f"{stage.name or f'init-{entry.name}'}-s{seed}"
        parent, own = self.parent_of(entry, seed), entry.condense is not None
        depths = self.study.depths_of(entry)
        changes = settings.init_settings(
            entry, seed, self.steps(stage.steps), depths, parent[1] if parent else None, own and not entry.parent
        )
        return self._stage("init", name, entry, changes, (parent[0].name,) if parent else (), depths)

    def train(self, entry: StudyEntry, depth: int, seed: int) -> list[StudyRun]:
        """The runs of stage 3 of one target, shortest first; empty if stage 2 is its only training."""
        if entry.init and entry.init.final:
            return []
        lengths = sorted({self.steps(formula) for formula in entry.train})
        parent = None if entry.init else self.parent_of(entry, seed)
        target: Path | None = None
        after = (parent[0].name,) if parent else ()
        if entry.init:
            first = self.init(entry, seed)
            target, after = settings.target_folder(first.config, depth), (first.name,)
        teacher = self.parent(self.study.entry(entry.teacher), seed) if entry.teacher else None
        if teacher:
            after = (*after, teacher[0].name)
        runs: list[StudyRun] = []
        for steps in lengths:
            middle = f"-n{steps}" if len(lengths) > 1 else ""
            name = f"{entry.name}-L{depth}{middle}-s{seed}"
            changes = settings.train_settings(entry, seed, steps, depth, parent[1] if parent else None, target)
            changes |= {"ancestor": str(teacher[1])} if teacher else {}
            # A schedule that depends on the last step changes the curve from the first step on, so a longer run can
            # continue a shorter one only with a constant rate.
            grows = runs[-1].name if runs and not runs[-1].config.optim.depends_on_steps else None
            runs.append(self._stage("train", name, entry, changes, (grows,) if grows else after, (depth,), grows))
        return runs

    def parent_of(self, entry: StudyEntry, seed: int) -> tuple[StudyRun, Path] | None:
        """The parent of an entry's targets: the run that produces it, and its folder. None without a parent."""
        if entry.parent:
            return self.parent(self.study.entry(entry.parent), seed)
        return self.parent(entry, seed) if entry.condense else None

    def parent(self, entry: StudyEntry, seed: int) -> tuple[StudyRun, Path]:
        """An entry as a parent: its learngene, or else the model of its longest training at its only depth."""
        # Entries may name each other as parents; this list detects a cycle, which would recurse without end.
        if entry.name in self._open:
            raise ConfigError(f"entries: {' -> '.join([*self._open, entry.name])} is a cycle of parents; break it")
        self._open.append(entry.name)
        try:
            if entry.source:
                run = self._add(StudyRun(entry.name, settings.COPY_MODULE, settings.copy_config(self.study, entry), 0))
                return run, run.run_dir / "model"
            if entry.condense:
                run = self.condense(entry, seed)
                return run, run.run_dir / "learngene"
            depths = self.study.depths_of(entry)
            if len(depths) != 1 or not entry.train:
                raise ConfigError(
                    f"entry {entry.name} cannot be a parent: it has no condense stage and no single trained depth "
                    f"(depths {list(depths)}, train {list(entry.train)}); give it one depth and one length or more"
                )
            run = self.train(entry, depths[0], seed)[-1]
            return run, run.run_dir / "model"
        finally:
            self._open.pop()

    def lineage(self, entry: StudyEntry, seed: int) -> list[StudyRun]:
        """The runs that train before an entry's targets: those of ancestors first, then those of the parent."""
        if entry.teacher:
            teacher, plain = self.study.entry(entry.teacher), entry.model_copy(update={"teacher": None})
            runs = [*self.lineage(plain, seed), *self.lineage(teacher, seed)]
            runs += [] if teacher.source else [self.parent(teacher, seed)[0]]
            return list({run.name: run for run in runs}.values())
        if entry.parent:
            parent = self.study.entry(entry.parent)
            own = parent.condense or parent.source  # a learngene is in its own lineage, and a copy costs nothing
            return [*self.lineage(parent, seed), *([] if own else [self.parent(parent, seed)[0]])]
        if not entry.condense:
            return []
        ancestor = self.study.entry(entry.condense.ancestor) if entry.condense.ancestor else None
        before: list[StudyRun] = []
        if ancestor and not ancestor.source:
            before = [*self.lineage(ancestor, seed), self.parent(ancestor, seed)[0]]
        return [*before, self.condense(entry, seed)]

    def steps(self, formula: int | str) -> int:
        """The value of a formula of steps in this study, at least 1."""
        steps = steps_of(formula, self.study.steps)
        if steps < 1:
            raise ConfigError(f"steps {formula!r} is {steps}; a run has 1 step or more")
        return steps

    # --- adding ------------------------------------------------------------------------------------------------------

    def _stage(
        self, stage: str, name: str, entry: StudyEntry, changes: dict[str, Any], after: tuple[str, ...],
        depths: tuple[int, ...] = (), grows: str | None = None,
    ) -> StudyRun:  # fmt: skip
        config = settings.stage_config(self.study, stage, name, entry, changes)
        name_of_data = settings.data_of(self.study, stage, entry)
        if self.study.encodes(name_of_data):
            data = self.data(name_of_data)
            # A dependency that another one implies is left out, so that the printed graph stays short.
            after = after if self._comes_after(after, data.name) else (*after, data.name)
        return self._add(StudyRun(name, settings.MODULES[stage], config, config.steps, after, grows, depths))

    def _comes_after(self, names: tuple[str, ...], dependency: str) -> bool:
        """Whether one of these runs is the dependency or depends on it, directly or indirectly."""
        return any(name == dependency or self._comes_after(self[name].after, dependency) for name in names)

    def _add(self, run: StudyRun) -> StudyRun:
        """Add a run; returns the earlier run if one has the same content under another name."""
        content = _content(run.module, run.config, {"launch", "run_dir"})
        # Entries often share a stage (one ancestor, one learngene) and seeds share data; equal content runs once.
        known = self._by_content.get(content)
        if known is not None:
            return known
        if any(other.name == run.name for other in self.runs):
            raise ConfigError(f"two different runs have the name {run.name}; give one of their stages another name")
        self._by_content[content] = run
        self.runs.append(run)
        return run


def _content(module: str, config: Config, without: set[str]) -> str:
    values = config.model_dump(mode="json", exclude=without)
    return json.dumps([module, values], sort_keys=True)


def plan(study: StudyConfig) -> Graph:
    """The graph of a study. Long runs without dependencies come first, so that no core is idle at the end."""
    graph = Graph(study)
    for name in study.data:
        if study.encodes(name):
            graph.data(name)
    for seed in study.seeds:
        for entry in study.used:
            if entry.condense:
                graph.condense(entry, seed)
        # Before runs that wait for a parent, so that cores have work while the parents train.
        _trains(graph, seed, [entry for entry in study.used if not entry.parent and not entry.condense])
    for seed in study.seeds:
        for entry in study.used:
            if entry.init:
                graph.init(entry, seed)
        _trains(graph, seed, [entry for entry in study.used if entry.parent or entry.condense])
    for entry in study.used:
        _check_depths(graph, entry)
    return graph


def _check_depths(graph: Graph, entry: StudyEntry) -> None:
    """Check that an entry's method can make all its depths, if the architecture of its parent is known already."""
    study, depths = graph.study, graph.study.depths_of(entry)
    if not entry.train and not entry.init:
        return  # it has no targets
    if entry.parent and study.entry(entry.parent).source:
        return  # it may not be copied yet; `init` and `train` check it
    parent = graph.parent_of(entry, study.seeds[0])
    arch = parent[0].config.arch if parent else None
    if parent is None or arch is None:
        return
    owner = study.entry(entry.parent) if entry.parent else entry
    if owner.condense:
        if owner is entry:
            shape = settings.method_of(entry.method).auxiliary(arch)
            settings.check_depths(entry, depths, shape, trained=False)
        return
    settings.check_depths(entry, depths, arch, trained=True)


def _trains(graph: Graph, seed: int, entries: list[StudyEntry]) -> None:
    """Add the runs of stage 3, deepest targets first."""
    # Deep models take longest, and a long run that starts last would leave all other cores idle.
    for depth in sorted({d for e in entries for d in graph.study.depths_of(e)}, reverse=True):
        for entry in entries:
            if depth in graph.study.depths_of(entry):
                graph.train(entry, depth, seed)
