"""The stage `encode`: encodes images as latent shards from its settings, and reports on existing shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from fine_dist.core.config import dump_yaml, expand_path
from fine_dist.core.errors import ConfigError, DataError
from fine_dist.core.processes import current_rank
from fine_dist.data.audit import Summary, verify
from fine_dist.data.codecs import Autoencoder, Codec, Identity, TokenEncoder
from fine_dist.data.encode_locks import EncodeJob, finished_manifest
from fine_dist.data.encoder import encode
from fine_dist.data.images import (
    ONE_CLASS,
    ChosenClasses,
    FolderImages,
    ImageSource,
    TarImages,
    class_folders,
    describe_left_out,
)
from fine_dist.data.manifest import MANIFEST, Manifest, check_classes
from fine_dist.data.settings import IDX, DataConfig, EncodeConfig, digits_side
from fine_dist.data.small_images import SPLITS, DigitImages, IdxImages
from fine_dist.model.arch import both

LoadEncoder = Callable[[str, str], TokenEncoder]
"""(folder, device) -> the image encoder in the folder, on the device."""


def no_encoder(folder: str, device: str) -> TokenEncoder:
    """The default loader, which refuses: only the command `encode` can load an image encoder."""
    raise ConfigError(f"repa_encoder: {folder} is loaded by the command `fine-dist encode` alone")


def run(config: EncodeConfig, load_encoder: LoadEncoder = no_encoder) -> Path:
    """Encode all splits of a config, together with the other processes that run the same call.

    The same call resumes an interrupted encoding. Nothing is done for a split that is complete.

    Returns:
        The folder of the splits.

    Raises:
        DataError: The splits have different classes, a split's folder holds latents of other settings, or too many
            images cannot be read.
    """
    splits = _splits(config)
    _check_classes(config, splits)
    for split in splits:
        folder = config.folder() / split
        manifest = finished_manifest(folder, config.settings(split))
        if manifest is not None:
            print(
                f"encode: {folder} is complete: {manifest.count} samples in {len(manifest.shards)} shards"
                + _left_out(manifest)
            )
            continue
        _encode(config, split, folder, load_encoder)
    return config.folder()


def _splits(config: EncodeConfig) -> tuple[str, ...]:
    if config.codec == "identity" and config.kind == "moments":
        raise ConfigError("kind: identity has no moments; legal with it: sample")
    if config.codec != "identity" and config.is_small_gray:
        raise ConfigError("codec: digits and idx files are small gray images, which no autoencoder takes; use identity")
    if config.held_out_fraction is not None and (config.held_out or not config.is_folder):
        why = f"held_out is {config.held_out!r}" if config.held_out else f"source is {config.source!r}"
        raise ConfigError(f"held_out_fraction: it divides a folder of class folders, and {why}; give one of the two")
    if config.split:
        return (config.split,)
    both = config.is_small_gray or config.held_out or config.held_out_fraction
    return SPLITS if both else ("train",)


def _check_classes(config: EncodeConfig, splits: tuple[str, ...]) -> None:
    """Check that every label means the same class in all splits.

    Splits that other commands have encoded are compared as well, by their manifests in `out`.

    Raises:
        DataError: The class names of two splits differ.
    """
    names = {f"{split} ({config.source_of(split)})": _class_names(config, split) for split in splits}
    for path in sorted(config.folder().glob(f"*/{MANIFEST}")):
        if path.parent.name not in splits and path.parent.name in SPLITS:
            names[f"{path.parent.name} ({path.parent})"] = Manifest.parse(path.read_bytes(), str(path)).class_names
    named = [(split, classes) for split, classes in names.items() if classes]
    for (one, first), (two, second) in pairwise(named):
        check_classes(one, first, two, second)


def _class_names(config: EncodeConfig, split: str) -> tuple[str, ...]:
    """Names of the classes of an image folder, in the order of labels; empty for other sources."""
    if not config.is_folder:
        return ()
    names = class_folders(config.source_of(split)) or ONE_CLASS
    return names if config.classes is None else tuple(names[c] for c in config.classes if c < len(names))


def _source(config: EncodeConfig, split: str) -> ImageSource:
    source = _all_classes(config, split)
    return source if config.classes is None else ChosenClasses(source, config.classes)


def _all_classes(config: EncodeConfig, split: str) -> ImageSource:
    per_unit, source = max(1, config.shard_samples // (2 if config.flips else 1)), config.source_of(split)
    if side := digits_side(source):
        return DigitImages(split, side=side, per_unit=per_unit, limit=config.limit)
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
        part=split if config.held_out_fraction is not None and split in SPLITS else None,
        fraction=config.held_out_fraction or 0.1,
    )


def _job(config: EncodeConfig, split: str, folder: Path) -> EncodeJob:
    return EncodeJob(
        folder=folder,
        settings=config.settings(split),
        kind=config.kind,
        flips=config.flips,
        dtype=config.dtype,
        seed=config.seed,
        batch=config.batch,
        workers=config.workers,
        max_bad_fraction=config.max_bad_fraction,
        normalize_channels=config.normalize_channels,
        tokens_dtype=config.repa_dtype,
        scaled_like=config.folder() / SPLITS[0] if config.normalize_channels and split != SPLITS[0] else None,
    )


def _encode(config: EncodeConfig, split: str, folder: Path, load_encoder: LoadEncoder) -> None:
    tokens = None
    if config.repa_encoder and config.stores_tokens(split):
        tokens = load_encoder(expand_path(config.repa_encoder), _device(config))
    job = replace(_job(config, split, folder), tokens=tokens)
    if job.scaled_like is not None and not (job.scaled_like / MANIFEST).exists():
        raise ConfigError(
            f"normalize_channels: split {split} is scaled by the statistics of {job.scaled_like}, which is not there; "
            f"encode the split {SPLITS[0]} first"
        )
    source = _source(config, split)
    codec: Codec = Identity()
    if config.codec == "vae":
        codec = Autoencoder(
            expand_path(config.vae), subfolder=config.vae_subfolder, device=_device(config), precision=config.precision
        )
        # Encoding one blank image reports a wrong size or autoencoder before thousands of images are read.
        codec.shape((3, *both(config.image_size)))
    if config.kind == "moments" and codec.encode(torch.zeros(1, 3, *both(config.image_size)))[1] is None:
        raise ConfigError(f"kind: {codec.name} has no moments; legal with it: sample")
    if config.scaling_factor:
        codec.scaling_factor = config.scaling_factor
    done = encode(source, codec, job, progress=current_rank()[0] == 0)
    rate = done.images / max(done.seconds, 1e-9)
    print(
        f"encode: {folder}: {done.manifest.count} samples in {len(done.manifest.shards)} shards, "
        f"{len(done.manifest.bad)} unreadable images{_left_out(done.manifest)}; "
        f"this process: {done.images} images, {rate:.1f} images/s, "
        f"data loading stalled the encoder {100 * done.waited_s / max(done.seconds, 1e-9):.1f}% of the time"
    )


def _left_out(manifest: Manifest) -> str:
    return f", {describe_left_out(manifest.left_out, manifest.num_left_out)}" if manifest.num_left_out else ""


def _device(config: EncodeConfig) -> str:
    """`cpu`, or the GPU of this process."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but there is no GPU; use auto or cpu")
    return f"cuda:{current_rank()[1] % torch.cuda.device_count()}"


