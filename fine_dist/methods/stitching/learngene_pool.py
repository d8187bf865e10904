"""Learngene Pool (arXiv 2312.05743): small anchors distilled from an ancestor, stitched into models of many sizes.

Stage 1 distils anchors of several widths, each by 0.1 of the diffusion loss and 0.9 of (output + block MSE + attention
MSE). The narrowest anchor's blocks d/3, 2d/3, d imitate the ancestor's 4 of 12, 8 of 12, 12 of 12 (by thirds of
whatever depths); wider anchors imitate its last block alone. Stage 2 joins them (`stitching.pool`): from narrow to
wide, neighboring widths, |j - k| <= 1; each step trains one random route (the paper's lr 5e-5). Any route deploys.

What an artifact holds, and how `arch` describes it: `stitching/method.py`.

*Choices*: an anchor a step, drawn uniformly. Maps go from the anchor's features to the ancestor's width (the authors'
go the other way): a map of the target features could shrink both sides to nothing. So a stitch begins as the mean of
the narrow anchor's block maps as they are, where the authors transpose, weight only; where the back anchor is narrower
than the ancestor, the pseudo-inverse of its own mean map leads back. Features are averaged over blocks.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.methods.base import Condensation, MethodConfig, Parent, Traits, Weights
from fine_dist.methods.stitching.config import LearngenePoolConfig
from fine_dist.methods.stitching.method import Stitching
from fine_dist.methods.stitching.pool import Imitating, Pool, drawn
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT


class LearngenePool(Stitching[LearngenePoolConfig]):
    """Stitches begin as the distillation's own maps."""

    Config: ClassVar[type[MethodConfig]] = LearngenePoolConfig
    label: ClassVar[str] = "Learngene Pool"
    paper: ClassVar[str] = "Learngene Pool, arXiv 2312.05743"
    summary: ClassVar[str] = "distilled anchors of several widths, stitched by their maps"
    windows: ClassVar[bool] = False

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene", "model"),
            varies=frozenset(),
            condenses=True,
            ancestor="must",
            # the features' term is the mean over both sorts of features: twice its weight is the sum of the two
            loss=Weights(diffusion=0.1, output=0.9, features=1.8),
            dense=False,
        )

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        if ancestor is None:
            raise ArtifactError(f"method {self.config.name} distils an ancestor; give its folder as ancestor")
        module = self.blueprint(arch, ancestor.arch, generator)
        pool: Any = module.pool
        pairs = []
        for taps in module.taps:  # type: ignore[union-attr]
            for name, (kind, _) in taps.items():
                third = int(name.rpartition("_")[2])
                pairs.append((name, f"{kind}.{thirds(ancestor.arch.num_layers)[third]}"))
        return Condensation(module, pairs=pairs, before_step=drawn(pool, pool.routes), prefix="pool.")

    def blueprint(self, arch: Arch, teacher: Arch | None = None, generator: torch.Generator | None = None) -> nn.Module:
        pool = self.pool_of(arch, generator)
        taps: list[dict[str, tuple[str, int]]] = []
        for anchor in range(len(self.config.widths)):
            places = thirds(arch.num_layers)
            own = {
                f"{anchor}_{kind}_{third}": (kind, places[third])
                for third in ((0, 1, 2) if anchor == 0 else (2,))
                for kind in ("block", "attention")
            }
            for key in own:
                pool.add_map(key, anchor, (teacher or arch).hidden_size, generator)
            taps.append(own)
        return Imitating(pool, taps)

    def begin_stitches(self, pool: Pool, parent: Parent, generator: torch.Generator) -> None:
        with torch.no_grad():
            for route in pool.routes:
                if route.last is None:
                    continue
                stitch = pool.stitches[pool.stitch_key(route)]
                stitch.weight.copy_(between(pool, route.anchor))  # type: ignore[operator]
                stitch.bias.zero_()  # type: ignore[operator]


def thirds(num_layers: int) -> list[int]:
    """The blocks at the ends of the thirds of a depth, counted from 0: 3, 7 and 11 of 12."""
    return [math.ceil(num_layers * part / 3) - 1 for part in (1, 2, 3)]


def mean_map(pool: Pool, anchor: int) -> Tensor:
    """The mean of an anchor's block maps, [D_t, D]."""
    maps: Any = [m.weight for key, m in pool.maps.items() if key.startswith(f"{anchor}_block_")]
    return torch.stack(maps).mean(0)


def between(pool: Pool, anchor: int) -> Tensor:
    """Where a stitch from an anchor to the next wider one begins, [D_b, D_a]."""
    to_teacher = mean_map(pool, anchor)
    if len(to_teacher) == pool.width(anchor + 1):
        return to_teacher
    from_teacher: Tensor = torch.linalg.pinv(mean_map(pool, anchor + 1))
    return from_teacher @ to_teacher
