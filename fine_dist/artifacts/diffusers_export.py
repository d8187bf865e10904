"""Export of a dense DiT as a diffusers folder, whose outputs diffusers must reproduce before it gets its final name.

A DDPM model becomes a `DiTPipeline` with a DDIM scheduler. A flow model gets diffusers' flow-matching scheduler and the
pipeline class of `flow_pipeline.py`, copied as `pipeline.py`. `diffusers_folder` describes the folder's layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from fine_dist.artifacts import flow_pipeline
from fine_dist.artifacts.autoencoder import check_scaling
from fine_dist.artifacts.card import ModelCard, card_text
from fine_dist.artifacts.diffusers_folder import (
    MARKER,
    PIPELINE_NULL,
    Marker,
    label_rows,
    read_class_names,
    read_marker,
    to_diffusers,
)
from fine_dist.artifacts.export_check import ExportComparison
from fine_dist.artifacts.layouts import read_json
from fine_dist.artifacts.scheduler_config import scheduler_of
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import atomic_folder, library_write
from fine_dist.data.codecs import scaling_of
from fine_dist.data.manifest import Channels
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch

_DIT_CHAIN, _EMPTY_CARD = DiffusionConfig(), ModelCard()


@dataclass(frozen=True)
class ExportReport:
    """Result of the comparison after an export; errors are those of `ExportComparison.error`.

    Args:
        folder: The exported folder.
        max_error: Error of diffusers' outputs with the time frequencies that the model was trained with.
        stock_error: Error of diffusers' outputs as it loads the folder by itself, with its own time frequencies. Equal
            to `max_error` for models with `frequency_shift` 1.
        pipeline: Whether the folder is a complete pipeline, with an autoencoder.
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
    scaling_factor: Channels | None = None,
    shift_factor: Channels | None = None,
    class_names: tuple[str, ...] = (),
    clip: float | None = None,
    card: ModelCard = _EMPTY_CARD,
) -> ExportReport:
    """Write transformer, scheduler, autoencoder, class names, model card and marker, and compare a forward pass.

    Args:
        folder: A folder that does not exist yet.
        arch: Architecture of the model.
        state: Tensors of a dense DiT, by this project's names.
        diffusion: The process that the model was trained for. It selects the scheduler and the pipeline class.
        vae: Folder or hub name of an `AutoencoderKL`, which is copied. Default: transformer and scheduler only.
        scaling_factor: Factor by which the training latents were multiplied; None if unknown.
        shift_factor: Value that was subtracted from the training latents before; None if unknown.
        class_names: Class names by label; empty, or one for each class.
        clip: `SamplerConfig.clip`, which the DDIM scheduler applies as `clip_sample_range`.
        card: Content of the model card.

    Raises:
        ConfigError: The folder exists, there are not as many names as classes, or the pipeline format cannot hold the
            model.
        ArtifactError: The autoencoder's channels or scaling are not those of the latents, or outputs differ by more
            than 1e-4.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder, or remove it")
    if class_names and len(class_names) != arch.num_classes:
        raise ConfigError(f"{len(class_names)} class names for {arch.num_classes} classes")
    with atomic_folder(folder) as draft:
        transformer = draft / "transformer"
        transformer.mkdir()
        theirs = to_diffusers(arch, state)
        numbers = sum(tensor.numel() for tensor in theirs.values())
        with library_write(file := transformer / "diffusion_pytorch_model.safetensors"):
            save_file(theirs, file, metadata={"format": "pt"})
        # Freed here, because the comparison below loads the file again and builds a second model.
        del theirs
        _write_json(transformer / "config.json", transformer_config(arch))
        scheduler = scheduler_of(diffusion, clip)
        scheduler.save_pretrained(draft / "scheduler")
        if vae is not None:
            _copy_vae(vae, draft / "vae", arch, (scaling_factor, shift_factor), diffusion)
            _write_json(draft / "model_index.json", _index(arch, diffusion, type(scheduler).__name__, class_names))
            if diffusion.process == "flow":
                shutil.copyfile(flow_pipeline.__file__, draft / "pipeline.py")
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
        text = card_text(card, arch, numbers, _how_to_load(arch, diffusion, vae is not None))
        (draft / "README.md").write_text(text, encoding="utf-8")
        model = _load_transformer(transformer)
        comparison = ExportComparison(arch, state)
        # Before `set_frequencies`: this is the model as diffusers loads it by itself.
        stock = comparison.error(forward_of(model))
        set_frequencies(model, arch.frequency_shift)
        error = comparison.confirm(forward_of(model), str(folder))
    return ExportReport(folder, error, stock, vae is not None)


def transformer_config(arch: Arch) -> dict[str, Any]:
    """Return the `config.json` of a `DiTTransformer2DModel` of this architecture."""
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


def load_pipeline(folder: str | Path) -> Any:
    """Load an exported folder as a diffusers pipeline with the time frequencies that the model was trained with.

    The pipeline class of a flow model is this package's `FlowDiTPipeline`; the folder's `pipeline.py` is not executed.

    Raises:
        ArtifactError: The folder is no complete pipeline, or its `fine_dist.json` or class names are damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ArtifactError(f"{folder} is not a complete pipeline (no model_index.json); export it with a VAE")
    marker = read_marker(folder / MARKER) if (folder / MARKER).is_file() else Marker()
    frequency_shift = 1 if marker.frequency_shift is None else marker.frequency_shift
    if marker.diffusion is not None and marker.diffusion.process == "flow":
        names = read_class_names(read_json(folder / "model_index.json"), folder / "model_index.json")
        return flow_pipeline.FlowDiTPipeline(
            _load_transformer(folder / "transformer"),
            diffusers.AutoencoderKL.from_pretrained(str(folder / "vae"), use_safetensors=True),
            diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler")),
            id2label=dict(enumerate(names)) or None,
            direction=marker.diffusion.direction,
            time_scale=marker.diffusion.time_scale,
            frequency_shift=frequency_shift,
            null_label=PIPELINE_NULL if marker.num_classes is None else marker.num_classes,
        )
    pipeline = diffusers.DiTPipeline.from_pretrained(str(folder), use_safetensors=True)
    set_frequencies(pipeline, frequency_shift)
    return pipeline


