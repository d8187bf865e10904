"""What TensorBoard shows of a model that trains: samples, and what its method draws over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fine_dist.artifacts.autoencoder import Decoder
    from fine_dist.data.shards import Manifest
    from fine_dist.methods.base import Method
    from fine_dist.model.arch import Arch
    from fine_dist.stages.config import StageConfig


class Pictures:
    """`(EMA model, step) -> pictures`: samples, a column a class, of the same noise every time, decoded where there is
    a decoder; and the method's tables over depth."""

    def __init__(
        self,
        config: StageConfig,
        arch: Arch,
        method: Method[Any] | None,
        manifest: Manifest,
        decoder: Decoder | None = None,
    ) -> None:
        self.config, self.arch, self.method = config, arch, method
        self.manifest, self.decoder = manifest, decoder

    def __call__(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        import torch

        from fine_dist.evaluation.quick import preview_renderer
        from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, tile_images
        from fine_dist.sampling.renderer import class_name_of

        labels = torch.arange(min(self.arch.num_classes, 10)).repeat(4)
        renderer = preview_renderer(self.config, model, self.manifest, self.decoder)
        drawn = [images for _, images in renderer.render(labels, torch.arange(len(labels)), self.config.seed, False)]
        images = torch.cat(drawn)
        captions = [class_name_of(int(label), renderer.facts, self.arch.num_classes) for label in labels]
        title = f"step {step}" if renderer.pictures else f"step {step}: LATENTS, not decoded (--vae)"
        picture = labelled_grid(
            images if renderer.pictures else latents_as_images(images), captions, len(labels) // 4, title=title
        )
        pictures = {"samples": picture.float() / 255}
        for name, table in sorted_tables(self.method, model).items():
            scale = table.abs().amax().clamp_min(1e-12)
            pictures[name] = tile_images((table / scale)[None, None], 1, zoom=8, gap=0)
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
