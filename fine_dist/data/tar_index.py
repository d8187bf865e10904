"""Indexes the samples of a tar by reading its headers: for shards of other programs, and for verification.

Nothing is extracted or unpickled. A latent is accepted only with the exact dtype and shape that the manifest states.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from fine_dist.core.config import short_repr
from fine_dist.data.records import BLOCK, LABEL, LABEL_DIGITS, LATENT

PICKLES = ("pth", "pt", "pkl", "pickle", "pyd", "pyobj", "joblib")
"""Extensions that some readers unpickle; a sample with such an entry is refused."""
_MAX_HEADER = 1 << 12
"""Maximum bytes of a `.npy` header or a label."""


class TarError(Exception):
    """The tar itself is damaged."""


class TarEntry(NamedTuple):
    """A file in a tar: its name, and the offset and size of its content."""

    name: str
    offset: int
    size: int


@dataclass
class ShardIndex:
    """The N samples of a tar in file order.

    Attributes:
        offsets: int64 [N], offset of each latent's values, after the `.npy` header.
        labels: int64 [N].
        keys: webdataset's `__key__` of each sample.
        faults: The error of each damaged sample, by number. Its offset and label are undefined.
    """

    offsets: np.ndarray
    labels: np.ndarray
    keys: list[str]
    faults: dict[int, str] = field(default_factory=dict)


def walk(stream: BinaryIO, size: int) -> Iterator[TarEntry]:
    """Iterate over the files in a tar (ustar, pax or GNU format) of `size` bytes.

    Raises:
        TarError: The tar is damaged or truncated.
    """
    at = 0
    override: dict[str, str] = {}
    while at + BLOCK <= size:
        stream.seek(at)
        header = stream.read(BLOCK)
        # A block of zeros ends an archive; everything after it is padding.
        if header.count(0) == BLOCK:
            return
        if len(header) < BLOCK or not _checksum_is_right(header):
            raise TarError(f"no tar header at byte {at}: truncated or damaged")
        # A pax header overrides fields of the entry that follows, such as sizes above 8 GiB.
        length = int(override.pop("size", 0)) or _number(header[124:136])
        if length < 0:
            raise TarError(f"the size of the entry at byte {at} is damaged")
        name = _text(header[:100])
        if header[257:262] == b"ustar" and header[345]:
            name = f"{_text(header[345:500])}/{name}"
        begin, kind = at + BLOCK, header[156:157]
        at = begin + -(-length // BLOCK) * BLOCK
        if begin + length > size:
            raise TarError(f"truncated: {name} ends at byte {begin + length}, the file at {size}")
        # GNU format: the content of an entry of type L is the name of the next entry, longer than 100 bytes.
        if kind == b"L":
            override["path"] = stream.read(length).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            override.update(_pax(stream.read(length)))
        elif kind in (b"0", b"\0"):
            yield TarEntry(override.pop("path", name), begin, length)
            override = {}
        elif kind != b"g":
            override = {}
    if size:
        raise TarError(f"truncated: no end of archive within {size} bytes")


def index_tar(
    stream: BinaryIO, size: int, shape: tuple[int, ...] | None, dtype: str | None, num_classes: int | None
) -> ShardIndex:
    """Find and check the samples of a tar.

    Args:
        stream: The tar, open for reading.
        size: Its size in bytes.
        shape: Shape of every latent. None, together with `dtype`: that of the first latent.
        dtype: Data type of every latent.
        num_classes: Number of classes, greater than every label. None accepts any label.

    Raises:
        TarError: The tar itself is damaged.
    """
    offsets: list[int] = []
    labels: list[int] = []
    keys: list[str] = []
    faults: dict[int, str] = {}
    known_keys: set[str] = set()
    headers: dict[bytes, tuple[tuple[int, ...], str] | str] = {}
    want = (tuple(shape), str(np.dtype(dtype))) if shape is not None and dtype is not None else None
    for key, entries in _samples(stream, size):
        number = len(keys)
        offset, label, fault, latent = _check(stream, entries, headers, want, num_classes)
        if key in known_keys:
            fault = f"key {key!r} is there twice"
        elif fault is None and want is None:
            want = latent
        known_keys.add(key)
        keys.append(key)
        offsets.append(offset)
        labels.append(label)
        if fault:
            faults[number] = fault
    return ShardIndex(np.asarray(offsets, np.int64), np.asarray(labels, np.int64), keys, faults)


def latent_type(stream: BinaryIO, size: int) -> tuple[tuple[int, ...], str] | None:
    """Shape and dtype of the first readable latent of a tar; None if there is none."""
    for _, entries in _samples(stream, size):
        latent = _check(stream, entries, {}, None, None)[3]
        if latent is not None:
            return latent
    return None


def _samples(stream: BinaryIO, size: int) -> Iterator[tuple[str, list[tuple[str, TarEntry]]]]:
    """Group adjacent entries by key, as webdataset does: the key and its (extension, entry) pairs."""
    key: str | None = None
    entries: list[tuple[str, TarEntry]] = []
    for entry in walk(stream, size):
        folder, _, base = entry.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        # Names without an extension, such as `README`, are no samples; webdataset skips
        # them as well. A path that leads outside is passed on, so that `_check` reports it.
        if not dot or not stem:
            if ".." in entry.name.split("/"):
                stem, extension = base, ""
            else:
                continue
        this = f"{folder}/{stem}" if folder else stem
        # A repeated extension starts a new sample with a duplicate key.
        repeated = any(extension.lower() == known for known, _ in entries)
        if key is not None and (this != key or repeated):
            yield key, entries
            entries = []
        key = this
        entries.append((extension.lower(), entry))
    if key is not None:
        yield key, entries


def _check(
    stream: BinaryIO,
    entries: list[tuple[str, TarEntry]],
    headers: dict[bytes, tuple[tuple[int, ...], str] | str],
    want: tuple[tuple[int, ...], str] | None,
    num_classes: int | None,
) -> tuple[int, int, str | None, tuple[tuple[int, ...], str] | None]:
    """Check one sample; returns (offset, label, fault, (shape, dtype))."""
    parts = dict(entries)
    for extension, entry in entries:
        if ".." in entry.name.split("/") or entry.name.startswith("/"):
            return 0, -1, f"the entry's name {entry.name!r} leads outside the shard", None
        if extension.rpartition(".")[2] in PICKLES:
            return 0, -1, f"entry {entry.name!r} is a pickle, which is never read; store the latent as .{LATENT}", None
    for needed in (LATENT, LABEL):
        if needed not in parts:
            return 0, -1, f"no .{needed} (it has: {', '.join(sorted(parts)) or 'nothing'})", None
    label, fault = _label(stream, parts[LABEL], num_classes)
    entry = parts[LATENT]
    stream.seek(entry.offset)
    latent, length = _npy_header(stream.read(min(entry.size, 12)), stream, entry, headers)
    if isinstance(latent, str):
        return 0, label, fault or latent, None
    payload = int(np.prod(latent[0], dtype=np.int64)) * np.dtype(latent[1]).itemsize
    if want is not None and latent != want:
        fault = fault or f"the latent is {describe(*latent)}, not {describe(*want)}"
    elif entry.size != length + payload:
        fault = fault or f"the latent has {entry.size - length} bytes of numbers, not {payload}"
    return entry.offset + length, label, fault, latent


def _label(stream: BinaryIO, entry: TarEntry, num_classes: int | None) -> tuple[int, str | None]:
    stream.seek(entry.offset)
    text = stream.read(min(entry.size, _MAX_HEADER)).decode("ascii", "replace").strip()
    if not text.isdigit() or len(text) > LABEL_DIGITS:
        return -1, f"the label is {text[:20]!r}, not a whole number of at most {LABEL_DIGITS} digits"
    label = int(text)
    if num_classes is not None and label >= num_classes:
        return label, f"label {label}, but there are {num_classes} classes"
    return label, None


def _npy_header(
    start: bytes, stream: BinaryIO, entry: TarEntry, headers: dict[bytes, tuple[tuple[int, ...], str] | str]
) -> tuple[tuple[tuple[int, ...], str] | str, int]:
    """((shape, dtype) of a `.npy` file or an error message, length of its header in bytes)."""
    if start[:6] != b"\x93NUMPY" or len(start) < 12:
        return "the latent is not a .npy file", 0
    wide = start[6] >= 2
    length = int.from_bytes(start[8 : 12 if wide else 10], "little") + (12 if wide else 10)
    if length > min(entry.size, _MAX_HEADER):
        return "the latent's .npy header is damaged", 0
    stream.seek(entry.offset + (12 if wide else 10))
    header = stream.read(length - (12 if wide else 10))
    # Parsed headers are cached, because nearly all samples of a shard have the same header.
    if header not in headers:
        headers[header] = _parse_npy(header)
    return headers[header], length


def _parse_npy(header: bytes) -> tuple[tuple[int, ...], str] | str:
    try:
        # `literal_eval` runs no code, so that a malicious header is at worst refused.
        fields = ast.literal_eval(header.decode("latin1").strip())
        descr, shape, fortran = fields["descr"], tuple(int(n) for n in fields["shape"]), fields["fortran_order"]
        dtype = np.dtype(descr)
    except (ValueError, SyntaxError, LookupError, TypeError, OverflowError, RecursionError, MemoryError):
        return "the latent's .npy header is damaged"
    # Bounded before an array of this shape is allocated.
    if not all(0 <= side < 2**16 for side in shape) or len(shape) > 8 or dtype.itemsize > 64:
        return f"the latent's .npy header says {short_repr(shape)}, which is no latent's shape"
    if dtype.hasobject:
        return "the latent is a pickled object array, which is never read"
    if fortran and len(shape) > 1:
        return "the latent is in Fortran order; store it in C order"
    if dtype.byteorder == ">":
        return "the latent is big-endian; store it little-endian"
    return shape, str(dtype)


def describe(shape: tuple[int, ...], dtype: str) -> str:
    """`float16 4x32x32`."""
    return f"{dtype} {'x'.join(str(n) for n in shape) or 'scalar'}"


def _checksum_is_right(header: bytes) -> bool:
    # The checksum treats its own field as eight blanks.
    return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])


def _number(octal: bytes) -> int:
    # GNU's base-256 encoding of numbers that do not fit into the octal field.
    if octal[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(octal[1:], "big")
    try:
        return int(octal.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax(content: bytes) -> dict[str, str]:
    """The `path` and `size` that a pax header sets for the next entry."""
    fields = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise TarError("a pax header is damaged")
        record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
        word, _, value = record.partition(b"=")
        if word == b"size" and not (value.isdigit() and len(value) < 20):
            raise TarError("a pax header is damaged")
        if word in (b"path", b"size"):
            fields[word.decode()] = value.decode("utf-8", "replace")
    return fields
