"""The trainable rows of embeddings, one for each run and encoder, and their loss. Everything else is frozen.

The adaptive prompt ("a photo of a <CreTok> mixture") is trained to agree with the restrictive prompts of a pair, in
both orders ("a lettuce mantis", "a mantis lettuce"), on the pooled embeddings E of each encoder (CreTok, arXiv
2410.24160; the choice of embeddings and the sum over encoders are this project's):

    loss = 1 - min(cos(E(restrictive), E(adaptive)), max_cosine), mean over the two orders, summed over the encoders

Restrictive prompts contain nothing trainable, so their embeddings are computed once. An adaptive prompt without the
words of the pair is the same for all samples, so it goes through the encoder once per step and run, from its first
trainable position on (`causal.py`).

Shapes: b samples, R rows that train together, Q pairs, O = 2 orders, C encoders, M adaptive prompts, S computed
positions of the longest prompt, D width, E projection, T sets of targets, U distinct prompts of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.creative import causal
from fine_dist.creative.config import Template
from fine_dist.creative.encoders import TextEncoder, pad
from fine_dist.creative.pairs import Pair, PairBatch

_SHUFFLE = 0x7368756666


@dataclass(frozen=True)
class RowSpec:
    """A trainable row. A `shuffled` row is a control: the coordinates of its targets are permuted."""

    template: Template
    seed: int
    shuffled: bool = False


class EncoderPrompts:
    """Fixed data of one encoder: prompts as token ids, the cached positions before the token, and the targets."""

    def __init__(
        self, encoder: TextEncoder, specs: Sequence[RowSpec], pairs: Sequence[Pair], token: str, cache: bool
    ) -> None:
        self.encoder = encoder
        prompts: dict[str, int] = {}
        table = np.empty((len(specs), len(pairs), 2), np.int64)
        for r, spec in enumerate(specs):
            for q, (first, second) in enumerate(pairs):
                for o, (t1, t2) in enumerate(((first, second), (second, first))):
                    prompt = spec.template.adaptive.format(token=token, t1=t1, t2=t2)
                    table[r, q, o] = prompts.setdefault(prompt, len(prompts))
        lists = [encoder.ids(prompt) for prompt in prompts]
        begins = common_beginning([ids[: ids.index(encoder.token_id)] for ids in lists]) if cache else []
        device = encoder.device
        self.before = causal.cache(encoder.model, torch.tensor(begins, dtype=torch.int64, device=device))
        self.ids, self.ends = pad([ids[len(begins) :] for ids in lists], device)  # [M, S], [M]
        self.is_token = (self.ids == encoder.token_id)[..., None]  # [M, S, 1]
        self.embedded = encoder.rows(self.ids)  # [M, S, D]
        self.prompt_of = torch.from_numpy(table).to(device)  # [R, Q, O]
        self.targets, self.target_of = self._targets(specs, pairs)

    # Copies of the module, such as the EMA, share this object: encoders are frozen and far larger than the rows.
    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderPrompts:
        return self

    def _targets(self, specs: Sequence[RowSpec], pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """(unit vectors [T, Q, O, E] of the restrictive prompts, index [R] of each row's set of targets)."""
        orders = [pair for first, second in pairs for pair in ((first, second), (second, first))]
        templates = {spec.template.restrictive for spec in specs}
        plain = {
            text: F.normalize(self.encoder.embed([text.format(t1=t1, t2=t2) for t1, t2 in orders]), dim=1)
            for text in templates
        }
        target_sets: dict[tuple[str, int | None], Tensor] = {}
        which = []
        for spec in specs:
            key = (spec.template.restrictive, spec.seed if spec.shuffled else None)
            if key not in target_sets:
                target = plain[spec.template.restrictive]
                target_sets[key] = target[:, shuffle(target.shape[1], spec.seed)] if spec.shuffled else target
            which.append(list(target_sets).index(key))
        targets = torch.stack(list(target_sets.values())).unflatten(1, (len(pairs), 2))
        return targets, torch.tensor(which, device=self.encoder.device)

    def embed(self, rows: Tensor, prompts: Tensor) -> Tensor:
        """Unit vectors [U, E], fp32, of adaptive prompts [U], each with its own row [U, D]."""
        # `where` and not an in-place assignment, so that the rows get a gradient from every occurrence of the token.
        x = torch.where(self.is_token[prompts], rows[:, None].to(self.embedded.dtype), self.embedded[prompts])
        hidden = causal.run(self.encoder.model, x, self.before)  # [U, S, D]
        # In fp32: near 1 the spacing of bf16 numbers is 0.004, and the loss is the difference to 1.
        return F.normalize(causal.pool(self.encoder.model, hidden, self.ends[prompts]).float(), dim=1)


class Tokens(nn.Module):
    """Rows [R, D] of each encoder, the only parameters, named as the encoders are (`clip_l`, `clip_g`).

    They start from the embedding of one word. Encoders and prompts are not part of the module.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        specs: Sequence[RowSpec],
        pairs: Sequence[Pair],
        *,
        token: str,
        start: str,
        cache: bool = True,
    ) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.prompts_by_encoder = [EncoderPrompts(encoder, specs, pairs, token, cache) for encoder in encoders]
        for encoder in encoders:
            begin = encoder.table[encoder.single(start, "start")].float()
            self.register_parameter(encoder.key, nn.Parameter(begin.repeat(len(specs), 1)))

    def row(self, key: str, index: int) -> Tensor:
        """Row [D] of one run."""
        return self.get_parameter(key)[index]

    def forward(self, pairs: Tensor, against: str = "own") -> Tensor:
        """Cosines [b, R, O, C] of the adaptive prompts to the restrictive prompts of pairs [b, R].

        Args:
            pairs: Number of the pair of each sample and row, int64 [b, R].
            against: `own`: the targets of each row; `true`: for shuffled rows the unshuffled targets.
        """
        cosines = []
        num_rows = len(self.specs)
        for prompts_of_encoder in self.prompts_by_encoder:
            rows = self.get_parameter(prompts_of_encoder.encoder.key)  # [R, D]
            index = torch.arange(num_rows, device=pairs.device)
            prompts = prompts_of_encoder.prompt_of[index, pairs]  # [b, R, O]
            # A prompt that several samples share goes through the encoder once.
            keys, places = torch.unique(prompts * num_rows + index[:, None], return_inverse=True)  # [U], [b, R, O]
            adaptive = prompts_of_encoder.embed(rows[keys % num_rows], keys // num_rows)  # [U, E]
            which = prompts_of_encoder.target_of if against == "own" else self._true(prompts_of_encoder)
            targets = prompts_of_encoder.targets[which, pairs]  # [b, R, O, E]
            cosines.append((adaptive[places] * targets).sum(-1))
        return torch.stack(cosines, dim=-1)

    def _true(self, prompts_of_encoder: EncoderPrompts) -> Tensor:
        """For each row, the targets of the unshuffled row with its template."""
        names = [(spec.template.restrictive, spec.shuffled) for spec in self.specs]
        plain = [names.index((restrictive, False)) for restrictive, _ in names]
        return prompts_of_encoder.target_of[plain]

    def work(self, batch: int) -> tuple[float, int]:
        """(FLOPs of the layers' matrices, computed positions) of one sample in a batch of `batch` samples.

        The weights have no gradients, so the backward pass costs as much as the forward pass.
        """
        flops, positions = 0.0, 0
        for prompts_of_encoder in self.prompts_by_encoder:
            layers = prompts_of_encoder.encoder.model.text_model.encoder.layers
            numbers = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
            # A prompt that all pairs share is encoded once for each step, so its cost is divided by the batch.
            fixed = len(self.specs) if all(len(p.unique()) == 1 for p in prompts_of_encoder.prompt_of) else 0
            prompts = fixed / batch if fixed else 2 * len(self.specs)
            positions += max(1, round(prompts * prompts_of_encoder.ids.shape[1]))
            flops += 4 * numbers * prompts * prompts_of_encoder.ids.shape[1]
        return flops, positions


class TokenObjective:
    """The loss of all rows. It is a sum over rows, so that each row has the gradient of a run of its own.

    The reported loss is the mean over the first `num_shown` rows; the other rows are controls.
    """

    def __init__(self, max_cosine: float, num_shown: int) -> None:
        self.max_cosine, self.num_shown = max_cosine, num_shown

    def __call__(self, model: Any, batch: PairBatch) -> Tensor:
        """Losses [b] with the value of the mean over shown rows and the gradient of the sum over all rows."""
        losses = per_row(model(batch.pairs), self.max_cosine)  # [b, R]
        total, shown = losses.sum(1), losses[:, : self.num_shown].mean(1)
        return total + (shown - total).detach()


def per_row(cosines: Tensor, max_cosine: float) -> Tensor:
    """Losses [b, R] of cosines [b, R, O, C]: mean over the orders, summed over the encoders."""
    return (1 - cosines.float().clamp(max=max_cosine)).mean(2).sum(-1)


def shuffle(size: int, seed: int) -> Tensor:
    """A fixed permutation of a target's coordinates; it preserves norms and cosines among targets."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, _SHUFFLE])).permutation(size))


def common_beginning(lists: Sequence[Sequence[int]]) -> list[int]:
    """The longest common prefix of some lists."""
    begins = []
    for column in zip(*lists):
        if len(set(column)) > 1:
            break
        begins.append(column[0])
    return begins
