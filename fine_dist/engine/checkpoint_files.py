"""A checkpoint's files: tensors written and hashed in one pass, and read back whole or by range.

The format is safetensors' (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header, then
the raw values. A key is `PART:NAME@START`, a flat range of a named parameter, so that any world size reads what any
other wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from fine_dist.core.errors import CheckpointError
from fine_dist.core.files import sha256_of, sha256_text
from fine_dist.core.json_files import Record, as_record, read_json

FORMAT = 1
PARTS = ("weight", "exp_avg", "exp_avg_sq", "ema")
_BLOCK_BYTES = 1 << 22
"""Bytes that are hashed and written at once. Both release Python's global lock meanwhile, so training runs on."""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors in host memory as one synced safetensors file, without a second copy in memory.

    Returns:
        `{"bytes": ..., "sha256": ...}` of the file.

    Raises:
        OSError: The file cannot be written.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    # Written by hand instead of by `safetensors.save`, which needs
    # a second copy in memory and leaves the hash for a second pass.
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # the values start at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as handle:
        for piece in (len(header_bytes).to_bytes(8, "little"), header_bytes):
            digest.update(piece)
            _write_all(handle, memoryview(piece))
        for tensor in tensors.values():
            # A view of the tensor's memory as bytes: nothing is copied,
            # and bf16, which numpy lacks, needs no case of its own.
            raw = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _BLOCK_BYTES):
                block = raw[start : start + _BLOCK_BYTES]
                digest.update(block)
                _write_all(handle, block)
        # The manifest that names this file may reach the disk before
        # its pages do; after a power cut it would vouch for zeros.
        os.fsync(handle.fileno())
    return {"bytes": 8 + len(header_bytes) + offset, "sha256": digest.hexdigest()}


def _write_all(handle: Any, block: memoryview) -> None:
    while len(block):
        # An unbuffered write may take only part of what it is given.
        block = block[handle.write(block) :]


class SavedFile(Record):
    """One tensor file of a checkpoint."""

    bytes: int = Field(ge=0)
    """Its size."""
    sha256: str
    """Of its content."""


Length = Annotated[int, Field(ge=0, le=2**48)]


class CheckpointManifest(Record):
    """manifest.json of a checkpoint."""

    format: Literal[1]
    """Of the checkpoint's files."""
    step: int = Field(ge=0)
    """Updates that were made."""
    identity: dict[str, Any]
    """What makes a run this run; another's checkpoint is refused."""
    extra: dict[str, Any]
    """What the loop keeps beside tensors: sums of an unfinished row, randomness, the stopping rule."""
    files: dict[str, SavedFile]
    """Tensor files by name."""
    shapes: dict[str, list[Length]]
    """Shapes of parameters by name."""
    optimizer_steps: dict[str, int]
    """Updates that the optimizer has made of each parameter."""
    digest: str
    """`digest_of` all other keys: steps, shapes and sums of an altered manifest would be believed otherwise."""


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own digest."""
    return sha256_text(json.dumps({key: manifest[key] for key in manifest if key != "digest"}, sort_keys=True))


class CheckpointReader:
    """An open checkpoint. Tensors are read by range, so a rank reads only what it owns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path, remedy = folder / "manifest.json", "copy the checkpoint again"
        values = read_json(path, CheckpointError, remedy)
        manifest = as_record(CheckpointManifest, values, path, CheckpointError, remedy)
        if manifest.digest != digest_of(values):
            raise CheckpointError(f"{path} is not what was written (its digest differs): it was edited; {remedy}")
        self.step, self.identity, self.extra = manifest.step, manifest.identity, manifest.extra
        self.shapes, self.optimizer_steps, self.files = manifest.shapes, manifest.optimizer_steps, manifest.files
        self._files: dict[str, Any] = {}
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}

    def verify(self) -> None:
        """Raise ValueError or OSError, saying what is wrong, unless every file is what was written."""
        for name, about in self.files.items():
            path = self.folder / name
            # The size is compared first: a truncated file, the usual damage, is found without reading gigabytes.
            if path.stat().st_size != about.bytes:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, {about.bytes} were written")
            if sha256_of(path) != about.sha256:
                raise ValueError(f"{name} is not what was written (sha256)")

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of a saved tensor, flat.

        Args:
            part: One of `PARTS`.
            name: Name of the parameter.
        """
        if not self._ranges:
            self._index()
        # What was saved as ranges of W ranks is read as ranges of another W: each overlap is one slice of a mapped
        # file, so a rank reads its own bytes only. `filled` proves that no gap of uninitialized memory remains.
        result = torch.empty(stop - start)
        filled = 0
        for lo, hi, file, key in self._ranges.get((part, name), ()):
            first, last = max(lo, start), min(hi, stop)
            if first < last:
                result[first - start : last - start] = self._files[file].get_slice(key)[first - lo : last - lo]
                filled += last - first
        if filled != stop - start:
            raise CheckpointError(f"checkpoint {self.folder}: {part} of {name!r} is stored in part only")
        return result

    def whole(self, part: str, name: str) -> Tensor:
        """A saved tensor, flat."""
        return self.read(part, name, 0, torch.Size(self.shapes[name]).numel())

    def moments(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """AdamW's moments of a range, flat, in host memory; zeros when the parameter has had no update."""
        if not self.optimizer_steps.get(name, 0):
            return {key: torch.zeros(stop - start) for key in ("exp_avg", "exp_avg_sq")}
        return {key: self.read(key, name, start, stop) for key in ("exp_avg", "exp_avg_sq")}

    def _index(self) -> None:
        for file in self.files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
            for key in self._files[file].keys():  # noqa: SIM118 - not a dict
                # Names hold dots but never `:`; `@` is searched from
                # the right because the number behind it is always last.
                part, _, rest = key.partition(":")
                name, _, start = rest.rpartition("@")
                size = self._files[file].get_slice(key).get_shape()[0]
                self._ranges.setdefault((part, name), []).append((int(start), int(start) + size, file, key))

    def close(self) -> None:
        """Close the files, which are mapped into memory."""
        self._files.clear()
        self._ranges.clear()
