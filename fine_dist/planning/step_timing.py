"""Timings of the parts of a training step on this machine's device, from which `planning.scaling` predicts.

The forward and the backward pass are timed with one sample and with several. Work that is proportional to the number of
parameters (AdamW, the EMA, copies around an all-reduce, clipping) is timed on a slice of them and extrapolated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import nn

from fine_dist.core.errors import ConfigError
from fine_dist.core.json_files import read_json
from fine_dist.data.batch import Batch
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.compiling import compiles, prepare_model
from fine_dist.engine.optimizer import adamw, precision, trainable
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.model.arch import Arch
from fine_dist.planning.memory import Groups, groups_of
from fine_dist.planning.scaling_model import Affine, Parts, counts

SLICE = 1 << 24
"""Maximum number of parameters for the timing of the optimizer."""
ROUNDS = 3
BUDGET_S = 12.0
"""Seconds for the timing of one model's passes; slow passes are timed with fewer samples."""


def measure(
    model: nn.Module, arch: Arch, engine: EngineConfig, optim: OptimConfig, micro: int, device: torch.device
) -> tuple[Parts, str]:
    """Time the parts of a step of `model` with up to `micro` samples; returns them and a description of the method.

    The passes are those of the engine, with its objective, precision and recomputation. Gradients are None afterwards.
    """
    model = model.to(device).train()
    prepare_model(model, engine, device)
    sizes = {1: _passes(model, arch, engine, 1, device)}
    first_s, second_s = sum(sizes[1]()), sum(sizes[1]())  # warm-up, which also gives the cost of a sample
    largest = max(2, min(micro, int(BUDGET_S / (ROUNDS * min(first_s, second_s))) - 1)) if micro > 1 else 1
    if largest > 1:
        sizes[largest] = _passes(model, arch, engine, largest, device)
        sizes[largest]()
    seconds: dict[int, list[tuple[float, float]]] = {b: [] for b in sizes}
    # The sizes alternate, so that a slow moment of the machine does not affect only one of them.
    for _ in range(ROUNDS):
        for b, passes in sizes.items():
            seconds[b].append(passes())
    forward, backward = (_line({b: median(pair[i] for pair in pairs) for b, pairs in seconds.items()}) for i in (0, 1))
    model.zero_grad(set_to_none=True)
    named = trainable(model)
    trained, tensors, small, small_tensors = counts(list(named.values()))
    per_number, fixed = _per_number(min(SLICE, trained), optim, device)
    how = f"passes with {' and '.join(map(str, sizes))} samples, {ROUNDS} rounds, on {device.type}"
    parts = Parts(
        forward,
        backward,
        per_number * trained,
        fixed * trained,
        trained,
        tensors,
        small,
        small_tensors,
        groups_of(model),
    )
    compiled = "compiled" if compiles(engine, device) else "not compiled"
    return parts, f"{how}, {compiled}"


def _line(seconds: dict[int, float]) -> Affine:
    """A line through the seconds of one or two numbers of samples; not negative at 0 samples."""
    (low, first), *more = sorted(seconds.items())
    if not more:
        return Affine(0.0, first / low)
    high, last = more[-1]
    slope = (last - first) / (high - low)
    base = first - slope * low
    # Noise may make the slope or the base negative; a line through the origin extrapolates better then.
    return Affine(base, slope) if base > 0 and slope > 0 else Affine(0.0, last / high)


def _passes(
    model: nn.Module, arch: Arch, engine: EngineConfig, samples: int, device: torch.device
) -> Callable[[], tuple[float, float]]:
    """A function that runs the forward and backward pass of a micro-batch of noise and returns the seconds of both."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, *arch.latent_shape, generator=generator)
    labels = torch.randint(0, arch.num_classes, (samples,), generator=generator)
    batch = Batch(0, 0, latents, 1.0, labels, torch.arange(samples)).to(device)
    objective = Objective(DiffusionConfig(), arch, seed=0)

    def passes() -> tuple[float, float]:
        start = _now(device)
        with precision(engine, device):
            losses = objective(model, batch)
        middle = _now(device)
        (losses.sum() / samples).backward()
        end = _now(device)
        model.zero_grad(set_to_none=True)
        return middle - start, end - middle

    return passes


def _per_number(count: int, optim: OptimConfig, device: torch.device) -> tuple[float, float]:
    """Seconds per parameter of AdamW and the EMA, and of copying gradients, their norm and clipping."""
    p = torch.nn.Parameter(torch.zeros(count, device=device))
    p.grad = torch.full_like(p, 1e-3)
    optimizer, ema = adamw([p], optim), p.detach().clone()
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        start = _now(device)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([ema], [p.detach()], 1e-4)
        middle = _now(device)
        # The plain backend copies gradients into one buffer for its all-reduce, and back.
        p.grad.copy_(torch.cat([p.grad.reshape(-1)]))
        norm = torch.nn.utils.get_total_norm([p.grad])
        torch.nn.utils.clip_grads_with_norm_([p], 1e9, norm)
        seconds.append((middle - start, _now(device) - middle))
    first, second = (median(pair[i] for pair in seconds[1:]) / count for i in (0, 1))
    return first, second


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # Kernels run asynchronously; without this the clock would be read when they were launched.
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- on disk ---------------------------------------------------------------------------------------------------------


def as_json(parts: Parts) -> dict[str, Any]:
    """The parts as JSON values for `--json`, which `--parts FILE` reads."""
    return asdict(parts) | {name: getattr(parts, name)._asdict() for name in ("forward", "backward")}


def read(path: str) -> tuple[dict[str, Parts], str]:
    """The parts of each model in a file that `plan --scale --json` printed, and how they were measured.

    Raises:
        ConfigError: The file is not such a file.
    """
    try:
        content = read_json(path, ConfigError, "give a file that `fine-dist plan --scale P --json` printed")
        parts = {}
        for name, values in content["parts"].items():
            passes = {key: Affine(**values[key]) for key in ("forward", "backward")}
            groups = Groups(**values["groups"]) if values.get("groups") else None
            parts[str(name)] = Parts(**{**values, **passes, "groups": groups})
        return parts, str(content["measured"])
    except OSError as error:
        raise ConfigError(f"--parts {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--parts {path}: not what `plan --scale P --json` prints ({type(error).__name__}: {error})"
        ) from None
