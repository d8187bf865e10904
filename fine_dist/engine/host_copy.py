"""Copies of many device tensors into host memory with a single wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_buffer(like: Tensor) -> Tensor:
    """Host memory for a copy of `like`. For a GPU tensor it is page-locked, which asynchronous copies require."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def copy_to_host(tensors: Sequence[Tensor], buffers: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Copies in host memory.

    All copies are queued before the host waits once for the last one. A wait for each copy would leave the device idle
    hundreds of times in a save.

    Args:
        tensors: Tensors of any shapes, on the device or in host memory.
        buffers: Destinations (`host_buffer`). None: new memory that is not page-locked.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        if buffers is None:
            # Cloned, because `cpu()` of a tensor in host memory is the tensor
            # itself, which later updates would change.
            return [tensor.detach().cpu().clone() for tensor in tensors]
        return [buffer.copy_(tensor.detach()) for buffer, tensor in zip(buffers, tensors)]
    targets = [host_buffer(tensor) for tensor in tensors] if buffers is None else buffers
    for target, tensor in zip(targets, tensors):
        target.copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    # Cloned out of page-locked memory, which is scarce and cannot be
    # swapped, because the caller may keep the result for a long time.
    return list(targets) if buffers is not None else [target.clone() for target in targets]
