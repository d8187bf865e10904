"""Where jobs run: `here`, a local pool, SLURM through submitit, Ray. `launch` is what every command calls."""

from launchers.base import Job, Launcher, Place
from launchers.entry import check, launch
from launchers.registry import get_launcher, names, pick

__all__ = ["Job", "Launcher", "Place", "check", "get_launcher", "launch", "names", "pick"]
