"""Metrics (FID, KID, ...) of samples against a reference, by name, with notes on how to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fine_dist.core.errors import ConfigError, DataError, nearest
from fine_dist.evaluation.frechet import frechet_from
from fine_dist.evaluation.image_statistics import SUBSET, Gaussian, Statistics
from fine_dist.evaluation.scores import kernel_distance, precision_recall

STANDARD = 50_000
"""Number of images of a plain FID. With other numbers the name has a suffix, such as FID-5k."""
HELD_OUT_LOSS = "held_out_loss"
"""The only metric that is computed from the model and not from its images."""
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
"""Every metric of images, and its default network."""
FRECHET = {"fid": "inception", "fdd": "dinov2", "fd_classifier": "classifier"}
"""Fréchet distances on pooled features; each is defined for one network only."""
ANY_NETWORK = ("is", "precision", "recall", "kid")
"""Metrics that are defined for any network. If Inception is not given, they use the only network that is."""


@dataclass(frozen=True)
class Score:
    """The value of a metric.

    metric: key in `NETWORKS`.
    name:   name to print, with the number of images if the metric depends on it.
    value:  None if it cannot be computed; `why` then gives the reason.
    spread: standard deviation over parts or subsets, if there are several.
    better: `lower` or `higher`.
    """

    metric: str
    name: str
    value: float | None
    spread: float | None = None
    better: str = "lower"
    why: str | None = None


def networks(metrics: Iterable[str]) -> dict[str, list[str]]:
    """{network: metrics} of some metrics by default network. `ConfigError` for an unknown metric."""
    needed: dict[str, list[str]] = {}
    for metric in metrics:
        if metric not in NETWORKS:
            raise ConfigError(f"metrics: {metric!r} is unknown; {nearest(metric, [HELD_OUT_LOSS, *NETWORKS])}")
        needed.setdefault(NETWORKS[metric], []).append(metric)
    return needed


def compare(samples: Statistics, reference: Statistics, metrics: Sequence[str], *, seed: int = 0) -> list[Score]:
    """The scores of samples against a reference, in the order of `metrics`.

    Args:
        samples: Statistics of the samples.
        reference: Statistics of the real images.
        metrics: Keys of `NETWORKS`.
        seed: Seed of the random subsets of KID.

    Raises:
        ConfigError: A metric is defined for another network.
        DataError: The two statistics come from different networks.
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
    """Warnings about these scores, such as too few samples.

    Args:
        samples: Statistics of the samples.
        reference: Statistics of the real images.
        metrics: The metrics of the scores.
        adm: Whether precision and recall follow ADM's protocol, which uses all 50,000 samples.
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
