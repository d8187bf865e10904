"""Latent shards on disk: plain webdataset tars and the `manifest.json` beside them.

A shard holds `KEY.cls` (the label, decimal text) and `KEY.latent.npy` (float16 or float32, unscaled) per sample and
can be read by any webdataset user. The manifest says how many samples each shard has, its size and sha256, and what
the latents are; training reads the manifest first and the shards through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fine_dist.core.config import shown
from fine_dist.core.errors import DataError
from fine_dist.core.files import write_atomic
from fine_dist.core.temp_files import open_temp_file
from fine_dist.data.records import (
    BLOCK,
    LABEL,
    LABEL_DIGITS,
    LATENT,
    TOKENS,
    Layout,
    layout_of,
    npy_bytes,
    record_key,
    shard_prefix,
    tar_writer,
)

MANIFEST = "manifest.json"
SHARD_NAME = "latents-{:06d}.tar"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Side = Annotated[int, Field(ge=1, le=2**16)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Channels: TypeAlias = float | tuple[float, ...]
"""A number for all channels, or one for each."""
MAX_NUMBERS = 2**26
"""Maximum number of values of one latent: 4 x 4096 x 4096."""
_SMALLEST = 4 * BLOCK
"""Minimum bytes of a sample in a tar: two headers and a block of content for each."""


_MANY = 10**6
"""Samples of one shard beyond which its count is compared with its size, before an order of so many is made."""


class ShardInfo(_Model):
    """One tar file."""

    name: str
    """File name, beside the manifest."""
    count: int = Field(ge=0, le=10**9)
    """Samples in it."""
    bytes: int = Field(ge=0, le=2**50)
    """Size of the file."""
    sha256: str
    """Of the file."""
    key_prefix: str | None = Field(None, pattern=r"^[!-~]{7,9}$")
    """Prefix of its keys when all its records have one size. None: the shard was written by another program."""


class TokenInfo(_Model):
    """An image encoder's tokens that lie beside the latents, for `loss.repa`."""

    encoder: str
    """Name of the encoder."""
    sha256: str
    """Of its weights."""
    shape: tuple[Side, Side, Side]
    """Width E of a token, rows and columns of tokens."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored numbers."""


class BadInput(_Model):
    """An image that could not be encoded and is therefore not in the shards."""

    source: str
    error: str


