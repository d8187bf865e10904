"""`python -m benchmarks sample`: a dense DiT drawn by our sampler and by diffusers' `DiTPipeline`, in turns.

The very same weights (exported, loaded by diffusers), noise, steps, guidance and VAE (a tiny random one, so that it is
the transformer that is timed). Both take both halves of guidance through the model at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import BenchmarkRow, interleaved, median, median_of_ratios, say, seconds
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.arch import Arch
from fine_dist.model.arch import arch as named

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BAR = 1.0
"""Our images a second over diffusers'."""
SEED = 5


def run(quick: bool) -> list[BenchmarkRow]:
    """All rows. quick: two layers, few steps."""
    from fine_dist.engine.dist import pick_device

    device = pick_device("auto")
    arch = named("DiT-S/2-L2") if quick else named("DiT-S/2")
    batch, steps, rounds = (2, 2, 2) if quick else (8, 5, 5)
    with tempfile.TemporaryDirectory(prefix="fine_dist-bench-") as folder:
        model, pipeline = both(Path(folder), arch, device)
        rows = []
        for guidance in (1.0, 4.0):
            say(f"sampling with guidance {guidance:g}")
            rows += turns(model, pipeline, batch, steps, guidance, rounds, None if quick else BAR)
    return rows


def both(folder: Path, arch: Arch, device: torch.device) -> tuple[nn.Module, Any]:
    """A random DiT, and the pipeline of its export."""
    import torch

    from fine_dist.artifacts.diffusers_export import load_pipeline, write_diffusers
    from fine_dist.model.dit import DiT

    generator = torch.Generator().manual_seed(0)
    model = DiT(arch, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    tiny_vae(folder / "vae", arch.in_channels)
    write_diffusers(folder / "pipeline", arch, model.state_dict(), vae=folder / "vae")
    pipeline = load_pipeline(folder / "pipeline").to(device)
    pipeline.set_progress_bar_config(disable=True)
    return model.to(device).eval(), pipeline


def tiny_vae(folder: Path, channels: int) -> None:
    """A random autoencoder of the usual kind, as small as it may be."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.18215,
    )
    vae.save_pretrained(folder)


def turns(
    model: nn.Module, pipeline: Any, batch: int, steps: int, guidance: float, rounds: int, bar: float | None
) -> list[BenchmarkRow]:
    """Images a second of each, and how far their images are apart."""
    import torch

    from fine_dist.diffusion.samplers import image_generator, sample

    arch: Arch = model.arch  # type: ignore[assignment]
    labels = torch.arange(batch) * (arch.num_classes // batch)
    config = SamplerConfig(scheduler="ddim", steps=steps, guidance=guidance, batch=batch)

    @torch.no_grad()
    def ours() -> Tensor:
        z = sample(model, labels=labels, arch=arch, config=config, diffusion=DiffusionConfig(), seed=SEED)
        images = pipeline.vae.decode(z.to(pipeline.device) / pipeline.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1).cpu()

    def theirs() -> Tensor:
        generators = [image_generator(SEED, i) for i in range(batch)]
        options = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "pt"}
        return pipeline(labels.tolist(), generator=generators, **options).images.cpu()

    apart = float((ours() - theirs()).abs().max())
    times = interleaved({"ours": lambda: seconds(ours), "theirs": lambda: seconds(theirs)}, rounds)
    label = f"{arch.name}, batch {batch}, {steps} DDIM steps, guidance {guidance:g}"
    return [
        BenchmarkRow(f"ours: {label}", batch / median(times["ours"]), "images/s"),
        BenchmarkRow("  DiTPipeline", batch / median(times["theirs"]), "images/s"),
        BenchmarkRow("  ours over DiTPipeline, images/s", median_of_ratios(times["theirs"], times["ours"]), "x", bar),
        BenchmarkRow("  largest difference of a pixel (0..1)", apart, "", None, "lower"),
    ]
