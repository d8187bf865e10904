"""Measuring models and sets of images with any number of processes, and writing numbers down with their protocol.

Every process measures its share; sums and float64 moments are merged, so that any number of processes gives the numbers
of one. A number without its protocol is no number: `evaluate.json` says how each came about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.model_facts import FeaturesConfig
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, DataError, nearest
from fine_dist.evaluation.references import References, is_images
from fine_dist.sampling.renderer import ImageRenderer, make_renderer
from fine_dist.sampling.settings import EvaluateConfig

if TYPE_CHECKING:
    import torch

    from fine_dist.diffusion.held_out import HeldOutLoss
    from fine_dist.engine.dist import World
    from fine_dist.evaluation.collect import Statistics
    from fine_dist.evaluation.comparison import Score

HELD_OUT = "held_out"
_ANY_NETWORK = ("is", "precision", "recall", "kid")
"""Metrics that are measured with another network where that alone is given."""


class Evaluation:
    """The measurements of a config, with what they share read once: `evaluation(path) -> row`. All processes call."""

    def __init__(self, config: EvaluateConfig, world: World) -> None:
        self.config, self.world = config, world
        self.device: torch.device = world.device  # type: ignore[assignment]
        self.wanted = wanted_of(config)
        self.networks = networks_of(self.wanted, config.features)
        self.references = References(config, self.networks, world)
        self._questions: dict[str, HeldOutLoss] = {}

    def __call__(self, path: str) -> dict[str, Any]:
        """The numbers of a model or of images, and how they came about; JSON."""
        if is_images(path):
            return self._row(path, {"arch": None, "method": "images"}, None, self._of_images(path), [])
        renderer = make_renderer(self.config, path, self.device)
        arch = renderer.model.arch
        if self.networks and not renderer.pictures:
            raise ConfigError(
                f"metrics: {', '.join(self.metrics)} of {path} need pictures, and it makes latents of "
                f"{arch.in_channels} channels; say what decodes them with --vae FOLDER"
            )
        loss = self.held_out_loss(renderer) if HELD_OUT in self.wanted else None
        found = self._of_samples(renderer) if self.networks else {}
        about = {"arch": arch.name, "method": renderer.about["method"]["name"]} | renderer.protocol(self.config.seed)
        about["hash"] = about.pop("model")
        return self._row(path, about, loss, found, renderer.notes)

    @property
    def metrics(self) -> list[str]:
        """Those that are measured on images."""
        return [metric for metric in self.wanted if metric != HELD_OUT]

    def protocol(self) -> dict[str, Any]:
        """What decides the numbers, models apart; JSON."""
        config = self.config
        return {
            "metrics": self.wanted,
            "samples": config.samples if self.networks else None,
            "seed": config.seed,
            "weights": config.weights,
            "sampler": config.sampler.model_dump(exclude={"batch"}),
            "diffusion": config.diffusion.model_dump() if config.diffusion else None,
            "vae": [config.vae, config.vae_precision] if config.vae else None,
            **self.references.protocol(),
        }

    def held_out_loss(self, renderer: ImageRenderer) -> float:
        """Over all questions, each process its share. `DataError` when the shards do not fit the model."""
        from fine_dist.data.sources import locate
        from fine_dist.data.stream import check_fit, read_all
        from fine_dist.diffusion.held_out import HeldOutLoss

        where = expand_path(str(self.config.data.held_out))
        check_fit(locate(where, self.config.data)[0], renderer.model.arch, where)
        key = renderer.diffusion.model_dump_json()
        if key not in self._questions:
            self._questions[key] = HeldOutLoss(*read_all(where), renderer.diffusion)
        total, count = self._questions[key].sums(
            renderer.model, self.device, 256, self.world.rank, self.world.world_size
        )
        both = self._sum(total, count)
        return both[0] / both[1]

    def _sum(self, *values: float) -> list[float]:
        import torch

        from fine_dist.engine.dist import all_reduce_sum

        return all_reduce_sum(torch.tensor(values, dtype=torch.float64), self.world).tolist()

    # --- images ------------------------------------------------------------------------------------------------------

    def _of_samples(self, renderer: ImageRenderer) -> dict[str, Statistics]:
        """The statistics of samples under every network; an image is drawn once and shown to all."""
        import torch

        from fine_dist.evaluation.collect import Collector

        count, world = self.config.samples, self.world
        labels = torch.arange(count) % renderer.model.arch.num_classes
        mine = torch.arange(world.rank, count, world.world_size)
        collectors = {
            name: Collector(self.references.network(name), count, source=renderer.where) for name in self.networks
        }
        bar = f"sample {Path(renderer.where).name}" if world.is_main else False
        for drawn, images in renderer.render(labels[mine], mine, self.config.seed, bar):
            for collector in collectors.values():
                collector.add(drawn.indices, images)
        return {name: collector.all_reduce().result() for name, collector in collectors.items()}

    def _of_images(self, path: str) -> dict[str, Statistics]:
        from fine_dist.evaluation.collect import measure_path

        return {
            name: measure_path(
                self.references.network(name),
                expand_path(path),
                rank=self.world.rank,
                world_size=self.world.world_size,
                progress=self.world.is_main,
            )
            for name in self.networks
        }

    def _row(
        self, path: str, about: dict[str, Any], loss: float | None, found: dict[str, Statistics], notes: list[str]
    ) -> dict[str, Any]:
        from fine_dist.evaluation.comparison import cautions, compare

        scores: dict[str, dict[str, Any]] = {}
        told = list(notes)
        for name, statistics in found.items():
            metrics, real = self.networks[name], self.references.statistics(name)
            both: list[Score] = compare(statistics, real, metrics, seed=self.config.seed)
            scores |= {score.metric: {**asdict(score), "network": name} for score in both}
            told += cautions(statistics, real, metrics)
        ordered = {metric: scores[metric] for metric in self.metrics if metric in scores}
        count = next((statistics.count for statistics in found.values()), None)
        return {"model": path, **about, "held_out_loss": loss, "images": count, "scores": ordered, "notes": told}


def wanted_of(config: EvaluateConfig) -> list[str]:
    """The metrics, in the order asked. `ConfigError` when there are none, or what one needs is not said."""
    from fine_dist.evaluation.comparison import NETWORKS

    wanted = list(dict.fromkeys(config.metrics))
    for metric in wanted:
        if metric not in (HELD_OUT, *NETWORKS):
            raise ConfigError(f"metrics: {metric!r} is none; {nearest(metric, [HELD_OUT, *NETWORKS])}")
    if not wanted:
        wanted = [HELD_OUT] if config.data.held_out else []
        wanted += ["fd-classifier"] if config.features.classifier else []
    if not wanted:
        raise ConfigError(
            "nothing to measure: set data.held_out (the loss), or metrics with their features and a reference"
        )
    if HELD_OUT in wanted and not config.data.held_out:
        raise ConfigError("data.held_out: the held-out loss needs shards that were never trained on")
    if wanted != [HELD_OUT] and not (config.reference or config.data.shards):
        raise ConfigError(
            "reference: scores of images need real ones to compare with: --reference FILE (images or statistics), or "
            "--data.shards FOLDER"
        )
    return wanted


def networks_of(wanted: Sequence[str], features: FeaturesConfig) -> dict[str, list[str]]:
    """The metrics of each network. `ConfigError` when one's weights are not said."""
    from fine_dist.evaluation.comparison import networks
    from fine_dist.evaluation.features import NAMES

    found: dict[str, list[str]] = {}
    others = [name for name in NAMES if getattr(features, name)]
    usual = networks([metric for metric in wanted if metric != HELD_OUT])
    for name, metrics in usual.items():
        for metric in metrics:
            use = name
            if not getattr(features, name) and metric in _ANY_NETWORK and len(others) == 1:
                use = others[0]
            if not getattr(features, use) and use != "efflite":
                raise ConfigError(f"features.{use}: {metric} needs its weights: {NAMES[use]}")
            found.setdefault(use, []).append(metric)
    return found


