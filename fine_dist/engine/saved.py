"""A checkpoint on disk, opened: whole or by range, so that any world size reads what any other wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fine_dist.core.errors import CheckpointError
from fine_dist.core.files import sha256_of

FORMAT = 1


class Saved:
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
        """Values [start, stop) of a saved tensor, flat; part is `weight`, `exp_avg`, `exp_avg_sq` or `ema`."""
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

    def _index(self) -> None:
        for file in self.manifest["files"]:
            self._files[file] = safe_open(self.folder / file, framework="pt")
            for key in self._files[file].keys():  # noqa: SIM118 - not a dict
                part, _, rest = key.partition(":")
                name, _, start = rest.rpartition("@")
                size = self._files[file].get_slice(key).get_shape()[0]
                self._ranges.setdefault((part, name), []).append((int(start), int(start) + size, file, key))

    def close(self) -> None:
        """Let the files go (they are mapped into memory)."""
        self._files.clear()
        self._ranges.clear()
