"""The configs of a study's runs, and the calls of methods; no other file of a study knows the keys of stages."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.artifacts.load import load_unmerged
from fine_dist.artifacts.targets import descend
from fine_dist.core.config import Config, validate
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.data.settings import EncodeConfig
from fine_dist.family.listing import result_of
from fine_dist.family.members import expand
from fine_dist.methods import SCRATCH, check, from_manifest, parent_of
from fine_dist.methods.base import Method, MethodConfig
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.flops import forward_macs
from fine_dist.stages.condense import CondenseStage
from fine_dist.stages.settings import CondenseConfig
from fine_dist.study.ancestor_copy import AncestorCopyConfig
from fine_dist.study.config import StudyConfig, StudyEntry, StudyStage, merged

MODULES = {stage: f"fine_dist.{stage}" for stage in ("encode", "condense", "init", "train")}
COPY_MODULE = "fine_dist.study.ancestor_copy"


# --- configs of stages -----------------------------------------------------------------------------------------------


def stage_config(study: StudyConfig, stage: str, run: str, entry: StudyEntry, changes: dict[str, Any]) -> Any:
    """The config of one run: the study's settings of the stage, overridden by the entry's, then by `changes`."""
    entry_stage = _stage_of(entry, stage)
    name = data_of(study, stage, entry)
    shards = study.shards_of(name)
    values = merged(study.stages[stage], entry_stage.settings if entry_stage else entry.settings)
    values["data"] = {**values.get("data", {}), "shards": shards.train, "held_out": shards.held_out}
    if stage == "init" and entry.labels == "new":
        values["domains"] = {name: {"data": values.pop("data"), "labels": "new"}}
    if stage == "train" and entry.shell != "inherited":
        values["shell"] = entry.shell
    values["run_dir"] = str(study.root / run)
    values["launch"] = merged(_launch_settings(study), values.get("launch", {}))
    kind = getattr(importlib.import_module(MODULES[stage]), f"{stage.capitalize()}Config")
    return validate(kind, merged(values, changes), f"{stage} of entry {entry.name}")


def data_of(study: StudyConfig, stage: str, entry: StudyEntry) -> str:
    """The name of the data set that a stage of an entry reads."""
    entry_stage = _stage_of(entry, stage)
    entry_data = entry_stage.data if entry_stage else None
    return entry_data or (None if stage == "condense" else entry.data) or next(iter(study.data))


def _stage_of(entry: StudyEntry, stage: str) -> StudyStage | None:
    return {"condense": entry.condense, "init": entry.init}.get(stage)


def _launch_settings(study: StudyConfig) -> dict[str, Any]:
    """Launch settings of a job, without `max_parallel`, which the scheduler of the study applies."""
    return study.launch.model_dump(exclude={"max_parallel"})


def encode_config(study: StudyConfig, name: str) -> Config:
    """The config of the run that encodes a data set."""
    values = {**study.data[name], "out": str(study.root / name), "launch": _launch_settings(study)}
    return validate(EncodeConfig, values, f"data.{name}")


def copy_config(study: StudyConfig, entry: StudyEntry) -> Config:
    """The config of the run that copies an existing model into the study."""
    values = {"source": entry.source, "run_dir": str(study.root / entry.name), "launch": _launch_settings(study)}
    return validate(AncestorCopyConfig, values, f"entries.{entry.name}")


def condense_settings(entry: StudyEntry, seed: int, steps: int, ancestor: Path | None) -> dict[str, Any]:
    """Settings of stage 1 that follow from an entry."""
    values = {"method": entry.method, "seed": seed, "steps": steps}
    return {**values, "ancestor": str(ancestor)} if ancestor else values


def init_settings(
    entry: StudyEntry, seed: int, steps: int, depths: tuple[int, ...], parent: Path | None, own: bool
) -> dict[str, Any]:
    """Settings of stage 2 that follow from an entry. `own`: whether the parent is the entry's own learngene, whose
    manifest then determines the method."""
    values: dict[str, Any] = {"depths": list(depths), "seeds": [seed], "steps": steps}
    if parent is not None:
        values["parent"] = str(parent)
    return values if own else {**values, "method": entry.method}


def train_settings(
    entry: StudyEntry, seed: int, steps: int, depth: int, parent: Path | None, target: Path | None
) -> dict[str, Any]:
    """Settings of stage 3 of one target, which starts from stage 2's result (`target`) or is initialized from `parent`
    by the entry's method."""
    values: dict[str, Any] = {"seed": seed, "steps": steps}
    if target is not None:
        return {**values, "parent": str(target), "arch": None, "method": None}
    values |= {"arch": {"num_layers": depth}, "method": entry.method}
    return {**values, "parent": str(parent)} if parent else values


