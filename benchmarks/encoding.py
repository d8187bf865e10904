"""Speed of encoding, compared with the codec alone on the same batches, which are then in memory already."""

from __future__ import annotations

from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds
from fine_dist.data.codecs import Autoencoder
from fine_dist.data.encode_locks import EncodeJob
from fine_dist.data.encoder import encode
from fine_dist.data.images import FolderImages

BATCH, WORKERS, SIDE = 16, 2, 256


def encoding(root: Path, count: int, rounds: int) -> list[BenchmarkRow]:
    """Rows for JPEGs of ImageNet's average size and a tiny autoencoder, with `WORKERS` threads that read and crop them.

    Args:
        root: Folder for images, autoencoder and latents.
        count: Number of images.
        rounds: Number of measurements of each variant.
    """
    say("encoding")
    codec, source = _autoencoder(root / "vae"), _images(root / "images", count)
    decoded = [item.read() for item in source.items(0)]
    batches = [
        torch.from_numpy(np.stack(decoded[start : start + BATCH])).float().div_(127.5).sub_(1)
        for start in range(0, count, BATCH)
    ]
    folders, waited = (root / f"encoded-{number}" for number in numbers()), []

    def complete() -> float:
        """Seconds of an encoding from files to shards."""
        result = encode(source, codec, EncodeJob(folder=next(folders), settings={}, batch=BATCH, workers=WORKERS))
        waited.append(result.waited_s / result.seconds)
        return result.seconds

    times = interleaved(
        {"codec": lambda: seconds(lambda: [codec.encode(batch) for batch in batches]), "complete": complete}, rounds
    )
    return [
        BenchmarkRow("encoding 500x375 JPEGs to 256 px with a tiny VAE", count / median(times["complete"]), "images/s"),
        BenchmarkRow("the codec alone, images decoded beforehand", count / median(times["codec"]), "images/s"),
        BenchmarkRow("encoding / the codec alone", median_of_ratios(times["codec"], times["complete"]), "x", 0.9),
        BenchmarkRow(f"of which the codec waits for images, {WORKERS} threads", 100 * median(waited), "%", 5, "lower"),
    ]


def _images(folder: Path, count: int) -> FolderImages:
    """Smooth random images as JPEGs, which take about as long to decode as photographs."""
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / "class" / f"{i:04d}.jpg", quality=90)
    return FolderImages(str(folder), image_size=SIDE, per_unit=1024, seed=0)


def _autoencoder(folder: Path) -> Autoencoder:
    """A random autoencoder of the usual architecture, which is so small that the rest of the encoding matters."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
    ).save_pretrained(folder)  # type: ignore[attr-defined]
    return Autoencoder(str(folder), subfolder=None, device="cpu", precision="fp32")
