"""The interface of a launch target: what a value of `--launcher` names, and the register of all targets.

Most targets are launchers (`launcher.py`), to which a command submits jobs; a `CommandTarget` runs the command itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from fine_dist.core.config import Config
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.spec import Finding, JobSpec


class LaunchTarget(ABC):
    """A value of `--launcher`. Use as a context manager.

    Args:
        needs: The `launch` settings of the config. None: the defaults.
    """

    name: ClassVar[str]
    """The value of `--launcher`. Two targets may share a name if they never serve the same environment."""
    on_this_machine: ClassVar[bool] = False
    """Whether jobs use this machine's cores, memory and accelerators."""
    detached: ClassVar[bool] = False
    """Whether jobs outlive this process."""

    def __init__(self, needs: LaunchConfig | None = None) -> None:
        self.needs = needs or LaunchConfig()

    @classmethod
    def serves(cls, needs: LaunchConfig) -> bool:
        """Whether the target works in this process's environment, for these needs."""
        return True

    @classmethod
    def affinity(cls, needs: LaunchConfig) -> int:
        """How well the target matches this process's environment; `--launcher auto` takes the highest."""
        return 0

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        """Findings about a job before it starts on this target.

        Args:
            spec: The job, or one task of a fan-out.
            many: Whether it is a task of a fan-out.
        """
        return []

    def close(self) -> None:  # noqa: B027 - most targets have nothing to close
        """Free the resources of the target."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


T = TypeVar("T", bound=LaunchTarget)
K = TypeVar("K", bound=type[LaunchTarget])
_registered: list[type[LaunchTarget]] = []


def register(target: K) -> K:
    """Class decorator: make a launch target known to `--launcher`."""
    _registered.append(target)
    return target


def registered() -> tuple[type[LaunchTarget], ...]:
    """The launch targets that were registered so far."""
    return tuple(_registered)


class CommandTarget(LaunchTarget):
    """A target that runs a whole command, with all its tasks."""

    @abstractmethod
    def run(self, module: str, config: Config) -> int:
        """Run `module.run(config)` with all its tasks; returns the exit code."""
