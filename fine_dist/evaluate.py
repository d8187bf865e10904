"""`python -m fine_dist.evaluate`: held-out loss, FID and other scores, of models or of images."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.callable_module import make_callable
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.launchers import entry


def run(config: EvaluateConfig) -> Path:
    """Measure every model, print a table and write evaluate.json; returns its path. Called by every rank."""
    from fine_dist.evaluation import recording  # imports torch, which --help must not

    return recording.run(config)


def result_lines(config: EvaluateConfig) -> list[str]:
    """Last lines of a successful command: the next command to run."""
    return [f"next: fine-dist sample --model {config.models[0]}"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return entry.run_command("fine_dist.evaluate", EvaluateConfig, argv, entry.plain_dry_run, promise="")


make_callable(__name__, "evaluate")

__all__ = ["EvaluateConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
