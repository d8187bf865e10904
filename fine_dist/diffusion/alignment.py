"""REPA (arXiv 2410.06940): a block's tokens are aligned with a frozen image encoder's while the model trains.

A projector maps the tokens of one block to the encoder's width. It trains with the model and is dropped afterwards.

Shapes: B batch, T the model's tokens, S the encoder's tokens, D the model's width, E the encoder's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.diffusion.objective import NoisedBatch
from fine_dist.model.dit import DiT, ModelOutput

FEATURE = "repa"
"""Name of the projected tokens in `ModelOutput.features`."""


class AlignedModel(nn.Module):
    """A DiT with a projector: `(z, t, y) -> ModelOutput` with the projected tokens [B, T, E] of one block.

    Args:
        student: The model that trains and is kept.
        block: Number of the block whose tokens are aligned, from 0.
        encoder_width: E.
        hidden: Width of the projector's two hidden layers; the paper's is 2048.
        generator: Seeds the projector.
    """

    def __init__(
        self, student: DiT, block: int, encoder_width: int, hidden: int = 2048, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.student, self.block = student, block
        width = student.arch.hidden_size
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, encoder_width)
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        output = self.student.forward_with_features(z, t, y, [self.block])
        projected = self.projector(output.features[f"block.{self.block}"])  #                              [B, T, E]
        return ModelOutput(output.out, {**output.features, FEATURE: projected})

    # The engine compiles and recomputes blocks of the module that it is given: these are the student's.

    @property
    def blocks(self) -> nn.ModuleList:
        return self.student.blocks

    @property
    def recompute(self) -> Any:
        return self.student.recompute

    @recompute.setter
    def recompute(self, value: Any) -> None:
        self.student.recompute = value

    def projector_flops(self) -> float:
        """FLOPs of the projector's forward and backward pass for one sample."""
        weights = sum(layer.weight.numel() for layer in self.projector if isinstance(layer, nn.Linear))
        return 6.0 * weights * self.student.arch.num_tokens


class RepresentationAlignment:
    """1 minus the cosine of projected tokens and the encoder's tokens of the clean image, averaged over tokens.

    The paper's term is the negative cosine, of the same gradient; this one is 0 where they agree.

    Args:
        encode: Clean latents [B, C, H, H] -> tokens [B, S, E], without gradients.
        weight: Weight of the term; the paper's is 0.5.
    """

    name = "repa"

    def __init__(self, encode: Callable[[Tensor], Tensor], weight: float) -> None:
        self.encode, self.weight = encode, weight

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor:
        ours = output.features[FEATURE].float()
        with torch.no_grad():
            theirs = resize_tokens(self.encode(batch.z).to(ours.device).float(), ours.shape[1])
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean(1)


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """A square grid of tokens [B, S, E] as [B, count, E], bilinearly; unchanged where S is count."""
    if tokens.shape[1] == count:
        return tokens
    side, wanted = math.isqrt(tokens.shape[1]), math.isqrt(count)
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))  #                                         [B, E, s, s]
    grid = F.interpolate(grid, (wanted, wanted), mode="bilinear", antialias=True, align_corners=False)
    return grid.flatten(2).transpose(1, 2)
