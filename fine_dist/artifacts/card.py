"""The model card of an export: what it is, what it was made from, under which licence, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fine_dist.model.arch import Arch


@dataclass(frozen=True)
class ModelCard:
    """What an export's card says besides its sizes.

    method:     name of the method that made it.
    learngene:  sha256 of the learngene it came from; none without one.
    licence:    as an SPDX name, or `unknown`; that of the ancestor's weights, where there was one.
    source:     what it was exported from, or the ancestor's name.
    metrics:    names (with their protocol) and numbers.
    notes:      further sentences.
    """

    method: str = "unknown"
    learngene: str | None = None
    licence: str = "unknown"
    source: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def card_text(card: ModelCard, arch: Arch, num_numbers: int, how_to_load: str) -> str:
    """Markdown with the front matter that model hubs read."""
    front = {"license": card.licence, "library_name": "diffusers", "tags": ["dit", "learngene", card.method]}
    rows: list[tuple[str, Any]] = [
        ("method", card.method),
        ("learngene (sha256)", card.learngene or "none"),
        ("made from", card.source or "unknown"),
        ("licence", card.licence),
        ("architecture", arch.name),
        ("layers x width, heads", f"{arch.num_layers} x {arch.hidden_size}, {arch.num_heads}"),
        ("latent", "x".join(map(str, arch.latent_shape))),
        ("classes", arch.num_classes),
        ("numbers", f"{num_numbers:,}"),
        *((name, f"{value:g}") for name, value in card.metrics.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    words = "\n\n".join([*card.notes, how_to_load])
    front_text = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{front_text}---\n# {arch.name}, initialised by {card.method}\n\n| | |\n|-|-|\n{table}\n\n{words}\n"


def licence_of_card(path: Path) -> str | None:
    """The licence in a card's front matter; none where there is no card, or no licence in it."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    matter = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    if not matter:
        return None
    try:
        values = yaml.safe_load(matter[1])
    except yaml.YAMLError:
        return None
    found = values.get("license") if isinstance(values, dict) else None
    return str(found) if found else None
