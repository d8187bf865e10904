"""SN-Net (stitchable neural networks, arXiv 2302.06586): anchors trained as they are, joined by least squares.

Stage 1 trains anchors of several widths on the plain diffusion loss (with an ancestor and `loss.output`, by distilling
it); a learngene of `learngene_pool` serves as well. Stage 2 joins them (`stitching.pool`): a stitch is shared by the
pairs of blocks of a sliding window (two blocks, stride one) and begins as the mean of their least-squares maps from the
front block's output to the *input* of the back block; each step then trains one random route (lr 5e-5).

The least squares look at 100 images of the target's data, each noised to a timestep of its own. Where a target is made
without data, Gaussian latents stand in: latents are scaled to variance one, and noising keeps it.

What an artifact holds, and how `arch` describes it: `stitching/method.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.methods.base import Condensation, MethodConfig, Parent, Traits
from fine_dist.methods.stitching.config import SnnetConfig
from fine_dist.methods.stitching.method import Stitching
from fine_dist.methods.stitching.pool import Pool, drawn, fit_stitches
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT


class Snnet(Stitching[SnnetConfig]):
    """Stitches begin as least-squares maps, shared by windows."""

    Config: ClassVar[type[MethodConfig]] = SnnetConfig
    label: ClassVar[str] = "SN-Net"
    paper: ClassVar[str] = "Stitchable Neural Networks, arXiv 2302.06586"
    summary: ClassVar[str] = "anchors of several widths, stitched by least squares"
    windows: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene", "model"),
            varies=frozenset(),
            condenses=True,
            ancestor="may",
            dense=False,
            samples=self.config.images,
        )

    @property
    def from_methods(self) -> tuple[str, ...]:
        return ("snnet", "learngene_pool")

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        module = self.blueprint(arch, generator)
        pool: Any = module
        return Condensation(module, before_step=drawn(pool, pool.routes))

    def blueprint(self, arch: Arch, generator: torch.Generator | None = None) -> nn.Module:
        return self.pool_of(arch, generator)

    def begin_stitches(self, pool: Pool, parent: Parent, generator: torch.Generator) -> None:
        fit_stitches(pool, *self.questions(pool.arch, parent, generator))

    def questions(self, arch: Arch, parent: Parent, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(z_t, t, y) that the least squares look at."""
        if parent.samples is None:
            z = torch.randn(self.config.images, *arch.latent_shape, generator=generator)
            y = torch.randint(arch.num_classes, (len(z),), generator=generator)
        else:
            z, y = parent.samples
        # The parent's process: stitches must fit the activations that its anchors were trained to give.
        process = make_process(DiffusionConfig.model_validate(parent.artifact.extra.get("diffusion") or {}))
        t = process.random_times(len(z), generator)
        return process.add_noise(z, t, torch.randn(z.shape, generator=generator)), t, y
