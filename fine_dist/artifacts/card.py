"""The model card of an export: architecture, origin, licence, metrics, and how to load the model."""

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
    """Content of a model card besides the architecture.

    Args:
        method: Name of the method that made the model.
        learngene: sha256 of the learngene that the model was initialized from; None if there was none.
        licence: SPDX name of the weights' licence, which an ancestor's weights pass on; or `unknown`.
        source: Name of the ancestor, or path of the artifact that was exported.
        metrics: Losses and other numbers, by name.
        protocol: Diffusion process, loss and sampler that the metrics refer to, by name.
        notes: Further sentences, one paragraph each.
    """

    method: str = "unknown"
    learngene: str | None = None
    licence: str = "unknown"
    source: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def card_text(card: ModelCard, arch: Arch, num_numbers: int, how_to_load: str) -> str:
    """Return the card as Markdown, with the YAML front matter that the Hugging Face Hub reads.

    Args:
        card: Content of the card.
        arch: Architecture of the model.
        num_numbers: Number of parameters.
        how_to_load: Last paragraph: how to load the model.
    """
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
    """Escape text for one cell of a Markdown table; names in it may come from users."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def licence_of_card(path: Path) -> str | None:
    """Return the licence in a card's front matter, or None if there is no card or it names none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, flags=re.DOTALL)
    if not front:
        return None
    try:
        values = yaml.safe_load(front[1])
    except yaml.YAMLError:
        return None
    licence = values.get("license") if isinstance(values, dict) else None
    return str(licence) if licence else None
