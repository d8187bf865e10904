"""Which launch target `--launcher NAME` means: the built-in ones and those of installed packages.

A package adds one by an entry point of the group `fine_dist.launchers` that names a module whose import registers it
(`fine_dist.launchers.launch_target.register`). No target imports Ray or submitit before it is used.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata

from fine_dist.core.errors import LaunchError, nearest
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.launch_target import LaunchTarget, registered
from fine_dist.launchers.launcher import Launcher

BUILT_IN = ("local", "ray_jobs", "ray_launcher", "slurm_steps", "slurm_submitit")
"""Modules of this package that register targets."""
ENTRY_POINTS = "fine_dist.launchers"
"""Group of the entry points by which other packages add targets."""


@cache
def targets() -> tuple[type[LaunchTarget], ...]:
    """All launch targets."""
    for name in BUILT_IN:
        # The import registers the target. It is fast, because Ray and submitit are only imported by the methods that
        # use them.
        importlib.import_module(f"fine_dist.launchers.{name}")
    for point in metadata.entry_points(group=ENTRY_POINTS):
        point.load()
    return registered()


def names() -> list[str]:
    """The values that `--launcher` takes."""
    return ["auto", *sorted({target.name for target in targets()})]


def pick(name: str, needs: LaunchConfig | None = None) -> type[LaunchTarget]:
    """The launch target of a name.

    Args:
        name: A value of `--launcher`. `auto` is the target with the highest affinity to this process's environment.
        needs: Resources of the job; some targets share a name and differ in the address that they serve.

    Raises:
        LaunchError: There is no such target; the message lists the legal names.
    """
    needs = needs or LaunchConfig()
    if name not in names():
        raise LaunchError(f"--launcher {name!r}: no such launcher; {nearest(name, names())}")
    # Two targets are called `ray` and two `slurm`; only one of each works with this address and environment.
    serving = [target for target in targets() if name in ("auto", target.name) and target.serves(needs)]
    return max(serving, key=lambda target: target.affinity(needs))


def get_launcher(name: str, needs: LaunchConfig | None = None) -> Launcher:
    """The launcher of a name, ready to submit jobs to.

    Raises:
        LaunchError: There is no such launcher, or the name means a target that runs commands only.
    """
    target = pick(name, needs)
    if not issubclass(target, Launcher):
        legal = nearest(name, {other.name for other in targets() if issubclass(other, Launcher)})
        raise LaunchError(f"launcher {name!r} takes whole commands, no jobs; {legal}")
    return target(needs)
