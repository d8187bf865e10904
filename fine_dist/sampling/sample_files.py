"""The files of sampled images: the stores that processes fill, and the grid, PNG, npz and npy files made from them.

Shapes: N images, C channels, H and W sides of an image; latents are [C, h, w].
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_dist.core.errors import DataError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.diffusion.samplers import SampledBatch
from fine_dist.engine.world import World
from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, save_png
from fine_dist.sampling.image_store import ImageStore, LatentStore
from fine_dist.sampling.renderer import ImageRenderer, class_name_of
from fine_dist.sampling.settings import SampleConfig

DONE = "samples.json"
GRID_IMAGES = 100
"""Maximum number of images in a grid: ten rows of ten."""


class OutputStores:
    """What is drawn, on disk: latents where they are wanted or there is nothing else, images where there are any."""

    def __init__(
        self, folder: Path, renderer: ImageRenderer, labels: Tensor, identity: dict[str, Any], wanted: set[Any]
    ) -> None:
        self.latents: LatentStore | None = None
        self.images: ImageStore | None = None
        shape, count = renderer.model.arch.latent_shape, len(labels)
        if "npy" in wanted or not renderer.pictures:
            self.latents = LatentStore(folder / "store" / "latents", count, shape, identity)
        if renderer.pictures and wanted & {"grid", "png", "npz"}:
            # The decoder alone knows the size of its images, and the
            # store must be allocated before the first one is drawn.
            one = renderer.finish(torch.zeros(1, *shape))
            size = (int(one.shape[2]), int(one.shape[3]))
            self.images = ImageStore(folder / "store" / "images", count, size, int(one.shape[1]), identity)

    @property
    def all(self) -> list[LatentStore | ImageStore]:
        return [store for store in (self.latents, self.images) if store is not None]

    def missing(self, rank: int, size: int) -> Tensor:
        """Numbers of images that are not in every store yet, this process's share of them."""
        return torch.cat([store.missing(rank, size) for store in self.all]).unique()

    def write(self, batch: SampledBatch, images: Tensor) -> None:
        """Store a batch; it is on disk when this returns."""
        if self.latents is not None:
            self.latents.write(batch.indices, batch.latents)
        if self.images is not None:
            self.images.write(batch.indices, images)

    def __enter__(self) -> OutputStores:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.all:
            store.close()


class SamplesDone(Record):
    """The file that says which images a folder holds."""

    protocol: dict[str, Any]
    """What decides every image: the model's hash, the sampler, the seed, the classes."""
    formats: list[str]
    """Formats that are complete."""


def samples_exist(folder: Path, identity: dict[str, Any], wanted: set[Any]) -> bool:
    """Whether these images are in the folder. `DataError` when others are."""
    try:
        record = read_record(SamplesDone, folder / DONE, DataError, f"remove {folder}, or choose another --run-dir")
    except FileNotFoundError:
        return False
    protocol = record.protocol
    differs = [key for key in identity if protocol.get(key) != json.loads(json.dumps(identity[key]))]
    if differs:
        raise DataError(
            f"{folder} holds other images (another {', '.join(differs)}); choose another --run-dir, or remove it"
        )
    if not wanted <= set(record.formats):
        return False
    print(f"sample: drawn before; the files are in {folder}")
    return True


def write_files(
    stores: OutputStores,
    config: SampleConfig,
    renderer: ImageRenderer,
    labels: Tensor,
    folder: Path,
    identity: dict[str, Any],
    seconds: float,
) -> None:
    if "npy" in config.formats and stores.latents is not None:
        stores.latents.to_npy(folder / "samples.npy")
    file = io.BytesIO()
    np.save(file, labels.numpy())
    write_atomic(folder / "labels.npy", file.getvalue())
    if "npz" in config.formats and stores.images is not None:
        stores.images.to_npz(folder / "samples.npz")
    if "grid" in config.formats:
        _write_grid(stores, config, renderer, labels, folder)
    record = {"protocol": identity, "formats": config.formats, "count": len(labels), "source": renderer.where}
    # From here on the same command does nothing, so it stands after every file that it promises.
    write_atomic(folder / DONE, json.dumps(record, indent=1) + "\n")
    # Last, after the record: an interruption before it costs disk space and no image.
    shutil.rmtree(folder / "store")
    rate = f", {len(labels) / seconds:.3g} images/s" if seconds else ""
    print(f"sample: {len(labels)} images of {renderer.where}{rate}; {', '.join(config.formats)} in {folder}")


def _write_grid(
    stores: OutputStores, config: SampleConfig, renderer: ImageRenderer, labels: Tensor, folder: Path
) -> None:
    num = min(len(labels), GRID_IMAGES)
    if stores.images is not None:
        images = torch.from_numpy(stores.images.read(0, num).copy()).permute(0, 3, 1, 2)
    else:
        assert stores.latents is not None
        images = latents_as_images(torch.from_numpy(stores.latents.read(0, num).copy()))
    captions = [class_name_of(int(label), renderer.facts, renderer.model.arch.num_classes) for label in labels[:num]]
    columns = 10 if config.count or "balanced" in config.classes else config.per_class
    grid = labelled_grid(images, captions, min(columns, 16), title=grid_title(renderer, config))
    save_png(grid, folder / "samples.png")


def write_pngs(store: ImageStore, renderer: ImageRenderer, labels: Tensor, folder: Path, process: World) -> None:
    for number in range(process.rank, len(labels), process.world_size):
        name = class_name_of(int(labels[number]), renderer.facts, renderer.model.arch.num_classes)
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
        picture = torch.from_numpy(store.read(number, 1)[0].copy()).permute(2, 0, 1)
        save_png(picture, folder / "images" / f"{number:06d}-{safe}.png")


def grid_title(renderer: ImageRenderer, config: SampleConfig) -> str:
    what = "" if renderer.pictures else "LATENTS, not decoded (--vae makes images of them); "
    sampler = renderer.sampler
    return f"{what}{sampler.scheduler} {sampler.steps} steps, guidance {sampler.guidance:g}, seed {config.seed}"
