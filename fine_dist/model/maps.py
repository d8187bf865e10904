"""Trained maps from a student's features to a teacher's width, part of what stage 1 trains and not of what it keeps.

Shapes: B batch, T tokens, D_s and D_t the student's and the teacher's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fine_dist.model.dit import DiT, ModelOutput


class Mapped(nn.Module):
    """`(z, t, y) -> ModelOutput`: a student, and some of its features through linear maps [B, T, D_s] -> [B, T, D_t].

    features: names as `DiT.forward_with_features` gives them, `block.3` or `attention.3`. width: D_t.
    """

    def __init__(self, student: DiT, features: Sequence[str], width: int, generator: torch.Generator | None = None):
        super().__init__()
        self.student, self.arch = student, student.arch
        self.wanted = tuple(features)
        self.layers = sorted({int(name.rpartition(".")[2]) for name in features})
        self.maps = nn.ModuleList(nn.Linear(student.arch.hidden_size, width) for _ in features)
        for linear in self.maps:
            nn.init.xavier_uniform_(linear.weight, generator=generator)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        answer = self.student.forward_with_features(z, t, y, self.layers)
        mapped = {name: linear(answer.features[name]) for name, linear in zip(self.wanted, self.maps)}
        return ModelOutput(answer.out, mapped)

    @property
    def recompute(self) -> str:
        """How much the student recomputes in its backward pass."""
        return self.student.recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        self.student.recompute = value
