"""A run of a study that copies an existing model or learngene into the study's folder, in this project's own layout.

Afterwards stages, measurements and reports treat it like one that the study trained itself.
"""

from __future__ import annotations

from pathlib import Path

from fine_dist.artifacts.exporting import export
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import find_artifact, is_foreign
from fine_dist.core.config import Config
from fine_dist.core.settings import LaunchConfig
from fine_dist.model.artifact import load_artifact, save_artifact


class AncestorCopyConfig(Config):
    """Copy a model of any source, or a learngene, into a folder of this project's layout."""

    source: str
    """A model or learngene of this project (its folder or its run), DiT's `.pt`, a diffusers folder or a hub name."""
    run_dir: str
    """Run directory of the copy, which is written to `model/` in it."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job."""


def run(config: AncestorCopyConfig) -> Path:
    """Copy the source unless the copy exists; returns its folder."""
    out = Path(config.run_dir) / "model"
    if out.exists():
        return out
    if not is_foreign(config.source):
        artifact = load_artifact(find_artifact(config.source))
        # A learngene stays one: loading it as a model would merge its factors, which its targets share.
        if artifact.kind == "learngene":
            save_artifact(
                out, kind=artifact.kind, method=artifact.method, arch=artifact.arch, tensors=artifact.tensors,
                extra=artifact.extra,
            )  # fmt: skip
            return out
    model, about = load_model(config.source)
    export(model, about, "fine_dist", out, None)
    return out
