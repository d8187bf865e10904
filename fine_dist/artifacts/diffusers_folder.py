"""Reader of diffusers' `DiTPipeline` and `DiTTransformer2DModel` folders, and conversion of tensors to their names.

In diffusers every block has its own time and label embedders. In folders converted from DiT those of all blocks are
equal: the reader checks this, and the conversion repeats our embedders for each block.

Two facts about diffusers (0.42) affect the meaning of a folder:

- Its time frequencies are `10000^(-i / 127)`, DiT's are `10000^(-i / 128)` (`Arch.frequency_shift` 1 and 0). The
  published `facebook/DiT-XL-2-*` hold DiT's weights unchanged, so diffusers runs them with frequencies that they were
  not trained with. Folders written here hold the weights unchanged, too; `load_pipeline` (or `set_frequencies` on any
  pipeline) sets the frequencies of the training.
- `DiTPipeline` uses label 1000 as the null label. A label table of fewer classes is written with its null label in
  every row up to 1000, so that guidance works; `fine_dist.json` in the folder states the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from fine_dist.artifacts.card import licence_of_card
from fine_dist.artifacts.imported import (
    DIT_LICENCE,
    UNKNOWN_LICENCE,
    ImportedModel,
    check_keys,
    check_tensor,
    checked_state,
)
from fine_dist.artifacts.layouts import DIFFUSERS_CLASSES, read_json
from fine_dist.artifacts.scheduler_config import diffusion_from_scheduler
from fine_dist.artifacts.settings import NO_HINTS, HintsConfig
from fine_dist.artifacts.tensor_files import fetch, read_weights_folder
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch

MARKER = "fine_dist.json"
"""File in an exported folder with the facts for which diffusers' own files have no keys."""
PIPELINE_NULL = 1000
"""The label that `DiTPipeline` uses as the null label for every model."""

# Names of modules: ours, and diffusers'. Those of a block are relative to it.
_OUTSIDE = {"patch": "pos_embed.proj", "final.adaln": "proj_out_1", "final.linear": "proj_out_2"}
_BLOCK = {"o": "attn1.to_out.0", "in": "ff.net.0.proj", "out": "ff.net.2", "adaln": "norm1.linear"}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_EMBED = {
    "time.hidden.weight": "timestep_embedder.linear_1.weight",
    "time.hidden.bias": "timestep_embedder.linear_1.bias",
    "time.out.weight": "timestep_embedder.linear_2.weight",
    "time.out.bias": "timestep_embedder.linear_2.bias",
    "label.weight": "class_embedder.embedding_table.weight",
}
_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
"""Keys of the transformer's `config.json` that have one value in every DiT."""


class Marker(BaseModel):
    """Schema of `fine_dist.json`. Unknown keys are ignored, because a later version may write more."""

    frequency_shift: Literal[0, 1] | None = None
    num_classes: int | None = Field(None, ge=1)
    class_names: tuple[str, ...] = ()
    licence: str | None = None
    diffusion: DiffusionConfig | None = None


@dataclass(frozen=True)
class PipelineFolder:
    """A folder's metadata. `config` is the transformer's; `scheduler` and `vae` are empty if the folder has none."""

    root: Path
    transformer: Path
    config: dict[str, Any]
    scheduler: dict[str, Any]
    vae: dict[str, Any]
    class_names: tuple[str, ...]
    marker: Marker


