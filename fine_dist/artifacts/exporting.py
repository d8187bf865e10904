"""Exports a model to this project's format, to a diffusers folder, or to a state dict in the original DiT's format.

The written files are read back, a diffusers folder by diffusers, and a forward pass is compared with the model's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from fine_dist.artifacts.card import ModelCard, card_text
from fine_dist.artifacts.diffusers_export import write_diffusers
from fine_dist.artifacts.dit_pt import write_dit
from fine_dist.artifacts.export_check import LIMIT, ExportComparison
from fine_dist.artifacts.imported import UNKNOWN_LICENCE
from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.model_facts import diffusion_of, model_facts_of
from fine_dist.artifacts.reading import inherited_facts, licence_of
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import write_atomic
from fine_dist.core.regular_files import read_bytes
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT

Format = Literal["fine_dist", "diffusers", "dit"]


def export(model: DiT, metadata: dict[str, Any], to: Format, out: Path, vae: str | None = None) -> list[str]:
    """Write a dense model with its model card.

    Args:
        model: The model.
        metadata: The model's metadata, as `load_model` returns them.
        to: The format.
        out: A folder that does not exist yet; with `dit`, a file.
        vae: Folder or hub name of an autoencoder, which makes a diffusers folder a complete pipeline.

    Returns:
        Lines for the user: what was written, and by how much its outputs differ from the model's.

    Raises:
        ConfigError: The format cannot hold the model or an autoencoder.
        ArtifactError: `out` exists, or outputs differ by more than 1e-4.
    """
    if out.exists():
        raise ArtifactError(f"{out} exists already; choose another folder, or remove it")
    if vae and to != "diffusers":
        raise ConfigError(f"vae: only a diffusers folder holds a VAE, not --to {to}; leave it out, or --to diffusers")
    _check_dense(model, to)
    if to == "diffusers":
        return _export_diffusers(model, metadata, out, vae)
    return _export_dit(model, metadata, out) if to == "dit" else _export_native(model, metadata, out)


def check_png(picture: Path) -> None:
    """Raise `ConfigError` unless a file begins with the signature of PNG."""
    if read_bytes(picture, 8) != b"\x89PNG\r\n\x1a\n":
        raise ConfigError(f"samples: {picture} is no PNG; give a picture such as the samples.png of `fine-dist sample`")


def show_samples(out: Path, picture: Path) -> None:
    """Copy a picture of samples next to the model card of an export, and add it to the card."""
    card = out / "README.md" if out.is_dir() else out.with_suffix(".md")
    copy = out / "samples.png" if out.is_dir() else out.with_suffix(".png")
    write_atomic(copy, read_bytes(picture))
    text = card.read_text(encoding="utf-8")
    write_atomic(card, f"{text}\n## Samples\n\n![Samples of the model]({copy.name})\n")


def card_of(metadata: dict[str, Any]) -> ModelCard:
    """Return the content of a model's card, from its metadata as `load_model` returns them."""
    ancestor = metadata.get("ancestor") or {}
    imported = metadata.get("imported") or ancestor.get("imported") or {}
    parent = metadata.get("parent")
    if isinstance(parent, dict):
        learngene = parent["hash"]
    elif metadata["kind"] == "learngene":
        learngene = metadata["hash"]
    else:
        learngene = metadata.get("origin")
    losses = {**(metadata.get("losses") or {}), **_init_losses(metadata.get("init") or {})}
    metrics = {name.replace("_", " "): value for name, value in losses.items() if isinstance(value, (int, float))}
    foreign = "imported" in metadata and not learngene
    return ModelCard(
        method="none" if foreign else str(metadata["method"]["name"]),
        learngene=learngene,
        licence=licence_of(metadata) or UNKNOWN_LICENCE,
        source=imported.get("source") or ancestor.get("path") or metadata.get("folder"),
        metrics=metrics,
        protocol=_protocol(metadata),
        notes=tuple(imported.get("notes", ())),
    )


