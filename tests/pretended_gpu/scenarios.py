"""What the tests have the pretended GPU do. Each function runs the product's own code and returns plain values.

They are called by name in the worker's process (`worker.py`); a test compares what they return with its bars.
"""

from __future__ import annotations

from tests.pretended_gpu.device import Trace, pretended_gpu  # isort: skip  # before torch

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.speed_loop import made_up_shards
from fine_dist.artifacts.targets import descend
from fine_dist.data.batch import Batch
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.objective import DiffusionLoss, Objective, OutputDistillation, Teacher
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.samplers import sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.engine import dist
from fine_dist.engine.loop import Run
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World
from fine_dist.family.pack_job import PackJob
from fine_dist.family.pack_loop import PackRun
from fine_dist.family.pack_model import PackedDiT
from fine_dist.model.arch import Arch
from fine_dist.model.arch import arch as arch_of
from fine_dist.model.dit import DiT
from fine_dist.model.flops import model_cost
from fine_dist.planning.memory import estimate
from tests.conftest import tiny_arch
from tests.methods import making
from tests.pretended_gpu.loops import GPU, NEVER, model_of, precisions, run_loop

torch.set_num_threads(1)

# --- the tool itself ------------------------------------------------------------------------------------------------


def operators() -> dict[str, Any]:
    """One instance of everything that the trace tells apart."""
    found: dict[str, Any] = {}

    def waits(body: Callable[[], Any]) -> list[str]:
        before = len(trace.waits)
        body()
        return [wait.what for wait in trace.waits[before:]]

    with pretended_gpu() as trace:
        x = torch.randn(4, 4, device=GPU, requires_grad=True)
        pinned, pageable = torch.zeros(4, 4, pin_memory=True), torch.zeros(4, 4)
        found["nothing but work"] = waits(lambda: (x > 0).any())
        found["backward"] = waits((x @ x).square().sum().backward)
        found["item"] = waits(lambda: x.sum().item())
        found["bool"] = waits(lambda: bool((x > 0).any()))
        found["list index"] = waits(lambda: x[[0, 2]])
        found["pageable copy"] = waits(lambda: pageable.to(GPU, non_blocking=True))
        found["pinned copy"] = waits(lambda: pinned.to(GPU, non_blocking=True))
        found["copy to the host"] = waits(lambda: x.detach().cpu())
        found["pinned copy to the host"] = waits(lambda: pinned.copy_(x.detach(), non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        found["event at once"] = waits(event.synchronize)
        event.record()
        x.detach() + 1
        found["event behind work"] = waits(event.synchronize)
        try:
            x + pageable
            found["mixture"] = "accepted"
        except RuntimeError as error:
            found["mixture"] = str(error)
        live = trace.live_bytes
        big = torch.empty(2**18, device=GPU)
        found["held"] = trace.live_bytes - live
        del big
        found["released"] = trace.live_bytes - live
        found["launches of a product"] = trace.kernels["mm"]
    return found


# --- the loop -------------------------------------------------------------------------------------------------------


def loop_step(kind: str, layers: int, **engine: Any) -> dict[str, Any]:
    """Launches, waits and casts of the third of four steps, by part of the loop, and the precisions of all products."""
    steps: list[dict[str, tuple[int, list[str]]]] = []
    casts: list[int] = []

    def watch(run: Run, trace: Trace) -> None:
        def counted(name: str) -> Callable[..., Any]:
            body = getattr(run, name)

            def call(*args: Any) -> Any:
                if name == "next_batch":
                    steps.append({})
                    casts.append(trace.kernels["_to_copy"])
                launches, waits = trace.launches, len(trace.waits)
                try:
                    return body(*args)
                finally:
                    said = [f"{wait.what} in {wait.where}" for wait in trace.waits[waits:]]
                    steps[-1][name] = (trace.launches - launches, said)

            return call

        for name in ("next_batch", "gradients", "read_pending_step", "update"):
            setattr(run, name, counted(name))

    with mock.patch.object(dist, "_backend", lambda device: "gloo"):  # DeepSpeed meets itself: this torch has no NCCL
        trace = run_loop(kind, f"DiT-S/2-L{layers}", steps=4, watch=watch, **engine)
    return {
        "launches": {name: launches for name, (launches, _) in steps[2].items()},
        "waits": [wait for _, waits in steps[2].values() for wait in waits],
        "casts": casts[3] - casts[2],
        "products": precisions(trace),
        "collectives": [[c.name, c.devices, c.num_bytes] for c in trace.collectives],
    }


def save_of_a_run(layers: int) -> dict[str, Any]:
    """Waits of a checkpoint, and the values that it copies."""
    found: dict[str, Any] = {}

    def watch(run: Run, trace: Trace) -> None:
        save = run.checkpoints.save

        def call(*args: Any) -> None:
            waits, copies = len(trace.waits), len(trace.overlapped)
            save(*args)
            found["waits"] = [f"{wait.what} in {wait.where}" for wait in trace.waits[waits:]]
            found["copies"] = len(trace.overlapped) - copies

        run.checkpoints.save = call  # type: ignore[method-assign]

    run_loop("dense", f"DiT-S/2-L{layers}", steps=2, checkpoint_every=2, watch=watch)
    return found


def loop_of_two_ranks(folder: str, **engine: Any) -> dict[str, Any]:
    """This rank's part of a run with checkpoints, rows and held-out losses: its collectives, by device.

    The process group under it is gloo's: tensors of the device travel as stand-ins in host memory.
    """
    often = {"checkpoint_every": 2, "log_every": 1, "eval_every": 2}
    how = {"rank": 32, "batch": 8, "steps": 4, "held_out": True, "folder": folder, **often, **engine}
    with mock.patch.object(dist, "_backend", lambda device: "gloo"):
        with pretended_gpu(count=2):
            world = dist.world("cuda")
        try:
            trace = run_loop("joint", "DiT-S/2-L1", world=world, **how)
        finally:
            dist.leave()
    return {
        "device": str(world.device),
        "mixed": trace.mixed_collectives(),
        "host": dict(Counter(trace.host_collectives())),
        "gradient_bytes": 4 * sum(p.numel() for p in model_of("joint", arch_of("DiT-S/2-L1"), 32).parameters()),
        "device_bytes": sum(c.num_bytes for c in trace.collectives if c.devices == "cuda"),
        "waits": dict(Counter(f"{wait.what} in {wait.where}" for wait in trace.waits)),
    }


# --- packs ----------------------------------------------------------------------------------------------------------


NARROW = Arch(
    hidden_size=64, num_layers=8, num_heads=4, patch_size=2, in_channels=1, input_size=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
"""The width of the digits demo."""


class Unobserved:
    """A pack's observer that keeps nothing."""

    def row(self, *_: Any) -> None: ...

    def evaluate(self, *_: Any) -> None: ...

    def ended(self, *_: Any) -> None: ...

    def after_step(self, *_: Any) -> None: ...


def pack_step(
    depths: list[int],
    seeds: list[int] | None = None,
    batch: int = 16,
    precision: str = "fp32",
    recompute: str = "none",
) -> dict[str, Any]:
    """Launches and waits of a pack's third step; every job is a sigma-only target of the demo's width."""

    def forms():
        for depth in depths:
            yield model_of("sigma", NARROW.with_depth(depth)).shared_form()

    with tempfile.TemporaryDirectory() as folder, pretended_gpu() as trace:
        shards = made_up_shards(Path(folder) / "shards", NARROW, count=64)
        data = DataConfig(shards=str(shards), streams=4)
        seeds = seeds or [0] * len(depths)
        jobs = [PackJob(str(j), "", "d", data, NARROW.num_classes, seed, 1e-3, NEVER) for j, seed in enumerate(seeds)]
        engine = EngineConfig(
            compile=False, precision=precision, log_every=NEVER, checkpoint_every=NEVER, eval_every=NEVER
        )
        run = PackRun(
            PackedDiT(forms(), recompute).to(GPU),
            jobs,
            batch=batch,
            optim=OptimConfig(),
            diffusion=DiffusionConfig(),
            engine=engine,
            observer=Unobserved(),
            world=World(device=GPU),
        )
        steps = run.steps()
        next(steps)  # its numbers are read at once: something may be wrong from the start
        next(steps)
        kernels, waits = Counter(trace.kernels), len(trace.waits)
        next(steps)
        steps.close()
        launched = Counter(trace.kernels) - kernels
        return {
            "launches": sum(launched.values()),
            "kernels": dict(launched.most_common(12)),
            "waits": [f"{wait.what} in {wait.where}" for wait in trace.waits[waits:]],
        }


# --- drawing and measuring ------------------------------------------------------------------------------------------


def sampling(scheduler: str, **more: Any) -> dict[str, Any]:
    """Products of a sampler's steps by precision, in a process that has not trained; its waits."""
    torch.set_float32_matmul_precision("highest")
    arch = arch_of("DiT-S/2-L2")
    with pretended_gpu() as trace:
        model = DiT(arch).to(GPU)
        config = SamplerConfig(**{"scheduler": scheduler, "steps": 5, "batch": 4, **more})
        before = len(trace.waits)
        sample(model, labels=torch.arange(4), arch=arch, config=config, diffusion=DiffusionConfig(), seed=0)
        return {
            "products": precisions(trace),
            "waits": dict(Counter(f"{wait.what} in {wait.where}" for wait in trace.waits[before:])),
        }


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(kind: str, arch: str, batch: int, **engine: Any) -> dict[str, Any]:
    """The most bytes that a run of three steps holds on the device, and what a dry run estimates."""
    shape = arch_of(arch)
    model = model_of(kind, shape)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = {"num_params": sum(p.numel() for p in model.parameters()), "num_trained": trained}
    config = EngineConfig(**engine)
    said = estimate(
        shape,
        config,
        micro_batch=batch,
        world_size=1,
        evaluates=False,
        kept=model_cost(model, batch).saved_for_backward,
        **counts,
    )
    del model
    trace = run_loop(kind, arch, batch=batch, **engine)
    return {"peak": trace.peak_bytes, "estimate": said.total}


# --- methods --------------------------------------------------------------------------------------------------------


def method_stage(name: str, stage: int) -> dict[str, Any]:
    """Two forward and backward passes of a method's stage in bf16: launches and waits of the second.

    Stage 1 distils as well, from a dense model of two layers.
    """
    method = making.tiny(name)
    teacher = None
    if stage == 1:
        condensation, _ = making.condensed(method)
        model, hook, arch = condensation.module, condensation.before_step, condensation.module.arch
        teacher = making.trained(tiny_arch(num_layers=2))
    else:
        targets = making.CASES[name].targets()
        arch = list(targets.values())[-1]
        made = descend(method, making.parent_for(name), arch, 0)
        model, hook = made.model, method.before_step(made.model)
        if made.trains in ("all", "nothing"):
            model.requires_grad_(True)
    with pretended_gpu() as trace:
        model = model.to(GPU)
        terms: tuple[Any, ...] = ()
        if teacher is not None:
            asked = Teacher(
                teacher.to(torch.bfloat16).to(GPU)
            )  # in this order: a fake parameter cannot change its dtype
            terms = (DiffusionLoss(make_process(DiffusionConfig()).to(GPU)), OutputDistillation(asked))
        objective = Objective(DiffusionConfig(), arch, 0, terms, ahead=False)
        for step in range(2):
            z, labels = torch.randn(4, *arch.latent_shape), torch.zeros(4, dtype=torch.int64)
            batch = Batch(step, 0, z, 1.0, labels, torch.arange(4)).to(GPU)
            if hook:
                hook(step, torch.Generator().manual_seed(step))
            launches, waits = trace.launches, len(trace.waits)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses = objective(model, batch)
            losses.mean().backward()
            model.zero_grad()
        said = [f"{wait.what} in {wait.where}" for wait in trace.waits[waits:]]
        return {"launches": trace.launches - launches, "waits": said}
