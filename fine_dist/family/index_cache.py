"""A cache of row numbers as device tensors, so that a step of a pack never waits for a copy from the host.

Indexing a GPU tensor by a Python list copies the list from pageable memory, and the host then waits until the device
has finished everything queued before. Here each list is copied once, through page-locked memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LISTS = 256
"""Maximum number of cached lists. The jobs and feeds of a step change only when a job ends, so few are needed."""


class IndexCache:
    """`cache.take(x, rows)` is `x[rows]` without a synchronization of host and device."""

    def __init__(self) -> None:
        self._indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def tensor(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The row numbers as int64 [len(rows)] on a device."""
        key = (device, tuple(rows))
        if key not in self._indices:
            if len(self._indices) >= MAX_LISTS:
                self._indices.clear()
            self._indices[key] = to_device(torch.tensor(key[1], dtype=torch.int64), device)
        return self._indices[key]

    def take(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of x in the given order; a view if they are consecutive."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            # A view keeps the memory format and launches no kernel; most steps take all rows.
            return x if len(rows) == len(x) else x.narrow(0, rows[0], len(rows))
        return x.index_select(0, self.tensor(rows, x.device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on a device; the host does not wait for a copy to a GPU."""
    return x.to(device) if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
