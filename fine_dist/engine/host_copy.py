"""Copies many tensors of a device into host memory with one wait for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def host_buffer(like: Tensor) -> Tensor:
    """Host memory for a copy of `like`; page-locked for a GPU's, without which a copy cannot run in the background."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def copy_to_host(tensors: Sequence[Tensor], buffers: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Copies in host memory.

    All copies are queued before the host waits once for the last of them: one wait each would leave the device idle
    between them, hundreds of times in a save.

    Args:
        buffers: Where the copies go (`host_buffer`); None: into new memory that is not page-locked.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        if buffers is None:
            # `cpu()` of a tensor in host memory is the tensor itself, and
            # the caller expects a copy that later updates leave alone.
            return [tensor.detach().cpu().clone() for tensor in tensors]
        return [buffer.copy_(tensor.detach()) for buffer, tensor in zip(buffers, tensors)]
    targets = [host_buffer(tensor) for tensor in tensors] if buffers is None else buffers
    for target, tensor in zip(targets, tensors):
        target.copy_(tensor.detach(), non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    # Cloned out of page-locked memory, which is scarce and cannot
    # be swapped, since the caller may keep the result for long.
    return list(targets) if buffers is not None else [target.clone() for target in targets]
