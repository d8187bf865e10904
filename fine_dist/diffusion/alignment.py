"""REPA (arXiv 2410.06940): a block's tokens are aligned with a frozen image encoder's while the model trains.

A projector maps the tokens of one block to the encoder's width. It trains with the model and is dropped afterwards.

Shapes: B batch, T the model's tokens, h, w the encoder's rows and columns of tokens, D the model's width,
E the encoder's width.
"""

from __future__ import annotations

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

    # The engine compiles and recomputes `blocks` of its model; here they are those of the student.

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

    The paper's term is the negative cosine, which has the same gradient; this term is 0 if the tokens agree.

    Args:
        encode: Clean latents [B, C, H, W] -> tokens [B, E, h, w], without gradients. None: batches contain the tokens.
        weight: Weight of the term; the paper's is 0.5.
        grid: Rows and columns of the model's tokens.
    """

    name = "repa"

    def __init__(self, encode: Callable[[Tensor], Tensor] | None, weight: float, grid: tuple[int, int]) -> None:
        self.encode, self.weight, self.grid = encode, weight, grid

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor:
        projected = output.features[FEATURE].float()
        with torch.no_grad():
            tokens = self.encode(batch.z) if self.encode is not None else batch.tokens
            assert tokens is not None, "the stream reads no tokens"
            target = resize_tokens(tokens.to(projected.device).float(), self.grid)
        return 1 - F.cosine_similarity(projected, target, dim=-1).mean(1)


def resize_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """A grid of tokens [B, E, h, w] resized bilinearly to the tokens [B, T, E] of another grid."""
    if tokens.shape[2:] != grid:
        tokens = F.interpolate(tokens, grid, mode="bilinear", antialias=True, align_corners=False)
    return tokens.flatten(2).transpose(1, 2)