def target_folder(config: Any, depth: int) -> Path:
    """Folder of the target of a depth in an init run."""
    return Path(config.run_dir) / next(member.name for member in expand(config) if member.depth == depth)


# --- finished runs ---------------------------------------------------------------------------------------------------


def finished(module: str, config: Any) -> bool | None:
    """Whether a run's directory contains its result; None for stages that do not record it there."""
    folder = Path(config.run_dir)
    if module == MODULES["init"]:
        return all(result_of(member.folder) is not None for member in expand(config))
    if module in (MODULES["condense"], MODULES["train"]):
        return (folder / "DONE.json").is_file()
    return None


# --- calls of methods ------------------------------------------------------------------------------------------------


def method_of(settings: dict[str, Any]) -> Method[MethodConfig]:
    """The method of an entry's settings."""
    return from_manifest(settings)


def check_depths(entry: StudyEntry, depths: tuple[int, ...], parent: Arch, trained: bool) -> None:
    """Check before any run that an entry's method can make targets of these depths.

    Args:
        entry: The entry.
        depths: Layers of its targets.
        parent: Architecture of the parent.
        trained: Whether the parent is an ordinary trained model and not a learngene.

    Raises:
        ConfigError: The method cannot make a target of one of these depths.
    """
    method, where = method_of(entry.method), f"entries.{entry.name}"
    if not trained:
        if "depth" not in method.traits.varies and set(depths) != {parent.num_layers}:
            raise ConfigError(f"{where}: method {method.config.name} keeps the {parent.num_layers} layers of its "
                              f"learngene, and depths are {list(depths)}; leave one of them out")  # fmt: skip
        return
    weights = {"blocks.0.qkv.weight": torch.empty(0)}  # its name marks an ordinary model; `check` reads no values
    placeholder = Artifact(Path("the ancestor"), "model", SCRATCH.model_dump(), parent, weights, {}, "")
    for depth in depths:
        try:
            check(method, placeholder, method.shape_of(parent.with_depth(depth), parent))
        except ArtifactError as error:
            raise ConfigError(f"{where}: {error}") from None


def label_of(entry: StudyEntry) -> str:
    """The display name of an entry."""
    label = entry.display_name or method_of(entry.method).label
    return label if entry.shell == "inherited" else f"{label}, scratch shell"


def untrained(method: Method[MethodConfig], parent: Artifact | None, arch: Arch, seed: int) -> Any:
    """A target of this architecture before any training, as a model."""
    return descend(method, parent_of(parent) if parent else None, arch, seed).model


def depth_tables(folder: Path) -> dict[str, Tensor]:
    """Tables [L, R] over depth of a learngene or target by name; empty if its method has none."""
    method, model = load_unmerged(folder)
    return method.tables(model)


def stage_1_flops(config: Config) -> float | None:
    """FLOPs of one training sample of stage 1, its teacher's forward pass included; None for another stage."""
    if not isinstance(config, CondenseConfig):
        return None
    plan = CondenseStage(config).blueprint()
    own = plan.method.cost(plan.model, config.batch).training
    return own + (2.0 * forward_macs(plan.teacher) if plan.teacher else 0.0)


def step_flops(arch: Arch) -> float:
    """FLOPs of one training sample of a dense model, forward and backward."""
    return 6.0 * forward_macs(arch)
