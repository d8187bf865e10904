"""Command modules that are also functions: `fd.condense(...)` and `fine_dist.condense.run(...)` both work.

Importing a submodule sets it as an attribute of its package, so the module `fine_dist.condense` would hide a function
of that name. The module itself is callable instead.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(module: str, function: str) -> None:
    """Let a call of a module run the function of that name in `fine_dist.api`."""

    class Command(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module("fine_dist.api"), function)(*args, **kwargs)

    # Python allows this for modules; name, file and content of the module stay the same.
    sys.modules[module].__class__ = Command
