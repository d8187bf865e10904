"""The properties of one SLURM cluster, read from `slurm/site.sh`, which the job scripts source as well."""

from __future__ import annotations

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
"""Environment variable: path of another site file."""
GPU_FLAGS = ("gpus-per-node", "gres", "gpus-per-task")
REQUEUES = ("scontrol", "resubmit")


@dataclass(frozen=True)
class SlurmSite:
    """The properties of one cluster; the defaults are those of a plain SLURM."""

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
    """Folder on the nodes' own disks, as the site file says on this machine. Empty: the system's default."""

    @classmethod
    def here(cls) -> SlurmSite:
        """The site of this installation.

        Raises:
            LaunchError: The site file is missing, cannot be sourced, or has an illegal value.
        """
        file = os.environ.get(FILE)
        # the project's folder (init-project), or else the checkout that this code is in
        places = [
            Path("slurm", "site.sh"),
            Path(fine_dist.__file__).resolve().parent / "resources" / "slurm" / "site.sh",
        ]
        path = Path(file) if file else next((place for place in places if place.is_file()), places[-1])
        if file and not path.is_file():
            raise LaunchError(f"{FILE}: no such file {file}; copy slurm/site.example.sh, or unset it")
        return _read(path.absolute(), path.stat().st_mtime_ns) if path.is_file() else cls()

    def gpu_flag(self, accelerators: float, processes: int) -> str:
        """The option of sbatch and srun for a number of accelerators on each node.

        Args:
            accelerators: Number of accelerators; a fraction is rounded up.
            processes: Number of tasks on the node that share them.
        """
        count = int(-(-accelerators // 1))
        if self.gpu_style == "gpus-per-task":
            return f"--gpus-per-task={-(-count // processes)}"
        return f"--gres=gpu:{count}" if self.gpu_style == "gres" else f"--gpus-per-node={count}"

    def setup_lines(self) -> list[str]:
        """Lines of a job script that source the site file and export what it sets, as `slurm/env.sh` does."""
        if self.file is None:
            return []
        return [
            # SCRATCH keeps the cluster's value for paths in configs,
            # and the site's folder travels under a name of its own.
            "cluster_scratch=${SCRATCH-}; unset SCRATCH",
            f"source {shlex.quote(str(self.file))}",
            f"export {SCRATCH}=${{SCRATCH:-}} SCRATCH=$cluster_scratch",
            'if [[ -n ${IFNAME:-} ]]; then export NCCL_SOCKET_IFNAME="$IFNAME" GLOO_SOCKET_IFNAME="$IFNAME"; fi',
        ]

    def environment(self) -> dict[str, str]:
        """The same as environment variables, for the steps of an allocation."""
        network = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.interface) if self.interface else {}
        return {**network, **({SCRATCH: self.scratch} if self.scratch else {})}


@cache
def _read(path: Path, written: int) -> SlurmSite:
    """What the file sets. The file may print and load modules: only the lines that are added at the end are read.

    Args:
        written: Time of the last change, so that the cache does not outlive it.
    """
    names = ("GPU_FLAG", "CONTAINER_EXEC", "CONTAINER_SRUN", "REQUEUE", "IFNAME", "SCRATCH")
    values = " ".join(f'"${{{name}:-}}"' for name in names)
    # The cluster's own SCRATCH is hidden: only one that the site file sets is a folder on the nodes' disks.
    script = f'set -e; unset SCRATCH; source "$1" >/dev/null; printf "%s\\n" {values}'
    done = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"{path} cannot be sourced: {done.stderr.strip()[-300:]}; see slurm/site.example.sh")
    # One value a line, in the order of `names`; the output of the file itself was sent to /dev/null.
    style, wrapper, srun, requeue, interface, scratch = done.stdout.split("\n")[:6]
    for name, value, legal in (("GPU_FLAG", style, GPU_FLAGS), ("REQUEUE", requeue, REQUEUES)):
        if value and value not in legal:
            raise LaunchError(f"{path}: {name}={value!r} is not known; {nearest(value, legal)}")
    srun_args = tuple(shlex.split(srun))
    return SlurmSite(path, style or GPU_FLAGS[0], wrapper, srun_args, requeue != "resubmit", interface, scratch)
