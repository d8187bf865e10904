"""fine_dist: condense a diffusion transformer once, then initialize every size from it.

    import fine_dist as fd

    ancestor = fd.load("facebook/DiT-XL-2-256")          # or a .pt, a folder, a module in memory
    learngene = fd.condense(ancestor, "data/imagenet256/train")
    model = fd.initialise(learngene, depth=14, data="data/imagenet256/train")
    images = model.sample([207, 360], vae="stabilityai/sd-vae-ft-ema")
    scores = fd.evaluate(model, held_out="data/imagenet256/held_out")

The functions are the commands of the same names (`fine-dist condense`), with values in place of files.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# MKL's results depend on the memory alignment of its inputs, which a restart changes. Without this variable, a resumed
# run differs from an uninterrupted one in the last bit. MKL reads it at its first call; products take up to 4% longer.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.2.0"

_COMMANDS = ("condense", "evaluate")
"""Functions that are commands too: their modules can be called (`core/callable_module.py`)."""
__all__ = ["Model", "condense", "evaluate", "initialise", "load"]


def __getattr__(name: str) -> Any:
    """The library's functions, imported at their first use: they need torch, and `--help` does not."""
    if name in _COMMANDS:
        return importlib.import_module(f"fine_dist.{name}")
    if name in __all__:
        return getattr(importlib.import_module("fine_dist.api"), name)
    raise AttributeError(f"module 'fine_dist' has no attribute {name!r}")
