"""`python -m fine_dist.sample`: draw images from a model."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from fine_dist.cli import parse
from fine_dist.config import Config, DiffusionConfig, EngineConfig, LaunchConfig, SamplerConfig, expand_path
from fine_dist.errors import ConfigError, guard


class SampleConfig(Config):
    """Draw images from a model: latents as .npy, their labels, and a picture of the first of them."""

    model: str | None = None
    """Folder of a model, an initialised target, a learngene, or the run that made one."""
    run_dir: str = "runs/samples"
    """Where samples.npy, labels.npy and samples.png are written."""
    classes: tuple[int, ...] = ()
    """Class labels to draw; none: all."""
    per_class: int = Field(8, ge=1)
    """Images of each class."""
    seed: int = Field(0, ge=0)
    """Seeds the noise: image i of a seed is the same whatever the batch or the number of processes."""
    sampler: SamplerConfig = SamplerConfig()
    """Scheduler, steps, guidance."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The process the model was trained for."""
    engine: EngineConfig = EngineConfig()
    """Device and threads."""
    launch: LaunchConfig = LaunchConfig()
    """What the job needs, where it is submitted."""


def run(config: SampleConfig) -> Path:
    """Draw the images; returns the folder they are in."""
    import numpy as np
    import torch

    from fine_dist.diffusion.sample import grid, sample
    from fine_dist.engine.dist import pick_device
    from fine_dist.stages import load_model

    if not config.model:
        raise ConfigError("model: give the folder of a model with --model")
    model, about = load_model(config.model)
    arch = model.arch
    wrong = [c for c in config.classes if not 0 <= c <= arch.num_classes]
    if wrong:
        raise ConfigError(f"classes: {wrong[0]} is out of range; legal: 0..{arch.num_classes} (the last is no class)")
    classes = torch.tensor(config.classes or range(arch.num_classes))
    labels = classes.repeat_interleave(config.per_class)
    latents = sample(
        model.to(pick_device(config.engine.device)),
        labels=labels,
        arch=arch,
        config=config.sampler,
        diffusion=config.diffusion,
        seed=config.seed,
        progress=f"sample {arch.name}",
    )
    folder = Path(expand_path(config.run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "samples.npy", latents.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    shown = latents[: 16 * config.per_class]
    save_png(grid(shown, config.per_class, zoom=max(1, 64 // arch.input_size)), folder / "samples.png")
    print(f"sample: {len(latents)} images of {about['folder']} are in {folder} (samples.npy, labels.npy, samples.png)")
    return folder


def save_png(picture: object, path: Path) -> None:
    """Write a picture [1 or 3, H, W] in 0..1."""
    import numpy as np
    from PIL import Image

    pixels = (np.asarray(picture).transpose(1, 2, 0) * 255).round().astype("uint8")
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(SampleConfig, argv, "python -m fine_dist.sample")
        if call.dry_run:
            from fine_dist.config import dump_yaml

            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0
        from launchers.entry import launch

        return launch("fine_dist.sample", call.config, call.launcher)

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