def _protocol(metadata: dict[str, Any]) -> dict[str, str]:
    """Return the diffusion process, the loss and the sampler as texts for the model card."""
    diffusion = diffusion_of(metadata) or DiffusionConfig()
    if diffusion.process == "flow":
        process = f"flow matching, velocity prediction, {diffusion.direction}, time scale {diffusion.time_scale:g}"
        process += f", shift {diffusion.time_shift:g}" if diffusion.time_shift != 1 else ""
    else:
        chain = f"{diffusion.num_timesteps} linear steps {diffusion.beta_start:g}..{diffusion.beta_end:g}"
        process = f"DDPM, {diffusion.predicts} prediction, {chain}"
        process += ", zero terminal SNR" if diffusion.zero_terminal_snr else ""
    protocol = {"process": process, "loss protocol": "mean squared error of the prediction at fixed times and noise"}
    settings = model_facts_of(metadata).sampler
    sampler = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return {**protocol, "sampler": sampler} if sampler else protocol


def _init_losses(init: dict[str, Any]) -> dict[str, Any]:
    return {name: init[name] for name in ("loss", "held_out_loss") if init.get(name) is not None}


def _check_dense(model: Any, to: Format) -> None:
    if to != "fine_dist" and type(model) is not DiT:
        raise ConfigError(f"to {to}: the model is a {type(model).__name__}, which only --to fine_dist can hold")


def _export_diffusers(model: DiT, metadata: dict[str, Any], out: Path, vae: str | None) -> list[str]:
    facts = model_facts_of(metadata)
    report = write_diffusers(
        out,
        model.arch,
        model.state_dict(),
        diffusion=facts.diffusion or DiffusionConfig(),
        vae=vae,
        scaling_factor=facts.scaling_factor,
        shift_factor=facts.shift_factor,
        class_names=facts.class_names,
        clip=facts.sampler.get("clip"),
        card=card_of(metadata),
    )
    kind = "a FlowDiTPipeline" if facts.diffusion and facts.diffusion.process == "flow" else "a DiTPipeline"
    what = kind if report.pipeline else "a transformer and a scheduler (for a complete pipeline, give --vae)"
    lines = [f"export: {model.arch.name} as {what} in {out}", _compared("diffusers", report.max_error)]
    if report.stock_error > LIMIT:
        lines.append(
            f"as diffusers loads the transformer by itself, outputs differ by {report.stock_error:.2g}: its time "
            "frequencies are not DiT's. README.md in the folder has the lines that set them, and "
            "fine_dist.artifacts.diffusers_export.load_pipeline sets them"
        )
    return lines


def _export_dit(model: DiT, metadata: dict[str, Any], out: Path) -> list[str]:
    error = write_dit(out, model.arch, model.state_dict())
    call = f"torch.load({out.name!r}, weights_only=True)"
    if out.suffix == ".safetensors":
        call = f"safetensors.torch.load_file({out.name!r})"
    load = f"A state dict under the original DiT's names: `{call}`."
    numbers = sum(p.numel() for p in model.parameters())
    write_atomic(out.with_suffix(".md"), card_text(card_of(metadata), model.arch, numbers, load))
    return [f"export: {model.arch.name} as DiT's state dict in {out}", _compared("the original layout", error)]


def _export_native(model: DiT, metadata: dict[str, Any], out: Path) -> list[str]:
    card = card_of(metadata)
    extra = {**inherited_facts(metadata), "exported_from": metadata["folder"]}
    if card.learngene:
        extra["origin"] = card.learngene
    if "imported" in metadata:
        extra["imported"] = metadata["imported"]
    manifest = save_artifact(
        out, kind="model", method=metadata["method"], arch=model.arch, tensors=model.state_dict(), extra=extra
    )
    try:
        error = _read_back(model, out)
    except BaseException:
        shutil.rmtree(out)
        raise
    load = f"Load it with `fine_dist.artifacts.load.load_model({out.name!r})`."
    write_atomic(out / "README.md", card_text(card, model.arch, manifest["num_numbers"], load))
    size = f"{manifest['num_numbers']:,} numbers, {manifest['bytes'] / 2**20:.1f} MiB"
    return [f"export: {model.arch.name}, {size} in {out}", _compared("the folder", error)]


def _read_back(model: DiT, out: Path) -> float:
    """Load the exported artifact; return its error, or 0 for other modules than `DiT`, which cannot be compared."""
    loaded, _ = load_model(out)
    if type(model) is not DiT:
        return 0.0
    return ExportComparison(model.arch, model.state_dict()).confirm(loaded.eval(), str(out))


def _compared(where: str, error: float) -> str:
    return f"read back from {where}, outputs differ by at most {error:.2g} (limit 1e-4)"
