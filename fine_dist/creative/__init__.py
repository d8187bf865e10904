"""CreTok (arXiv 2410.24160): one learned token for "creative", trained on frozen CLIP text encoders, without images.

core/settings.py     settings, and the runs that they ask for (read without torch)
pairs.py      pairs of concepts: the lists, held-out ones, and which pair a sample of a step is
encoders.py   frozen text encoders with the new token in their vocabulary
sources.py    where they come from: a folder, the hub, or made up
causal.py     the encoders' arithmetic, from any position on
tokens.py     what trains: rows of embeddings; and the loss
run.py        several runs as one program of the engine
evaluate.py   cosines to held-out pairs beside the controls, nearest words, the report
scores.py     CLIP scores of images
again.py      a token measured again
saving.py     tokens on disk, and into diffusers' pipelines
tiny.py       random encoders with a vocabulary of their own, to try things out
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_cretok", "plain_prompt", "read_token"]


def __getattr__(name: str) -> Any:
    """What other rooms and users take from here; imported when asked for, since it needs torch."""
    if name in __all__:
        from fine_dist.creative import saving

        return getattr(saving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
