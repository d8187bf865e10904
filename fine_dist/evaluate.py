"""`python -m fine_dist.evaluate`: held-out loss and Fréchet distance of models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fine_dist.cli import parse
from fine_dist.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EngineConfig,
    LaunchConfig,
    SamplerConfig,
    dump_yaml,
    expand_path,
)
from fine_dist.errors import ConfigError, guard

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.metrics.moments import Moments
    from fine_dist.model.dit import DiT


class EvaluateConfig(Config):
    """Measure models: the held-out noise-prediction loss at fixed timesteps and noise, and the Fréchet distance."""

    models: tuple[str, ...] = ()
    """Folders of models, initialised targets, learngenes, or the runs that made them."""
    run_dir: str = "runs/evaluate"
    """Where evaluate.json is written."""
    data: DataConfig = DataConfig()
    """`held_out` for the loss; `shards` are the reference of the Fréchet distance."""
    features: str | None = None
    """Folder of a feature extractor (the demo's digits classifier); none: no Fréchet distance."""
    samples: int = Field(500, ge=2)
    """Images drawn for the Fréchet distance; classes in turn."""
    seed: int = Field(0, ge=0)
    """Seeds the noise of the samples."""
    sampler: SamplerConfig = SamplerConfig()
    """Scheduler, steps, guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The process the models were trained for."""
    engine: EngineConfig = EngineConfig()
    """Device and threads."""
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


class Measures:
    """The measurements of a config, with what they share read once: `measure(model, title) -> numbers`.

    floor: the Fréchet distance of held-out real images to the reference; none where it is not measured.
    """

    def __init__(self, config: EvaluateConfig):
        from fine_dist.data.stream import read_all
        from fine_dist.diffusion.objective import HeldOut
        from fine_dist.engine.dist import pick_device

        self.config = config
        self.device = pick_device(config.engine.device)
        held_out = read_all(expand_path(config.data.held_out)) if config.data.held_out else None
        self.held_out = HeldOut(*held_out, config.diffusion) if held_out else None
        self.reference: Moments | None = None
        self.floor: float | None = None
        if config.features:
            from fine_dist.metrics.features import load_classifier
            from fine_dist.metrics.frechet import frechet_distance

            if not config.data.shards:
                raise ConfigError("data.shards: the Fréchet distance needs real data to compare with")
            self.classifier = load_classifier(expand_path(config.features)).classifier
            self.reference = self.moments(read_all(expand_path(config.data.shards))[0])
            if held_out:
                self.floor = frechet_distance(self.moments(held_out[0]), self.reference)

    def moments(self, images: Tensor) -> Moments:
        import torch

        from fine_dist.metrics.moments import Moments

        with torch.no_grad():
            return Moments.of(self.classifier.features(images))

    def __call__(self, model: DiT, title: str) -> dict[str, Any]:
        model = model.to(self.device).eval()
        loss = self.held_out(model)["held_out_loss"] if self.held_out else None
        return {"held_out_loss": loss, "frechet": self.frechet(model, title) if self.reference else None}

    def frechet(self, model: DiT, title: str) -> float:
        from fine_dist.metrics.frechet import frechet_distance

        return frechet_distance(self.moments(self.draw(model, self.config.samples, title)), self.reference)  # type: ignore[arg-type]

    def draw(self, model: DiT, count: int, title: str) -> Tensor:
        """Samples [count, C, H, H], classes in turn; image i is the same for every model of a seed."""
        import torch

        from fine_dist.diffusion.sample import sample

        return sample(
            model,
            labels=torch.arange(count) % model.arch.num_classes,
            arch=model.arch,
            config=self.config.sampler,
            diffusion=self.config.diffusion,
            seed=self.config.seed,
            progress=f"sample {title}",
        )


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
