"""What differs from cluster to cluster: read from `slurm/site.sh`, which the scripts source too."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fine_dist
from fine_dist.core.errors import LaunchError, nearest

FILE = "FINE_DIST_SITE"
"""Environment variable that names another file."""
GPU_FLAGS = ("gpus-per-node", "gres", "gpus-per-task")
REQUEUES = ("scontrol", "resubmit")


@dataclass(frozen=True)
class SlurmSite:
    """The facts of one cluster; the defaults are those of a plain SLURM."""

    file: Path | None = None
    """Sourced by every job before anything else."""
    gpu_style: str = GPU_FLAGS[0]
    """The option that asks for accelerators."""
    wrapper: str = ""
    """A command line before Python's, such as `apptainer exec --nv image.sif`."""
    srun_args: tuple[str, ...] = ()
    """Further options of srun, such as pyxis's `--container-image=...`."""
    requeues: bool = True
    """Whether users may `scontrol requeue` their jobs."""

    @classmethod
    def here(cls) -> SlurmSite:
        """The site of this installation. `LaunchError` when its file is wrong."""
        file = os.environ.get(FILE)
        path = Path(file) if file else Path(fine_dist.__file__).resolve().parents[1] / "slurm" / "site.sh"
        if file and not path.is_file():
            raise LaunchError(f"{FILE}: no such file {file}; copy slurm/site.example.sh, or unset it")
        return _read(path.absolute(), path.stat().st_mtime_ns) if path.is_file() else cls()

    def gpu_flag(self, accelerators: float, processes: int) -> str:
        """The option of sbatch and srun for so many accelerators a node, which so many processes share."""
        count = int(-(-accelerators // 1))
        if self.gpu_style == "gpus-per-task":
            return f"--gpus-per-task={-(-count // processes)}"
        return f"--gres=gpu:{count}" if self.gpu_style == "gres" else f"--gpus-per-node={count}"


@cache
def _read(path: Path, written: int) -> SlurmSite:
    """What the file sets. It may print, load modules and so on: only our own lines at the end are read."""
    names = ("GPU_FLAG", "CONTAINER_EXEC", "CONTAINER_SRUN", "REQUEUE")
    values = " ".join(f'"${{{name}:-}}"' for name in names)
    script = f'set -e; source "$1" >/dev/null; printf "%s\\n" {values}'
    done = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{path} cannot be sourced: {done.stderr.strip()[-300:]}; see slurm/site.example.sh")
    style, wrapper, srun, requeue = done.stdout.split("\n")[:4]
    for name, value, legal in (("GPU_FLAG", style, GPU_FLAGS), ("REQUEUE", requeue, REQUEUES)):
        if value and value not in legal:
            raise LaunchError(f"{path}: {name}={value!r} is not known; {nearest(value, legal)}")
    return SlurmSite(path, style or GPU_FLAGS[0], wrapper, tuple(shlex.split(srun)), requeue != "resubmit")
