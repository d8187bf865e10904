"""`python -m fine_dist.encode`: images become latent shards, once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from fine_dist.cli import parse
from fine_dist.config import Config
from fine_dist.errors import ConfigError, guard


class EncodeConfig(Config):
    """Encode images into latent shards: OUT/SPLIT/latents-000000.tar ... and their manifest.json."""

    source: str = "digits"
    """`digits` (embedded), a folder with one sub-folder of images per class, or webdataset image shards (a brace
    pattern or URL of .tar files)."""
    out: str | None = None
    """Folder that gets one sub-folder of shards per split."""
    split: str | None = None
    """Name of that sub-folder, such as train or held_out; none: train (and for digits both)."""
    codec: Literal["identity", "vae"] = "identity"
    """`identity` keeps pixels, scaled to [-1, 1]; `vae` encodes with diffusers' AutoencoderKL."""
    shard_samples: int = Field(1024, ge=1)
    """Samples of a shard."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored numbers."""


def run(config: EncodeConfig) -> Path:
    """Encode what the config says and return the folder of shards."""
    from fine_dist.data.digits import SPLITS, digits
    from fine_dist.data.shards import write_shards

    if not config.out:
        raise ConfigError("out: the folder for the shards is needed, for example --out data/digits")
    if config.source != "digits":
        raise ConfigError(f"source: {config.source!r} is not known; legal: digits")
    for split in [config.split] if config.split else SPLITS:
        images, labels = digits(split)
        write_shards(
            Path(config.out) / split,
            images,
            labels,
            num_classes=10,
            shard_samples=config.shard_samples,
            dtype=config.dtype,
            source="digits",
        )
    return Path(config.out)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(EncodeConfig, argv, "python -m fine_dist.encode")
        print(run(call.config))
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
