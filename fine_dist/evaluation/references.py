"""Real images to compare with: statistics of them under each network, read or measured once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.artifacts.locate import is_foreign
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fine_dist.engine.dist import World
    from fine_dist.evaluation.base import Features
    from fine_dist.evaluation.collect import Statistics
    from fine_dist.sampling.settings import EvaluateConfig

_BATCH = 256


class References:
    """Networks and the statistics of real images under them; all processes ask alike: they measure them together."""

    def __init__(self, config: EvaluateConfig, networks: dict[str, list[str]], world: World) -> None:
        self.config, self.networks, self.world = config, networks, world
        self._networks: dict[str, Features] = {}
        self._statistics: dict[str, Statistics] = {}
        self._decoder: Any = None

    def network(self, name: str) -> Features:
        """A feature network with its weights."""
        from fine_dist.evaluation.features import load_features

        if name not in self._networks:
            weights = getattr(self.config.features, name)
            device = self.world.device or "cpu"
            self._networks[name] = load_features(name, expand_path(weights) if weights else None, device)
        return self._networks[name]

    def statistics(self, name: str) -> Statistics:
        """Of the real images under a network."""
        from fine_dist.evaluation.collect import reference

        if name not in self._statistics:
            config, world = self.config, self.world
            if config.reference:
                share = {"rank": world.rank, "world_size": world.world_size, "progress": world.is_main}
                self._statistics[name] = reference(self.network(name), expand_path(config.reference), **share)
            else:
                self._statistics[name] = self.of_shards(name, str(config.data.shards))
        return self._statistics[name]

    def floors(self) -> dict[str, float]:
        """Each Fréchet distance of held-out real images to the reference, by metric; where both are shards."""
        from fine_dist.evaluation.comparison import compare

        if self.config.reference or not self.config.data.held_out:
            return {}
        found: dict[str, float] = {}
        for name, metrics in self.networks.items():
            own = [metric for metric in metrics if metric in ("fid", "fdd", "fd-efflite", "fd-classifier")]
            if own:
                real = self.of_shards(name, self.config.data.held_out)
                found |= {score.metric: float(score.value or 0) for score in compare(real, self.statistics(name), own)}
        return found

    def of_shards(self, name: str, where: str) -> Statistics:
        """Statistics of the pictures in shards of latents; each process reads its part."""
        from fine_dist.data.reader import ShardSet
        from fine_dist.evaluation.collect import measure

        shards = ShardSet(expand_path(where), self.config.data)
        try:
            finish = self._finish(shards.manifest, where)
            batches = self._batches(shards, finish)
            count = shards.manifest.count
            return measure(self.network(name), batches, num_images=count, source=where, progress=self.world.is_main)
        finally:
            shards.close()

    def _batches(self, shards: Any, finish: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import numpy as np
        import torch

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
            yield torch.arange(part.start, part.stop), finish(rows.latents[:, : manifest.latent_shape[0]])

    def _finish(self, manifest: Any, where: str) -> Any:
        """What makes pictures of these latents."""
        from fine_dist.sampling.image_grid import to_uint8

        if manifest.codec == "identity" and manifest.latent_shape[0] in (1, 3):

            def picture(latents: Tensor) -> Tensor:
                return to_uint8(latents.clamp(-1, 1))

            return picture
        if not self.config.vae:
            raise ConfigError(
                f"reference: {where} holds latents of {manifest.codec}; give real images with --reference FILE, or "
                "what decodes them with --vae FOLDER"
            )
        if self._decoder is None:
            from fine_dist.artifacts.autoencoder import Decoder

            self._decoder = Decoder(
                self.config.vae,
                scaling_factor=manifest.scaling_factor,
                device=self.world.device or "cpu",
                precision=self.config.vae_precision,
            )
        return self._decoder.decode

    def protocol(self) -> dict[str, Any]:
        """Names and hashes of networks and data; JSON."""
        from fine_dist.core.files import sha256_of
        from fine_dist.data.sources import locate

        config = self.config
        found: dict[str, Any] = {}
        for name in ("held_out", "shards"):
            where = getattr(config.data, name)
            if where and (name == "held_out" or not config.reference):
                found[name] = locate(expand_path(where), config.data)[0].hash
        if config.reference:
            path = Path(expand_path(config.reference))
            found["reference"] = sha256_of(path) if path.is_file() else config.reference
        return {**found, "features": {name: self.network(name).identity or name for name in self.networks}}


def is_images(source: str) -> bool:
    """Whether a source is a set of images, not a model: an .npz, a .tar, or a folder of pictures."""
    from fine_dist.artifacts.locate import find_artifact
    from fine_dist.core.errors import ArtifactError
    from fine_dist.evaluation.image_reader import SUFFIXES

    path = Path(expand_path(source))
    if path.suffix in (".npz", ".tar"):
        return True
    if not path.is_dir() or is_foreign(source):
        return False
    try:
        find_artifact(path)
    except ArtifactError:
        return any(found.suffix.lower() in SUFFIXES for found in path.rglob("*"))
    return False