class Manifest(_Model):
    """The content of a set of shards, as manifest.json."""

    format: Literal["fine_dist/latents/1"] = "fine_dist/latents/1"
    count: int = Field(ge=0)
    """Samples in all shards."""
    latent_shape: tuple[Side, Side, Side]
    """Channels, height, width of a latent; stored `moments` have twice the channels."""
    kind: Literal["sample", "moments"] = "sample"
    """`sample`: the latent itself; `moments`: its mean, then its standard deviation."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored numbers."""
    scaling_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor of the stream: it gives `(stored - shift_factor) * scaling_factor`; shards hold the codec's own output."""
    shift_factor: float = Field(0.0, allow_inf_nan=False)
    """Shift of the stream, before the factor."""
    channel_scale: tuple[PositiveFloat, ...] = ()
    """Factor of each channel, in place of the one factor; with it goes `channel_shift`."""
    channel_shift: tuple[FiniteFloat, ...] = ()
    """Shift of each channel, in place of the one shift."""
    channel_mean: tuple[float, ...] = ()
    """Mean of each channel of the stored latents, where it was measured while encoding."""
    channel_std: tuple[float, ...] = ()
    """Standard deviation of each channel of the stored latents (of the mean, for moments)."""
    tokens: TokenInfo | None = None
    """Tokens of an image encoder beside the latents; None: there are none."""
    num_classes: int = Field(ge=1, le=10**7)
    """Labels are 0 .. num_classes - 1."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of labels, where known."""
    flips: bool = False
    """Whether every image was encoded twice: itself, then its mirror image."""
    codec: str = "identity"
    """What made the latents: `identity`, or the autoencoder's name."""
    source: str = ""
    """What was encoded."""
    made_by: dict[str, Any] = {}
    """The settings of the encoding that made it."""
    shards: tuple[ShardInfo, ...]
    bad: tuple[BadInput, ...] = ()
    left_out: tuple[str, ...] = ()
    """Names of files in the source that are no images; the first of them."""
    num_left_out: int = Field(0, ge=0)
    """How many there are."""

    @property
    def scale(self) -> Channels:
        """What the stream multiplies latents by."""
        return self.channel_scale or self.scaling_factor

    @property
    def shift(self) -> Channels:
        """What the stream subtracts before."""
        return self.channel_shift or self.shift_factor

    @property
    def stored_scaling(self) -> tuple[Channels, Channels]:
        """Scale and shift of the stored numbers. Where channels have their own, the deviations of moments are scaled
        like the means, and not shifted."""
        if self.kind == "moments" and self.channel_scale:
            return 2 * self.channel_scale, (*self.channel_shift, *(0.0 for _ in self.channel_shift))
        return self.scale, self.shift

    @property
    def layout(self) -> Layout:
        """The bytes of a record in shards that this package wrote."""
        tokens = (self.tokens.shape, self.tokens.dtype) if self.tokens else None
        return layout_of(self.stored_shape, self.dtype, tokens)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of the array in a shard."""
        channels, height, width = self.latent_shape
        return (channels * (2 if self.kind == "moments" else 1), height, width)

    @property
    def hash(self) -> str:
        """sha256 of the content; a run is resumed only with the same."""
        parts = [
            self.latent_shape,
            self.kind,
            self.dtype,
            self.scaling_factor,
            self.num_classes,
            # Content, not names or folders: the same shards moved elsewhere still continue the same run.
            [(s.count, s.sha256) for s in self.shards],
        ]
        # Left out where it is 0, so that a manifest without the key has the same hash.
        if self.shift_factor:
            parts.append(self.shift_factor)
        if self.channel_scale:
            parts += list(self.channel_scale + self.channel_shift)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write `folder/manifest.json` atomically."""
        return write_atomic(Path(folder) / MANIFEST, self.model_dump_json(indent=1))

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Manifest:
        """A manifest from its JSON. `DataError` names what is wrong."""
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            at = f"{place}: " if place else ""
            message = first["msg"][0].lower() + first["msg"][1:]
            raise DataError(
                f"{where}: not a manifest of latent shards: {at}{message} (got {shown(first['input'])}); encode again, "
                "or write one with `fine-dist encode --index FOLDER`"
            ) from None
        if math.prod(manifest.stored_shape) > MAX_NUMBERS:
            shape = "x".join(map(str, manifest.stored_shape))
            raise DataError(f"{where}: latent_shape: {shape} numbers a sample; at most {MAX_NUMBERS:,} are read")
        total = sum(shard.count for shard in manifest.shards)
        if total != manifest.count:
            raise DataError(f"{where}: count is {manifest.count}, but its shards add up to {total}")
        for shard in manifest.shards:
            if shard.count > _MANY and shard.count * _SMALLEST > shard.bytes:
                raise DataError(f"{where}: {shard.name}: {shard.count} samples cannot be in {shard.bytes} bytes")
            # A name with a slash could lead to any file of the machine.
            if os.path.basename(shard.name) != shard.name or shard.name in ("", ".", ".."):
                raise DataError(f"{where}: shard name {shard.name!r} is not a plain file name")
        if manifest.tokens and math.prod(manifest.tokens.shape) > MAX_NUMBERS:
            raise DataError(f"{where}: tokens.shape: more than {MAX_NUMBERS:,} numbers a sample")
        lengths = {len(manifest.channel_scale), len(manifest.channel_shift)}
        if len(lengths) > 1 or not lengths <= {0, manifest.latent_shape[0]}:
            raise DataError(
                f"{where}: channel_scale and channel_shift have {len(manifest.channel_scale)} and "
                f"{len(manifest.channel_shift)} numbers, and latents {manifest.latent_shape[0]} channels"
            )
        if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
            raise DataError(f"{where}: a shard is listed twice")
        return manifest


def check_classes(one: str, first: tuple[str, ...], two: str, second: tuple[str, ...]) -> None:
    """Refuse two sets of latents in which one label stands for different classes.

    Args:
        one: Name of the first set for the message.
        first: Its class names in the order of labels. Sets without names are not compared.
        two: Name of the second set.
        second: Its class names.

    Raises:
        DataError: The names differ.
    """
    if not first or not second or first == second:
        return
    label = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    what = " and ".join(
        f"{names[label]!r} in {where}" if label < len(names) else f"no class of {where}"
        for where, names in ((one, first), (two, second))
    )
    raise DataError(
        f"label {label} is {what} ({len(first)} and {len(second)} classes); labels are ranks of class folders in "
        "sorted order: give both the same class folders (an empty one keeps its label)"
    )


