"""Settings of the latent stream and of encoding. Read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fine_dist.core.config import Config, PathKey, Seed, expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.core.settings import LaunchConfig
from fine_dist.model.arch import SidesKey


class DataConfig(Config):
    """Source and streaming of the latents that a model is trained and measured on."""

    shards: PathKey | None = None
    """Training latents: a folder, a URL or a brace pattern of webdataset shards that have a manifest.json."""
    held_out: PathKey | None = None
    """Latents for the held-out loss, which are never trained on. Their classes must be those of `shards`."""
    held_out_samples: int = Field(2048, ge=1, le=1_000_000_000)
    """Maximum number of held-out samples per measurement during training. Each is measured at one to four timesteps."""
    streams: int = Field(64, ge=1, le=2**16)
    """Number of canonical streams into which an epoch is divided. The order of samples depends on it, and never on the
    number of processes; change it only for more processes than streams."""
    window: int = Field(1024, ge=1, le=2**30)
    """Shuffle window of a stream, in samples, rounded up to whole shards. A larger window shuffles better and keeps
    more shards open."""
    workers: int = Field(0, ge=0, le=1024)
    """Reader threads of each training process. With 0, the training loop reads each batch itself; use 2 or more for
    slow or remote storage."""
    max_bad_fraction: float = Field(0.0, ge=0.0, lt=1.0)
    """Fraction of damaged samples that is skipped before training stops with an error."""
    verify: Literal["size", "sha256", "none"] = "size"
    """Check of a shard when it is opened: its size, its size and sha256, or none."""
    cache_dir: str | None = None
    """Local folder for copies of remote shards, shared by all processes of a node. Default: none; a remote shard is
    copied to an unnamed temporary file each time it is opened."""
    cache_bytes: int = Field(50 * 2**30, ge=0)
    """Size limit of the cache in bytes. The least recently used shards are removed first."""
    retries: int = Field(5, ge=0, le=1000)
    """Number of retries when a remote shard cannot be opened or read."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a received byte after which a remote read is retried."""


Byte = Annotated[int, Field(ge=0, le=255)]
IDX = "idx:"
"""Prefix of a source that is a folder of IDX files."""
DIGITS = "digits"
DIGIT_SIDE = 8
"""Side of scikit-learn's digits, in pixels."""


def digits_side(source: str) -> int | None:
    """Side of the digits that a source `digits` or `digits:SIDE` stands for, in pixels; None for any other source.

    Raises:
        ConfigError: SIDE is not a number from 8 to 256.
    """
    name, _, side = source.partition(":")
    if name != DIGITS:
        return None
    if not side:
        return DIGIT_SIDE
    if not side.isdecimal() or not DIGIT_SIDE <= int(side) <= 256:
        raise ConfigError(f"source: {source!r}: SIDE is a number of pixels from {DIGIT_SIDE} to 256, such as digits:28")
    return int(side)


