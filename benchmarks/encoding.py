"""Encoding against its codec alone: the same images in the same batches, decoded beforehand, and nothing written."""

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
    """Images of ImageNet's usual size through a tiny autoencoder, with 2 threads that read and crop them."""
    say("encoding")
    codec, source = _autoencoder(root / "vae"), _images(root / "images", count)
    decoded = [item.read() for item in source.items(0)]
    batches = [
        torch.from_numpy(np.stack(decoded[start : start + BATCH])).float().div_(127.5).sub_(1)
        for start in range(0, count, BATCH)
    ]
    folders, waited = (root / f"encoded-{number}" for number in numbers()), []

    def whole() -> float:
        done = encode(source, codec, EncodeJob(folder=next(folders), settings={}, batch=BATCH, workers=WORKERS))
        waited.append(done.waited_s / done.seconds)
        return done.seconds

    found = interleaved(
        {"codec": lambda: seconds(lambda: [codec.encode(batch) for batch in batches]), "whole": whole}, rounds
    )
    return [
        BenchmarkRow("encoding 500x375 JPEGs to 256 px with a tiny VAE", count / median(found["whole"]), "images/s"),
        BenchmarkRow("the codec alone, images decoded beforehand", count / median(found["codec"]), "images/s"),
        BenchmarkRow("encoding / the codec alone", median_of_ratios(found["codec"], found["whole"]), "x", 0.9),
        BenchmarkRow(f"of which the codec waits for images, {WORKERS} threads", 100 * median(waited), "%", 5, "lower"),
    ]


def _images(folder: Path, count: int) -> FolderImages:
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / "class" / f"{i:04d}.jpg", quality=90)
    return FolderImages(str(folder), image_size=SIDE, per_unit=1024, seed=0)


def _autoencoder(folder: Path) -> Autoencoder:
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
