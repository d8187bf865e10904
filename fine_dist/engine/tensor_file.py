"""Writing a safetensors file in one pass: hashed while it is written, synced, without a second copy in memory.

The format is https://huggingface.co/docs/safetensors: eight bytes of header length, a JSON header, then the raw values.
Files are read back with the safetensors library.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Bytes hashed and written at once; both let go of Python's lock meanwhile, so training runs on."""
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.float64: "F64"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write contiguous tensors in host memory; `{"bytes", "sha256"}` of the synced file. OSError when it cannot be."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as handle:
        for piece in (len(words).to_bytes(8, "little"), words):
            digest.update(piece)
            _write_all(handle, memoryview(piece))
        for tensor in tensors.values():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(raw), _BLOCK):
                block = raw[start : start + _BLOCK]
                digest.update(block)
                _write_all(handle, block)
        os.fsync(handle.fileno())
    return {"bytes": 8 + len(words) + offset, "sha256": digest.hexdigest()}


def _write_all(handle: Any, block: memoryview) -> None:
    while len(block):
        block = block[handle.write(block) :]
