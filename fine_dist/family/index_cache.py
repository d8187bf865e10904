"""A cache of row numbers as device tensors, so that a step of a pack never waits for a copy from the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 256
"""Maximum number of cached lists; the jobs and feeds of a step change only when a job ends."""


class IndexCache:
    """`cache.take(x, rows)` is `x[rows]` without a wait.

    Indexing a GPU tensor by a Python list copies the list from pageable memory, which stops the host until the device
    has done everything before it. Here a list becomes a device tensor once, through page-locked memory. Rows in a row
    are a view, and need no kernel at all.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def tensor(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The rows as int64 on a device."""
        key = (device, tuple(rows))
        if key not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[key] = to_device(torch.tensor(key[1], dtype=torch.int64), device)
        return self._known[key]

    def take(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Some rows of x, in that order: a view where they are consecutive."""
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            # A view keeps the memory format and costs no kernel; most steps take all rows.
            return x if len(rows) == len(x) else x.narrow(0, rows[0], len(rows))
        return x.index_select(0, self.tensor(rows, x.device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; the host does not wait for a copy to a GPU."""
    return x.to(device) if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
