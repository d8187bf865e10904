"""Encodes images into latent shards with many processes; a unit of work is one shard, and each is encoded once.

Processes share only the folder of the shards (`encode_locks.py`). A latent depends on its image and the seed, not on
the process that encodes it. Within a process the codec is the bottleneck: a pool of threads reads images, one thread
stacks them and one writes shards, each a batch ahead of or behind the codec.

Letters: B images of a batch, C channels of a latent, H, W height and width of an image.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fine_dist.core.errors import DataError
from fine_dist.data.codecs import Codec
from fine_dist.data.encode_locks import (
    EncodeJob,
    UnitClaims,
    UnitDone,
    count_done,
    mark_done,
    merge,
    record_settings,
    too_many_bad_images,
)
from fine_dist.data.images import ImageItem, ImageSource
from fine_dist.data.manifest import BadInput, Manifest
from fine_dist.data.unit_writer import UnitWriter


@dataclass(frozen=True)
class Encoded:
    """The result of one process: the images that it encoded, its seconds, and the seconds that the codec waited."""

    manifest: Manifest
    images: int
    seconds: float
    waited_s: float


def encode(source: ImageSource, codec: Codec, job: EncodeJob, *, progress: bool = False) -> Encoded:
    """Encode all images of `source` into `job.folder`, together with the other processes that run the same call.

    Returns when everything is encoded and the manifest is written.

    Args:
        source: The images.
        codec: Encodes images as latents.
        job: How to encode.
        progress: Whether to show a progress bar of all processes together.

    Raises:
        DataError: The folder holds latents of other settings, or too many images cannot be read.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    record_settings(job.folder, {**job.settings, "fingerprint": source.fingerprint})
    claims = UnitClaims(job.folder, source.units)
    started, waited, images, bad = time.perf_counter(), 0.0, 0, 0
    with _Threads(job.workers) as threads, closing(claims):
        bar = EncodeProgress(job.folder, source.count, source.units) if progress else None
        with closing(_decoded(threads.images, source, claims, job)) as results, closing(bar) if bar else nullcontext():
            for first in results:
                report_progress = partial(bar.show, count_done(job.folder, source.units)) if bar else None
                part = _encode_unit(first, results, codec, job, threads, report_progress)
                claims.release(first[0])
                if bar:
                    bar.show(count_done(job.folder, source.units), 0)
                waited, images, bad = waited + part.waited_s, images + part.images, bad + part.bad
                if source.count is not None and bad > job.max_bad_fraction * source.count:
                    raise DataError(too_many_bad_images(job, bad, source.count, part.last_bad))
        seconds = time.perf_counter() - started
        manifest = merge(source, codec, job)
    return Encoded(manifest, images, seconds, waited)


# --- one process's share -------------------------------------------------------------------------------------------

Result = tuple[int, ImageItem | None, Any]
"""(unit, one of its images, the image's array or the error). None as the image marks the end of the unit."""


def _decoded(
    pool: ThreadPoolExecutor, source: ImageSource, claims: UnitClaims, job: EncodeJob
) -> Generator[Result, None, None]:
    """The images of the units that this process claims, in order; the pool's threads read ahead."""
    ahead: deque[tuple[int, ImageItem | None, Future[Any] | None]] = deque()
    # One batch in the codec, one stacked, one being read, and a few images for threads that finish out of order.
    most = 3 * job.batch + 2 * job.workers

    def oldest() -> Result:
        unit, item, future = ahead.popleft()
        return unit, item, future and future.result()

    try:
        for unit in claims:
            if unit is None:  # Finish the own units first: the other process may wait for one of them.
                while ahead:
                    yield oldest()
                continue
            for item in source.items(unit):
                ahead.append((unit, item, pool.submit(_read, item)))
                while len(ahead) > most:
                    yield oldest()
            ahead.append((unit, None, None))
        while ahead:
            yield oldest()
    finally:
        for _, _, future in ahead:
            if future is not None:
                future.cancel()


def _read(item: ImageItem) -> np.ndarray | BadInput:
    """The array of an image, or the manifest's entry with the reason why it cannot be read."""
    try:
        return item.read()
    except Exception as error:  # decoders raise errors of many types; the manifest lists them
        text = str(error).replace(str(item.source), "").strip() or type(error).__name__
        return BadInput(source=item.source, error=text.partition("\n")[0][:200])


class _Threads:
    """The thread pools that work in parallel with the codec: reading images, stacking batches, writing shards."""

    def __init__(self, workers: int) -> None:
        self.images = ThreadPoolExecutor(max(1, workers), thread_name_prefix="images")
        self.stack = ThreadPoolExecutor(1, thread_name_prefix="stack")
        self.write = ThreadPoolExecutor(1, thread_name_prefix="shard")

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in (self.images, self.stack, self.write):
            pool.shutdown()


@dataclass
class _UnitResult:
    images: int = 0
    bad: int = 0
    waited_s: float = 0.0
    last_bad: BadInput | None = None


