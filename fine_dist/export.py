"""`python -m fine_dist.export`: write a model as a dense one, for diffusers or in DiT's layout, with a model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, PathKey, dump_yaml, expand_path
from fine_dist.core.errors import ConfigError, guard


class ExportConfig(Config):
    """Write a model as an ordinary dense one: for this project, for diffusers, or in the original DiT's layout. The
    result is read back and compared."""

    model: PathKey | None = None
    """Model to write: a model, target, learngene or run of fine_dist, DiT's `.pt`, a diffusers folder or a hub name."""
    out: PathKey | None = None
    """Folder to write, or with `--to dit` a file that ends in .pt or .safetensors; it must not exist yet."""
    to: Literal["fine_dist", "diffusers", "dit"] = "fine_dist"
    """Format: this project's `model` folder, a `DiTPipeline` folder of diffusers, or the original DiT's state dict."""
    vae: PathKey | None = None
    """Folder or hub name of the `AutoencoderKL` that completes a diffusers pipeline (with `--to diffusers`)."""
    learngene: PathKey | None = None
    """Present path of the learngene that a target was initialized from, if it has moved since."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights to write: their exponential moving average (`ema`), or those of the last step (`raw`)."""
    samples: PathKey | None = None
    """PNG that the model card shows, such as the `samples.png` that `fine-dist sample` writes. Default: none."""
    push: str | None = None
    """Repository OWNER/MODEL of the Hugging Face Hub to upload the export to, private if it is new. The card must
    name a licence. With --dry-run nothing is written or uploaded."""
    hints: HintsConfig = HintsConfig()
    """Facts about a file of another project that the file does not state."""


def run(config: ExportConfig) -> Path:
    """Write the model; returns its path."""
    from fine_dist.artifacts.exporting import check_png, export, show_samples
    from fine_dist.artifacts.hub import check_repository, push
    from fine_dist.artifacts.load import load_model

    if not config.model or not config.out:
        raise ConfigError("export needs --model FOLDER and --out FOLDER")
    out = Path(expand_path(config.out))
    if config.push:
        check_repository(config.push)
    picture = Path(expand_path(config.samples)) if config.samples else None
    if picture is not None:
        check_png(picture)
    model, about = load_model(config.model, config.learngene, config.weights, config.hints)
    print("\n".join(export(model, about, config.to, out, config.vae)))
    if picture is not None:
        show_samples(out, picture)
    if config.push:
        print(f"export: {config.push} is {push(out, config.push)}")
    return out


def plan(config: ExportConfig) -> str:
    """The text of a dry run: what would be written and uploaded, and under which licence."""
    from fine_dist.artifacts.hub import check_repository
    from fine_dist.artifacts.reading import facts_of, licence_of

    if not config.model or not config.out:
        raise ConfigError("export needs --model FOLDER and --out FOLDER")
    facts = facts_of(config.model, config.hints)
    lines = [f"would write {facts.arch.name} ({facts.kind}) as {config.to} to {config.out}"]
    if config.push:
        check_repository(config.push)
        licence = config.hints.licence or licence_of(facts.extra)
        terms = f"under the licence {licence}" if licence else "and would be refused: no licence is known"
        lines.append(f"would upload it to {config.push} of the Hugging Face Hub, {terms}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def body() -> int:
        call = parse(ExportConfig, argv, "fine-dist export")
        if call.dry_run:
            print(f"{dump_yaml(call.config)}\n{plan(call.config)}\ndry run: nothing was done")
            return 0
        out = run(call.config)
        print(f"next: fine-dist sample --model {out}")
        return 0

    return guard(body)


if __name__ == "__main__":
    sys.exit(main())
