"""Settings of the latent stream and of encoding. Read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fine_dist.core.config import Config, Seed, expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.core.settings import LaunchConfig


class DataConfig(Config):
    """Where latents are read from, and how (see `fine_dist.data.stream`)."""

    shards: str | None = None
    """Folder, URL or brace pattern of webdataset latent shards with their manifest.json."""
    held_out: str | None = None
    """Shards that are never trained on; the held-out loss is measured on them."""
    held_out_samples: int = Field(2048, ge=1)
    """Samples of them, at most, that are measured each time while a model trains, at one to four timesteps each."""
    streams: int = Field(64, ge=1)
    """Canonical streams C: the order of samples depends on it, never on the number of processes."""
    window: int = Field(1024, ge=1)
    """Shuffle window of one stream, in samples (rounded up to whole shards)."""
    workers: int = Field(0, ge=0)
    """Reader threads of each training process, which read ahead; 0 reads when a batch is asked for."""
    max_bad_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of damaged samples that is skipped before it becomes an error."""
    verify: Literal["size", "sha256", "none"] = "size"
    """What is checked when a shard is opened: its size, its sha256 as well, or nothing."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept; none by default."""
    cache_bytes: int = Field(50 * 2**30, ge=0)
    """Size cap of the cache, in bytes."""
    retries: int = Field(5, ge=0)
    """Attempts after the first to open or read a remote shard."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which a remote read is tried again."""


Byte = Annotated[int, Field(ge=0, le=255)]
IDX = "idx:"
"""What the name of a folder of IDX files begins with, as a source."""


class EncodeConfig(Config):
    """Encode images into latent shards: OUT/SPLIT/latents-000000.tar and so on, and their manifest.json."""

    source: str = "digits"
    """`digits` (embedded), a folder with one sub-folder of images per class, webdataset image shards (.tar files as a
    brace pattern of paths or URLs), or `idx:FOLDER` with IDX files such as Fashion-MNIST's."""
    held_out: str | None = None
    """ImageSource of a second split, held_out, that is encoded after the first; none: what the source itself has."""
    classes: tuple[int, ...] | None = Field(None, min_length=1)
    """Classes that are kept, by their labels: the first named becomes label 0; none: all."""
    out: str | None = None
    """Folder that gets one sub-folder of shards per split."""
    split: str | None = None
    """Name of that sub-folder, such as train or held_out; none: train (for digits and idx: both)."""
    codec: Literal["identity", "vae"] = "identity"
    """`identity` keeps pixels, scaled to [-1, 1]; `vae` encodes with diffusers' AutoencoderKL."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """Hub name or local folder of the autoencoder (safetensors weights)."""
    vae_subfolder: str | None = None
    """Sub-folder that holds it, such as vae in a whole pipeline's repository."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue, 0 to 255, of what transparent images are laid over."""
    kind: Literal["sample", "moments"] = "sample"
    """Store one sample of each latent, or its mean and standard deviation, sampled anew at every reading."""
    image_size: int = Field(256, ge=1)
    """Side of the square that is cut from each image."""
    flips: bool = False
    """Encode every image's mirror image too, as a further sample."""
    scaling_factor: float | None = Field(None, gt=0)
    """What the stream multiplies latents by; none: what the autoencoder says (identity: 1)."""
    num_classes: int | None = Field(None, ge=1)
    """Classes of webdataset image shards; none: up to the largest label."""
    shard_samples: int = Field(1024, ge=1)
    """Samples of a shard (webdataset image shards become one each, whatever their size)."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored numbers."""
    batch: int = Field(32, ge=1)
    """Images that go through the codec together."""
    workers: int = Field(4, ge=1)
    """Threads that read, decode and crop images ahead of the codec."""
    seed: Seed = 0
    """Shuffles the images over shards, and seeds the noise of sampled latents."""
    limit: int | None = Field(None, ge=1)
    """At most about so many images; none: all."""
    max_bad_fraction: float = Field(0.001, ge=0, lt=1)
    """Fraction of images that may be unreadable; they are listed in the manifest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the autoencoder runs; `auto` takes a GPU when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the autoencoder."""
    launch: LaunchConfig = LaunchConfig()
    """What a job needs; its processes share the work by shard."""

    @property
    def run_dir(self) -> str | None:
        """Where a job keeps its files."""
        return self.out

    def folder(self) -> Path:
        """`out` as a path. Raises `ConfigError` when it is not given."""
        if not self.out:
            raise ConfigError("out: the folder for the shards is needed, for example --out data/digits")
        return Path(expand_path(self.out))

    def settings(self, split: str) -> dict[str, Any]:
        """What decides the content of the shards."""
        keys = (
            "source codec vae vae_subfolder kind image_size flips scaling_factor num_classes shard_samples dtype seed"
        )
        made = {key: getattr(self, key) for key in [*keys.split(), "limit", "precision", "batch"]}
        if self.codec == "identity":
            made = {key: value for key, value in made.items() if key not in ("vae", "vae_subfolder", "precision")}
        if self.source != "digits":
            made["background"] = self.background
        if self.classes is not None:
            made["classes"] = list(self.classes)
        return {**made, "source": self.source_of(split), "split": split}

    def source_of(self, split: str) -> str:
        """What a split is made of."""
        return self.held_out if self.held_out and split == "held_out" else self.source
