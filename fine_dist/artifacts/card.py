"""The model card of an export: what the model is, what it was made from, its licence, and how to load it."""

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

    Args:
        method: Name of the method that made it.
        learngene: sha256 of the learngene it came from; None without one.
        licence: An SPDX name, or `unknown`; that of the ancestor's weights, where there was one.
        source: The ancestor's name, or what it was exported from.
        metrics: Numbers by name.
        protocol: How the numbers were measured and the model is sampled, by name.
        notes: Further sentences.
    """

    method: str = "unknown"
    learngene: str | None = None
    licence: str = "unknown"
    source: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, str] = field(default_factory=dict)
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
        *card.protocol.items(),
    ]
    table = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)
    body = "\n\n".join([*card.notes, how_to_load])
    front_text = yaml.safe_dump(front, sort_keys=False)
    return f"---\n{front_text}---\n# {arch.name}, initialized by {card.method}\n\n| | |\n|-|-|\n{table}\n\n{body}\n"


def _cell(value: Any) -> str:
    """A text in one cell of a table, whatever a user called things."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def licence_of_card(path: Path) -> str | None:
    """The licence in a card's front matter; None where there is no card, or no licence in it."""
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
    licence = values.get("license") if isinstance(values, dict) else None
    return str(licence) if licence else None
