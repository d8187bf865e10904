"""The copy of the code that submitted jobs run, so that edits made while a job waits do not reach it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import fine_dist
from fine_dist.core.errors import LaunchError
from fine_dist.core.files import sha256_of
from fine_dist.core.resources import resource
from fine_dist.core.temp_files import temp_path
from fine_dist.launchers.worker import import_module

SOURCES = (".py", ".sh", ".yaml", ".yml", ".json", ".toml", ".cfg", ".txt")
"""Suffixes of the files that are copied."""


def code_root(module: str) -> str:
    """The folder from which `module` is imported, for jobs that run the installed code.

    Raises:
        LaunchError: The module cannot be imported, or has no file.
    """
    loaded = import_module(module)
    if not loaded.__file__:
        raise LaunchError(f"module {module} has no file; a worker cannot import it")
    return str(Path(loaded.__file__).resolve().parents[loaded.__name__.count(".")])


def snapshot(run_dir: Path, module: str = "fine_dist") -> Path:
    """Copy the code (`code_files`) into `RUN_DIR/code/HASH`, unless that folder exists; returns the folder.

    Args:
        run_dir: Run directory of the submission.
        module: Module of the job.
    """
    files = code_files(module)
    # A hash of the content, so that all submissions of unchanged code share one copy.
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{sha256_of(files[name])}\n".encode())
    target = run_dir / "code" / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    # Copied under a temporary name first, so that no job can import an incomplete copy.
    draft = temp_path(target)
    stage_code(draft, module)
    try:
        os.rename(draft, target)
    except OSError:  # another process has made the same copy at the same time
        shutil.rmtree(draft)
        if not target.is_dir():
            raise
    return target


def stage_code(folder: Path, module: str) -> None:
    """Copy the code (`code_files`) into a folder, and write its version and git commit into SNAPSHOT.json."""
    for name, file in code_files(module).items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)  # without the file's mode: that of the copy follows from this user's umask
    about = {"git": _git(Path(fine_dist.__file__).resolve().parents[1]), "version": fine_dist.__version__}
    (folder / "SNAPSHOT.json").write_text(json.dumps(about) + "\n")


def code_files(module: str) -> dict[str, Path]:
    """The files of `fine_dist`, of the scripts in `slurm/` and of the package of `module`, by their names in a copy.

    Only files with the suffixes `SOURCES` are included, because run directories and data may be inside a checkout.
    """
    root = Path(fine_dist.__file__).resolve().parent
    folders = {"fine_dist": root, "slurm": resource("slurm")}
    top = module.partition(".")[0]
    if top != "fine_dist":
        package = Path(code_root(module), top)
        package = package if package.is_dir() else package.with_suffix(".py")
        folders[package.name] = package
    return {
        (Path(name) / file.relative_to(folder)).as_posix(): file
        for name, folder in folders.items()
        for file in _sources(folder)
    }


def _sources(path: Path) -> list[Path]:
    """The source files in a folder, or the file itself if `path` is one."""
    if path.is_file():
        return [path]
    sources = []
    # Links are followed: fine_dist/launchers and fine_dist/resources/* are links in a checkout and folders in a wheel.
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__pycache__"))]
        sources += [Path(folder, name) for name in files if name.endswith(SOURCES)]
    return sources


def _git(root: Path) -> str | None:
    """The commit of a checkout, ending in `-dirty` if files differ from it; None outside of a checkout."""
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    result = subprocess.run(
        # `git describe --dirty` refreshes the index, which fails in a read-only checkout without this option.
        ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.stdout.strip() or None
