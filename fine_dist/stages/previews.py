"""What TensorBoard shows of a model that trains: samples, and what its method draws over depth."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fine_dist.engine.stopping import Budget
from fine_dist.methods.base import Method, MethodConfig
from fine_dist.sampling.image_grid import labelled_grid, latents_as_images, tile_images
from fine_dist.sampling.renderer import ImageRenderer, class_name_of

log = logging.getLogger(__name__)

CLASSES, ROWS = 10, 4
"""Columns (the first classes) and rows of a preview, at most."""


class PreviewCallback:
    """`(renderer of the EMA, step, budget) -> images`: samples of the same noise every time, a column a class, decoded
    where there is a decoder; and the method's tables over depth.

    Rows are drawn one after the other, so that a preview which must end early shows the rows it has.

    Args:
        method: Whose tables are drawn; None draws none.
        seed: Seeds the samples' noise.
    """

    def __init__(self, method: Method[MethodConfig] | None, seed: int) -> None:
        self.method, self.seed = method, seed

    def __call__(self, renderer: ImageRenderer, step: int, budget: Budget) -> dict[str, Tensor]:
        images: dict[str, Tensor] = {}
        samples, shown = self._samples(renderer, step, budget)
        if shown:
            num_classes = renderer.model.arch.num_classes
            labels = range(min(num_classes, CLASSES))
            captions = [class_name_of(label, renderer.facts, num_classes) for label in labels] * shown
            title = f"step {step}" if renderer.pictures else f"step {step}: LATENTS, not decoded (--vae)"
            samples = samples if renderer.pictures else latents_as_images(samples)
            images["samples"] = labelled_grid(samples, captions, len(labels), title=title).float() / 255
        for name, table in sorted_tables(self.method, renderer.model).items():
            scale = table.abs().amax().clamp_min(1e-12)
            images[name] = tile_images((table / scale)[None, None], 1, zoom=8, gap=0)
        return images

    def _samples(self, renderer: ImageRenderer, step: int, budget: Budget) -> tuple[Tensor, int]:
        """Samples [rows x classes, C, H, W] and how many rows there was time for."""
        columns = min(renderer.model.arch.num_classes, CLASSES)
        rows: list[Tensor] = []

        def check(*_: Any) -> None:
            if why := budget.used_up():
                raise _OutOfTime(why)

        # The model is called at every denoising step: the one place where slow sampling can be ended in time.
        hook = renderer.model.register_forward_pre_hook(check)
        try:
            for row in tqdm(range(ROWS), desc=f"preview at step {step}", unit="row", leave=False):
                numbers = torch.arange(row * columns, (row + 1) * columns)
                batches = renderer.render(numbers % columns, numbers, self.seed, False)
                rows.append(torch.cat([part for _, part in batches]))
        except _OutOfTime as error:
            log.warning("the preview at step %d has %d of %d rows: %s", step, len(rows), ROWS, error)
        finally:
            hook.remove()
        return torch.cat(rows) if rows else torch.empty(0), len(rows)


class _OutOfTime(Exception):
    """Ends the sampling of a preview; carries the reason."""


def sorted_tables(method: Method[MethodConfig] | None, model: nn.Module) -> dict[str, Tensor]:
    """The method's tables [L, R] over depth by `TITLE/NAME`, components sorted by their mean; none without a method."""
    if method is None:
        return {}
    tables = method.tables(model).items()
    return {f"{method.tables_of}/{name}": table[:, table.mean(0).argsort(descending=True)] for name, table in tables}


def histograms_of(method: Method[MethodConfig] | None) -> Callable[[nn.Module], dict[str, Tensor]]:
    """The same tables, for TensorBoard's histograms."""
    return lambda model: sorted_tables(method, model)
