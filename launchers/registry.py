"""The places where jobs run, listed once: `--launcher NAME` takes the first of that name which serves, `auto` the first
that says it is the one. None of them imports Ray or submitit before it is used."""

from __future__ import annotations

from fine_dist.core.errors import LaunchError, nearest
from fine_dist.core.settings import LaunchConfig
from launchers.base import Launcher, LaunchTarget
from launchers.here import Here
from launchers.local import LocalLauncher
from launchers.ray_jobs import RayJobs
from launchers.ray_train import RayLauncher
from launchers.slurm_steps import StepLauncher
from launchers.slurm_submitit import SlurmLauncher

TARGETS: tuple[type[LaunchTarget], ...] = (RayJobs, RayLauncher, StepLauncher, SlurmLauncher, LocalLauncher, Here)
"""In the order in which they are asked; LocalLauncher always is the one."""


def names() -> list[str]:
    """What `--launcher` takes."""
    return ["auto", *dict.fromkeys(place.name for place in TARGETS)]


def pick(name: str, needs: LaunchConfig | None = None) -> type[LaunchTarget]:
    """The place of a name, by where this process is and what the job needs. `LaunchError` names the legal ones."""
    needs = needs or LaunchConfig()
    if name not in names():
        raise LaunchError(f"--launcher {name!r}: no such launcher; {nearest(name, names())}")
    if name == "auto":
        return next(place for place in TARGETS if place.serves(needs) and place.is_the_one(needs))
    return next(place for place in TARGETS if place.name == name and place.serves(needs))


def get_launcher(name: str, needs: LaunchConfig | None = None) -> Launcher:
    """The launcher of a name. `LaunchError` when jobs cannot be handed to what the name means here."""
    place = pick(name, needs)
    if not issubclass(place, Launcher):
        legal = nearest(name, dict.fromkeys(p.name for p in TARGETS if issubclass(p, Launcher)))
        raise LaunchError(f"launcher {name!r} takes whole commands, no jobs; {legal}")
    return place(needs)