class EncodeConfig(Config):
    """Encode images into latent shards: OUT/SPLIT/latents-000000.tar and so on, with their manifest.json."""

    source: PathKey = "digits"
    """Images to encode: `digits` (scikit-learn's, embedded, 8x8) or `digits:SIDE` (enlarged to SIDE pixels by bicubic
    interpolation, such as digits:28), a folder with one sub-folder of images per class, webdataset image shards (.tar
    files as a brace pattern of paths or URLs), or `idx:FOLDER` with IDX files such as Fashion-MNIST's."""
    held_out: PathKey | None = None
    """Source of a second split named held_out, encoded after the first. Its class folders must have the names of the
    first source's. Default: the held-out split of the source, if it has one."""
    held_out_fraction: float | None = Field(None, gt=0, le=0.5)
    """Fraction of each class's images that becomes the split held_out when `source` is a folder: every n-th image, at
    least one of each class with two or more. Default: no image is set aside."""
    classes: tuple[int, ...] | None = Field(None, min_length=1)
    """Labels of the classes to keep; the first named becomes label 0. Default: all classes."""
    out: PathKey | None = None
    """Output folder, with one sub-folder of shards per split."""
    split: str | None = None
    """Name of that sub-folder, such as train or held_out. Default: train, and held_out where the source has one."""
    codec: Literal["identity", "vae"] = "identity"
    """`identity` keeps pixels, scaled to [-1, 1]; `vae` encodes with an autoencoder of diffusers."""
    vae: PathKey = "stabilityai/sd-vae-ft-ema"
    """Hub name or local folder of the autoencoder, with safetensors weights. Any class of diffusers that encodes single
    images serves, such as AutoencoderKL and AutoencoderDC; its scale and shift are kept in the manifest."""
    vae_subfolder: str | None = None
    """Sub-folder of the autoencoder in a pipeline's repository, usually vae. Default: the repository's root."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue, 0 to 255, onto which transparent images are composited."""
    kind: Literal["sample", "moments"] = "sample"
    """Stored form of a latent: one `sample`, or the `moments` (mean and standard deviation), from which every reading
    draws a new sample. Moments take twice the space."""
    image_size: SidesKey = 256
    """Side of the square that is cropped from the center of each image, in pixels, or the height and width of a
    rectangle."""
    flips: bool = False
    """Also encode the mirror image of every image, as a further sample."""
    repa_encoder: PathKey | None = None
    """Local transformers folder of a DINOv2 encoder. Its patch tokens of every image are stored with the latent, for
    `loss.repa`, in all splits except held_out. Default: no tokens."""
    repa_dtype: Literal["float16", "float32"] = "float16"
    """Data type of those tokens. A DINOv2-B/14's take 384 KiB an image in float16, an SD latent of 256 pixels 8 KiB."""
    scaling_factor: float | None = Field(None, gt=0)
    """Factor by which the stream multiplies latents. Default: the autoencoder's own (identity: 1)."""
    normalize_channels: bool = False
    """Let the stream subtract each channel's mean and divide by its standard deviation, as measured over the split
    train, in place of the autoencoder's factor and shift (as LightningDiT does, arXiv 2501.01423)."""
    num_classes: int | None = Field(None, ge=1)
    """Number of classes of webdataset image shards. Default: the largest label plus one."""
    shard_samples: int = Field(1024, ge=1, le=10**9)
    """Number of samples in a shard. Each webdataset image shard becomes one latent shard, whatever its size."""
    dtype: Literal["float16", "float32"] = "float16"
    """Data type of the stored numbers; float16 halves the shards and is exact enough for latents."""
    batch: int = Field(32, ge=1, le=2**16)
    """Number of images that the codec encodes at once. It changes only speed and memory."""
    workers: int = Field(4, ge=1, le=1024)
    """Threads that read, decode and crop images ahead of the codec."""
    seed: Seed = 0
    """Seed of the order of images over shards and of the noise of sampled latents."""
    limit: int | None = Field(None, ge=1)
    """Maximum number of images to encode. Default: all."""
    max_bad_fraction: float = Field(0.001, ge=0, lt=1)
    """Fraction of unreadable images beyond which encoding fails; those within it are listed in the manifest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the autoencoder; `auto` takes a GPU when there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the autoencoder; bf16 is faster on a GPU and changes latents by about one part in 200."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job, whose processes divide the shards among themselves."""

    @property
    def run_dir(self) -> str | None:
        """Run directory of the job: the output folder."""
        return self.out

    def folder(self) -> Path:
        """`out` as a path. `ConfigError` when it is not given."""
        if not self.out:
            raise ConfigError("out: the folder for the shards is needed, for example --out data/digits")
        return Path(expand_path(self.out))

    @property
    def is_small_gray(self) -> bool:
        """Whether the source is one of small gray images with both splits: the digits, or IDX files."""
        return digits_side(self.source) is not None or self.source.startswith(IDX)

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder of class folders."""
        return not self.is_small_gray and not self.source.startswith("pipe:") and not self.source.endswith(".tar")

    def settings(self, split: str) -> dict[str, Any]:
        """The settings that determine the content of a split's shards."""
        keys = (
            "source codec vae vae_subfolder kind image_size flips scaling_factor num_classes shard_samples dtype seed"
        )
        values = {key: getattr(self, key) for key in [*keys.split(), "limit", "precision", "batch"]}
        if self.codec == "identity":
            values = {key: value for key, value in values.items() if key not in ("vae", "vae_subfolder", "precision")}
        if not digits_side(self.source):
            values["background"] = self.background
        if self.classes is not None:
            values["classes"] = list(self.classes)
        if self.held_out_fraction is not None:
            values["held_out_fraction"] = self.held_out_fraction
        if self.normalize_channels:
            values["normalize_channels"] = True
        if self.stores_tokens(split):
            values |= {"repa_encoder": self.repa_encoder, "repa_dtype": self.repa_dtype}
        return {**values, "source": self.source_of(split), "split": split}

    def stores_tokens(self, split: str) -> bool:
        """Whether an image encoder's tokens are stored in a split; held-out latents are measured without them."""
        return self.repa_encoder is not None and split != "held_out"

    def source_of(self, split: str) -> str:
        """The source of a split's images."""
        return self.held_out if self.held_out and split == "held_out" else self.source
