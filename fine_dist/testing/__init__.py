"""Test tools for this project and for other packages: real ranks on one machine, and the contract of methods."""

from fine_dist.testing.contract import MethodContract
from fine_dist.testing.ranks import Ranks, run_distributed
from fine_dist.testing.tiny_models import condensed, inputs, lively, moved, saved, tiny_arch, trained

__all__ = [
    "MethodContract",
    "Ranks",
    "condensed",
    "inputs",
    "lively",
    "moved",
    "run_distributed",
    "saved",
    "tiny_arch",
    "trained",
]