def read_diffusers(source: str | Path, hints: HintsConfig = NO_HINTS) -> ImportedModel:
    """Read a DiT from the folder of a pipeline or transformer, or from a repository on the hub.

    Args:
        source: The folder, or the repository's name OWNER/MODEL.
        hints: Facts that the files do not state.

    Raises:
        ArtifactError: The files are damaged or of another model, the embedders of its blocks differ, or the repository
            cannot be downloaded.
    """
    folder, where = Path(source), str(source)
    if not folder.is_dir():
        folder = fetch(where)
    configs = _read_configs(folder)
    config = configs.config
    tensors, sha256, variant = read_weights_folder(configs.transformer)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"{where}: {name} is a {type(tensor).__name__}, and a tensor is needed")
        check_tensor(name, tensor, where)
    notes: list[str] = []
    if variant:
        notes.append(f"its weights are of variant {variant}, in reduced precision; there is no file without a variant")
    arch = _arch_of(configs, hints, _frequency_shift(configs, where, hints, notes), where)
    check_keys((name for name, _ in _tensor_names(arch.num_layers)), tensors, where, "a DiTTransformer2DModel")
    state = {}
    for our_name, theirs in _EMBED.items():
        first = tensors[f"transformer_blocks.0.norm1.emb.{theirs}"]
        for layer in range(1, arch.num_layers):
            name = f"transformer_blocks.{layer}.norm1.emb.{theirs}"
            if not torch.equal(tensors.pop(name), first):
                raise ArtifactError(
                    f"{where}: {name} is not block 0's: its blocks were trained with embedders of their own, which a "
                    "DiT (one time and one label embedder) cannot hold"
                )
        state[our_name] = first
    state["label.weight"] = state["label.weight"][: arch.num_classes + 1]  # without the copies of the null label
    for our_name, theirs in _OUTSIDE.items():
        for part in ("weight", "bias"):
            state[f"{our_name}.{part}"] = tensors[f"{theirs}.{part}"]
    state["patch.weight"] = state["patch.weight"].flatten(1)
    for layer in range(arch.num_layers):
        at = f"transformer_blocks.{layer}."
        for part in ("weight", "bias"):
            for our_name, theirs in _BLOCK.items():
                state[f"blocks.{layer}.{our_name}.{part}"] = tensors[f"{at}{theirs}.{part}"]
            state[f"blocks.{layer}.qkv.{part}"] = torch.cat([tensors[f"{at}{name}.{part}"] for name in _QKV])
    epsilon = config.get("norm_eps", 1e-5)
    if not isinstance(epsilon, (int, float)):
        raise ArtifactError(f"{where}: norm_eps is {epsilon!r}, and a number is needed")
    if epsilon != 1e-6:
        notes.append(f"norm_eps {epsilon:g} of its MLPs' LayerNorms becomes DiT's 1e-6")
    licence = hints.licence or configs.marker.licence or licence_of_card(configs.root / "README.md")
    if not licence and _is_published(where):
        licence = DIT_LICENCE
    if not licence:
        notes.append("its files name no licence; give it with --hints.licence")
    return ImportedModel(
        arch=arch,
        state=checked_state(state, arch, where),
        source=where,
        layout="diffusers",
        sha256=sha256,
        licence=licence or UNKNOWN_LICENCE,
        diffusion=diffusion_from_scheduler(configs.scheduler, configs.marker.diffusion, where, notes),
        scaling_factor=_scaling_factor(configs.vae, where),
        class_names=configs.class_names,
        notes=tuple(notes),
    )


def _read_configs(folder: Path) -> PipelineFolder:
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(transformer / "config.json")
    if config.get("_class_name") not in DIFFUSERS_CLASSES:
        raise ArtifactError(
            f"{transformer / 'config.json'} is of a {config.get('_class_name', 'model without a name')}; legal: "
            + ", ".join(DIFFUSERS_CLASSES)
        )
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    marker = read_marker(folder / MARKER) if (folder / MARKER).is_file() else Marker()
    parts = [
        read_json(path) if (path := folder / part / name).is_file() else {}
        for part, name in (("scheduler", "scheduler_config.json"), ("vae", "config.json"))
    ]
    class_names = read_class_names(index, folder / "model_index.json") or marker.class_names
    return PipelineFolder(folder, transformer, config, parts[0], parts[1], class_names, marker)


def read_marker(path: Path) -> Marker:
    """Read a `fine_dist.json`. Raises `ArtifactError` if it is damaged."""
    try:
        return Marker.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged: {key}: {first['msg']}; export the model again") from None


