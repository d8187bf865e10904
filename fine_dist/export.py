"""`python -m fine_dist.export`: a model for others: dense, as diffusers' folder, as DiT's state dict, with its card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from fine_dist.artifacts.locate import HintsConfig
from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, dump_yaml, expand_path
from fine_dist.core.errors import ConfigError, guard


class ExportConfig(Config):
    """Write a model as an ordinary dense one: for this project, for diffusers, or in the original DiT's layout. What
    was written is read back and compared."""

    model: str | None = None
    """A model, a target, a learngene, a run; also DiT's `.pt`, a folder of diffusers, a name on the hub."""
    out: str | None = None
    """Folder to write, or with `--to dit` a file that ends in .pt or .safetensors; must not exist yet."""
    to: Literal["fine_dist", "diffusers", "dit"] = "fine_dist"
    """Format: this project's `model`, a `DiTPipeline` folder, or the original DiT's state dict."""
    vae: str | None = None
    """Folder or hub name of the `AutoencoderKL` that goes into a pipeline."""
    learngene: str | None = None
    """Where the parent of an initialised target lies now, when it has moved."""
    weights: Literal["ema", "raw"] = "ema"
    """The averages of what was trained, or the weights themselves."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""


def run(config: ExportConfig) -> Path:
    """Write the model; returns where it is."""
    from fine_dist.artifacts.exporting import export
    from fine_dist.artifacts.load import load_model

    if not config.model or not config.out:
        raise ConfigError("export needs --model FOLDER and --out FOLDER")
    out = Path(expand_path(config.out))
    model, about = load_model(
        config.model, config.learngene, config.weights, config.hints, draws=config.to == "diffusers"
    )
    print("\n".join(export(model, about, config.to, out, config.vae)))
    return out


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    def body() -> int:
        call = parse(ExportConfig, argv, "python -m fine_dist.export")
        if call.dry_run:
            print(dump_yaml(call.config) + "\ndry run: nothing was done")
            return 0
        run(call.config)
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
