"""scikit-learn's digits: a real data set that needs no download (1,797 grey images of 8x8, ten classes)."""

from __future__ import annotations

import numpy as np

from fine_dist.core.errors import DataError

NUM_TRAIN = 1500
SPLITS = ("train", "held_out")


def digits(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The images of a split: float32 [N, 1, 8, 8] in [-1, 1], and labels int64 [N].

    `train` is the first 1,500 in scikit-learn's order, `held_out` the other 297. `DataError` for another name.
    """
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise DataError(f"digits have no split {split!r}; legal: {', '.join(SPLITS)}")
    data = load_digits()
    part = slice(None, NUM_TRAIN) if split == "train" else slice(NUM_TRAIN, None)
    # grey values are 0..16: the result is exact in float16
    images = (data.images[part] / 8.0 - 1.0).astype(np.float32)[:, None]
    return images, data.target[part].astype(np.int64)
