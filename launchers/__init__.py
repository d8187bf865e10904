"""Where jobs run: `here`, a local pool, SLURM through submitit, Ray. `launch` is what every command calls."""

from launchers.base import Job, Launcher, choose, get_launcher
from launchers.entry import launch

__all__ = ["Job", "Launcher", "choose", "get_launcher", "launch"]
