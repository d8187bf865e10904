"""What TensorBoard shows of a model that trains: samples, and what its method draws over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.methods import Method
    from fine_dist.model.zoo import Arch
    from fine_dist.stages.config import StageConfig


class Pictures:
    """`(EMA model, step) -> pictures`: samples, a row a class, and the method's tables over depth."""

    def __init__(self, config: StageConfig, arch: Arch, method: Method[Any] | None):
        self.config, self.arch, self.method = config, arch, method

    def __call__(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        import torch

        from fine_dist.diffusion.sample import grid, sample

        classes = torch.arange(min(self.arch.num_classes, 10)).repeat_interleave(4)
        images = sample(
            model,
            labels=classes,
            arch=self.arch,
            config=self.config.sampler,
            diffusion=self.config.diffusion,
            seed=self.config.seed,
        )
        zoom = max(1, 64 // self.arch.input_size)
        pictures = {"samples": grid(images, 10, zoom=zoom)}
        for name, table in sorted_tables(self.method, model).items():
            scale = table.abs().amax().clamp_min(1e-12)
            pictures[name] = grid((table / scale)[None, None], 1, zoom=8, gap=0)
        return pictures


def sorted_tables(method: Method[Any] | None, model: nn.Module) -> dict[str, Tensor]:
    """The method's tables [L, R] over depth by `TITLE/NAME`, components sorted by their mean; none without a method."""
    if method is None:
        return {}
    tables = method.tables(model).items()
    return {f"{method.tables_of}/{name}": table[:, table.mean(0).argsort(descending=True)] for name, table in tables}


def histograms_of(method: Method[Any] | None) -> Callable[[nn.Module], dict[str, Tensor]]:
    """The same tables, for TensorBoard's histograms."""
    return lambda model: sorted_tables(method, model)
