"""Images to latent shards: many processes, one unit of work a shard, each done once.

The folder of the shards is all they share (`sharing.py`). What a latent is depends on its image and the seed, not on
who encoded it.

Letters: B images of a batch, C channels of a latent, S image size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch

from fine_dist.data.images import Item, Source
from fine_dist.data.progress import Progress
from fine_dist.data.shards import BadInput, Manifest, ShardWriter
from fine_dist.data.sharing import Claims, Job, agree, count_done, mark_done, merge, too_many
from fine_dist.errors import DataError

_NOISE = 0x656E636F6465
"""Keeps the noise of sampled latents apart from other uses of the seed."""


class Codec(Protocol):
    """What turns images into latents."""

    name: str
    scaling_factor: float

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image [C, S, S]."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (None: there is none) of float32 images [B, C, S, S] in [-1, 1]."""


class Identity:
    """Pixels are the latents."""

    name, scaling_factor = "identity", 1.0

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        return channels, height, width

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images, None


class Autoencoder:
    """diffusers' `AutoencoderKL`, from a local folder or a hub name.

    `DataError` when it cannot be loaded, has no safetensors weights, or shifts its latents.
    """

    def __init__(self, name: str, *, subfolder: str | None, device: str, precision: str) -> None:
        from diffusers import AutoencoderKL

        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        try:
            kind = AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name", "AutoencoderKL")
            if kind == "AutoencoderKL":
                vae = AutoencoderKL.from_pretrained(
                    name, subfolder=subfolder, use_safetensors=True, torch_dtype=self.dtype
                )
        except Exception as error:  # what diffusers raises for a folder that is something else is not to be foreseen
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"vae: {name}: no AutoencoderKL can be loaded: {first}") from None
        if kind != "AutoencoderKL":
            raise DataError(
                f"vae: {name}: it is a {kind}, and an AutoencoderKL is needed (in a whole pipeline's folder: "
                "--vae-subfolder vae)"
            )
        if getattr(vae.config, "shift_factor", None):
            raise DataError(f"vae: {name}: shift_factor {vae.config.shift_factor} is not supported; use a VAE without")
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.name, self.scaling_factor = name, float(vae.config.scaling_factor)

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels, height, width = image_shape
        if channels != self.vae.config.in_channels or height % factor or width % factor:
            raise DataError(
                f"image_size: the VAE takes {self.vae.config.in_channels} channels and sides that are multiples of "
                f"{factor}, not {channels}x{height}x{width}"
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return found.mean.float().cpu(), found.std.float().cpu()


@dataclass(frozen=True)
class Encoded:
    """What this process did: its images, its seconds, and of those the seconds in which the codec waited for images."""

    manifest: Manifest
    images: int
    seconds: float
    waited_s: float


def encode(source: Source, codec: Codec, job: Job, *, progress: bool = False) -> Encoded:
    """Encode all images of `source` into `job.folder`, together with whatever processes do the same.

    progress: show how far all of them are.

    Returns when everything is encoded and the manifest is written. `DataError`: the folder holds other latents; too
    many images cannot be read.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    agree(job.folder, {**job.settings, "fingerprint": source.fingerprint})
    claims = Claims(job.folder, source.units)
    started, waited, images, bad = time.perf_counter(), 0.0, 0, 0
    with ThreadPoolExecutor(max(1, job.workers), thread_name_prefix="images") as pool, closing(claims):
        bar = Progress(job.folder, source.count, source.units) if progress else None
        with closing(_decoded(pool, source, claims, job)) as results, closing(bar) if bar else nullcontext():
            for first in results:
                tell = partial(bar.show, count_done(job.folder, source.units)) if bar else None
                part = _encode_unit(first, results, codec, job, tell)
                claims.release(first[0])
                if bar:
                    bar.show(count_done(job.folder, source.units), 0)
                waited, images, bad = waited + part.waited_s, images + part.images, bad + part.bad
                if source.count is not None and bad > job.max_bad_fraction * source.count:
                    raise DataError(too_many(job, bad, source.count, part.last_bad))
        seconds = time.perf_counter() - started
        manifest = merge(source, codec.name, codec.scaling_factor, job)
    return Encoded(manifest, images, seconds, waited)


# --- one process's share -------------------------------------------------------------------------------------------

Result = tuple[int, Item | None, Any]
"""A unit, one of its images, and the array (or what is wrong with it). No image: the unit ends here."""


def _decoded(pool: ThreadPoolExecutor, source: Source, claims: Claims, job: Job) -> Generator[Result, None, None]:
    """The images of the units that fall to this process, in order, read ahead by the pool's threads."""
    ahead: deque[tuple[int, Item | None, Future[Any] | None]] = deque()
    most = 3 * job.batch + 2 * job.workers

    def oldest() -> Result:
        unit, item, future = ahead.popleft()
        return unit, item, future and future.result()

    try:
        for unit in claims:
            if unit is None:  # the next claim may wait for another process, which may wait for what this one holds
                while ahead:
                    yield oldest()
                continue
            for item in source.items(unit):
                ahead.append((unit, item, pool.submit(_read, item)))
                while len(ahead) > most:
                    yield oldest()
            ahead.append((unit, None, None))
        while ahead:
            yield oldest()
    finally:
        for _, _, future in ahead:
            if future is not None:
                future.cancel()


def _read(item: Item) -> np.ndarray | BadInput:
    """An image, or the entry of the manifest that says why it could not be read."""
    try:
        return item.read()
    except Exception as error:  # decoders raise whatever they like; the manifest lists it
        text = str(error).replace(str(item.source), "").strip() or type(error).__name__
        return BadInput(source=item.source, error=text.partition("\n")[0][:200])


@dataclass
class _Part:
    images: int = 0
    bad: int = 0
    waited_s: float = 0.0
    last_bad: BadInput | None = None


def _encode_unit(
    first: Result, rest: Iterator[Result], codec: Codec, job: Job, tell: Callable[[int], None] | None
) -> _Part:
    """Encode one unit, up to where it ends, into its shard, and mark it as done. tell: takes how many images are."""
    unit = first[0]
    part, bad, largest, shape, ended = _Part(), [], -1, None, False
    writer: ShardWriter | None = None
    results = chain([first], rest)
    try:
        index = 0
        while not ended:
            started = time.perf_counter()
            images, labels = [], []
            for _, item, found in results:
                ended = item is None
                if item is not None and isinstance(found, BadInput):
                    bad.append(found)
                elif item is not None:
                    images.append(found)
                    labels.append(item.label)
                if ended or len(images) == job.batch:
                    break
            part.waited_s += time.perf_counter() - started
            if not images:
                continue
            latents = _latents(codec, images, unit, index, job)
            for sides, label in zip(latents, labels):
                shape = sides[0].shape
                for latent in sides:
                    writer = writer or ShardWriter(job.folder, unit, shape, job.dtype)
                    writer.add(latent, label)
            largest = max(largest, *labels)
            index += len(images)
            if tell:
                tell(index)
        info = writer.close() if writer else None
    except BaseException:
        if writer:
            writer.abandon()
        raise
    mark_done(job.folder, unit, info, shape, bad, largest)
    part.images, part.bad, part.last_bad = index, len(bad), bad[-1] if bad else None
    return part


def _latents(codec: Codec, images: list[np.ndarray], unit: int, index: int, job: Job) -> list[list[np.ndarray]]:
    """For each image its latent, and with `flips` that of its mirror image."""
    batch = torch.from_numpy(np.stack(images))
    x = batch.float().div_(127.5).sub_(1) if batch.dtype == torch.uint8 else batch
    sides = []
    for side, pixels in enumerate((x, x.flip(-1)) if job.flips else (x,)):
        mean, std = codec.encode(pixels)
        if std is not None and job.kind == "moments":
            mean = torch.cat([mean, std], 1)
        elif std is not None:
            noise = np.empty(mean.shape, np.float32)
            for row in range(len(noise)):
                rng = np.random.Generator(
                    np.random.Philox(key=[job.seed, _NOISE], counter=[0, side, index + row, unit])
                )
                rng.standard_normal(dtype=np.float32, out=noise[row])
            mean = mean + std * torch.from_numpy(noise)
        sides.append(mean.numpy())
    return [[side[row] for side in sides] for row in range(len(images))]
