"""`python -m fine_dist.evaluate`: held-out loss, FID and other scores, of models or of images."""

from __future__ import annotations

import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.callable_module import make_callable
from fine_dist.core.config import dump_yaml, expand_path
from fine_dist.core.errors import ConfigError, guard
from fine_dist.core.files import check_writable
from fine_dist.evaluation.settings import EvaluateConfig
from fine_dist.launchers.entry import launch


def run(config: EvaluateConfig) -> Path:
    """Measure every model, print a table, write evaluate.json; its path. Every process of the world takes part."""
    import torch
    from rich.console import Console

    from fine_dist.engine import dist
    from fine_dist.evaluation.evaluator import Evaluator, record, table

    if not config.models:
        raise ConfigError("models: give one folder or more with --models")
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    world = dist.world(config.engine.device)
    evaluator = Evaluator(config, world)
    folder = Path(expand_path(config.run_dir))
    check_writable(folder)
    rows = [evaluator(path) for path in config.models]
    floors = evaluator.references.floors()
    if not world.is_main:
        return folder
    path = record(folder, evaluator.protocol(), rows, floors)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    for metric, value in floors.items():
        print(f"{metric} of held-out real images to the same reference: {value:.4f}")
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        print(f"note: {note}")
    for score in (score for row in rows for score in row["scores"].values() if score["why"]):
        print(f"note: {score['metric']}: {score['why']}")
    print(f"evaluate: {path}")
    return path


def result_lines(config: EvaluateConfig) -> list[str]:
    """What the command prints when it has succeeded: what to do next."""
    return [f"next: fine-dist sample --model {config.models[0]}"]


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(EvaluateConfig, argv, "fine-dist evaluate")
        if call.dry_run:
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0

        return launch("fine_dist.evaluate", call.config, call.launcher)

    return guard(body)


make_callable(__name__, "evaluate")

__all__ = ["EvaluateConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
