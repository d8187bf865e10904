"""How a table of numbers a layer moves over depth: principal components, and how close to a line they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Linearity:
    """How a table [L, R] moves with depth: `score` [L] on its first principal component, that score's correlation
    with depth, and the share of variance that a straight line in depth explains (R²)."""

    mean: np.ndarray
    direction: np.ndarray
    score: np.ndarray
    correlation: float
    r_squared: float


def linearity(table: Any) -> Linearity | None:
    """PCA over the layers of a table [L, R]. None for fewer than 3 layers or a table that does not move."""
    values = np.asarray(table, dtype=np.float64)
    if len(values) < 3 or np.allclose(values, values[0]):
        return None
    mean = values.mean(axis=0)
    centred = values - mean
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    score, direction = left[:, 0] * singular[0], right[0]
    depth = np.linspace(-1, 1, len(values))
    slope = depth @ centred / (depth @ depth)
    if score @ depth < 0:
        score, direction = -score, -direction
    return Linearity(
        mean,
        direction,
        score,
        float(np.corrcoef(score, depth)[0, 1]),
        float(((depth[:, None] * slope) ** 2).sum() / (centred**2).sum()),
    )
