"""Images become latent shards, once: the settings of an encoding, and what of a data set is shown and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fine_dist.core.config import Config, Seed, dump_yaml, expand_path
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.core.processes import rank_here
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig

if TYPE_CHECKING:
    from fine_dist.data.audit import Summary
    from fine_dist.data.images import Source
    from fine_dist.data.shards import Manifest
    from fine_dist.data.sharing import Job


Byte = Annotated[int, Field(ge=0, le=255)]
IDX = "idx:"
"""What the name of a folder of IDX files begins with, as a source."""


class EncodeConfig(Config):
    """Encode images into latent shards: OUT/SPLIT/latents-000000.tar and so on, and their manifest.json."""

    source: str = "digits"
    """`digits` (embedded), a folder with one sub-folder of images per class, webdataset image shards (.tar files as a
    brace pattern of paths or URLs), or `idx:FOLDER` with IDX files such as Fashion-MNIST's."""
    held_out: str | None = None
    """Source of a second split, held_out, that is encoded after the first; none: what the source itself has."""
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


def run(config: EncodeConfig) -> Path:
    """Encode what the config says, together with any other process that does; returns the folder of the splits.

    Run again, it continues, and does nothing when everything is there.
    """
    from fine_dist.data.sharing import finished

    splits = _splits(config)
    for split in splits:
        folder = out_of(config) / split
        manifest = finished(folder, config.settings(split))
        if manifest is not None:
            print(
                f"encode: {folder} is complete: {manifest.count} samples in {len(manifest.shards)} shards"
                + _left_out(manifest)
            )
            continue
        _encode(config, split, folder)
    return out_of(config)


def out_of(config: EncodeConfig) -> Path:
    if not config.out:
        raise ConfigError("out: the folder for the shards is needed, for example --out data/digits")
    return Path(expand_path(config.out))


def _splits(config: EncodeConfig) -> tuple[str, ...]:
    from fine_dist.data.digits import SPLITS

    if config.codec == "identity" and config.kind == "moments":
        raise ConfigError("kind: identity has no moments; legal with it: sample")
    if config.codec != "identity" and (config.source == "digits" or config.source.startswith(IDX)):
        raise ConfigError("codec: digits and idx files are small grey images, which no autoencoder takes; use identity")
    if config.split:
        return (config.split,)
    both = config.source == "digits" or config.source.startswith(IDX) or config.held_out
    return SPLITS if both else ("train",)


def _source(config: EncodeConfig, split: str) -> Source:
    from fine_dist.data.images import ChosenClasses

    source = _all_classes(config, split)
    return source if config.classes is None else ChosenClasses(source, config.classes)


