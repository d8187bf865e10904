"""The evaluator of `evaluate`, of studies and of evaluation during training: the held-out loss and scores of images.

Every process measures its share; sums and float64 moments are merged, so that the result does not depend on the number
of processes. `evaluate.json` records the protocol with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.data.manifest import check_classes
from fine_dist.data.sources import locate
from fine_dist.data.stream import check_fit, read_all
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.settings import DiffusionConfig, Precision
from fine_dist.engine.dist import all_reduce_sum
from fine_dist.engine.world import World
from fine_dist.evaluation.comparison import ANY_NETWORK, HELD_OUT_LOSS, NETWORKS, Score, cautions, compare, networks
from fine_dist.evaluation.features import NAMES
from fine_dist.evaluation.image_statistics import Collector, Selection, Statistics, measure_path
from fine_dist.evaluation.references import References, is_images
from fine_dist.evaluation.settings import EvaluateConfig, FeaturesConfig
from fine_dist.sampling.renderer import ImageRenderer, make_renderer

_BATCH = 256
"""Batch size of the held-out loss."""


@dataclass
class Measurement:
    """The numbers of one model or one set of images.

    held_out_loss: None if it was not requested.
    scores: scores by metric, such as `fid` or `fd_classifier`.
    networks: feature network of each score.
    images: number of measured images.
    notes: warnings, such as too few samples.
    """

    held_out_loss: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    images: int | None = None
    notes: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, float]:
        """All values by metric, including the held-out loss; metrics that could not be computed are left out."""
        values = {metric: float(score.value) for metric, score in self.scores.items() if score.value is not None}
        return values if self.held_out_loss is None else {HELD_OUT_LOSS: self.held_out_loss, **values}

    def row(self) -> dict[str, Any]:
        """The measurement as a row of evaluate.json."""
        scores = {metric: {**asdict(s), "network": self.networks[metric]} for metric, s in self.scores.items()}
        return {HELD_OUT_LOSS: self.held_out_loss, "images": self.images, "scores": scores, "notes": self.notes}


class Evaluator:
    """Measures models by one config; networks, references and held-out samples are read once.

    All processes have to make the same calls.

    Args:
        config: Metrics, data and sampler.
        world: The processes that measure together.
        held_out_samples: Number of samples of `data.held_out` to use, from the first. Default: all samples.

    Raises:
        ConfigError: No metric is requested, or an input of a metric is missing.
    """

    def __init__(self, config: EvaluateConfig, world: World, held_out_samples: int | None = None) -> None:
        self.config, self.world, self.held_out_samples = config, world, held_out_samples
        self.device = world.device or torch.device("cpu")
        self.metrics = requested_metrics(config)
        self.networks = networks_of(self.metrics, config.features)
        self.references = References(config, self.networks, world)
        self._held_out: dict[str, HeldOutLoss] = {}

    def __call__(self, path: str) -> dict[str, Any]:
        """The row of evaluate.json for a model or a set of images at a path: measurement and protocol."""
        if is_images(path):
            measured = self._scored(self._of_files(path))
            return {"model": path, "arch": None, "method": "images", **measured.row()}
        renderer = self.renderer(path)
        arch, protocol = renderer.model.arch, renderer.protocol(self.config.seed)
        about = {"arch": arch.name, "method": renderer.metadata["method"]["name"], **protocol}
        about["hash"] = about.pop("model")
        return {"model": path, **about, **self.measure(renderer).row()}

    def renderer(self, path: str) -> ImageRenderer:
        """A model on disk with its sampling settings, from the config or else from the model's manifest."""
        return make_renderer(self.config, path, self.device)

    def measure(self, renderer: ImageRenderer) -> Measurement:
        """All metrics of a model.

        Raises:
            DataError: The held-out shards do not fit the model or have other classes.
            ConfigError: Scores of images are requested for a model of latents, and no VAE is given.
        """
        loss = None
        if HELD_OUT_LOSS in self.metrics:
            where = expand_path(str(self.config.data.held_out))
            manifest, _ = locate(where, self.config.data)
            check_fit(manifest, renderer.model.arch, where)
            check_classes(renderer.where, renderer.facts.class_names, where, manifest.class_names)
            loss = self.held_out_loss(renderer.model, renderer.diffusion, precision=renderer.sampler.precision)
        measurement = self.scores(renderer) if self.networks else Measurement()
        measurement.held_out_loss, measurement.notes = loss, [*renderer.notes, *measurement.notes]
        return measurement

    def held_out_loss(
        self, model: nn.Module, diffusion: DiffusionConfig, alone: bool = False, precision: Precision = "fp32"
    ) -> float:
        """Mean diffusion loss over the fixed inputs of `data.held_out`, of a dense or a composed model.

        Args:
            model: A model trained for `diffusion`.
            diffusion: The diffusion process.
            alone: Whether this process measures all inputs, as rank 0 does during training; otherwise each process
                measures its share.
            precision: Arithmetic of the model.
        """
        # Models of different processes need different times and noise; models of one process share the inputs.
        key = diffusion.model_dump_json()
        if key not in self._held_out:
            latents, labels = read_all(expand_path(str(self.config.data.held_out)), self.held_out_samples)
            self._held_out[key] = HeldOutLoss(latents, labels, diffusion)
        rank, size = (0, 1) if alone else (self.world.rank, self.world.world_size)
        total, count = self._held_out[key].sums(
            model.to(self.device).eval(), self.device, _BATCH, rank, size, precision
        )
        if not alone:
            # In fp64, so that the sum over ranks equals the sum of one process in all printed digits.
            total, count = all_reduce_sum(torch.tensor([total, count], dtype=torch.float64), self.world).tolist()
        return float(total / count)

    def scores(self, renderer: ImageRenderer, alone: bool = False) -> Measurement:
        """Scores of samples; each image is sampled once for all networks. `alone` is that of `held_out_loss`."""
        if not renderer.pictures:
            requested = ", ".join(metric for metric in self.metrics if metric != HELD_OUT_LOSS)
            raise ConfigError(
                f"metrics: {requested} of {renderer.where} need images, and the model samples latents of "
                f"{renderer.model.arch.in_channels} channels; give their autoencoder with --vae FOLDER"
            )
        count = self.config.samples
        rank, size = (0, 1) if alone else (self.world.rank, self.world.world_size)
        # Classes are balanced, and the class and noise of an image depend on its number alone and not on the process.
        labels, mine = torch.arange(count) % renderer.model.arch.num_classes, torch.arange(rank, count, size)
        collectors = {
            name: Collector(self.references.network(name), count, self._selection, source=renderer.where)
            for name in self.networks
        }
        progress = f"sample {Path(renderer.where).name}" if self.world.is_main and not alone else False
        for drawn, images in renderer.render(labels[mine], mine, self.config.seed, progress):
            for collector in collectors.values():
                collector.add(drawn.indices, images, labels[drawn.indices])
        if not alone:
            for collector in collectors.values():
                # The statistics of disjoint images add up to those of one process.
                collector.all_reduce()
        return self._scored({name: collector.result() for name, collector in collectors.items()})

    @property
    def _selection(self) -> Selection:
        """The selection of samples: that of the reference, or all samples under ADM's protocol."""
        reference = self.references.selection
        return Selection(None, reference.seed, consecutive=True) if self.config.protocol == "adm" else reference

    def _of_files(self, path: str) -> dict[str, Statistics]:
        return {
            name: measure_path(
                self.references.network(name),
                expand_path(path),
                selection=self._selection,
                rank=self.world.rank,
                world_size=self.world.world_size,
                progress=self.world.is_main,
                background=self.config.background,
            )
            for name in self.networks
        }

    def _scored(self, statistics_by_network: dict[str, Statistics]) -> Measurement:
        result = Measurement(images=next((statistics.count for statistics in statistics_by_network.values()), None))
        scores: dict[str, Score] = {}
        for name, statistics in statistics_by_network.items():
            metrics, real = self.networks[name], self.references.statistics(name)
            scores |= {score.metric: score for score in compare(statistics, real, metrics, seed=self.config.seed)}
            result.networks |= dict.fromkeys(metrics, name)
            result.notes += cautions(statistics, real, metrics, adm=self.config.protocol == "adm")
        result.scores = {metric: scores[metric] for metric in self.metrics if metric in scores}
        return result

    def protocol(self) -> dict[str, Any]:
        """Everything besides the model that determines the numbers; JSON."""
        config = self.config
        return {
            "metrics": self.metrics,
            "protocol": config.protocol,
            "samples": config.samples if self.networks else None,
            "seed": config.seed,
            "weights": config.weights,
            "sampler": config.sampler.model_dump(exclude={"batch"}),
            "diffusion": config.diffusion.model_dump() if config.diffusion else None,
            "vae": [config.vae, config.vae_precision] if config.vae else None,
            **({"held_out_samples": self.held_out_samples} if self.held_out_samples else {}),
            **self.references.protocol(),
        }


