"""Statistics of the real images to compare with, under each network; read or measured once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_dist.artifacts.autoencoder import Decoder
from fine_dist.artifacts.locate import find_artifact, is_foreign
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, ConfigError, FineDistError, ReportedElsewhere
from fine_dist.core.files import sha256_of
from fine_dist.data.manifest import Manifest
from fine_dist.data.reader import ShardSet
from fine_dist.data.sources import locate
from fine_dist.engine.dist import broadcast_object
from fine_dist.engine.world import World
from fine_dist.evaluation.classifier import classifier_of_shards
from fine_dist.evaluation.comparison import FRECHET, compare
from fine_dist.evaluation.feature_network import Features
from fine_dist.evaluation.features import load_features
from fine_dist.evaluation.image_reader import is_picture
from fine_dist.evaluation.image_statistics import SUBSET, Selection, Statistics, measure, reference
from fine_dist.evaluation.settings import TRAIN, EvaluateConfig
from fine_dist.sampling.image_grid import to_uint8

_BATCH = 256


class References:
    """Feature networks and the statistics of real images. All processes make the same calls and measure together."""

    def __init__(self, config: EvaluateConfig, networks: dict[str, list[str]], world: World) -> None:
        self.config, self.networks, self.world = config, networks, world
        self.selection = Selection(SUBSET, config.seed, consecutive=config.protocol == "adm")
        self._networks: dict[str, Features] = {}
        self._statistics: dict[str, Statistics] = {}
        self._decoder: Decoder | None = None

    def network(self, name: str) -> Features:
        """A feature network with its weights."""
        if name not in self._networks:
            weights = getattr(self.config.features, name)
            if weights == TRAIN and name == "classifier":
                weights = self._trained_classifier()
            device = self.world.device or "cpu"
            self._networks[name] = load_features(name, expand_path(weights) if weights else None, device)
        return self._networks[name]

    def _trained_classifier(self) -> str:
        """Folder of the classifier, which rank 0 trains on the shards unless it exists."""
        data, folder = self.config.data, Path(expand_path(self.config.run_dir)) / "classifier"
        failure: FineDistError | None = None
        if self.world.is_main:
            try:
                if not data.shards:
                    raise ConfigError("features.classifier: train needs data.shards to train on")
                accuracy = classifier_of_shards(folder, data.shards, data.held_out).accuracy
                print(f"classifier: accuracy {accuracy:.1%} on held-out images; {folder}", flush=True)
            except FineDistError as error:
                failure = error
        # The other ranks must stop as well, because they would wait for rank 0 in the next collective; only rank 0
        # prints the message.
        if broadcast_object(failure is not None, self.world) and failure is None:
            raise ReportedElsewhere("rank 0 could not train the classifier")
        if failure is not None:
            raise failure
        return str(folder)

    def statistics(self, name: str) -> Statistics:
        """Statistics of the real images under a network."""
        if name not in self._statistics:
            config, world = self.config, self.world
            if config.reference:
                self._statistics[name] = reference(
                    self.network(name),
                    expand_path(config.reference),
                    selection=self.selection,
                    rank=world.rank,
                    world_size=world.world_size,
                    progress=world.is_main,
                    background=config.background,
                )
            else:
                self._statistics[name] = self.of_shards(name, str(config.data.shards))
        return self._statistics[name]

    def floors(self) -> dict[str, float]:
        """Fréchet distances of held-out real images to the reference, by metric; empty unless both are shards."""
        if self.config.reference or not self.config.data.held_out:
            return {}
        distances: dict[str, float] = {}
        for name, metrics in self.networks.items():
            own = [metric for metric in metrics if metric in FRECHET]
            if own:
                real = self.of_shards(name, self.config.data.held_out)
                distances |= {
                    score.metric: float(score.value or 0) for score in compare(real, self.statistics(name), own)
                }
        return distances

    def of_shards(self, name: str, where: str) -> Statistics:
        """Statistics of the images in shards; each process reads its share."""
        shards = ShardSet(expand_path(where), self.config.data)
        try:
            return measure(
                self.network(name),
                self._batches(shards, self._to_pictures(shards.manifest, where)),
                num_images=shards.manifest.count,
                source=where,
                selection=self.selection,
                progress=self.world.is_main,
            )
        finally:
            shards.close()

    def _batches(self, shards: ShardSet, to_pictures: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        manifest = shards.manifest
        shard = np.repeat(np.arange(len(manifest.shards)), [info.count for info in manifest.shards])
        index = np.concatenate([np.arange(info.count) for info in manifest.shards])
        size, rank = self.world.world_size, self.world.rank
        start, stop = len(shard) * rank // size, len(shard) * (rank + 1) // size
        for first in range(start, stop, _BATCH):
            part = slice(first, min(first + _BATCH, stop))
            rows = shards.read(shard[part], index[part], scaled=True)
            for row, fault in rows.faults.items():
                shards.count_bad(int(shard[part][row]), int(index[part][row]), fault)
            yield torch.arange(part.start, part.stop), to_pictures(rows.latents[:, : manifest.latent_shape[0]])

    def _to_pictures(self, manifest: Manifest, where: str) -> Callable[[Tensor], Tensor]:
        """A function that turns the latents of these shards into uint8 images."""
        if manifest.codec == "identity" and manifest.latent_shape[0] in (1, 3):
            return lambda latents: to_uint8(latents.clamp(-1, 1))
        if not self.config.vae:
            raise ConfigError(
                f"reference: {where} holds latents of {manifest.codec}; give real images with --reference FILE, or the "
                "autoencoder with --vae FOLDER"
            )
        if self._decoder is None:
            self._decoder = Decoder(
                self.config.vae,
                scaling_factor=manifest.scale,
                shift_factor=manifest.shift,
                device=self.world.device or "cpu",
                precision=self.config.vae_precision,
            )
        return self._decoder.decode

    def protocol(self) -> dict[str, Any]:
        """Names and hashes of networks and data; JSON."""
        config = self.config
        hashes: dict[str, Any] = {}
        for name in ("held_out", "shards"):
            where = getattr(config.data, name)
            if where and (name == "held_out" or not config.reference):
                hashes[name] = locate(expand_path(where), config.data)[0].hash
        if config.reference:
            path = Path(expand_path(config.reference))
            hashes["reference"] = sha256_of(path) if path.is_file() else config.reference
        return {**hashes, "features": {name: self.network(name).identity or name for name in self.networks}}


def is_images(source: str) -> bool:
    """Whether a source is a set of images and not a model: an .npz, a .tar, or a folder of images."""
    path = Path(expand_path(source))
    if path.suffix in (".npz", ".tar"):
        return True
    if not path.is_dir() or is_foreign(source):
        return False
    try:
        find_artifact(path)
    except ArtifactError:
        return any(is_picture(file) for file in path.rglob("*"))
    return False
