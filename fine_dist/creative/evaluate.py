"""Quality of a token without images: its cosine to held-out pairs, compared with controls.

A control replaces the token in the same prompt: the plain word "creative", the start word, random rows, and a row
trained for as many steps on targets whose coordinates are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.creative.config import Template
from fine_dist.creative.encoders import TextEncoder
from fine_dist.creative.pairs import Pair
from fine_dist.creative.tokens import Tokens, per_row

RANDOM_ROWS = 16
"""Number of random rows whose mean is the random control."""
_RANDOM_SEED = 0x72616E64
START_WORD = 'the start word, "{}"'
NOT_MEASURED = (
    "The paper evaluates images: it reports VQAScore 0.835, PickScore 21.775 and ImageReward 1.065. This report does "
    "not measure images, and its cosines do not replace those scores."
)


class HeldOutPairs:
    """Evaluation during training: cosines to the held-out pairs and norms of the rows.

    Args:
        names: Names of the reported rows, the first rows of the model; one empty name for a single run.
        num_trained: Number of training pairs, which come first.
        num_pairs: Number of all pairs.
        max_cosine: Clamp of the loss.
    """

    def __init__(self, names: Sequence[str], num_trained: int, num_pairs: int, max_cosine: float) -> None:
        self.names, self.max_cosine = list(names), max_cosine
        self._pairs = torch.arange(num_trained, num_pairs)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Mean cosine, clamped loss and norms by name, without the controls."""
        cosines = held_out_cosines(model, self._pairs)  # [Q, R, O, C]
        losses = per_row(cosines, self.max_cosine)
        values = {}
        for index, name in enumerate(self.names):
            suffix = f"/{name}" if name else ""
            values[f"held_out_cosine{suffix}"] = float(cosines[:, index].mean())
            values[f"held_out_loss{suffix}"] = float(losses[:, index].mean())
            for key, rows in model.named_parameters():
                values[f"norm_{key}{suffix}"] = float(rows[index].detach().norm())
        return values


@torch.no_grad()
def held_out_cosines(model: Any, pairs: Tensor) -> Tensor:
    """Cosines [Q, R, O, C] of all rows to the true targets of the same pairs [Q]."""
    device = next(model.parameters()).device
    cosines: Tensor = model(pairs.to(device)[:, None].expand(-1, len(model.specs)), "true")
    return cosines.float().cpu()


class NearestWords:
    """Texts for TensorBoard: the words of the vocabulary that are nearest to each row."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def __call__(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Tokens)
        texts = {}
        for index, name in enumerate(self.names):
            for prompts_of_encoder in model.prompts_by_encoder:
                words = prompts_of_encoder.encoder.nearest(model.row(prompts_of_encoder.encoder.key, index))
                title = f"nearest/{prompts_of_encoder.encoder.key}" + (f"/{name}" if name else "")
                texts[title] = "  \n".join(f"`{word}` {cosine:.3f}" for word, cosine in words)
        return texts


@torch.no_grad()
def measure(
    encoders: Sequence[TextEncoder],
    template: Template,
    pairs: Sequence[Pair],
    *,
    token: str,
    start: str,
    rows: dict[str, dict[str, Tensor]],
) -> dict[str, dict[str, float]]:
    """Mean cosine to the restrictive prompts of pairs, both orders: {what: {encoder or `mean`: cosine}}.

    Args:
        encoders: The text encoders.
        template: The two prompts.
        pairs: Pairs of concepts.
        token: The token in prompts.
        start: The start word.
        rows: {what: {encoder: row [D]}}; the controls "creative", the start word and random rows are added.
    """
    cosines: dict[str, dict[str, float]] = {}
    for encoder in encoders:
        probe = _Probe(encoder, template, pairs)
        for what, own in rows.items():
            cosines.setdefault(what, {})[encoder.key] = probe(token, own[encoder.key])
        cosines.setdefault('the word "creative"', {})[encoder.key] = probe("creative")
        cosines.setdefault(START_WORD.format(start), {})[encoder.key] = probe(start)
        drawn = [probe(token, row) for row in random_rows(encoder)]
        cosines.setdefault(f"a random row (mean of {RANDOM_ROWS})", {})[encoder.key] = sum(drawn) / len(drawn)
    for values in cosines.values():
        values["mean"] = sum(values.values()) / len(values)
    return cosines


class _Probe:
    """The mean cosine of the adaptive prompt, with any word or row in place of the token, to the targets of pairs."""

    def __init__(self, encoder: TextEncoder, template: Template, pairs: Sequence[Pair]) -> None:
        self.encoder, self.template = encoder, template
        self.orders = [pair for first, second in pairs for pair in ((first, second), (second, first))]
        targets = encoder.embed([template.restrictive.format(t1=t1, t2=t2) for t1, t2 in self.orders])
        self.targets = F.normalize(targets, dim=1)  # [2 Q, E]

    def __call__(self, word: str, row: Tensor | None = None) -> float:
        prompts = [self.template.adaptive.format(token=word, t1=t1, t2=t2) for t1, t2 in self.orders]
        # An adaptive prompt without the pair's words is the same for all pairs and is embedded once.
        distinct = list(dict.fromkeys(prompts))
        embedded = F.normalize(self.encoder.embed(distinct, row), dim=1)
        indices = [distinct.index(prompt) for prompt in prompts]
        return float((embedded[indices] * self.targets).sum(1).mean())


def random_rows(encoder: TextEncoder) -> Tensor:
    """Random rows [RANDOM_ROWS, D] with the mean and deviation of each coordinate over the vocabulary."""
    table = encoder.table.float()
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    noise = torch.randn(RANDOM_ROWS, encoder.width, generator=generator)
    # Distributed like the vocabulary, because a row of another norm would differ from the token by its norm alone.
    return table.mean(0) + table.std(0) * noise.to(table.device)


def report(title: str, facts: dict[str, Any], measured: dict[str, dict[str, float]]) -> str:
    """A report in Markdown: the cosines as a table, the nearest words, and a note about what is not measured.

    Args:
        title: Title of the report.
        facts: The token's manifest.
        measured: The result of `measure`.
    """
    keys = list(next(iter(measured.values())))
    lines = [
        f"# {title}",
        "",
        f'`{facts["token"]}` in "{facts["template"]["adaptive"]}", trained towards '
        f'"{facts["template"]["restrictive"]}" of {facts["num_trained"]} pairs in both orders, {facts["steps"]:,} '
        f"steps of {facts['batch']} pairs, seed {facts['seed']}; {facts['word_list']}.",
        "",
        f"Mean cosine to {facts['num_held_out']} pairs that were never trained on (the loss is clamped at "
        f"{facts['max_cosine']:g}):",
        "",
        f"| in the token's place | {' | '.join(keys)} |",
        f"|---|{'---|' * len(keys)}",
        *[
            f"| {what} | " + " | ".join(f"{values[key]:.4f}" for key in keys) + " |"
            for what, values in measured.items()
        ],
        "",
        "Nearest words of the vocabulary: "
        + "; ".join(
            f"{key}: " + ", ".join(f"`{word}` {cosine:.3f}" for word, cosine in words)
            for key, words in facts["nearest"].items()
        )
        + ".",
        "",
        NOT_MEASURED,
    ]
    return "\n".join(lines) + "\n"
