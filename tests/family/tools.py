"""Packs for tests, and the naive solo run that they are held against."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fine_dist.artifacts.targets import descend
from fine_dist.data.settings import DataConfig
from fine_dist.data.stream import LatentStream
from fine_dist.diffusion.objective import Objective
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.family.pack_job import JobProgress, PackJob
from fine_dist.family.pack_loop import PackRun
from fine_dist.family.pack_model import PackedDiT
from fine_dist.init import main as init
from fine_dist.methods import from_manifest, parent_of
from fine_dist.model.artifact import Artifact
from fine_dist.model.factors import FactoredDiT, SharedForm
from tests.conftest import in_process

ROOT = Path(__file__).resolve().parents[2]

Point = tuple[int, int, float]
"""(depth, seed, learning rate) of a job."""


def target(learngene: Artifact, depth: int, seed: int = 0, **how: Any) -> FactoredDiT:
    """A target of the learngene before stage 2."""
    method = from_manifest(learngene.method)
    model = descend(method, parent_of(learngene), learngene.arch.with_depth(depth), seed, **how).model
    assert isinstance(model, FactoredDiT)
    return model


def form(model: FactoredDiT) -> SharedForm:
    """A target as a pack takes it."""
    found = model.shared_form()
    assert found is not None
    return found


def job(point: Point, data: Path, steps: int, name: str | None = None, num_classes: int = 10) -> PackJob:
    depth, seed, lr = point
    name = name or f"L{depth}-s{seed}-lr{lr:g}"
    return PackJob(name, "key", str(data), DataConfig(shards=str(data)), num_classes, seed, lr, steps)


class Recorder:
    """Keeps every loss and every end."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {}
        self.ends: dict[int, JobProgress] = {}
        self.ticks = 0
        self.looks: list[tuple[int, int]] = []

    def row(self, job: int, step: int, values: dict[str, float]) -> None:
        self.losses.setdefault(job, []).append(values["loss"])

    def ended(self, job: int, progress: JobProgress) -> None:
        assert job not in self.ends
        self.ends[job] = progress

    def evaluate(self, job: int, step: int) -> None:
        self.looks.append((job, step))

    def after_step(self, progress: Sequence[JobProgress]) -> None:
        self.ticks += 1


def packed(
    learngene: Artifact,
    points: Sequence[Point],
    data: Path,
    steps: int = 20,
    *,
    batch: int = 16,
    models: Sequence[FactoredDiT] | None = None,
    **how: Any,
) -> tuple[PackRun, Recorder]:
    """A pack of these jobs, not trained yet; losses are recorded at every step. models: default targets if None."""
    recorder = Recorder()
    how = {"optim": OptimConfig(), "engine": EngineConfig(device="cpu", log_every=1), **how}
    how.setdefault("world", dist.single_process("cpu"))
    diffusion = how.pop("diffusion", DiffusionConfig())
    run = PackRun(
        PackedDiT(map(form, models or [target(learngene, depth, seed) for depth, seed, _ in points])),
        [job(point, data, steps) for point in points],
        batch=batch,
        diffusion=diffusion,
        observer=recorder,
        **how,
    )
    return run, recorder


def solo(
    learngene: Artifact,
    point: Point,
    data: Path,
    steps: int,
    *,
    batch: int = 16,
    optim: OptimConfig | None = None,
    diffusion: DiffusionConfig | None = None,
) -> tuple[list[float], FactoredDiT]:
    """One job by itself, written down plainly: torch's own model, optimizer, clipping and schedule."""
    optim = optim or OptimConfig()
    depth, seed, lr = point
    model = target(learngene, depth, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    objective = Objective(diffusion or DiffusionConfig(), model.arch, seed)
    stream = LatentStream(DataConfig(shards=str(data)), seed=seed, global_batch=batch)
    losses = []
    for step, data_batch in zip(range(steps), stream.batches()):
        factor = 1.0
        if step < optim.warmup_steps:
            factor = (step + 1) / optim.warmup_steps
        elif optim.schedule == "cosine":
            factor = 0.5 + 0.5 * math.cos(math.pi * (step - optim.warmup_steps) / (steps - optim.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr * factor
        loss = objective(model, data_batch).mean()
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    stream.close()
    return losses, model


def sigma_of(model: FactoredDiT) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


# --- the command ----------------------------------------------------------------------------------------------------

STEPS = 12
"""Steps of the targets that `init_argv` asks for."""
NAMES = ["L2-s0-lr0.01", "L2-s1-lr0.01", "L3-s0-lr0.01", "L3-s1-lr0.01"]
"""The targets of `init_argv` with seeds 0 and 1."""


def init_argv(learngene, shards, run_dir, *more: str) -> list[str]:
    flags = {
        "run-dir": run_dir,
        "parent": learngene.folder,
        "data.shards": shards / "train",
        "data.held-out": shards / "held_out",
        "engine.device": "cpu",
        "engine.threads": 1,
        "engine.log-every": 1,
        "engine.checkpoint-every": 2,
        "engine.eval-every": 5,
        "optim.lr": 0.01,
        "batch": 16,
        "steps": STEPS,
    }
    base = [sys.executable, "-m", "fine_dist.init"]
    return [*base, *[w for key, value in flags.items() for w in (f"--{key}", str(value))], "--depths", "2", "3", *more]


def run_here(command: list[str]) -> subprocess.CompletedProcess[str]:
    """The command in this process."""
    return in_process(init, command[3:])


def start_process(command: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
