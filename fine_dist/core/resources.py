"""Files that are shipped with the package: configs, the scripts in `slurm/` and the examples.

They are at the top level of the repository, where users read and edit them. `fine_dist/resources/` holds links to
them, so that a wheel contains the same files and one function locates them in both.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fine_dist.core.errors import ConfigError

SHIPPED = ("configs", "slurm", "examples")
"""Top-level folders that are shipped."""


def resource(name: str) -> Path:
    """The path of a shipped file or folder, such as `configs/study/digits_demo.yaml`.

    Raises `ConfigError` when nothing of that name is shipped.
    """
    path = Path(str(resources.files("fine_dist"))) / "resources" / name
    if name.partition("/")[0] not in SHIPPED or ".." in Path(name).parts or not path.exists():
        raise ConfigError(f"{name} is not among the shipped files; legal: {', '.join(SHIPPED)} and what is in them")
    return path


def shipped_config(path: str | Path) -> Path:
    """The path as given if that file exists, else the shipped config of the same name.

    So `--config configs/condense/dit_b.yaml` works in any folder after `pip install`.
    """
    given = Path(path)
    if given.exists() or given.is_absolute() or given.parts[:1] != ("configs",) or ".." in given.parts:
        return given
    shipped = Path(str(resources.files("fine_dist"))) / "resources" / given
    return shipped if shipped.is_file() else given
