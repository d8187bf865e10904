"""`python -m fine_dist.sample`: sample images from a model."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import Call
from fine_dist.launchers import entry
from fine_dist.sampling.settings import SampleConfig


def run(config: SampleConfig) -> Path:
    """Sample the images of a config, this process its share of them; returns their folder."""
    from fine_dist.sampling import drawing  # imports torch, which --help must not

    return drawing.run(config)


def result_lines(config: SampleConfig) -> list[str]:
    """Last lines of a successful command: the next command to run."""
    models = " ".join([*filter(None, [config.model]), *config.compare])
    return [f"next: fine-dist evaluate --models {models} --data.held-out SHARDS"]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
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
