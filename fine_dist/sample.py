"""`python -m fine_dist.sample`: draw images from a model."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import dump_yaml
from fine_dist.core.errors import guard
from fine_dist.launchers.entry import launch
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

    def body() -> int:
        call = parse(SampleConfig, argv, "fine-dist sample")
        if call.dry_run:
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0

        return launch("fine_dist.sample", call.config, call.launcher)

    return guard(body, "the same command draws what is missing")


__all__ = ["SampleConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
