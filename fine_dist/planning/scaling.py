"""From a config and a request of `plan --scale` to predictions: parts measured or read, links as stated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError
from fine_dist.engine.dist import pick_device
from fine_dist.engine.program import divide_batch
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from fine_dist.planning import step_timing
from fine_dist.planning.estimates import StageEstimate, stage_of
from fine_dist.planning.memory import estimate, groups_of
from fine_dist.planning.scaling_model import FSDP2, Network, Parts, Prediction, ScalingRequest, Sharding, predict
from fine_dist.stages.blueprint import Blueprint
from fine_dist.stages.settings import CondenseConfig, StageConfig

log = logging.getLogger(__name__)

ANCESTOR = "its ancestor"


@dataclass(frozen=True)
class ScalingPrediction:
    """Predictions by label, the parts that they were made from, and both as lines of text."""

    series: dict[str, list[Prediction]]
    parts: dict[str, Parts]
    measured: str
    words: list[str]

    def as_json(self) -> dict[str, Any]:
        """JSON values; `--parts` reads them back."""
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
        parts = {label: step_timing.as_json(each) for label, each in self.parts.items()}
        return {"measured": self.measured, "parts": parts, "words": self.words, "predictions": made}


def answer(
    config: Config, asked: ScalingRequest, file: str | None,
    network_of: Callable[[int], tuple[Network, float]] | None = None,
) -> ScalingPrediction:  # fmt: skip
    """Predict a stage's step for every number of processes.

    Args:
        file: Parts of an earlier measurement; none: they are measured here and now.
        network_of: Links between so many processes and how much slower each computes, measured; none: as stated.
    """
    stage = stage_of(config)
    if stage is None:
        raise ConfigError("--scale: predicts a stage that trains one model (condense, train); this config is another's")
    plan: Blueprint | None = stage.blueprint()
    settings: StageConfig = stage.config
    if plan is None:
        raise ConfigError("arch: what would be trained is not known yet")
    if asked.gloo:
        torch.set_num_threads(1)  # as each of the local processes has it
    launched = settings.launch.nodes * settings.launch.processes
    divided = shares(settings.batch, settings.engine.micro_batch, launched, asked.processes, asked.hold)
    models = _models(settings, plan)
    parts, measured = _measured(settings, models, max(micro for micro, _ in divided.values()), file)
    threads = torch.get_num_threads() if asked.cores else 1
    series: dict[str, list[Prediction]] = {f"{label}, {_name(s)}": [] for label in models for s in asked.stages}
    gathered = 0.5 if settings.engine.gather_dtype == "bf16" else 1.0
    for processes in asked.processes:
        network, slowdown = (network_of or (lambda p: _stated(asked, p, threads)))(processes)
        for label in models:
            for zero in asked.stages:
                made = predict(
                    parts[label], zero, network, processes, *divided[processes],
                    overlap=asked.overlap, slowdown=slowdown, gathered=gathered,
                )  # fmt: skip
                needed = _memory(settings, plan, label, zero, processes, divided[processes][0])
                series[f"{label}, {_name(zero)}"].append(replace(made, memory_bytes=needed))
    words = _words(asked, plan.arch.name, parts, measured, network_of is not None)
    return ScalingPrediction(series, parts, measured, words)


def _name(sharding: Sharding) -> str:
    """A series in words."""
    return "FSDP2" if sharding == FSDP2 else f"ZeRO-{sharding}"


def _memory(config: StageConfig, plan: Blueprint, label: str, sharding: Sharding, processes: int, micro: int) -> float:
    """Memory in bytes of a process that trains the stage's model, or its ancestor."""
    backend = "fsdp2" if sharding == FSDP2 else "deepspeed" if sharding else "plain"
    zero = config.engine.deepspeed.model_copy(update={"stage": sharding if backend == "deepspeed" else 1})
    gather = config.engine.gather_dtype if sharding == FSDP2 else "fp32"
    changes = {"backend": backend, "deepspeed": zero, "micro_batch": micro, "gather_dtype": gather}
    engine = config.engine.model_copy(update=changes)
    if label != ANCESTOR:
        return StageEstimate(config.model_copy(update={"engine": engine}), plan).memory(processes).total
    of = plan.teacher or plan.arch
    with torch.device("meta"):
        groups = groups_of(DiT(of))
    numbers = of.count()
    return estimate(
        of,
        engine,
        micro_batch=micro,
        world_size=processes,
        num_params=numbers,
        num_trained=numbers,
        groups=groups,
    ).total


def _stated(asked: ScalingRequest, processes: int, threads: int) -> tuple[Network, float]:
    here = min(processes, asked.per_node)
    return asked.network, max(1.0, here * threads / asked.cores) if asked.cores else 1.0


def _models(config: StageConfig, plan: Blueprint) -> dict[str, tuple[Arch, Callable[[], nn.Module]]]:
    """The model that the stage trains and, for a learngene, the dense ancestor that it replaces."""
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
    if file:
        found, where = step_timing.read(file)
        if missing := [label for label in models if label not in found]:
            raise ConfigError(f"--parts {file}: has nothing of {missing[0]!r}; it was made for {', '.join(found)}")
        return found, f"{where}, given by {file}"
    device = pick_device(config.engine.device)
    parts, words = {}, ""
    for label, (arch, make) in models.items():
        log.info("measuring a step of %s on this %s ...", label, device.type)
        parts[label], words = step_timing.measure(make(), arch, config.engine, config.optim, micro, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
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
    if FSDP2 in asked.stages:
        found.append("engine.compile: by default on a GPU with the plain backend alone; true: with ZeRO and FSDP2 too")
    if asked.cores:
        found.append(f"{min(asked.per_node, max(asked.processes))} processes of a node share {asked.cores} cores")
    counts = {label: each.trained for label, each in parts.items()}
    if len(counts) > 1:
        (ours, few), (theirs, many) = counts.items()
        found.append(f"{ours} sums {few:,} numbers a step, {theirs} {many:,}: {many / few:.1f} times as many")
    return found


def shares(
    batch: int, micro: int | None, start: int, processes: Sequence[int], hold: str
) -> dict[int, tuple[int, int]]:
    """(micro-batch, accumulation) of each number of processes. `ConfigError` for a share that cannot be divided.

    Args:
        batch: Global batch of the config, over `start` processes.
        hold: `process` keeps the share of each process, so that the batch grows with P; `batch` keeps the global
            batch.
    """
    if hold == "process":
        return dict.fromkeys(processes, divide_batch(batch, micro, start))
    found = {}
    for p in processes:
        local = batch // p
        found[p] = divide_batch(batch, micro if micro and local and local % micro == 0 else None, p)
    return found