def _all_classes(config: EncodeConfig, split: str) -> Source:
    from fine_dist.data.idx import IdxImages
    from fine_dist.data.images import DigitImages, FolderImages, TarImages

    per_unit, source = max(1, config.shard_samples // (2 if config.flips else 1)), config.source_of(split)
    if source == "digits":
        return DigitImages(split, per_unit=per_unit, limit=config.limit)
    if source.startswith(IDX):
        return IdxImages(source.removeprefix(IDX), split, per_unit=per_unit, limit=config.limit)
    if source.endswith(".tar") or source.startswith("pipe:"):
        return TarImages(
            source,
            image_size=config.image_size,
            data=DataConfig(),
            num_classes=config.num_classes,
            limit=config.limit,
            background=config.background,
        )
    return FolderImages(
        source,
        image_size=config.image_size,
        per_unit=per_unit,
        seed=config.seed,
        limit=config.limit,
        background=config.background,
    )


def _job(config: EncodeConfig, split: str, folder: Path) -> Job:
    from fine_dist.data.sharing import Job

    return Job(
        folder=folder,
        settings=config.settings(split),
        kind=config.kind,
        flips=config.flips,
        dtype=config.dtype,
        seed=config.seed,
        batch=config.batch,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
    )


def _encode(config: EncodeConfig, split: str, folder: Path) -> None:
    from fine_dist.data.codecs import Autoencoder, Codec, Identity
    from fine_dist.data.encode import encode

    source = _source(config, split)
    codec: Codec = Identity()
    if config.codec == "vae":
        codec = Autoencoder(
            expand_path(config.vae), subfolder=config.vae_subfolder, device=_device(config), precision=config.precision
        )
        codec.shape((3, config.image_size, config.image_size))
    if config.scaling_factor:
        codec.scaling_factor = config.scaling_factor
    done = encode(source, codec, _job(config, split, folder), progress=rank_here()[0] == 0)
    rate = done.images / max(done.seconds, 1e-9)
    print(
        f"encode: {folder}: {done.manifest.count} samples in {len(done.manifest.shards)} shards, "
        f"{len(done.manifest.bad)} unreadable images{_left_out(done.manifest)}; "
        f"this process: {done.images} images, {rate:.1f} images/s, "
        f"codec waiting for images {100 * done.waited_s / max(done.seconds, 1e-9):.1f}% of the time"
    )


def _left_out(manifest: Manifest) -> str:
    from fine_dist.data.images import tell_left_out

    return f", {tell_left_out(manifest.left_out, manifest.num_left_out)}" if manifest.num_left_out else ""


def _device(config: EncodeConfig) -> str:
    """`cpu`, or this process's own GPU."""
    import torch

    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but there is no GPU; use auto or cpu")
    return f"cuda:{rank_here()[1] % torch.cuda.device_count()}"


def dry_run(config: EncodeConfig) -> list[str]:
    """The resolved config, and what an encoding would make; a source that is not there (yet) is only named."""
    lines = [dump_yaml(config)]
    for split in _splits(config):
        try:
            source = _source(config, split)
        except DataError as error:
            lines.append(f"{out_of(config) / split}: {error}")
            continue
        samples = None if source.count is None else source.count * (2 if config.flips else 1)
        amount = "an unknown number of" if samples is None else f"{samples:,}"
        lines.append(f"{out_of(config) / split}: {amount} samples in {source.units:,} shards")
    return [*lines, "dry run: nothing was done"]


def show(summary: Summary) -> list[str]:
    """A summary of shards, in lines."""
    manifest, counts = summary.manifest, summary.histogram
    shape = "x".join(str(n) for n in manifest.latent_shape)
    payload = manifest.count * 2 * (2 if manifest.dtype == "float32" else 1)
    for size in manifest.stored_shape:
        payload *= size
    named = list(enumerate(manifest.class_names or map(str, range(len(counts)))))
    step = max(1, -(-len(named) // 20))
    widest = max(1, int(counts.max()))
    lines = [
        f"shards      {summary.base}: {len(manifest.shards)} tars, {summary.bytes / 1e9:.3g} GB "
        f"({payload / 1e9:.3g} GB of numbers)",
        f"samples     {manifest.count:,}" + (" (each image and its mirror image)" if manifest.flips else ""),
        f"latents     {shape} {manifest.dtype}, kind {manifest.kind}, codec {manifest.codec}",
        f"scaling     {manifest.scaling_factor:g}",
        f"mean, std   {summary.mean:.4g}, {summary.std:.4g} stored; std {summary.scaled_std:.4g} scaled",
        "by channel  " + ", ".join(f"{m:.3g} ± {s:.3g}" for m, s in zip(summary.channel_mean, summary.channel_std)),
        f"unreadable  {len(manifest.bad)} images"
        + "".join(f"\n              {b.source}: {b.error}" for b in manifest.bad[:10])
        + (f"\n            {_left_out(manifest)[1:]}" if manifest.num_left_out else ""),
        f"classes     {manifest.num_classes}; {counts.min():,} to {counts.max():,} samples each",
    ]
    for label, name in named[::step]:
        lines.append(f"  {label:5d} {name[:20]:20} {counts[label]:8,} {'▇' * round(30 * counts[label] / widest)}")
    return lines + [f"warning: {text}" for text in summary.warnings]


def verified(config: EncodeConfig, where: str) -> list[str]:
    """Check shards byte by byte (none named: those of `out`): a line for each. `DataError` lists what is wrong."""
    from fine_dist.data.audit import verify

    lines = []
    for place in [where] if where else [str(out_of(config) / split) for split in _splits(config)]:
        manifest, problems = verify(place)
        if problems:
            listed = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
            raise DataError(f"{place}: {len(problems)} problems:\n  {listed}")
        count = f"{manifest.count} samples in {len(manifest.shards)} shards"
        lines.append(f"verified: {place}: {count} are as the manifest says")
    return lines
