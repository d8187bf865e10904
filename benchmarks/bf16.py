"""`python -m benchmarks bf16`: the effect of bf16 on the held-out loss.

Models train on scikit-learn's digits in fp32, and in bf16 with three ways of rounding weights and the residual stream.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import BenchmarkRow, say

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, autocast casts each weight": {"precision": "bf16", "bf16_copies": False},
    "bf16, copies of the weights": {"precision": "bf16"},
    "bf16, copies, bf16 residual stream": {"precision": "bf16", "residual_dtype": "bf16"},
}
"""Settings of the engine, by the name in the rows."""


def run(quick: bool) -> list[BenchmarkRow]:
    """Mean and standard deviation over seeds of the held-out loss of the EMA weights, by model, `WAYS` and step.

    Args:
        quick: Whether to run a smoke test, of 8 steps and one seed instead of 300 and three.
    """
    steps, seeds = (8, (0,)) if quick else (300, (0, 1, 2))
    every = steps // 3
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("dense", "joint"):
            for way, engine in WAYS.items():
                say(f"{kind}, {way}")
                curves = [
                    curve(Path(folder), kind, seed, steps, every, {"eval_every": every, **engine}) for seed in seeds
                ]
                for step, losses in enumerate(zip(*curves), start=1):
                    measure = f"{kind}: {way}, step {step * every}"
                    rows.append(BenchmarkRow(measure, statistics.mean(losses), ""))
                    if len(losses) > 1:
                        rows.append(BenchmarkRow(f"{measure}: deviation over seeds", statistics.stdev(losses), ""))
    return rows


def curve(folder: Path, kind: str, seed: int, steps: int, every: int, engine: dict[str, Any]) -> list[float]:
    """Held-out losses of one run.

    Args:
        folder: Folder for shards and run directories.
        kind: `dense`, or `joint` for FINE's genes and sigma.
        seed: Seed of the model and of the run.
        steps: Number of updates.
        every: Number of updates between two losses.
        engine: Settings of the engine.

    Returns:
        The losses after `every`, 2 `every`, ... updates.
    """
    import torch

    from fine_dist import encode
    from fine_dist.data.settings import DataConfig
    from fine_dist.data.small_images import digits
    from fine_dist.data.stream import LatentStream
    from fine_dist.diffusion.held_out import HeldOutLoss
    from fine_dist.diffusion.objective import Objective
    from fine_dist.diffusion.settings import DiffusionConfig
    from fine_dist.engine import dist
    from fine_dist.engine.fit import fit
    from fine_dist.engine.program import Program
    from fine_dist.engine.run_dir import RunDir
    from fine_dist.engine.settings import EngineConfig, OptimConfig
    from fine_dist.model.arch import Arch
    from fine_dist.model.dit import DiT
    from fine_dist.model.factors import FactoredDiT

    shards = folder / "shards"
    if not shards.exists():
        encode.run(encode.EncodeConfig(source="digits", out=str(shards)))
    arch = Arch(
        hidden_size=64, num_layers=6, num_heads=4, patch_size=2, in_channels=1, input_size=8, num_classes=10,
        learn_sigma=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = DiT(arch, generator=generator) if kind == "dense" else FactoredDiT(arch, 64, generator)
    images, labels = (torch.from_numpy(x) for x in digits("held_out"))
    here = dist.single_process("cpu")
    batch = 64
    with LatentStream(DataConfig(shards=str(shards / "train")), seed=seed, global_batch=batch, expect=arch) as stream:
        program = Program(
            model,
            Objective(DiffusionConfig(), arch, seed),
            stream,
            held_out=HeldOutLoss(images, labels, DiffusionConfig()),
            tokens_per_sample=arch.num_tokens,
        )
        settings = EngineConfig.model_validate({"device": "cpu", "compile": False, "checkpoint_every": steps, **engine})
        with RunDir(tempfile.mkdtemp(dir=folder)).open("bf16", {}, here) as run_dir:
            result = fit(
                program, steps=steps, global_batch=batch, optim=OptimConfig(lr=1e-3), engine=settings, run_dir=run_dir,
                seed=seed, title=kind, world=here,
            )  # fmt: skip
    losses = {row["step"]: row["held_out_loss"] for row in result.rows if "held_out_loss" in row}
    return [losses[step] for step in range(every, steps + 1, every)]
