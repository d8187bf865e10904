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
    """The folder that `module` is imported from, for jobs that run the installed code."""
    loaded = import_module(module)
    if not loaded.__file__:
        raise LaunchError(f"module {module} has no file; a worker cannot import it")
    return str(Path(loaded.__file__).resolve().parents[loaded.__name__.count(".")])


def snapshot(run_dir: Path, module: str = "fine_dist") -> Path:
    """Copy the code into `RUN_DIR/code/HASH`, once for each content; returns that folder."""
    files = code_files(module)
    # By content, so that a thousand submissions of unchanged code share one copy and each edit gets one of its own.
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{sha256_of(files[name])}\n".encode())
    target = run_dir / "code" / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    # Copied under another name first: a job that starts meanwhile must never import half a copy.
    draft = temp_path(target)
    stage_code(draft, module)
    try:
        os.rename(draft, target)
    except OSError:  # another process has just made the same copy
        shutil.rmtree(draft)
        if not target.is_dir():
            raise
    return target


def stage_code(folder: Path, module: str) -> None:
    """Copy `fine_dist`, the scripts in `slurm/` and the package of `module` into a folder."""
    # Sources alone, no folder as a whole: run directories and data may lie inside a checkout.
    for name, file in code_files(module).items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)  # the modes of the copy are those of this user's umask
    about = {"git": _git(Path(fine_dist.__file__).resolve().parents[1]), "version": fine_dist.__version__}
    (folder / "SNAPSHOT.json").write_text(json.dumps(about) + "\n")


def code_files(module: str) -> dict[str, Path]:
    """The files that are copied, by their names in the copy."""
    root = Path(fine_dist.__file__).resolve().parent
    places = {"fine_dist": root, "slurm": resource("slurm")}
    top = module.partition(".")[0]
    if top != "fine_dist":
        package = Path(code_root(module), top)
        package = package if package.is_dir() else package.with_suffix(".py")
        places[package.name] = package
    return {
        (Path(name) / file.relative_to(place)).as_posix(): file
        for name, place in places.items()
        for file in _sources(place)
    }


def _sources(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = []
    # fine_dist/launchers and fine_dist/resources/* are links in a checkout and folders in a wheel
    for folder, inner, files in os.walk(place, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        found += [Path(folder, name) for name in files if name.endswith(SOURCES)]
    return found


def _git(root: Path) -> str | None:
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    said = subprocess.run(
        # Without its locks: `git describe --dirty` refreshes the index, which fails where the checkout is read-only.
        ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return said.stdout.strip() or None
