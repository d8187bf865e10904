"""What TensorBoard shows of a model that trains: samples, and what its method draws over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.methods.base import Method
from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, tile_images
from fine_dist.sampling.renderer import ImageRenderer, class_name_of

CLASSES, ROWS = 10, 4
"""Columns (the first classes) and rows of a preview, at most."""


class PreviewCallback:
    """`(renderer of the EMA, step) -> pictures`: samples of the same noise every time, a column a class, decoded where
    there is a decoder; and the method's tables over depth.

    method: whose tables are drawn; none draws none. seed: of the samples' noise.
    """

    def __init__(self, method: Method[Any] | None, seed: int) -> None:
        self.method, self.seed = method, seed

    def __call__(self, renderer: ImageRenderer, step: int) -> dict[str, Tensor]:
        num_classes = renderer.model.arch.num_classes
        labels = torch.arange(min(num_classes, CLASSES)).repeat(ROWS)
        drawn = [images for _, images in renderer.render(labels, torch.arange(len(labels)), self.seed, False)]
        images = torch.cat(drawn)
        captions = [class_name_of(int(label), renderer.facts, num_classes) for label in labels]
        title = f"step {step}" if renderer.pictures else f"step {step}: LATENTS, not decoded (--vae)"
        picture = labelled_grid(
            images if renderer.pictures else latents_as_images(images), captions, len(labels) // ROWS, title=title
        )
        pictures = {"samples": picture.float() / 255}
        for name, table in sorted_tables(self.method, renderer.model).items():
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