def requested_metrics(config: EvaluateConfig) -> list[str]:
    """The requested metrics in order. `ConfigError` when there are none, or an input of one is missing."""
    wanted = list(dict.fromkeys(config.metrics))
    for metric in wanted:
        if metric not in (HELD_OUT_LOSS, *NETWORKS):
            raise ConfigError(f"metrics: {metric!r} is unknown; {nearest(metric, [HELD_OUT_LOSS, *NETWORKS])}")
    if not wanted:
        wanted = [HELD_OUT_LOSS] if config.data.held_out else []
        wanted += ["fd_classifier"] if config.features.classifier else []
    if not wanted:
        raise ConfigError(
            "nothing to measure: give --data.held-out SHARDS for the held-out loss, or --metrics with features.* "
            "and a --reference"
        )
    if HELD_OUT_LOSS in wanted and not config.data.held_out:
        raise ConfigError("data.held_out: the held-out loss needs shards that were never trained on")
    if wanted != [HELD_OUT_LOSS] and not (config.reference or config.data.shards):
        raise ConfigError(
            "reference: scores of images need real images to compare with: --reference FILE (images or statistics), or "
            "--data.shards FOLDER"
        )
    return wanted


def networks_of(metrics: Sequence[str], features: FeaturesConfig) -> dict[str, list[str]]:
    """The metrics of each network. `ConfigError` when a network's weights are not given."""
    metrics_of: dict[str, list[str]] = {}
    given = [name for name in NAMES if getattr(features, name)]
    usual = networks([metric for metric in metrics if metric != HELD_OUT_LOSS])
    for name, its_metrics in usual.items():
        for metric in its_metrics:
            use = name
            # If exactly one network is given, it is used; with two the choice would be a guess.
            if not getattr(features, name) and metric in ANY_NETWORK and len(given) == 1:
                use = given[0]
            if not getattr(features, use):
                raise ConfigError(f"features.{use}: {metric} needs weights: {NAMES[use]}")
            metrics_of.setdefault(use, []).append(metric)
    return metrics_of