def set_frequencies(model: Any, frequency_shift: int) -> None:
    """Set the time frequencies of a `DiTPipeline` or `DiTTransformer2DModel`, see `Arch.frequency_shift`."""
    for block in getattr(model, "transformer", model).transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift


def forward_of(model: Any) -> Any:
    """Return the forward pass `(z, t, y) -> output` of a `DiTTransformer2DModel`, in eval mode: no label dropout."""
    model.eval()
    return lambda z, t, y: model(z, timestep=t, class_labels=y, return_dict=False)[0]


def _load_transformer(folder: Path) -> Any:
    return diffusers.DiTTransformer2DModel.from_pretrained(str(folder), use_safetensors=True)


def _copy_vae(
    name: str | Path, to: Path, arch: Arch, scaling: tuple[Channels | None, Channels | None], diffusion: DiffusionConfig
) -> None:
    """Copy an autoencoder in float32, after checking that diffusers' pipelines would decode the model's latents."""
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(str(name), use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"vae {name}: no AutoencoderKL can be loaded from there: {first}") from None
    if vae.config.latent_channels != arch.in_channels:
        raise ArtifactError(
            f"vae {name}: its latents have {vae.config.latent_channels} channels, not {arch.in_channels}"
        )
    vae_scaling = scaling_of(vae)
    check_scaling(str(name), vae_scaling, scaling)
    # DiTPipeline divides by one scaling factor and ignores shifts; FlowDiTPipeline undoes one shift as well.
    per_channel = isinstance(scaling[0] or vae_scaling[0], tuple)
    if per_channel or (diffusion.process == "ddpm" and vae_scaling[1]):
        what = "a scale for each channel" if per_channel else f"a shift of {vae_scaling[1]:g}"
        raise ConfigError(
            f"vae {name}: the model's latents have {what}, which the exported pipeline would not undo; leave --vae out "
            "and decode with fine_dist (fine-dist sample --vae)"
        )
    with library_write(to):
        vae.save_pretrained(str(to), safe_serialization=True)


def _index(arch: Arch, diffusion: DiffusionConfig, scheduler: str, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Return the content of `model_index.json`."""
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if diffusion.process == "flow":
        index |= {
            "_class_name": ["pipeline", "FlowDiTPipeline"],  # [file, class]: diffusers imports it from pipeline.py
            "direction": diffusion.direction,
            "time_scale": diffusion.time_scale,
            "frequency_shift": arch.frequency_shift,
            "null_label": arch.num_classes,
        }
    if class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(class_names)}
    parts = {"scheduler": scheduler, "transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}
    return {**index, **{part: ["diffusers", kind] for part, kind in parts.items()}}


def _how_to_load(arch: Arch, diffusion: DiffusionConfig, pipeline: bool) -> str:
    """Return the paragraph of the model card that shows how to load the folder."""
    if pipeline and diffusion.process == "flow":
        code = (
            "from diffusers import DiffusionPipeline\n"
            'pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)\n'
            "images = pipe([0, 1], num_inference_steps=50).images"
        )
        sentence = "Load it with diffusers; `pipeline.py` in the folder samples it by flow matching:"
        return f"{sentence}\n\n```python\n{code}\n```"
    load = (
        'pipe = DiTPipeline.from_pretrained("FOLDER")'
        if pipeline
        else 'model = DiTTransformer2DModel.from_pretrained("FOLDER", subfolder="transformer")'
    )
    name, kind = ("pipe.transformer", "DiTPipeline") if pipeline else ("model", "DiTTransformer2DModel")
    lines = [f"from diffusers import {kind}", load]
    sentence = "Load it with diffusers"
    if not arch.frequency_shift:
        # DiTTransformer2DModel has no config key for this, so users must set it in code.
        lines.append(f"for block in {name}.transformer_blocks:\n    block.norm1.emb.time_proj.downscale_freq_shift = 0")
        sentence += " (the last lines give it the time frequencies it was trained with; diffusers' own differ)"
    if diffusion.process == "flow":
        sentence += f"; it predicts velocities ({diffusion.direction}) at times 0 to {diffusion.time_scale:g}"
    elif arch.num_classes > PIPELINE_NULL:
        sentence += f"; DiTPipeline guides with label {PIPELINE_NULL}, which is a class here: use guidance_scale 1"
    sentence += ":"
    code = "\n".join(lines)
    return f"{sentence}\n\n```python\n{code}\n```"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