# --- the record ------------------------------------------------------------------------------------------------------


def keep(folder: Path, protocol: dict[str, Any], rows: list[dict[str, Any]], floors: dict[str, float]) -> Path:
    """Write rows beside those of the same protocol; the file. Numbers of another protocol are never overwritten."""
    from fine_dist.core.files import sha256_text, write_atomic

    protocol = json.loads(json.dumps(protocol))
    key = sha256_text(json.dumps(protocol, sort_keys=True))
    for path in (folder / "evaluate.json", folder / f"evaluate-{key[:8]}.json"):
        there = _read(path)
        if there is None or there.get("protocol") == protocol:
            break
    mine = {(row["model"], row.get("hash")) for row in rows}
    before = [row for row in (there or {}).get("rows", ()) if (row["model"], row.get("hash")) not in mine]
    text = json.dumps({"protocol": protocol, "floors": floors, "rows": [*before, *rows]}, indent=1)
    write_atomic(path, text + "\n")
    return path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; move it away, or choose another --run-dir") from None
    return found if isinstance(found, dict) else {}


def table(rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table of rows; a model's name is folded where it is long, never cut."""
    from rich.table import Table

    made = Table()
    made.add_column("model", overflow="fold", min_width=12)
    made.add_column("architecture", overflow="fold")
    made.add_column("method", overflow="fold")
    loss = any(row["held_out_loss"] is not None for row in rows)
    if loss:
        made.add_column("held-out loss", justify="right")
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["scores"]))
    for metric in metrics:
        name = next(row["scores"][metric]["name"] for row in rows if metric in row["scores"])
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        cells = [row["model"], row["arch"] or "-", row["method"]]
        cells += [_figure(row["held_out_loss"])] if loss else []
        made.add_row(*cells, *(_cell(row["scores"].get(metric)) for metric in metrics))
    return made


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return _figure(score["value"]) + (f" ± {score['spread']:.2g}" if score["spread"] is not None else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
