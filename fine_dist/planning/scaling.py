"""From a config and a request of `plan --scale` to predictions: parts measured or read, links as stated."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import ConfigError
from fine_dist.planning.scaling_model import STAGES, Link, Network, Parts, Prediction, predict, shares

if TYPE_CHECKING:
    from torch import nn

    from fine_dist.model.arch import Arch
    from fine_dist.stages.config import Blueprint, StageConfig

log = logging.getLogger(__name__)

ANCESTOR = "its ancestor"
GLOO_PROCESSES = 16
"""Local processes that links are measured between, at most."""


@dataclass(frozen=True)
class ScalingRequest:
    """What is predicted, and what is stated of the machines."""

    processes: tuple[int, ...]
    stages: tuple[int, ...] = STAGES
    hold: str = "process"
    per_node: int = 8
    gigabytes_per_s: tuple[float, float] = (150.0, 25.0)
    """Of a process inside its node, and between nodes."""
    microseconds: tuple[float, float] = (5.0, 15.0)
    overlap: float = 0.0
    cores: int | None = None
    """Cores of a node, which its processes share; none: each has its own device."""
    gloo: bool = False

    def check(self) -> None:
        """`ConfigError` for what no machine has."""
        for flag, values in (("scale", self.processes), ("per-node", (self.per_node,)), ("cores", (self.cores or 1,))):
            if low := [value for value in values if value < 1]:
                raise ConfigError(f"--{flag}: {low[0]}; give 1 or more")
        if len(set(self.processes)) < len(self.processes):
            raise ConfigError(
                f"--scale: {' '.join(map(str, self.processes))}: a number of processes stands there twice"
            )
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ConfigError(f"--zero: {unknown[0]}; legal: {', '.join(map(str, STAGES))}")
        for flag, pair, least in (("bandwidth", self.gigabytes_per_s, 1e-9), ("latency", self.microseconds, 0.0)):
            if low_value := [value for value in pair if not least <= value < float("inf")]:
                raise ConfigError(f"--{flag}: {low_value[0]:g}; give two numbers above 0: inside a node, between nodes")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap: {self.overlap:g}; give a share of the passes, from 0 to 1")
        if self.gloo and max(self.processes) > GLOO_PROCESSES:
            raise ConfigError(
                f"--gloo: measures between local processes, {GLOO_PROCESSES} at most (got {max(self.processes)}); "
                "for more, state --bandwidth and --latency"
            )

    @property
    def network(self) -> Network:
        """The links as stated."""
        inside, between = (Link(g * 1e9, us * 1e-6) for g, us in zip(self.gigabytes_per_s, self.microseconds))
        return Network(inside, between, self.per_node)


@dataclass(frozen=True)
class ScalingPrediction:
    """Predictions by label, the parts that they were made from, and both as lines of text."""

    series: dict[str, list[Prediction]]
    parts: dict[str, Parts]
    measured: str
    words: list[str]

    def as_json(self) -> dict[str, Any]:
        """JSON values; `--parts` reads them back."""
        from fine_dist.planning.step_timing import as_json

        made = [
            {
                "label": label,
                **asdict(p),
                "step_s": p.step_s,
                "images_per_s": p.images_per_s,
                "efficiency": p.efficiency,
            }
            for label, predictions in self.series.items()
            for p in predictions
        ]
        parts = {label: as_json(each) for label, each in self.parts.items()}
        return {"measured": self.measured, "parts": parts, "words": self.words, "predictions": made}


def answer(
    config: StageConfig, asked: ScalingRequest, file: str | None,
    network_of: Callable[[int], tuple[Network, float]] | None = None,
) -> ScalingPrediction:  # fmt: skip
    """Predict a stage's step for every number of processes.

    Args:
        file: Parts of an earlier measurement; none: they are measured here and now.
        network_of: Links between so many processes and how much slower each computes, measured; none: as stated.
    """
    plan = config.blueprint()
    if plan is None:
        raise ConfigError("arch: what would be trained is not known yet")
    launched = config.launch.nodes * config.launch.processes
    divided = shares(config.batch, config.engine.micro_batch, launched, asked.processes, asked.hold)
    models = _models(config, plan)
    parts, measured = _measured(config, models, max(micro for micro, _ in divided.values()), file)
    threads = _threads() if asked.cores else 1
    series: dict[str, list[Prediction]] = {f"{label}, ZeRO-{s}": [] for label in models for s in asked.stages}
    for processes in asked.processes:
        network, slowdown = (network_of or (lambda p: _stated(asked, p, threads)))(processes)
        for label in models:
            for stage in asked.stages:
                made = predict(
                    parts[label], stage, network, processes, *divided[processes],
                    overlap=asked.overlap, slowdown=slowdown,
                )  # fmt: skip
                series[f"{label}, ZeRO-{stage}"].append(made)
    words = _words(asked, plan.arch.name, parts, measured, network_of is not None)
    return ScalingPrediction(series, parts, measured, words)


def _stated(asked: ScalingRequest, processes: int, threads: int) -> tuple[Network, float]:
    here = min(processes, asked.per_node)
    return asked.network, max(1.0, here * threads / asked.cores) if asked.cores else 1.0


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _models(config: StageConfig, plan: Blueprint) -> dict[str, tuple[Arch, Callable[[], nn.Module]]]:
    """The model that the stage trains and, for a learngene, the dense ancestor that it replaces."""
    from fine_dist.model.dit import DiT
    from fine_dist.stages.condense import CondenseConfig

    if not isinstance(config, CondenseConfig):
        return {plan.arch.name: (plan.arch, lambda: DiT(plan.arch))}
    of = plan.teacher or plan.arch
    return {
        f"{plan.method.label} stage 1": (plan.arch, lambda: plan.method.blueprint(plan.arch)),
        ANCESTOR: (of, lambda: DiT(of)),
    }


def _measured(
    config: StageConfig, models: dict[str, tuple[Arch, Callable[[], nn.Module]]], micro: int, file: str | None
) -> tuple[dict[str, Parts], str]:
    from fine_dist.planning.step_timing import measure, read

    if file:
        found, where = read(file)
        if missing := [label for label in models if label not in found]:
            raise ConfigError(f"--parts {file}: has nothing of {missing[0]!r}; it was made for {', '.join(found)}")
        return found, f"{where}, given by {file}"
    from fine_dist.engine.dist import pick_device

    device = pick_device(config.engine.device)
    parts, words = {}, ""
    for label, (arch, make) in models.items():
        log.info("measuring a step of %s on this %s ...", label, device.type)
        parts[label], words = measure(make(), arch, config.engine, config.optim, micro, device)
    threads = f", {_threads()} threads" if device.type == "cpu" else ""
    return parts, f"measured here: {words}{threads}, {config.engine.precision}"


def _words(asked: ScalingRequest, name: str, parts: dict[str, Parts], measured: str, gloo: bool) -> list[str]:
    """How the figures were obtained."""
    (g_in, g_out), (us_in, us_out) = asked.gigabytes_per_s, asked.microseconds
    stated = (
        "links: measured between local gloo processes, as is how much slower each computes beside the others"
        if gloo
        else f"links, as stated: {g_in:g} GB/s and {us_in:g} us inside a node of {asked.per_node}, {g_out:g} GB/s and "
        f"{us_out:g} us between nodes; ring collectives"
    )
    held = "a process's share of the batch" if asked.hold == "process" else "the whole batch"
    hides = f"{asked.overlap:.0%} of a pass's time"
    found = [f"{name}; parts {measured}", stated, f"held fixed: {held}; communication may hide behind {hides}"]
    if asked.cores:
        found.append(f"{min(asked.per_node, max(asked.processes))} processes of a node share {asked.cores} cores")
    counts = {label: each.trained for label, each in parts.items()}
    if len(counts) > 1:
        (ours, few), (theirs, many) = counts.items()
        found.append(f"{ours} sums {few:,} numbers a step, {theirs} {many:,}: {many / few:.1f} times as many")
    return found
