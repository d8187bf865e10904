"""Lists the targets of a family, and other runs, from the files in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fine_dist.artifacts.locate import ARTIFACT_FOLDERS, find_artifact
from fine_dist.core.regular_files import last_row as newest_row
from fine_dist.engine.run_dir import RunDir
from fine_dist.methods import from_manifest
from fine_dist.methods.base import Parent
from fine_dist.model.artifact import read_manifest


def result_of(folder: Path) -> dict[str, Any] | None:
    """Content of a target's DONE.json. None while the target is not done or if its artifact is missing. `RunDirError`
    when the file is damaged."""
    done = RunDir(folder).done
    has_artifact = any((folder / name / "manifest.json").is_file() for name in ARTIFACT_FOLDERS)
    return done if has_artifact else None


def last_row(folder: Path) -> dict[str, Any] | None:
    """The newest row of a target's metrics.jsonl that has a training loss."""
    return newest_row(folder / "metrics.jsonl", "loss")


def baselines(parent: Parent | None, runs: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(depth, held-out loss) of the models to compare a family with, by label: its parent, and other runs.

    Models whose manifest has no held-out loss are left out. `ArtifactError` for a run without a model.
    """
    losses: dict[str, list[tuple[int, float]]] = {}

    def add(label: str, depth: int, extra: Mapping[str, Any]) -> None:
        loss = (extra.get("losses") or extra.get("init") or {}).get("held_out_loss")
        if loss is not None:
            losses.setdefault(label, []).append((depth, float(loss)))

    if parent is not None:
        add("its parent", parent.arch.num_layers, parent.artifact.extra)
    for run in runs:
        manifest = read_manifest(find_artifact(run))
        add(_label_of(manifest), int(manifest["arch"]["num_layers"]), manifest["extra"])
    return losses


def _label_of(manifest: Mapping[str, Any]) -> str:
    steps = manifest["extra"].get("steps")
    label = from_manifest(manifest["method"]).label
    return f"{label}, {steps:,} steps" if steps else label
