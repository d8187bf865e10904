"""`python -m fine_dist.sample`: draw images from a model."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import Call
from fine_dist.launchers import entry
from fine_dist.sampling.settings import SampleConfig


def run(config: SampleConfig) -> Path:
    """Draw what a config asks for, in this process among the others; returns where it is."""
    from fine_dist.sampling import drawing  # with torch, which --help does without

    return drawing.run(config)


def result_lines(config: SampleConfig) -> list[str]:
    """What the command prints when it has succeeded: what to do next."""
    models = " ".join([*filter(None, [config.model]), *config.compare])
    return [f"next: fine-dist evaluate --models {models} --data.held-out SHARDS"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    return entry.run_command(
        "fine_dist.sample", SampleConfig, argv, _dry_run, promise="the same command draws what is missing"
    )


def _dry_run(call: Call) -> list[str]:
    from fine_dist.sampling import drawing

    drawing.check(call.config)
    return entry.plain_dry_run(call)


__all__ = ["SampleConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
