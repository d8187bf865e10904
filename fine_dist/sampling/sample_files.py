"""The files of sampled images: stores that all processes write, and the grid, PNG, npz and npy files made from them.

Shapes: N images, B images of a batch, C channels, H, W height and width of an image; latents are [C, h, w].
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
"""File that is written when all images of a folder are complete."""
GRID_IMAGES = 100
"""Maximum number of images in a grid: ten rows of ten."""


class OutputStores:
    """The stores of a command's results, in `FOLDER/store`; a context that closes them.

    Latents are stored if `npy` is wanted or nothing decodes them, images if a wanted format needs them. Raises
    `DataError` if the stores hold images of another identity.
    """

    def __init__(
        self, folder: Path, renderer: ImageRenderer, labels: Tensor, identity: dict[str, Any], wanted: set[Any]
    ) -> None:
        self.latents: LatentStore | None = None
        self.images: ImageStore | None = None
        shape, count = renderer.model.arch.latent_shape, len(labels)
        if "npy" in wanted or not renderer.pictures:
            self.latents = LatentStore(folder / "store" / "latents", count, shape, identity)
        if renderer.pictures and wanted & {"grid", "png", "npz"}:
            channels, height, width = renderer.image_shape
            try:
                self.images = ImageStore(folder / "store" / "images", count, (height, width), channels, identity)
            except BaseException:
                self.__exit__()  # the store of latents is open already
                raise

    @property
    def all(self) -> list[LatentStore | ImageStore]:
        """The stores that exist."""
        return [store for store in (self.latents, self.images) if store is not None]

    def missing(self, rank: int, size: int) -> Tensor:
        """Return the numbers of images that are missing in any store, among the share of rank `rank` of `size`."""
        return torch.cat([store.missing(rank, size) for store in self.all]).unique()

    def write(self, batch: SampledBatch, images: Tensor) -> None:
        """Write a batch to the stores. It is on disk when this returns."""
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
    """Schema of `samples.json`."""

    protocol: dict[str, Any]
    """Everything that determines the images: hash of the model, sampler, seed, labels."""
    formats: list[str]
    """Formats whose files are complete."""


def samples_exist(folder: Path, identity: dict[str, Any], wanted: set[Any]) -> bool:
    """Whether a folder has these images in all wanted formats. Raises `DataError` if it has other images."""
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
    """Write the files of all formats but `png` from complete stores, then delete the stores. Only rank 0 calls it.

    `seconds` is the duration of sampling, for the message; 0 if all images were already there.
    """
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
    # After all other files, because a command that finds this one does nothing.
    write_atomic(folder / DONE, json.dumps(record, indent=1) + "\n")
    # After the record, so that an interruption here loses no images.
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
    """Write this process's share of the images as PNG files, named by number and class."""
    for number in range(process.rank, len(labels), process.world_size):
        name = class_name_of(int(labels[number]), renderer.facts, renderer.model.arch.num_classes)
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
        image = torch.from_numpy(store.read(number, 1)[0].copy()).permute(2, 0, 1)
        save_png(image, folder / "images" / f"{number:06d}-{safe}.png")


def grid_title(renderer: ImageRenderer, config: SampleConfig) -> str:
    """Return the title of a grid: sampler, steps, guidance and seed."""
    prefix = "" if renderer.pictures else "LATENTS, not decoded (--vae makes images of them); "
    sampler = renderer.sampler
    return f"{prefix}{sampler.scheduler} {sampler.steps} steps, guidance {sampler.guidance:g}, seed {config.seed}"
