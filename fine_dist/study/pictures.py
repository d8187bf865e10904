"""The pictures of a study: samples of its models, and real data, a column a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.study.config import Entry, StudyConfig
from fine_dist.study.report.results import Picture

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.evaluation.evaluator import Evaluator

COLUMNS = 10
"""Of a grid, about: a multiple of the classes, where they are not too many."""


def pictured(study: StudyConfig, entry: Entry) -> bool:
    """Whether an entry's models are shown in pictures."""
    return bool(study.pictures) and (not study.pictured or entry.name in study.pictured)


def samples(study: StudyConfig, evaluator: Evaluator, folder: Path, **fields: Any) -> Picture:
    """Samples of a model on disk; `fields` are the picture's."""
    import torch

    renderer = evaluator.renderer(str(folder))
    num_classes, numbers = renderer.model.arch.num_classes, torch.arange(study.pictures)
    drawn = renderer.render(numbers % num_classes, numbers, evaluator.config.seed, "sample pictures")
    images = torch.cat([batch.latents for batch, _ in drawn])
    return Picture(image=_grid(study, images, num_classes), **fields)


def real(study: StudyConfig) -> Picture:
    """Held-out real data in the order of the samples: labels in turn."""
    import torch

    from fine_dist.data.stream import read_all

    images, labels = read_all(str(study.root / next(iter(study.data)) / "held_out"))
    classes = labels.unique()
    each = max(1, study.pictures // len(classes))
    columns = [(labels == label).nonzero().flatten()[:each] for label in classes]
    order = torch.tensor([int(column[i]) for i in range(each) for column in columns if i < len(column)])
    return Picture(image=_grid(study, images[order], len(classes)), caption="held-out real data")


def _grid(study: StudyConfig, images: Tensor, num_classes: int) -> Tensor:
    from fine_dist.sampling.image_grid import tile_images

    low, high = (1.0, -1.0) if study.ink else (-1.0, 1.0)
    columns = num_classes * max(1, COLUMNS // num_classes) if num_classes <= 2 * COLUMNS else COLUMNS
    return tile_images(images, columns, low=low, high=high, zoom=max(1, 48 // images.shape[-1]), gap=2)
