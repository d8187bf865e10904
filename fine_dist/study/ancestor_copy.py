"""A run of a study that copies an existing model into the study's folder, in this project's own layout.

Afterwards stages, measurements and reports treat the ancestor like a model that the study trained itself.
"""

from __future__ import annotations

from pathlib import Path

from fine_dist.artifacts.exporting import export
from fine_dist.artifacts.load import load_model
from fine_dist.core.config import Config
from fine_dist.core.settings import LaunchConfig


class AncestorCopyConfig(Config):
    """Copy a model of any source into a folder of this project's layout."""

    source: str
    """The model: a folder or run of this project, DiT's `.pt`, a diffusers folder or a name on the hub."""
    run_dir: str
    """Run directory of the copy, which is written to `model/` in it."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job."""


def run(config: AncestorCopyConfig) -> Path:
    """Copy the model unless the copy exists; returns its folder."""
    out = Path(config.run_dir) / "model"
    if not out.exists():
        model, about = load_model(config.source)
        export(model, about, "fine_dist", out, None)
    return out
