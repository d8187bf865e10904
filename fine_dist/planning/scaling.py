"""Predictions of `plan --scale` for a config, from measured or given parts of a step and the stated network."""

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
    """Predictions by label, the timings they are based on, and a description."""

    series: dict[str, list[Prediction]]
    parts: dict[str, Parts]
    measured: str
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """JSON values; `--parts` reads them back."""
        rows = [
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
        return {"measured": self.measured, "parts": parts, "words": self.notes, "predictions": rows}


def predict_scaling(
    config: Config, request: ScalingRequest, file: str | None,
    network_of: Callable[[int], tuple[Network, float]] | None = None,
) -> ScalingPrediction:  # fmt: skip
    """Predict a stage's step for every number of processes.

    Args:
        config: Config of a stage that trains one model.
        request: What to predict, and the network.
        file: Parts of an earlier measurement. None: they are measured now.
        network_of: Measures the network of a number of processes and their slowdown. None: as in the request.

    Raises:
        ConfigError: The stage trains no single model, its shape is unknown, or the batch cannot be divided.
    """
    stage = stage_of(config)
    if stage is None:
        raise ConfigError(
            "--scale: predicts stages that train one model (condense, train), and this config is for another"
        )
    plan: Blueprint | None = stage.blueprint()
    settings: StageConfig = stage.config
    if plan is None:
        raise ConfigError("arch: the model's shape is not known yet; give --arch, or create the parent first")
    if request.gloo:
        torch.set_num_threads(1)  # as in each of the local processes
    num_processes = settings.launch.nodes * settings.launch.processes
    micro_batches = shares(settings.batch, settings.engine.micro_batch, num_processes, request.processes, request.hold)
    models = _models(settings, plan)
    parts, measured = _measured(settings, models, max(micro for micro, _ in micro_batches.values()), file)
    threads = torch.get_num_threads() if request.cores else 1
    series: dict[str, list[Prediction]] = {f"{label}, {_name(s)}": [] for label in models for s in request.stages}
    gathered = 0.5 if settings.engine.gather_dtype == "bf16" else 1.0
    for processes in request.processes:
        network, slowdown = (network_of or (lambda p: _stated(request, p, threads)))(processes)
        for label in models:
            for zero in request.stages:
                prediction = predict(
                    parts[label], zero, network, processes, *micro_batches[processes],
                    overlap=request.overlap, slowdown=slowdown, gathered=gathered,
                )  # fmt: skip
                memory = _memory(settings, plan, label, zero, processes, micro_batches[processes][0])
                series[f"{label}, {_name(zero)}"].append(replace(prediction, memory_bytes=memory))
    notes = _notes(request, plan.arch.name, parts, measured, network_of is not None)
    return ScalingPrediction(series, parts, measured, notes)


def _name(sharding: Sharding) -> str:
    """The name of a way of sharding, as a label."""
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
    arch = plan.teacher or plan.arch
    with torch.device("meta"):
        groups = groups_of(DiT(arch))
    num_params = arch.count()
    return estimate(
        arch,
        engine,
        micro_batch=micro,
        world_size=processes,
        num_params=num_params,
        num_trained=num_params,
        groups=groups,
    ).total


def _stated(request: ScalingRequest, processes: int, threads: int) -> tuple[Network, float]:
    on_node = min(processes, request.per_node)
    return request.network, max(1.0, on_node * threads / request.cores) if request.cores else 1.0


def _models(config: StageConfig, plan: Blueprint) -> dict[str, tuple[Arch, Callable[[], nn.Module]]]:
    """The model that the stage trains and, for a learngene, the dense ancestor that it replaces."""
    if not isinstance(config, CondenseConfig):
        return {plan.arch.name: (plan.arch, lambda: DiT(plan.arch))}
    ancestor = plan.teacher or plan.arch
    return {
        f"{plan.method.label} stage 1": (plan.arch, lambda: plan.method.blueprint(plan.arch)),
        ANCESTOR: (ancestor, lambda: DiT(ancestor)),
    }


def _measured(
    config: StageConfig, models: dict[str, tuple[Arch, Callable[[], nn.Module]]], micro: int, file: str | None
) -> tuple[dict[str, Parts], str]:
    if file:
        saved, origin = step_timing.read(file)
        if missing := [label for label in models if label not in saved]:
            raise ConfigError(f"--parts {file}: {missing[0]!r} is not in the file, which has {', '.join(saved)}")
        return saved, f"{origin}, given by {file}"
    device = pick_device(config.engine.device)
    parts, how = {}, ""
    for label, (arch, make) in models.items():
        log.info("measuring a step of %s on this %s ...", label, device.type)
        parts[label], how = step_timing.measure(make(), arch, config.engine, config.optim, micro, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return parts, f"measured here: {how}{threads}, {config.engine.precision}"


def _notes(request: ScalingRequest, name: str, parts: dict[str, Parts], measured: str, gloo: bool) -> list[str]:
    """Lines that state how the predictions were obtained."""
    (g_in, g_out), (us_in, us_out) = request.gigabytes_per_s, request.microseconds
    stated = (
        "links: measured between local gloo processes, as is the slowdown of each by the others"
        if gloo
        else f"links, as stated: {g_in:g} GB/s and {us_in:g} us inside a node of {request.per_node}, {g_out:g} GB/s "
        f"and {us_out:g} us between nodes; ring collectives"
    )
    constant = "the batch per process" if request.hold == "process" else "the whole batch"
    share = f"{request.overlap:.0%} of a pass's time"
    notes = [f"{name}; parts {measured}", stated, f"constant: {constant}; communication may overlap with {share}"]
    if FSDP2 in request.stages:
        notes.append("engine.compile: by default on a GPU with the plain backend alone; true: with ZeRO and FSDP2 too")
    if request.cores:
        notes.append(f"{min(request.per_node, max(request.processes))} processes of a node share {request.cores} cores")
    counts = {label: each.trained for label, each in parts.items()}
    if len(counts) > 1:
        (name, few), (other, many) = counts.items()
        notes.append(f"{name} reduces {few:,} gradients per step, {other} {many:,}: {many / few:.1f} times as many")
    return notes


def shares(
    batch: int, micro: int | None, start: int, processes: Sequence[int], hold: str
) -> dict[int, tuple[int, int]]:
    """(micro-batch, accumulation) of each number of processes. `ConfigError` if a batch cannot be divided.

    Args:
        batch: Global batch of the config, divided over `start` processes.
        micro: Micro-batch of the config. None: not set.
        start: Number of processes of the config.
        processes: Numbers of processes to predict for.
        hold: `process` keeps the batch per process, so that the global batch grows; `batch` keeps the global batch.
    """
    if hold == "process":
        return dict.fromkeys(processes, divide_batch(batch, micro, start))
    divided = {}
    for p in processes:
        local = batch // p
        divided[p] = divide_batch(batch, micro if micro and local and local % micro == 0 else None, p)
    return divided
