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
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fine_dist.core.errors import CheckpointError
from fine_dist.core.files import sha256_of

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
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # the values start at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as handle:
        for piece in (len(header_bytes).to_bytes(8, "little"), header_bytes):
            digest.update(piece)
            _write_all(handle, memoryview(piece))
        for tensor in tensors.values():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _BLOCK_BYTES):
                block = raw[start : start + _BLOCK_BYTES]
                digest.update(block)
                _write_all(handle, block)
        os.fsync(handle.fileno())
    return {"bytes": 8 + len(header_bytes) + offset, "sha256": digest.hexdigest()}


def _write_all(handle: Any, block: memoryview) -> None:
    while len(block):
        block = block[handle.write(block) :]


class CheckpointReader:
    """An open checkpoint. Tensors are read by range, so a rank reads only what it owns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"format {self.manifest.get('format')!r} is not {FORMAT}, the one that is read here")
        self.step: int = self.manifest["step"]
        self.identity: dict[str, Any] = self.manifest["identity"]
        self.extra: dict[str, Any] = self.manifest["extra"]
        self.shapes: dict[str, list[int]] = self.manifest["shapes"]
        self.optimizer_steps: dict[str, int] = self.manifest["optimizer_steps"]
        self._files: dict[str, Any] = {}
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}

    def verify(self) -> None:
        """Raise ValueError or OSError, saying what is wrong, unless every file is what was written."""
        for name, about in self.manifest["files"].items():
            path = self.folder / name
            if path.stat().st_size != about["bytes"]:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, {about['bytes']} were written")
            if sha256_of(path) != about["sha256"]:
                raise ValueError(f"{name} is not what was written (sha256)")

    def read(self, part: str, name: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of a saved tensor, flat.

        Args:
            part: One of `PARTS`.
            name: Name of the parameter.
        """
        if not self._ranges:
            self._index()
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
        for file in self.manifest["files"]:
            self._files[file] = safe_open(self.folder / file, framework="pt")
            for key in self._files[file].keys():  # noqa: SIM118 - not a dict
                part, _, rest = key.partition(":")
                name, _, start = rest.rpartition("@")
                size = self._files[file].get_slice(key).get_shape()[0]
                self._ranges.setdefault((part, name), []).append((int(start), int(start) + size, file, key))

    def close(self) -> None:
        """Close the files, which are mapped into memory."""
        self._files.clear()
        self._ranges.clear()
