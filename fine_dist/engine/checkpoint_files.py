"""The files of a checkpoint: tensors are written and hashed in one pass, and read completely or by range.

The format is safetensors' (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header, then
the raw values. A key is `PART:NAME@START`, a flat range of a named parameter, so that the world size may change
between writing and reading.
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
"""Bytes that are hashed and written at once. Both release the GIL, so that training continues."""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors in host memory as one safetensors file, and sync it, without a second copy in memory.

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
    # Written here instead of by `safetensors.save`, which needs a
    # second copy in memory and a second pass for the hash.
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # the values start at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as handle:
        for piece in (len(header_bytes).to_bytes(8, "little"), header_bytes):
            digest.update(piece)
            _write_all(handle, memoryview(piece))
        for tensor in tensors.values():
            # A byte view of the tensor's memory, which copies nothing
            # and also works for bf16, which NumPy does not have.
            raw = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _BLOCK_BYTES):
                block = raw[start : start + _BLOCK_BYTES]
                digest.update(block)
                _write_all(handle, block)
        # Without this the manifest could reach the disk before the file's
        # pages, and a power cut would leave a valid manifest of zeros.
        os.fsync(handle.fileno())
    return {"bytes": 8 + len(header_bytes) + offset, "sha256": digest.hexdigest()}


def _write_all(handle: Any, block: memoryview) -> None:
    while len(block):
        # An unbuffered write may write only part of a block.
        block = block[handle.write(block) :]


class SavedFile(Record):
    """One tensor file of a checkpoint."""

    bytes: int = Field(ge=0)
    """Size of the file."""
    sha256: str
    """sha256 of the file."""


Length = Annotated[int, Field(ge=0, le=2**48)]


class CheckpointManifest(Record):
    """manifest.json of a checkpoint."""

    format: Literal[1]
    """Version of the file format."""
    step: int = Field(ge=0)
    """Number of updates."""
    identity: dict[str, Any]
    """Identity of the run; a checkpoint of another run is refused."""
    extra: dict[str, Any]
    """State of the loop besides tensors, such as the sums of an unfinished row of metrics."""
    files: dict[str, SavedFile]
    """Tensor files by name."""
    shapes: dict[str, list[Length]]
    """Shapes of parameters by name."""
    optimizer_steps: dict[str, int]
    """Number of updates of each parameter."""
    digest: str
    """`digest_of` all other keys, which detects an edited manifest."""


def digest_of(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own digest."""
    return sha256_text(json.dumps({key: manifest[key] for key in manifest if key != "digest"}, sort_keys=True))


class CheckpointReader:
    """An open checkpoint. Tensors are read by range, so that a rank reads only what it owns.

    Raises:
        CheckpointError: The manifest is missing, damaged or edited.
    """

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
        """Check size and sha256 of every file. Raises ValueError or OSError with the first problem."""
        for name, saved in self.files.items():
            path = self.folder / name
            # The size first: a truncated file, the usual damage, is detected without reading gigabytes.
            if path.stat().st_size != saved.bytes:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, {saved.bytes} were written")
            if sha256_of(path) != saved.sha256:
                raise ValueError(f"{name} is not what was written (sha256)")

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Read the values [start, stop) of a flattened tensor: fp32 [stop - start].

        Args:
            part: One of `PARTS`.
            name: Name of the parameter.
            start: First value.
            stop: End of the range.

        Raises:
            CheckpointError: The checkpoint holds only part of the range.
        """
        if not self._ranges:
            self._index()
        # The saved ranges may be those of another world size. Each overlap is one slice of a mapped file, so that a
        # rank reads only its own bytes. `filled` ensures that no uninitialized memory remains.
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

    def read_full(self, part: str, name: str) -> Tensor:
        """Read all values of a tensor, flattened: fp32 [numel]."""
        return self.read(part, name, 0, torch.Size(self.shapes[name]).numel())

    def moments(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """AdamW's moments of a range, fp32 [stop - start] in host memory; zeros for a parameter without updates."""
        if not self.optimizer_steps.get(name, 0):
            return {key: torch.zeros(stop - start) for key in ("exp_avg", "exp_avg_sq")}
        return {key: self.read(key, name, start, stop) for key in ("exp_avg", "exp_avg_sq")}

    def _index(self) -> None:
        for file in self.files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
            for key in self._files[file].keys():  # noqa: SIM118 - not a dict
                # Names contain dots but no `:`. `@` is searched from the
                # right, because the number after it is always last.
                part, _, location = key.partition(":")
                name, _, start = location.rpartition("@")
                size = self._files[file].get_slice(key).get_shape()[0]
                self._ranges.setdefault((part, name), []).append((int(start), int(start) + size, file, key))

    def close(self) -> None:
        """Close the memory-mapped files."""
        self._files.clear()
        self._ranges.clear()