def read_class_names(index: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Return the class names of a `model_index.json`, by label. Raises `ArtifactError` if they are damaged."""
    labels = index.get("id2label") or {}
    if not isinstance(labels, dict) or not all(key.isdecimal() for key in labels):
        raise ArtifactError(f"{path}: id2label must map numbers of classes to names: the file is damaged")
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def _scaling_factor(vae: Mapping[str, Any], where: str) -> float | None:
    factor = vae.get("scaling_factor")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0):
        raise ArtifactError(f"{where}: scaling_factor of its vae is {factor!r}; a number above 0 is needed")
    return None if factor is None else float(factor)


def _is_published(source: str) -> bool:
    """Whether a path or hub name is that of the DiT-XL/2 weights that facebook published in this format."""
    return Path(source).name.startswith(("DiT-XL-2-256", "DiT-XL-2-512")) and "facebook" in source


def _frequency_shift(configs: PipelineFolder, source: str, hints: HintsConfig, notes: list[str]) -> int:
    """Return 0 for weights trained with DiT's time frequencies, 1 for weights trained in diffusers."""
    if hints.frequency_shift is not None:
        return hints.frequency_shift
    if configs.marker.frequency_shift is not None:
        return configs.marker.frequency_shift
    if configs.config["_class_name"] == "Transformer2DModel" or _is_published(source):
        notes.append("frequency_shift 0: converted from the original DiT, whose time frequencies its weights know")
        return 0
    notes.append(
        "frequency_shift 1: taken for trained in diffusers; give --hints.frequency-shift 0 if it was converted from DiT"
    )
    return 1


def _arch_of(configs: PipelineFolder, hints: HintsConfig, frequency_shift: int, where: str) -> Arch:
    config = configs.config
    for key, wanted in _FIXED.items():
        if config.get(key, wanted) != wanted:
            raise ArtifactError(f"{where}: {key} is {config[key]!r}, and a DiT's is {wanted!r}")
    try:
        heads, head_size, channels = (
            int(config.get(key, default))  # defaults are those of DiTTransformer2DModel
            for key, default in (("num_attention_heads", 16), ("attention_head_dim", 72), ("in_channels", 4))
        )
        out = int(config.get("out_channels") or channels)
        if out not in (channels, 2 * channels):
            raise ArtifactError(f"{where}: out_channels is {out} and in_channels {channels}; a DiT has C or 2C")
        classes = hints.num_classes or configs.marker.num_classes or config.get("num_embeds_ada_norm", 1000)
        return Arch(
            hidden_size=heads * head_size,
            num_layers=int(config.get("num_layers", 28)),
            num_heads=heads,
            patch_size=int(config.get("patch_size", 2)),
            in_channels=channels,
            input_size=int(config.get("sample_size", 32)),
            num_classes=int(classes),
            learn_sigma=out == 2 * channels,
            frequency_shift=frequency_shift,
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: its config is of no possible DiT: {error}") from None


def to_diffusers(arch: Arch, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a dense DiT's tensors, float32 on the CPU, under the names of `DiTTransformer2DModel`.

    Raises:
        ConfigError: The model's latents are not square or its positions are rescaled, which the format cannot express.
    """
    if not isinstance(arch.input_size, int):
        raise ConfigError(
            f"the model's latents are {' x '.join(map(str, arch.input_size))} (input_size), and diffusers' "
            "DiTTransformer2DModel has square ones only; legal here: DiT's layout (--to dit), or --to fine_dist"
        )
    if arch.position_grid not in (None, arch.input_size // arch.patch_size):
        raise ConfigError(
            f"the model's positions are rescaled to a grid of {arch.position_grid} patches (position_grid), which a "
            "diffusers folder cannot say; legal here: DiT's layout, which holds the position table itself"
        )
    state = {name: tensor.detach().cpu().float() for name, tensor in state.items()}
    rows = label_rows(arch)
    table = state["label.weight"]
    null = table[arch.num_classes].expand(rows - len(table), -1)
    state["label.weight"] = torch.cat([table, null])
    p, tensors = arch.patch_size, {}
    for name, (ours, third) in _tensor_names(arch.num_layers):
        tensor = state[ours] if third is None else state[ours].chunk(3)[third]
        tensors[name] = tensor.clone()  # safetensors refuses tensors that share memory
    tensors["pos_embed.proj.weight"] = tensors["pos_embed.proj.weight"].reshape(-1, arch.in_channels, p, p)
    return tensors


def label_rows(arch: Arch) -> int:
    """Number of rows of a folder's label table: one per class, then null labels up to at least `PIPELINE_NULL`."""
    return max(arch.num_classes, PIPELINE_NULL) + 1


def _tensor_names(num_layers: int) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """Yield (diffusers' name, (our name, third)) for each tensor; third: 0, 1, 2 for q, k, v in our qkv, else None."""
    parts = ("weight", "bias")
    for ours, theirs in _OUTSIDE.items():
        yield from ((f"{theirs}.{part}", (f"{ours}.{part}", None)) for part in parts)
    for layer in range(num_layers):
        at = f"transformer_blocks.{layer}."
        yield from ((f"{at}norm1.emb.{theirs}", (ours, None)) for ours, theirs in _EMBED.items())
        for ours, theirs in _BLOCK.items():
            yield from ((f"{at}{theirs}.{part}", (f"blocks.{layer}.{ours}.{part}", None)) for part in parts)
        for third, theirs in enumerate(_QKV):
            yield from ((f"{at}{theirs}.{part}", (f"blocks.{layer}.qkv.{part}", third)) for part in parts)
