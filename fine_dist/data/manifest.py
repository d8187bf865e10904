"""The manifest of a set of latent shards: what the latents are, and the count, size and sha256 of every shard.

Training reads `manifest.json` first and the shards through it. `shards.py` describes and writes the shards themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fine_dist.core.config import short_repr
from fine_dist.core.errors import DataError
from fine_dist.core.files import write_atomic
from fine_dist.data.records import BLOCK, Layout, layout_of

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
"""Number of samples of a shard above which its count is checked against its size, before an order is allocated."""


class ShardInfo(_Model):
    """The manifest's entry of one shard, a tar file."""

    name: str
    """File name, beside the manifest."""
    count: int = Field(ge=0, le=10**9)
    """Number of samples."""
    bytes: int = Field(ge=0, le=2**50)
    """Size of the file."""
    sha256: str
    """sha256 of the file."""
    key_prefix: str | None = Field(None, pattern=r"^[!-~]{7,9}$")
    """Prefix of the keys, for a shard whose records all have the same size. None: another program wrote the shard."""


class TokenInfo(_Model):
    """The image encoder's tokens that are stored with the latents, for `loss.repa`."""

    encoder: str
    """Name of the encoder."""
    sha256: str
    """sha256 of the encoder's weights."""
    shape: tuple[Side, Side, Side]
    """(E, h, w): the width of a token, rows and columns of tokens."""
    dtype: Literal["float16", "float32"] = "float16"
    """Data type of the stored tokens."""


class BadInput(_Model):
    """An image that could not be encoded and is therefore not in the shards."""

    source: str
    error: str


class Manifest(_Model):
    """The content of a set of shards, as manifest.json."""

    format: Literal["fine_dist/latents/1"] = "fine_dist/latents/1"
    count: int = Field(ge=0)
    """Total number of samples in all shards."""
    latent_shape: tuple[Side, Side, Side]
    """(C, H, W) of a latent; stored `moments` have 2C channels."""
    kind: Literal["sample", "moments"] = "sample"
    """`sample`: the latent itself; `moments`: its mean, then its standard deviation."""
    dtype: Literal["float16", "float32"] = "float16"
    """Data type of the stored latents."""
    scaling_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Factor that the stream applies: `(stored - shift_factor) * scaling_factor`. Shards hold the codec's raw
    output."""
    shift_factor: float = Field(0.0, allow_inf_nan=False)
    """Shift that the stream subtracts before it multiplies by the factor."""
    channel_scale: tuple[PositiveFloat, ...] = ()
    """Factor of each channel, which replaces `scaling_factor`; requires `channel_shift`."""
    channel_shift: tuple[FiniteFloat, ...] = ()
    """Shift of each channel, which replaces `shift_factor`."""
    channel_mean: tuple[float, ...] = ()
    """Mean of each channel of the stored latents, if it was measured while encoding."""
    channel_std: tuple[float, ...] = ()
    """Standard deviation of each channel of the stored latents (of the mean, for moments)."""
    tokens: TokenInfo | None = None
    """The image encoder's tokens that are stored with the latents. None: the shards hold none."""
    num_classes: int = Field(ge=1, le=10**7)
    """Labels are 0 .. num_classes - 1."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of labels, if known."""
    flips: bool = False
    """Whether every image was encoded twice: the image, then its mirror image."""
    codec: str = "identity"
    """Codec that made the latents: `identity`, or the autoencoder's name."""
    source: str = ""
    """Path or name of the images that were encoded."""
    made_by: dict[str, Any] = {}
    """Settings of the encoding."""
    shards: tuple[ShardInfo, ...]
    bad: tuple[BadInput, ...] = ()
    left_out: tuple[str, ...] = ()
    """Names of the first files in the source that are no images."""
    num_left_out: int = Field(0, ge=0)
    """Number of such files."""

    @property
    def scale(self) -> Channels:
        """Factor that the stream multiplies latents by, for all channels or one for each."""
        return self.channel_scale or self.scaling_factor

    @property
    def shift(self) -> Channels:
        """Shift that the stream subtracts before, for all channels or one for each."""
        return self.channel_shift or self.shift_factor

    @property
    def stored_scaling(self) -> tuple[Channels, Channels]:
        """Scale and shift of the stored array. For moments with channel-wise scaling, standard deviations are scaled
        like the means and not shifted."""
        if self.kind == "moments" and self.channel_scale:
            return 2 * self.channel_scale, (*self.channel_shift, *(0.0 for _ in self.channel_shift))
        return self.scale, self.shift

    @property
    def layout(self) -> Layout:
        """Byte layout of a record in shards that this package wrote."""
        tokens = (self.tokens.shape, self.tokens.dtype) if self.tokens else None
        return layout_of(self.stored_shape, self.dtype, tokens)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of a stored array: (C, H, W), or (2C, H, W) for moments."""
        channels, height, width = self.latent_shape
        return (channels * (2 if self.kind == "moments" else 1), height, width)

    @property
    def hash(self) -> str:
        """sha256 of the content, part of a run's identity: a run resumes only with the same data."""
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
        """Parse a manifest.

        Args:
            text: JSON text.
            where: Path or URL of the file, for messages.

        Raises:
            DataError: The manifest is invalid; the message names the key and the value.
        """
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            at = f"{key}: " if key else ""
            message = first["msg"][0].lower() + first["msg"][1:]
            raise DataError(
                f"{where}: not a manifest of latent shards: {at}{message} (got {short_repr(first['input'])}); encode "
                "again, or write one with `fine-dist encode --index FOLDER`"
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
