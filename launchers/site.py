"""The properties of one SLURM cluster, read from `slurm/site.sh`, which the job scripts source as well."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fine_dist
from fine_dist.core.errors import LaunchError, nearest
from fine_dist.launchers.worker import SCRATCH

FILE = "FINE_DIST_SITE"
"""Environment variable: path of the site file, in place of `slurm/site.sh`."""
GPU_FLAGS = ("gpus-per-node", "gres", "gpus-per-task")
"""Legal values of GPU_FLAG in the site file; the first is the default."""
REQUEUES = ("scontrol", "resubmit")
"""Legal values of REQUEUE in the site file; the first is the default."""


@dataclass(frozen=True)
class SlurmSite:
    """The properties of one cluster. The defaults suit a SLURM cluster without local conventions."""

    file: Path | None = None
    """Site file that every job sources before anything else. None: there is none."""
    gpu_style: str = GPU_FLAGS[0]
    """Name of the option by which jobs request accelerators."""
    wrapper: str = ""
    """Command line before the interpreter, such as `apptainer exec --nv image.sif`."""
    srun_args: tuple[str, ...] = ()
    """Further options of srun, such as pyxis's `--container-image=...`."""
    requeues: bool = True
    """Whether users may `scontrol requeue` their jobs."""
    interface: str = ""
    """Network interface for NCCL and Gloo, such as `ib0`. Empty: they choose."""
    scratch: str = ""
    """Folder on the nodes' local disks, as the site file sets it on this machine. Empty: the system's default."""

    @classmethod
    def here(cls) -> SlurmSite:
        """The site of this installation.

        Raises:
            LaunchError: The site file is missing, cannot be sourced, or has an illegal value.
        """
        file = os.environ.get(FILE)
        # The current project's file (fine-dist init-project), or else that of the checkout that contains this code.
        candidates = [
            Path("slurm", "site.sh"),
            Path(fine_dist.__file__).resolve().parent / "resources" / "slurm" / "site.sh",
        ]
        path = Path(file) if file else next((path for path in candidates if path.is_file()), candidates[-1])
        if file and not path.is_file():
            raise LaunchError(f"{FILE}: no such file {file}; copy slurm/site.example.sh, or unset it")
        return _read(path.absolute(), path.stat().st_mtime_ns) if path.is_file() else cls()

    def gpu_flag(self, accelerators: float, processes: int) -> str:
        """The option of sbatch and srun that requests accelerators.

        Args:
            accelerators: Number of accelerators on each node; a fraction is rounded up.
            processes: Number of SLURM tasks on each node.
        """
        count = math.ceil(accelerators)
        if self.gpu_style == "gpus-per-task":
            return f"--gpus-per-task={-(-count // processes)}"
        return f"--gres=gpu:{count}" if self.gpu_style == "gres" else f"--gpus-per-node={count}"

    def setup_lines(self) -> list[str]:
        """Lines of a job script that source the site file and export what it sets, as `slurm/env.sh` does."""
        if self.file is None:
            return []
        return [
            # SCRATCH keeps the cluster's value for paths in configs; the site file's folder gets another variable.
            "cluster_scratch=${SCRATCH-}; unset SCRATCH",
            f"source {shlex.quote(str(self.file))}",
            f"export {SCRATCH}=${{SCRATCH:-}} SCRATCH=$cluster_scratch",
            'if [[ -n ${IFNAME:-} ]]; then export NCCL_SOCKET_IFNAME="$IFNAME" GLOO_SOCKET_IFNAME="$IFNAME"; fi',
        ]

    def environment(self) -> dict[str, str]:
        """The environment variables that `setup_lines` exports, for steps of an allocation, which have no script."""
        network = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.interface) if self.interface else {}
        return {**network, **({SCRATCH: self.scratch} if self.scratch else {})}


@cache
def _read(path: Path, written: int) -> SlurmSite:
    """Source the site file with bash and read the variables that it sets.

    Args:
        path: The site file.
        written: Time of its last change in nanoseconds. It is part of the cache's key, so that a new version is read.
    """
    names = ("GPU_FLAG", "CONTAINER_EXEC", "CONTAINER_SRUN", "REQUEUE", "IFNAME", "SCRATCH")
    values = " ".join(f'"${{{name}:-}}"' for name in names)
    # SCRATCH is unset first, because a value that the cluster sets is often a shared file system, not a local disk.
    script = f'set -e; unset SCRATCH; source "$1" >/dev/null; printf "%s\\n" {values}'
    result = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise LaunchError(f"{path} cannot be sourced: {result.stderr.strip()[-300:]}; see slurm/site.example.sh")
    # One value on each line, in the order of `names`. What the file itself prints goes to /dev/null.
    style, wrapper, srun, requeue, interface, scratch = result.stdout.split("\n")[:6]
    for name, value, legal in (("GPU_FLAG", style, GPU_FLAGS), ("REQUEUE", requeue, REQUEUES)):
        if value and value not in legal:
            raise LaunchError(f"{path}: {name}={value!r} is not known; {nearest(value, legal)}")
    srun_args = tuple(shlex.split(srun))
    return SlurmSite(path, style or GPU_FLAGS[0], wrapper, srun_args, requeue != "resubmit", interface, scratch)