class ShardWriter:
    """Writes one shard, which gets its final name only when it is complete.

        with ShardWriter(folder, number=3, shape=(4, 32, 32)) as shard:
            shard.add(latent, label)          # [C, H, W] array, int
        shard.info                            # ShardInfo, once closed

    When the `with` block raises, the unfinished file is removed.

    Raises:
        DataError: A latent has another shape, or is not finite in the stored dtype.
    """

    def __init__(
        self,
        folder: str | Path,
        number: int,
        shape: tuple[int, ...],
        dtype: str = "float16",
        tokens: tuple[tuple[int, ...], str] | None = None,
    ) -> None:
        self.path = Path(folder) / SHARD_NAME.format(number)
        self.prefix = shard_prefix(number)
        self.layout = layout_of(tuple(shape), dtype, tokens)
        self.count = 0
        self.info: ShardInfo | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = open_temp_file(self.path)
        self._part = Path(draft.name)
        self._stream = _Hashing(draft)
        self._tar = tar_writer(self._stream)

    def add(self, latent: np.ndarray, label: int, tokens: np.ndarray | None = None) -> str:
        """Append a sample and return its key.

        Args:
            latent: [C, H, W].
            label: Its class.
            tokens: [E, h, w] of the image, in a shard that holds them.
        """
        key = record_key(self.prefix, self.count)
        if tuple(latent.shape) != self.layout.shape:
            raise DataError(f"{self.path}: {key}: latent of shape {tuple(latent.shape)}, not {self.layout.shape}")
        if not 0 <= label < 10**LABEL_DIGITS:
            raise DataError(f"{self.path}: {key}: label {label} is not in 0 .. {10**LABEL_DIGITS - 1}")
        entries = {LATENT: self._stored(key, "latent", latent, self.layout.dtype)}
        if self.layout.tokens is not None:
            if tokens is None or tuple(tokens.shape) != self.layout.tokens.shape:
                found = None if tokens is None else tuple(tokens.shape)
                raise DataError(f"{self.path}: {key}: tokens of shape {found}, not {self.layout.tokens.shape}")
            entries[TOKENS] = self._stored(key, "image's tokens", tokens, self.layout.tokens.dtype)
        self._tar.write({"__key__": key, LABEL: str(int(label)).encode(), **entries})
        self.count += 1
        return key

    def _stored(self, key: str, what: str, numbers: np.ndarray, dtype: np.dtype) -> bytes:
        """Numbers as the bytes of their entry. `DataError` when they are not finite in the stored dtype."""
        # A float16 overflow gives Inf, which the next line names with its key; NumPy's warning would not.
        with np.errstate(over="ignore"):
            stored = np.asarray(numbers).astype(dtype)
        if not np.isfinite(stored).all():
            plural = "have" if what.endswith("tokens") else "has"
            raise DataError(f"{self.path}: {key}: the {what} {plural} NaN or Inf as {dtype}")
        return npy_bytes(stored)

    def close(self) -> ShardInfo:
        """Finish the file and rename it to its final name."""
        self._tar.close()
        self._stream.flush()
        # Before the rename: once the shard has its name, its marks say that it is done.
        os.fsync(self._stream.fileno())
        os.replace(self._part, self.path)
        self._stream.close()
        self.info = ShardInfo(
            name=self.path.name,
            count=self.count,
            bytes=self._stream.size,
            sha256=self._stream.sha256.hexdigest(),
            key_prefix=self.prefix,
        )
        return self.info

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk, perhaps; there is nothing left to lose
            self._tar.close()
            self._stream.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class _Hashing(io.BufferedWriter):
    """A file that is written sequentially and keeps count of its size and sha256."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file, 1 << 20)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        # Hashed while it is written: reading 100 GB again for their
        # hashes would take as long as encoding on some disks.
        self.sha256.update(data)
        self.size += len(data)
        return super().write(data)


def write_shards(
    folder: str | Path,
    latents: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    shard_samples: int = 1024,
    dtype: str = "float16",
    **fields: Any,
) -> Manifest:
    """Write arrays as shards with their manifest, for small data sets and tests; use `encode` for large ones.

    Args:
        folder: Folder of the shards.
        latents: [N, C, H, W], unscaled.
        labels: Integers [N].
        num_classes: Number of classes.
        shard_samples: Samples of a shard.
        dtype: Data type of the stored numbers.
        fields: Further fields of the manifest (`scaling_factor`, `codec`, `class_names`, ...).
    """
    shape = tuple(latents.shape[1:])
    infos = []
    for number, start in enumerate(range(0, len(latents), shard_samples)):
        with ShardWriter(folder, number, shape, dtype) as writer:
            for latent, label in zip(latents[start : start + shard_samples], labels[start : start + shard_samples]):
                writer.add(latent, int(label))
        if writer.info is not None:
            infos.append(writer.info)
    channels = shape[0] // (2 if fields.get("kind") == "moments" else 1)
    manifest = Manifest(
        count=len(latents),
        latent_shape=(channels, *shape[1:]),
        dtype=dtype,
        num_classes=num_classes,
        shards=tuple(infos),
        **fields,
    )
    manifest.save(folder)
    return manifest