def dry_run(config: EncodeConfig) -> list[str]:
    """The lines of a dry run: the resolved config, and samples and shards of each split, or why its source fails."""
    lines = [dump_yaml(config)]
    for split in _splits(config):
        try:
            source = _source(config, split)
        except DataError as error:
            lines.append(f"{config.folder() / split}: {error}")
            continue
        samples = None if source.count is None else source.count * (2 if config.flips else 1)
        amount = "an unknown number of" if samples is None else f"{samples:,}"
        lines.append(f"{config.folder() / split}: {amount} samples in {source.units:,} shards")
    return [*lines, "dry run: nothing was done"]


def summary_lines(summary: Summary) -> list[str]:
    """The lines that describe a summary of shards."""
    manifest, counts = summary.manifest, summary.histogram
    shape = "x".join(str(n) for n in manifest.latent_shape)
    payload = manifest.count * 2 * (2 if manifest.dtype == "float32" else 1)
    for size in manifest.stored_shape:
        payload *= size
    named = list(enumerate(manifest.class_names or map(str, range(len(counts)))))
    step = max(1, -(-len(named) // 20))
    widest = max(1, int(counts.max()))
    tokens = []
    if manifest.tokens:
        side = "x".join(map(str, manifest.tokens.shape))
        payload += manifest.count * math.prod(manifest.tokens.shape) * (4 if manifest.tokens.dtype == "float32" else 2)
        tokens = [f"tokens      {side} {manifest.tokens.dtype} of {manifest.tokens.encoder} for loss.repa"]
    lines = [
        f"shards      {summary.base}: {len(manifest.shards)} tars, {summary.bytes / 1e9:.3g} GB "
        f"({payload / 1e9:.3g} GB of numbers)",
        f"samples     {manifest.count:,}" + (" (each image and its mirror image)" if manifest.flips else ""),
        f"latents     {shape} {manifest.dtype}, kind {manifest.kind}, codec {manifest.codec}",
        *tokens,
        "scaling     "
        + ("each channel by its own statistics" if manifest.channel_scale else f"{manifest.scaling_factor:g}")
        + (f", shift {manifest.shift_factor:g}" if manifest.shift_factor else ""),
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


def verify_splits(config: EncodeConfig, where: str) -> list[str]:
    """Verify every byte of shards; returns one line for each set.

    Args:
        config: Gives the folders of the splits.
        where: Folder of the shards; empty: all splits in `out`.

    Raises:
        DataError: A set has problems; the message lists the first of them.
    """
    lines = []
    for folder in [where] if where else [str(config.folder() / split) for split in _splits(config)]:
        manifest, problems = verify(folder)
        if problems:
            listed = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
            raise DataError(f"{folder}: {len(problems)} problems:\n  {listed}")
        count = f"{manifest.count} samples in {len(manifest.shards)} shards"
        lines.append(f"verified: {folder}: {count} are as the manifest says")
    return lines
