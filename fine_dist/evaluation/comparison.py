"""Metrics (FID, KID, ...) of samples against a reference, by name, with notes on how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fine_dist.core.errors import ConfigError, DataError, nearest
from fine_dist.evaluation.frechet import frechet_from
from fine_dist.evaluation.image_statistics import SUBSET, Gaussian, Statistics
from fine_dist.evaluation.scores import kernel_distance, precision_recall

STANDARD = 50_000
"""Images of a FID that may be called so; of another number it is called FID-5k."""
HELD_OUT_LOSS = "held_out_loss"
"""The one metric that asks the model itself, not its images."""
NETWORKS = {
    "fid": "inception",
    "sfid": "inception",
    "is": "inception",
    "precision": "inception",
    "recall": "inception",
    "kid": "inception",
    "fdd": "dinov2",
    "fd_classifier": "classifier",
    "accuracy": "classifier",
}
"""Every metric of images, and its usual network."""
FRECHET = {"fid": "inception", "fdd": "dinov2", "fd_classifier": "classifier"}
"""Fréchet distances on pooled features, each of one network alone."""
ANY_NETWORK = ("is", "precision", "recall", "kid")
"""Metrics that go with any network, and take the only one that is given where it is not Inception."""


@dataclass(frozen=True)
class Score:
    """A number under its full name.

    metric: its key in `NETWORKS`. name: as it is to be printed, with the number of images where that matters.
    value:  none where it cannot be given; `why` says what is missing then.
    spread: standard deviation over parts or subsets, where there are some.
    better: `lower` or `higher`.
    """

    metric: str
    name: str
    value: float | None
    spread: float | None = None
    better: str = "lower"
    why: str | None = None


def networks(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Which networks some metrics usually need, and which of them each measures. `ConfigError` for an unknown one."""
    needed: dict[str, list[str]] = {}
    for metric in metrics:
        if metric not in NETWORKS:
            raise ConfigError(f"metrics: {metric!r} is unknown; {nearest(metric, [HELD_OUT_LOSS, *NETWORKS])}")
        needed.setdefault(NETWORKS[metric], []).append(metric)
    return needed


def compare(samples: Statistics, reference: Statistics, metrics: Sequence[str], *, seed: int = 0) -> list[Score]:
    """The scores of samples, in the order asked. seed: of KID's subsets.

    `ConfigError` for a metric of another network, `DataError` when the two were measured by different networks.
    """
    if samples.features != reference.features or (
        samples.identity and reference.identity and samples.identity != reference.identity
    ):
        raise DataError(
            f"{samples.source} was measured with {samples.features} ({str(samples.identity)[:12]}) and "
            f"{reference.source} with {reference.features} ({str(reference.identity)[:12]}); measure both with "
            "one network"
        )
    size = _size(samples.count)
    scores: list[Score] = []
    both: tuple[float, float] | None = None
    for metric in metrics:
        networks([metric])
        if metric in FRECHET:
            if FRECHET[metric] != samples.features:
                raise ConfigError(f"metrics: {metric} is measured with {FRECHET[metric]}, not with {samples.features}")
            scores.append(Score(metric, samples.distance + size, _frechet(samples.pooled, reference.pooled)))
        elif metric == "sfid":
            scores.append(_spatial(samples, reference, size))
        elif metric == "accuracy":
            why = None if samples.accuracy is not None else f"{samples.source} does not say which class an image shows"
            scores.append(Score("accuracy", "class accuracy", samples.accuracy, None, "higher", why))
        elif metric == "is":
            scores.append(_inception_score(samples, size))
        elif samples.kept is None or reference.kept is None:
            who = samples if samples.kept is None else reference
            why = f"{who.source} holds statistics only, and {metric} needs images (arr_0)"
            better = "lower" if metric == "kid" else "higher"
            scores.append(Score(metric, metric if metric != "kid" else "KID", None, None, better, why))
        elif metric == "kid":
            scores.append(Score("kid", f"KID{size}", *kernel_distance(reference.kept, samples.kept, seed=seed)))
        else:
            both = both or precision_recall(reference.kept, samples.kept)
            scores.append(Score(metric, metric, both[metric == "recall"], None, "higher"))
    return scores


def cautions(samples: Statistics, reference: Statistics, metrics: Sequence[str], adm: bool = False) -> list[str]:
    """What a reader of these scores should know: too few samples, above all.

    Args:
        adm: Precision and recall were made by ADM's protocol, of all 50,000 samples.
    """
    warnings = []
    frechet = [metric for metric in metrics if metric in FRECHET or metric == "sfid"]
    count = samples.count or STANDARD
    if frechet and count <= len(samples.pooled.mean):
        warnings.append(
            f"{count} samples have a singular covariance of {len(samples.pooled.mean)} features: "
            f"{', '.join(frechet)} is far too large and compares only between equal numbers of samples"
        )
    elif frechet and count < STANDARD:
        warnings.append(
            f"{count} samples: {', '.join(frechet)} is larger than with {STANDARD}, and compares only between equal "
            "numbers of samples"
        )
    near = [metric for metric in ("precision", "recall") if metric in metrics]
    subset_sizes = [len(s.kept) for s in (samples, reference) if s.kept is not None]
    wanted = (STANDARD, SUBSET) if adm else (SUBSET, SUBSET)
    if near and len(subset_sizes) == 2 and any(n < most for n, most in zip(subset_sizes, wanted)):
        warnings.append(
            f"{' and '.join(near)} of {subset_sizes[0]} samples against {subset_sizes[1]} real images; the literature "
            f"takes {wanted[0]} against {wanted[1]}"
        )
    return warnings


def _frechet(a: Gaussian, b: Gaussian) -> float:
    return frechet_from(a.mean, a.covariance, b.mean, b.covariance)


def _spatial(samples: Statistics, reference: Statistics, size: str) -> Score:
    name = "sFID" + size
    for who in (samples, reference):
        if who.spatial is None:
            return Score("sfid", name, None, why=f"{who.source} has no spatial statistics (mu_s, sigma_s)")
    assert samples.spatial is not None and reference.spatial is not None
    return Score("sfid", name, _frechet(samples.spatial, reference.spatial))


def _inception_score(samples: Statistics, size: str) -> Score:
    if samples.classes is None:
        return Score("is", "IS" + size, None, None, "higher", f"{samples.features} has no classes")
    name = "IS" if samples.features == "inception" else f"IS({samples.features})"
    return Score("is", name + size, *samples.classes, "higher")


def _size(count: int | None) -> str:
    if count is None or count == STANDARD:
        return ""
    return f"-{count // 1000}k" if count % 1000 == 0 else f"-{count}"