def _encode_unit(
    first: Result,
    results: Iterator[Result],
    codec: Codec,
    job: EncodeJob,
    threads: _Threads,
    report_progress: Callable[[int], None] | None,
) -> _UnitResult:
    """Encode one unit into its shard and mark it as done. `report_progress` gets the number of images so far."""
    part, bad = _UnitResult(), list[BadInput]()
    shard = UnitWriter(threads.write, job, first[0])
    batches = _stacked(chain([first], results), threads.stack, job, bad)
    try:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            sides = batch[0].result() if batch else []
            part.waited_s += time.perf_counter() - started
            if not batch:
                break
            # A mirror image has tokens of its own, which are computed from the mirror image.
            tokens = [job.tokens.grid_tokens(pixels).cpu().numpy() for pixels in sides] if job.tokens else None
            shard.add([codec.encode(pixels) for pixels in sides], batch[1], tokens)
            if report_progress:
                report_progress(shard.images)
        info = shard.close()
    except BaseException:
        # The unit is not marked as done, so that another process can encode it.
        shard.abandon()
        raise
    rows = tuple(tuple(row) for row in shard.sums.tolist())
    done = UnitDone(
        shard=info,
        bad=tuple(bad),
        largest_label=shard.largest,
        shape=shard.shape,
        tokens_shape=shard.tokens_shape,
        sums=rows,
    )
    # Last, because the record states that the shard is on disk.
    mark_done(job.folder, shard.unit, done)
    part.images, part.bad, part.last_bad = shard.images, len(bad), bad[-1] if bad else None
    return part


def _stacked(
    results: Iterator[Result], stack: ThreadPoolExecutor, job: EncodeJob, bad: list[BadInput]
) -> Iterator[tuple[Future[list[torch.Tensor]], list[int]]]:
    """The batches of one unit with their labels; the next batch is stacked while the codec encodes the current one.

    Images that could not be read are appended to `bad`.
    """
    ready: tuple[Future[list[torch.Tensor]], list[int]] | None = None
    first, ended = True, False
    while not ended:
        images, labels = list[np.ndarray](), list[int]()
        for _, item, content in results:
            ended = item is None
            if item is not None and isinstance(content, BadInput):
                bad.append(content)
            elif item is not None:
                images.append(content)
                labels.append(item.label)
            if ended or len(images) == job.batch:
                break
        following = (stack.submit(_pixels, images, job.flips), labels) if images else None
        if ready:
            yield ready
        elif first and following:  # the codec is idle and should not wait until a second batch is read
            yield following
            following = None
        first, ready = False, following
    if ready:
        yield ready


def _pixels(images: list[np.ndarray], flips: bool) -> list[torch.Tensor]:
    """The codec's input of a batch, float32 [B, C, H, W] in [-1, 1]; with `flips` also that of the mirror images."""
    batch = torch.from_numpy(np.stack(images))
    x = batch.float().div_(127.5).sub_(1) if batch.dtype == torch.uint8 else batch
    return [x, x.flip(-1)] if flips else [x]


# --- progress ------------------------------------------------------------------------------------------------------

EVERY_S = 60.0
"""Seconds between two lines in a log."""


class EncodeProgress:
    """A progress bar of all processes that share a folder.

    Args:
        folder: The folder.
        total: Number of images. None: unknown, and shards are counted instead.
        units: Number of shards.
    """

    def __init__(self, folder: Path, total: int | None, units: int) -> None:
        self._folder, self._units = folder, units
        self.total = units if total is None else total
        self.unit = " shards" if total is None else " images"
        self._a_unit = self.total / max(1, units)
        self._started: float | None = None
        self._first, self._logged_at = 0.0, time.monotonic()
        self._bar = tqdm(
            total=self.total, unit=self.unit, desc=f"encode {folder}", disable=not sys.stderr.isatty(), smoothing=0.1
        )

    def show(self, done_units: int, within: int) -> None:
        """Show the progress of all processes together.

        Args:
            done_units: Units that any process has finished.
            within: Images of the unit that this process is working on.
        """
        count = min(self.total, round(done_units * self._a_unit) + (within if self.unit == " images" else 0))
        if self._started is None:  # units that were done before this process started do not count for its rate
            self._started, self._first = time.monotonic(), count
            self._bar.initial = count
            self._bar.start_t = time.time()
        self._bar.n = max(self._bar.n, count)
        self._bar.update(0)
        now = time.monotonic()
        if self._bar.disable and now - self._logged_at >= EVERY_S:
            self._logged_at = now
            print(self.line(count, now - self._started), flush=True)

    def line(self, count: int, seconds: float) -> str:
        """A line for a log: images done, total, rate, and time left."""
        rate = (count - self._first) / max(seconds, 1e-9)
        left = tqdm.format_interval((self.total - count) / rate) if rate else "unknown"
        return f"encode: {self._folder}: {count:,} of {self.total:,}{self.unit}, {rate:.3g}/s, {left} left"

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.refresh()
        self._bar.close()
