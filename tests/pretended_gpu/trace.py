"""The record of what a pretended GPU was asked to do: kernels, waits of the host, products, collectives, bytes held."""

from __future__ import annotations

import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Wait(NamedTuple):
    """A place where the host stands still until the device has caught up."""

    what: str
    where: str


class Collective(NamedTuple):
    """One collective: the kinds of device its tensors lie on, and their bytes."""

    name: str
    devices: str
    where: str
    num_bytes: int


@dataclass
class Trace:
    """What the pretended GPU was asked to do."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)
    overlapped: list[Wait] = field(default_factory=list)
    """Copies and event waits that leave the device busy: page-locked and asynchronous, or of work long queued."""
    collectives: list[Collective] = field(default_factory=list)
    products: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Matrix products by (dtype, precision of fp32 products at that time)."""
    live_bytes: int = 0
    peak_bytes: int = 0

    @property
    def launches(self) -> int:
        return sum(self.kernels.values())

    def mixed_collectives(self) -> list[str]:
        """Collectives that no process group takes: their tensors lie on two kinds of device."""
        return [f"{c.name} of {c.devices} in {c.where}" for c in self.collectives if "+" in c.devices]

    def host_collectives(self) -> list[str]:
        """Collectives that a group of NCCL alone would refuse: their tensors lie in host memory."""
        return [f"{c.name} in {c.where}" for c in self.collectives if c.devices == "cpu"]


def where() -> str:
    """The innermost line of the product on the stack; autograd's own threads have none."""
    product = [str(ROOT / "fine_dist"), str(ROOT / "launchers")]
    for frame in reversed(traceback.extract_stack()):
        if any(frame.filename.startswith(folder) for folder in product):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "backward" if threading.current_thread() is not threading.main_thread() else "torch"
