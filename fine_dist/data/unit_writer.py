"""Writes the latents of one unit into a shard, in a thread, while the codec encodes the next batch.

Letters: B images of a batch, C channels, H height and W width of a latent.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from fine_dist.data.encode_locks import EncodeJob
from fine_dist.data.manifest import ShardInfo
from fine_dist.data.shards import ShardWriter

_NOISE = 0x656E636F6465
"""Constant that separates the noise of sampled latents from other uses of the seed."""
_BEHIND = 2
"""Maximum number of batches that wait to be written before the codec blocks."""
EncodedBatch = tuple[torch.Tensor, torch.Tensor | None]
"""Mean and standard deviation (None for a deterministic codec) of a batch, float32 [B, C, H, W]."""


class UnitWriter:
    """Writes the shard of a unit. An error of the thread, such as a full disk, is raised by the next `add` or `close`.

    Attributes:
        images: Number of images added so far.
        shape: Shape of a stored latent, once closed.
        tokens_shape: Shape of the image encoder's tokens, once closed; None without them.
        largest: Largest label, once closed.
        sums: Count, sum and sum of squares of the values (for moments, of the means), [3, C], once closed.
    """

    def __init__(self, thread: ThreadPoolExecutor, job: EncodeJob, unit: int) -> None:
        self.unit, self.images, self.largest = unit, 0, -1
        self.shape: tuple[int, ...] | None = None
        self.tokens_shape: tuple[int, int, int] | None = None
        self.sums = np.zeros((3, 0))
        self._thread, self._job = thread, job
        self._writer: ShardWriter | None = None
        self._behind: deque[Future[None]] = deque()

    def add(self, sides: list[EncodedBatch], labels: list[int], tokens: list[np.ndarray] | None = None) -> None:
        """Append a batch.

        Args:
            sides: The codec's results for the images and, with `flips`, for their mirror images.
            labels: Classes of the images.
            tokens: The image encoder's tokens [B, E, h, w] of each side. None: no tokens are stored.
        """
        while len(self._behind) >= _BEHIND:
            # Bounded, because a codec that is faster than the disk would fill the memory with latents.
            self._behind.popleft().result()
        self._behind.append(self._thread.submit(self._write, sides, labels, tokens, self.images))
        self.images += len(labels)
        self.largest = max(self.largest, *labels)

    def close(self) -> ShardInfo | None:
        """Finish the shard; returns its manifest entry, or None if it has no image."""
        while self._behind:
            self._behind.popleft().result()
        return self._writer.close() if self._writer else None

    def abandon(self) -> None:
        """Drop the unfinished shard."""
        for future in self._behind:
            future.cancel()
        wait(self._behind)
        if self._writer:
            self._writer.abandon()

    def _write(self, sides: list[EncodedBatch], labels: list[int], tokens: list[np.ndarray] | None, first: int) -> None:
        latents = [self._latents(*encoded, side, first) for side, encoded in enumerate(sides)]
        for (mean, _), stored in zip(sides, latents):
            # Statistics of the stored values in fp64, because fp32 sums over millions of latents lose digits.
            values = stored[:, : mean.shape[1]].astype(np.float64)
            count = np.full(values.shape[1], values.size / values.shape[1])
            sums = np.stack([count, values.sum((0, 2, 3)), np.square(values).sum((0, 2, 3))])
            self.sums = self.sums + sums if self.sums.size else sums
        for row, label in enumerate(labels):
            for number, side in enumerate(latents):
                beside = tokens[number][row] if tokens else None
                if self._writer is None:
                    self.shape = side[row].shape
                    if beside is not None:
                        self.tokens_shape = beside.shape
                    extra = (beside.shape, self._job.tokens_dtype) if beside is not None else None
                    self._writer = ShardWriter(self._job.folder, self.unit, side[row].shape, self._job.dtype, extra)
                self._writer.add(side[row], label, beside)

    def _latents(self, mean: torch.Tensor, std: torch.Tensor | None, side: int, first: int) -> np.ndarray:
        """The stored array of a batch: the moments, or mean + std * noise, seeded by (seed, side, image, unit)."""
        if std is None:
            return mean.numpy()
        if self._job.kind == "moments":
            return torch.cat([mean, std], 1).numpy()
        noise = np.empty(mean.shape, np.float32)
        for row in range(len(noise)):
            rng = np.random.Generator(
                np.random.Philox(key=[self._job.seed, _NOISE], counter=[0, side, first + row, self.unit])
            )
            rng.standard_normal(dtype=np.float32, out=noise[row])
        return (mean + std * torch.from_numpy(noise)).numpy()
