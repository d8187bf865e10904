"""The parts of a training step, timed on this machine's device; `planning.scaling` predicts many processes from them.

Forward and backward pass are timed whole, at one sample and at a few. What costs so much a number (AdamW, the EMA, what
is copied around an all-reduce, clipping) is timed on a slice of the numbers that train, and counted for all of them.
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
"""Maximum number of parameters that the optimizer is timed on."""
ROUNDS = 3
BUDGET_S = 12.0
"""Seconds in which the passes of one model are timed; with slow passes, fewer samples are used."""


def measure(
    model: nn.Module, arch: Arch, engine: EngineConfig, optim: OptimConfig, micro: int, device: torch.device
) -> tuple[Parts, str]:
    """Measure the parts of a step of `model` at up to `micro` samples; returns them with a description of how.

    The passes are the engine's: its objective, precision and recomputation. Weights are left with no gradients.
    """
    model = model.to(device).train()
    prepare_model(model, engine, device)
    sizes = {1: _passes(model, arch, engine, 1, device)}
    once = sum(sizes[1]())  # warms up, and tells how long it takes
    again = sum(sizes[1]())
    most = max(2, min(micro, int(BUDGET_S / (ROUNDS * min(once, again))) - 1)) if micro > 1 else 1
    if most > 1:
        sizes[most] = _passes(model, arch, engine, most, device)
        sizes[most]()
    seconds: dict[int, list[tuple[float, float]]] = {b: [] for b in sizes}
    # Sizes by turns, so that a slow moment of the machine does not fall on one of them alone.
    for _ in range(ROUNDS):
        for b, passes in sizes.items():
            seconds[b].append(passes())
    forward, backward = (_line({b: median(pair[i] for pair in found) for b, found in seconds.items()}) for i in (0, 1))
    model.zero_grad(set_to_none=True)
    named = trainable(model)
    trained, tensors, small, small_tensors = counts(list(named.values()))
    per_number, fixed = _per_number(min(SLICE, trained), optim, device)
    words = f"passes at {' and '.join(map(str, sizes))} samples, {ROUNDS} rounds, on {device.type}"
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
    return parts, f"{words}, {compiled}"


def _line(seconds: dict[int, float]) -> Affine:
    """Seconds as a line over samples, through one or two points; its value at 0 samples is not negative."""
    (low, first), *more = sorted(seconds.items())
    if not more:
        return Affine(0.0, first / low)
    high, last = more[-1]
    each = (last - first) / (high - low)
    base = first - each * low
    # Noise can turn the slope or the base negative; a line through the origin is then the safer extrapolation.
    return Affine(base, each) if base > 0 and each > 0 else Affine(0.0, last / high)


def _passes(
    model: nn.Module, arch: Arch, engine: EngineConfig, samples: int, device: torch.device
) -> Callable[[], tuple[float, float]]:
    """A function that runs both passes of a micro-batch of noise and returns their seconds."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, *arch.latent_shape, generator=generator)
    labels = torch.randint(0, arch.num_classes, (samples,), generator=generator)
    batch = Batch(0, 0, latents, 1.0, labels, torch.arange(samples)).to(device)
    objective = Objective(DiffusionConfig(), arch, seed=0)

    def passes() -> tuple[float, float]:
        begun = _now(device)
        with precision(engine, device):
            losses = objective(model, batch)
        between = _now(device)
        (losses.sum() / samples).backward()
        ended = _now(device)
        model.zero_grad(set_to_none=True)
        return between - begun, ended - between

    return passes


def _per_number(count: int, optim: OptimConfig, device: torch.device) -> tuple[float, float]:
    """Seconds for each parameter: of AdamW and the EMA; of flattening gradients, unflattening, norm and clipping."""
    p = torch.nn.Parameter(torch.zeros(count, device=device))
    p.grad = torch.full_like(p, 1e-3)
    optimizer, ema = adamw([p], optim), p.detach().clone()
    found: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        begun = _now(device)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([ema], [p.detach()], 1e-4)
        between = _now(device)
        # What the plain backend does around its all-reduce: into one buffer and back.
        p.grad.copy_(torch.cat([p.grad.reshape(-1)]))
        norm = torch.nn.utils.get_total_norm([p.grad])
        torch.nn.utils.clip_grads_with_norm_([p], 1e9, norm)
        found.append((between - begun, _now(device) - between))
    first, second = (median(pair[i] for pair in found[1:]) / count for i in (0, 1))
    return first, second


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        # Kernels run asynchronously; the clock would otherwise read when they were handed over.
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- on disk ---------------------------------------------------------------------------------------------------------


def as_json(parts: Parts) -> dict[str, Any]:
    """JSON values for `--json`, which `--parts FILE` of a later call reads."""
    return asdict(parts) | {name: getattr(parts, name)._asdict() for name in ("forward", "backward")}


def read(path: str) -> tuple[dict[str, Parts], str]:
    """The parts of each model in a file that `plan --scale --json` printed, and where they were measured.

    `ConfigError` for a file that is not one."""
    try:
        content = read_json(path, ConfigError, "give what `fine-dist plan --scale P --json` printed")
        found = {}
        for name, values in content["parts"].items():
            passes = {key: Affine(**values[key]) for key in ("forward", "backward")}
            groups = Groups(**values["groups"]) if values.get("groups") else None
            found[str(name)] = Parts(**{**values, **passes, "groups": groups})
        return found, str(content["measured"])
    except OSError as error:
        raise ConfigError(f"--parts {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"--parts {path}: not what `plan --scale P --json` prints ({type(error).__name__}: {error})"
        ) from None
