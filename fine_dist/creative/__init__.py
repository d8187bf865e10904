"""CreTok (arXiv 2410.24160): one learned token for "creative", trained on frozen CLIP text encoders, without images.

A row of the embedding table of each encoder is trained by the engine's loop; everything else is frozen. Several seeds
and templates are several runs, whose rows train as one batch.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_cretok", "plain_prompt", "read_token"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used, since they need torch."""
    if name in __all__:
        from fine_dist.creative import saving

        return getattr(saving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
