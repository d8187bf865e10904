"""`python -m fine_dist.evaluate`: held-out loss and Fréchet distance of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fine_dist.cli import parse
from fine_dist.config import LaunchConfig, dump_yaml, expand_path
from fine_dist.errors import ConfigError, guard
from fine_dist.stages.measure import MeasureConfig, Measures


class EvaluateConfig(MeasureConfig):
    """Measure models: the held-out noise-prediction loss at fixed timesteps and noise, and the Fréchet distance."""

    models: tuple[str, ...] = ()
    """Folders of models, initialised targets, learngenes, or the runs that made them."""
    run_dir: str = "runs/evaluate"
    """Where evaluate.json is written."""
    launch: LaunchConfig = LaunchConfig()
    """What the job needs, where it is submitted."""


def run(config: EvaluateConfig) -> Path:
    """Measure every model, print a table, write evaluate.json; returns its path."""
    from rich.console import Console
    from rich.table import Table

    from fine_dist.files import write_atomic
    from fine_dist.stages import load_model

    if not config.models:
        raise ConfigError("models: give one folder or more with --models")
    if not config.data.held_out and not config.features:
        raise ConfigError(
            "nothing to measure: set data.held_out (the loss), or features and data.shards (the distance)"
        )
    folder = Path(expand_path(config.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    measure = Measures(config)
    rows = []
    for path in config.models:
        model, about = load_model(path)
        row = {"model": path, "arch": model.arch.name, "method": about["method"]["name"], **measure(model, path)}
        rows.append({**row, "hash": about["hash"]})
    write_atomic(folder / "evaluate.json", json.dumps({"floor": measure.floor, "rows": rows}, indent=1))
    table = Table("model", "architecture", "method", "held-out loss", "Fréchet distance")
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("held_out_loss", "frechet")]
        table.add_row(row["model"], row["arch"], row["method"], *numbers)
    if measure.floor is not None:
        table.caption = f"Fréchet distance of held-out real data to the same reference: {measure.floor:.4f}"
    Console().print(table)
    print(f"evaluate: {folder / 'evaluate.json'}")
    return folder / "evaluate.json"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(EvaluateConfig, argv, "python -m fine_dist.evaluate")
        if call.dry_run:
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0
        from launchers.entry import launch

        return launch("fine_dist.evaluate", call.config, call.launcher)

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
