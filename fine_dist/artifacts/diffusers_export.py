"""Writing a `DiTPipeline` folder, and running it in diffusers before it gets its name.

The format is described in `fine_dist.artifacts.diffusers_folder`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.artifacts.autoencoder import check_scaling
from fine_dist.artifacts.card import ModelCard, card_text
from fine_dist.artifacts.diffusers_folder import MARKER, PIPELINE_NULL, label_rows, to_diffusers
from fine_dist.artifacts.export_check import ExportComparison
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import whole_folder, written_whole
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch

_DIT_CHAIN, _EMPTY_CARD = DiffusionConfig(), ModelCard()


@dataclass(frozen=True)
class ExportReport:
    """What an export found out.

    max_error:   of a forward pass in diffusers with the model's own time frequencies, against ours.
    stock_error: the same as diffusers loads it by itself; as max_error for models of `frequency_shift` 1.
    pipeline:    whether the folder is a whole `DiTPipeline` (it has a VAE).
    """

    folder: Path
    max_error: float
    stock_error: float
    pipeline: bool


def write_diffusers(
    folder: str | Path,
    arch: Arch,
    state: Mapping[str, Tensor],
    *,
    diffusion: DiffusionConfig = _DIT_CHAIN,
    vae: str | Path | None = None,
    scaling_factor: float | None = None,
    class_names: tuple[str, ...] = (),
    clip: float | None = None,
    card: ModelCard = _EMPTY_CARD,
) -> ExportReport:
    """Write transformer, scheduler, the VAE's copy, labels, model card and marker; returns what running it gave.

    vae:            a folder or hub name of an `AutoencoderKL`; none: no whole pipeline (diffusers' needs one).
    scaling_factor: of the codec that made the training latents; another one of the VAE is an error.
    clip:           `SamplerConfig.clip`; the scheduler clamps predicted latents, too.

    `ConfigError` when it exists already, or the names do not fit the classes; `ArtifactError` when the VAE does not
    fit, or outputs differ by more than 1e-4.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder, or remove it")
    if class_names and len(class_names) != arch.num_classes:
        raise ConfigError(f"{len(class_names)} class names for {arch.num_classes} classes")
    with whole_folder(folder) as draft:
        transformer = draft / "transformer"
        transformer.mkdir()
        theirs = to_diffusers(arch, state)
        numbers = sum(tensor.numel() for tensor in theirs.values())
        with written_whole(file := transformer / "diffusion_pytorch_model.safetensors"):
            save_file(theirs, file, metadata={"format": "pt"})
        del theirs
        _write_json(transformer / "config.json", transformer_config(arch))
        ddim_scheduler(diffusion, clip).save_pretrained(draft / "scheduler")
        if vae is not None:
            _copy_vae(vae, draft / "vae", arch, scaling_factor)
            _write_json(draft / "model_index.json", _index(class_names))
        _write_json(
            draft / MARKER,
            {
                "format": 1,
                "arch": arch.model_dump(),
                "num_classes": arch.num_classes,
                "frequency_shift": arch.frequency_shift,
                "diffusion": diffusion.model_dump(),
                "class_names": class_names,
                "licence": card.licence,
            },
        )
        (draft / "README.md").write_text(card_text(card, arch, numbers, _how_to_load(arch, vae is not None)))
        model = _transformer(transformer)
        comparison = ExportComparison(arch, state)
        stock = comparison.error(forward_of(model))
        set_frequencies(model, arch.frequency_shift)
        error = comparison.confirm(forward_of(model), str(folder))
    return ExportReport(folder, error, stock, vae is not None)


def transformer_config(arch: Arch) -> dict[str, Any]:
    """The `config.json` of a `DiTTransformer2DModel` of this shape."""
    import diffusers

    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": diffusers.__version__,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": arch.hidden_size // arch.num_heads,
        "dropout": 0.0,
        "in_channels": arch.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": arch.num_heads,
        "num_embeds_ada_norm": label_rows(arch) - 1,
        "num_layers": arch.num_layers,
        "out_channels": arch.out_channels,
        "patch_size": arch.patch_size,
        "sample_size": arch.input_size,
        "upcast_attention": False,
    }


def ddim_scheduler(diffusion: DiffusionConfig, clip: float | None) -> Any:
    """diffusers' DDIM over the model's chain, its timesteps ending at T-1 as ours do."""
    import diffusers

    return diffusers.DDIMScheduler(
        num_train_timesteps=diffusion.num_timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        beta_schedule="linear",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",
    )


def load_pipeline(folder: str | Path) -> Any:
    """A written folder as diffusers' `DiTPipeline`, computing what the model was trained for."""
    from diffusers import DiTPipeline

    from fine_dist.artifacts.tensor_files import read_json

    if not (Path(folder) / "model_index.json").is_file():
        raise ArtifactError(f"{folder} is no whole pipeline (no model_index.json); export it with a VAE")
    pipeline = DiTPipeline.from_pretrained(str(folder), use_safetensors=True)
    marker = Path(folder) / MARKER
    set_frequencies(pipeline, int(read_json(marker).get("frequency_shift", 1)) if marker.is_file() else 1)
    return pipeline


def set_frequencies(model: Any, frequency_shift: int) -> None:
    """Give a `DiTPipeline` or `DiTTransformer2DModel` the time frequencies of `Arch.frequency_shift`."""
    for block in getattr(model, "transformer", model).transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift


def forward_of(model: Any) -> Any:
    """A `DiTTransformer2DModel` as a function `(z, t, y) -> output`, dropping no labels."""
    model.eval()
    return lambda z, t, y: model(z, timestep=t, class_labels=y, return_dict=False)[0]


def _transformer(folder: Path) -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(str(folder), use_safetensors=True)


def _copy_vae(name: str | Path, to: Path, arch: Arch, scaling_factor: float | None) -> None:
    from diffusers import AutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(str(name), use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"vae {name}: no AutoencoderKL can be loaded from there: {first}") from None
    if vae.config.latent_channels != arch.in_channels:
        raise ArtifactError(
            f"vae {name}: its latents have {vae.config.latent_channels} channels, not {arch.in_channels}"
        )
    check_scaling(str(name), float(vae.config.scaling_factor), scaling_factor)
    with written_whole(to):
        vae.save_pretrained(str(to), safe_serialization=True)


def _index(class_names: tuple[str, ...]) -> dict[str, Any]:
    import diffusers

    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    parts = {"scheduler": "DDIMScheduler", "transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    return {**index, **{part: ["diffusers", kind] for part, kind in parts.items()}}


def _how_to_load(arch: Arch, pipeline: bool) -> str:
    load = (
        'pipe = DiTPipeline.from_pretrained("FOLDER")'
        if pipeline
        else 'model = DiTTransformer2DModel.from_pretrained("FOLDER", subfolder="transformer")'
    )
    name, kind = ("pipe.transformer", "DiTPipeline") if pipeline else ("model", "DiTTransformer2DModel")
    lines = [f"from diffusers import {kind}", load]
    words = "Load it with diffusers"
    if not arch.frequency_shift:
        lines.append(f"for block in {name}.transformer_blocks:\n    block.norm1.emb.time_proj.downscale_freq_shift = 0")
        words += " (the last lines give it the time frequencies it was trained with; diffusers' own differ)"
    if arch.num_classes > PIPELINE_NULL:
        words += f"; DiTPipeline guides with label {PIPELINE_NULL}, which is a class here: use guidance_scale 1"
    words += ":"
    code = "\n".join(lines)
    return f"{words}\n\n```python\n{code}\n```"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
