"""`fine-dist init-project DIR`: copy the configs, scripts and examples that a user edits into a folder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fine_dist.core.arguments import FlagParser
from fine_dist.core.errors import RunDirError, guard
from fine_dist.core.files import umask
from fine_dist.core.resources import SHIPPED, resource

SITE = "slurm/site.sh"


def run(folder: Path) -> list[Path]:
    """Copy `configs/`, `slurm/` and `examples/` into a folder, and write `slurm/site.sh` from its example.

    Returns the written files. Existing files are left as they are, so that files of a later version can be added to a
    project.
    """
    written = []
    for top in SHIPPED:
        source = resource(top)
        for file in sorted(source.rglob("*")):
            target = folder / top / file.relative_to(source)
            if not file.is_file() or "__pycache__" in file.parts or target.exists() or f"{top}/{file.name}" == SITE:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(file, target)
            written.append(target)
    site = folder / SITE
    if not site.exists():
        _copy(resource("slurm/site.example.sh"), site)
        written.append(site)
    return written


def _copy(file: Path, target: Path) -> None:
    """Copy a file with the umask's mode: files of an installed package are often readable by their owner only."""
    shutil.copyfile(file, target)
    os.chmod(target, (0o777 if file.stat().st_mode & 0o111 else 0o666) & ~umask())


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = FlagParser("fine-dist init-project")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the project's folder; created if it does not exist")

    def body() -> int:
        args = list(sys.argv[1:] if argv is None else argv)
        parser.exit_if_help(args, "DIR", " ".join((__doc__ or "").split()))
        folder: Path = parser.parse_flags(args).folder
        if folder.exists() and not folder.is_dir():
            raise RunDirError(f"{folder} is a file; give a folder for the project")
        written = run(folder)
        print(f"init-project: {len(written)} files written to {folder} (existing files are unchanged)")
        print(f"next: describe your cluster in {folder / SITE}, then, in {folder}: sbatch slurm/condense.sh")
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
