"""`python -m fine_dist.evaluate`: held-out loss, FID and other scores, of models or of images."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.callable_module import make_callable
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.launchers import entry


def run(config: EvaluateConfig) -> Path:
    """Measure every model, print a table, write evaluate.json; its path. Every process of the world takes part."""
    from fine_dist.evaluation import recording  # with torch, which --help does without

    return recording.run(config)


def result_lines(config: EvaluateConfig) -> list[str]:
    """What the command prints when it has succeeded: what to do next."""
    return [f"next: fine-dist sample --model {config.models[0]}"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return entry.run_command("fine_dist.evaluate", EvaluateConfig, argv, entry.plain_dry_run, promise="")


make_callable(__name__, "evaluate")

__all__ = ["EvaluateConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
