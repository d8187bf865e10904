"""`python -m benchmarks metrics`: every metric at 50,000 images of Inception's sizes, and its memory.

Features are noise of the right shapes (N images, 2048 pooled features, 2023 spatial ones, 1008 classes), because only
the computations after the network are timed. The Fréchet distance is compared with scipy's `sqrtm`, which most
implementations use; both are timed alternately. All run with one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.peak_memory import resident_growth
from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds

if TYPE_CHECKING:
    from torch import Tensor

FRECHET_BAR = 0.2
"""Target of the time of our Fréchet distance over that of scipy's `sqrtm` alone."""
MEMORY_BAR_GIB = 2.0
"""Target of the memory of precision and recall with 10,000 real and 10,000 generated images, in GiB."""
BATCH = 500
"""Number of images of which features are added at once."""


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows.

    Args:
        quick: Whether to use 2,000 images of 256 features; there are no targets then.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images, pooled, spatial, classes = (2000, 256, 200, 100) if quick else (50_000, 2048, 2023, 1008)
        rows = frechet_rows(pooled, rounds=2 if quick else 3, bar=None if quick else FRECHET_BAR)
        return rows + metric_rows(images, pooled, spatial, classes, kept=min(images, 10_000), bars=not quick)
    finally:
        torch.set_num_threads(threads)


def frechet_rows(num: int, rounds: int, bar: float | None) -> list[BenchmarkRow]:
    """Rows about the Fréchet distance, with regular and with singular covariances.

    Args:
        num: Number of features.
        rounds: Number of measurements.
        bar: Target of our time over scipy's.
    """
    import scipy.linalg

    from fine_dist.evaluation.frechet import frechet_from

    say(f"the Fréchet distance of {num} features")
    a, b = covariance(num, 4 * num, 0), covariance(num, 4 * num, 1)
    singular = covariance(num, num // 2, 2)
    mean = a.new_zeros(num)
    product = (a @ b).numpy()
    times = interleaved(
        {
            "ours": lambda: seconds(lambda: frechet_from(mean, a, mean, b)),
            "singular": lambda: seconds(lambda: frechet_from(mean, singular, mean, b)),
            "sqrtm": lambda: seconds(lambda: scipy.linalg.sqrtm(product)),
        },
        rounds,
        warmup=0,
    )
    ours = frechet_from(mean, a, mean, b)
    theirs = float(a.trace() + b.trace()) - 2 * float(scipy.linalg.sqrtm(product).trace().real)
    return [
        BenchmarkRow(f"Fréchet distance, {num} features", median(times["ours"]), "s", None, "lower"),
        BenchmarkRow("  over scipy's sqrtm", median_of_ratios(times["ours"], times["sqrtm"]), "x", bar, "lower"),
        BenchmarkRow("  difference to sqrtm's result, relative", abs(ours - theirs) / theirs, "x", None, "lower"),
        BenchmarkRow(
            "  singular covariance, over sqrtm", median_of_ratios(times["singular"], times["sqrtm"]), "x", None, "lower"
        ),
    ]


def covariance(num: int, samples: int, seed: int) -> Tensor:
    """The covariance of normal samples whose standard deviations range from 1 to 0.01, float64 [num, num]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, num, generator=generator, dtype=torch.float64)
    return torch.cov((x * torch.logspace(0, -2, num)).T)


def metric_rows(images: int, pooled: int, spatial: int, classes: int, kept: int, bars: bool) -> list[BenchmarkRow]:
    """Seconds and memory of each metric, without the network.

    Args:
        images: Number of images.
        pooled: Number of pooled features.
        spatial: Number of spatial features.
        classes: Number of classes.
        kept: Number of real and of generated images for precision and recall and for KID.
        bars: Whether rows have targets.
    """
    import torch

    from fine_dist.evaluation.moments import Moments
    from fine_dist.evaluation.scores import ClassSums, kernel_distance, precision_recall

    generator = torch.Generator().manual_seed(0)

    def batches(width: int) -> list[Tensor]:
        """Four batches of features, which are used repeatedly, because 50,000 rows of them would take much memory."""
        return [torch.randn(BATCH, width, generator=generator) for _ in range(4)]

    def moments(width: int) -> Callable[[], object]:
        parts = batches(width)

        def body() -> object:
            total = Moments.empty(width)
            for i in range(images // BATCH):
                total.update(parts[i % 4])
            return total.covariance()

        return body

    logits = batches(classes)

    def inception_score() -> object:
        sums = ClassSums.empty(images, classes)
        for i in range(images // BATCH):
            sums.update(logits[i % 4], torch.arange(i * BATCH, (i + 1) * BATCH))
        return sums.score()

    real, fake = (torch.randn(kept, pooled, generator=generator) for _ in range(2))
    bodies: dict[str, tuple[Callable[[], object], float | None]] = {
        f"moments for FID, {images} x {pooled}": (moments(pooled), None),
        f"moments for sFID, {images} x {spatial}": (moments(spatial), None),
        f"Inception Score, {images} x {classes}": (inception_score, None),
        f"precision and recall, {kept} x {kept} x {pooled}": (
            lambda: precision_recall(real, fake),
            MEMORY_BAR_GIB if bars else None,
        ),
        f"KID, 100 subsets of {min(kept, 1000)} x {pooled}": (lambda: kernel_distance(real, fake), None),
    }
    rows = []
    for name, (body, bar) in bodies.items():
        say(name)
        times: list[float] = []
        grown = resident_growth(lambda body=body, times=times: times.append(seconds(body)))  # type: ignore[misc]
        rows.append(BenchmarkRow(name, times[0], "s", None, "lower"))
        rows.append(BenchmarkRow("  memory beside its inputs", grown / 2**30, "GiB", bar, "lower"))
    return rows
