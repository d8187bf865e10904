"""Write a pipeline folder, and run it in diffusers before it gets its name.

A DDPM becomes a `DiTPipeline` with a DDIM scheduler. A flow becomes a folder with diffusers' flow-matching scheduler
and a pipeline of its own (`flow_pipeline.py`, copied as `pipeline.py`). `diffusers_folder` describes the layout.
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
    """What the check after an export measured.

    Args:
        folder: Where the export is.
        max_error: Largest difference of a forward pass in diffusers, with the model's own time frequencies, to ours.
        stock_error: The same as diffusers loads the folder by itself; `max_error` for models of `frequency_shift` 1.
        pipeline: Whether the folder is a whole pipeline (it has a VAE).
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
    """Write transformer, scheduler, the VAE's copy, labels, model card and marker, and compare a forward pass.

    Args:
        folder: A folder that does not exist yet.
        arch: The model's shape.
        state: The tensors of a dense DiT.
        diffusion: The process; it decides the scheduler and the kind of pipeline.
        vae: A folder or hub name of an `AutoencoderKL`. Default: no whole pipeline, which needs one.
        scaling_factor: Of the codec that made the training latents; a VAE with another one is an error.
        shift_factor: Likewise; None where nothing says.
        class_names: Names by label, all or none.
        clip: `SamplerConfig.clip`; a DDIM scheduler clamps predicted latents, too.
        card: What the model card says.

    Raises:
        ConfigError: The folder exists, or the names do not fit the classes.
        ArtifactError: The VAE does not fit, or outputs differ by more than 1e-4.
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
        # The check below loads the file again, and a large model must not be in memory three times.
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
        (draft / "README.md").write_text(card_text(card, arch, numbers, _how_to_load(arch, diffusion, vae is not None)))
        model = _transformer(transformer)
        comparison = ExportComparison(arch, state)
        # Measured before the frequencies are set, since that is the state in which diffusers alone loads the folder.
        stock = comparison.error(forward_of(model))
        set_frequencies(model, arch.frequency_shift)
        error = comparison.confirm(forward_of(model), str(folder))
    return ExportReport(folder, error, stock, vae is not None)


def transformer_config(arch: Arch) -> dict[str, Any]:
    """The `config.json` of a `DiTTransformer2DModel` of this shape."""
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
    """A written folder as a diffusers pipeline that computes what the model was trained for.

    A flow's pipeline is built from this package's own file: code in the folder is not run.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ArtifactError(f"{folder} is no whole pipeline (no model_index.json); export it with a VAE")
    marker = read_marker(folder / MARKER) if (folder / MARKER).is_file() else Marker()
    if marker.diffusion is not None and marker.diffusion.process == "flow":
        names = read_class_names(read_json(folder / "model_index.json"), folder / "model_index.json")
        return flow_pipeline.FlowDiTPipeline(
            _transformer(folder / "transformer"),
            diffusers.AutoencoderKL.from_pretrained(str(folder / "vae"), use_safetensors=True),
            diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler")),
            id2label=dict(enumerate(names)) or None,
            direction=marker.diffusion.direction,
            time_scale=marker.diffusion.time_scale,
            frequency_shift=1 if marker.frequency_shift is None else marker.frequency_shift,
            null_label=PIPELINE_NULL if marker.num_classes is None else marker.num_classes,
        )
    pipeline = diffusers.DiTPipeline.from_pretrained(str(folder), use_safetensors=True)
    set_frequencies(pipeline, 1 if marker.frequency_shift is None else marker.frequency_shift)
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
    return diffusers.DiTTransformer2DModel.from_pretrained(str(folder), use_safetensors=True)


def _copy_vae(
    name: str | Path, to: Path, arch: Arch, scaling: tuple[Channels | None, Channels | None], diffusion: DiffusionConfig
) -> None:
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
    if isinstance(scaling[0] or vae_scaling[0], tuple) or (diffusion.process == "ddpm" and vae_scaling[1]):
        what = (
            "a scale for each channel"
            if isinstance(scaling[0] or vae_scaling[0], tuple)
            else f"a shift of {vae_scaling[1]:g}"
        )
        raise ConfigError(
            f"vae {name}: the model's latents have {what}, which the exported pipeline would not undo; leave --vae out "
            "and decode with fine_dist (fine-dist sample --vae)"
        )
    with library_write(to):
        vae.save_pretrained(str(to), safe_serialization=True)


def _index(arch: Arch, diffusion: DiffusionConfig, scheduler: str, class_names: tuple[str, ...]) -> dict[str, Any]:
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
    if diffusion.process == "flow":
        index |= {
            "_class_name": ["pipeline", "FlowDiTPipeline"],  # diffusers takes the class from pipeline.py
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
        # diffusers has no setting for this in config.json, so the card must tell a user to set it.
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
