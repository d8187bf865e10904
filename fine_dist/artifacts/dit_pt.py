"""Reads and writes state dicts in the original DiT's format; fast-DiT, SiT and REPA use the same names.

The format is that of the published checkpoints: the patch embedding is a convolution, there are one time and one label
embedder, q, k and v are one matrix, and the position table is a tensor. `unwrap` removes the wrappers of frameworks.

Letters: D width, L layers, p patch side, C latent channels, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fine_dist.artifacts.export_check import ExportComparison
from fine_dist.artifacts.imported import (
    DIT_LICENCE,
    UNKNOWN_LICENCE,
    ImportedModel,
    check_keys,
    check_tensor,
    checked_state,
    heads_of,
    read_int,
)
from fine_dist.artifacts.settings import NO_HINTS, HintsConfig
from fine_dist.artifacts.tensor_files import read_tensor_file
from fine_dist.artifacts.unwrap import Unwrapped, unwrap
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.core.files import atomic_file, library_write, sha256_of
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch, Sides, both, parse_name, sides
from fine_dist.model.dit import positions_of

# Names of modules: ours, and DiT's. Those of a block are relative to it.
_OUTSIDE = {
    "patch": "x_embedder.proj",
    "time.hidden": "t_embedder.mlp.0",
    "time.out": "t_embedder.mlp.2",
    "final.adaln": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_BLOCK = {"qkv": "attn.qkv", "o": "attn.proj", "in": "mlp.fc1", "out": "mlp.fc2", "adaln": "adaLN_modulation.1"}
_LABEL, _POSITION = "y_embedder.embedding_table.weight", "pos_embed"
_PUBLISHED = re.compile(r"^DiT-XL-2-(256x256|512x512)\.pt$")


def names(num_layers: int) -> Iterator[tuple[str, str]]:
    """Yield (our name, DiT's name) for each trained tensor."""
    parts = ("weight", "bias")
    yield from ((f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in _OUTSIDE.items() for part in parts)
    yield "label.weight", _LABEL
    for layer in range(num_layers):
        at = f"blocks.{layer}."
        yield from ((f"{at}{ours}.{part}", f"{at}{theirs}.{part}") for ours, theirs in _BLOCK.items() for part in parts)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_dit(path: str | Path, hints: HintsConfig = NO_HINTS, weights: Literal["ema", "raw"] = "ema") -> ImportedModel:
    """Read a checkpoint in DiT's format, `.pt` or `.safetensors`, with or without wrappers of a framework.

    Args:
        path: The file. Code in it is not executed.
        hints: Facts that the file does not state.
        weights: Which weights to read if the file holds both: the averaged (`ema`) or the trained ones (`raw`).

    Raises:
        ArtifactError: The file is damaged, holds pickled code, or is no DiT.
    """
    path = Path(path)
    unwrapped = unwrap(read_tensor_file(path), weights, path)
    state, notes = unwrapped.state, unwrapped.notes
    _refuse_relatives(state, str(path))
    arch, has_null = _arch_of(state, hints, unwrapped.arguments, str(path))
    if not has_null:
        notes.append(
            "no null label: its label table has one row a class; it cannot be guided, and a row of zeros is added"
        )
        state[_LABEL] = torch.cat([state[_LABEL], torch.zeros_like(state[_LABEL][:1])])
    arch = _with_positions(state.pop(_POSITION, None), arch, str(path))
    tensors = {our_name: state[their_name] for our_name, their_name in names(arch.num_layers)}
    tensors["patch.weight"] = tensors["patch.weight"].flatten(1)
    licence = hints.licence or (DIT_LICENCE if _PUBLISHED.match(path.name) else UNKNOWN_LICENCE)
    if licence == UNKNOWN_LICENCE:
        notes.append(
            "the file names no licence; give it with --hints.licence (the published weights of DiT are cc-by-nc-4.0)"
        )
    return ImportedModel(
        arch=arch,
        state=checked_state(tensors, arch, str(path)),
        source=str(path),
        layout="dit",
        sha256=sha256_of(path),
        licence=licence,
        diffusion=_process_of(hints, unwrapped, path, has_null),
        notes=tuple(notes),
    )


def _process_of(hints: HintsConfig, unwrapped: Unwrapped, path: Path, has_null: bool) -> DiffusionConfig:
    """Return the process: by the hint, by REPA's projectors and arguments, by the name of the model, else DDPM."""
    drop = {} if has_null else {"label_drop": 0.0}
    words = re.split(r"[^a-z]+", f"{path.name} {unwrapped.arguments.get('model', '')}".lower())
    kind = hints.process
    if kind is None and (unwrapped.dropped or "proj_coeff" in unwrapped.arguments or "repa" in words):
        kind = "repa"
    if kind is None and "sit" in words:
        kind = "sit"
    if kind in (None, "ddpm"):
        return DiffusionConfig(**drop)
    for name, legal in (("path_type", ("linear", "Linear")), ("prediction", ("v", "velocity"))):
        if unwrapped.arguments.get(name, legal[0]) not in legal:
            raise ArtifactError(
                f"{path}: it was trained with {name} {unwrapped.arguments[name]!r}; legal: {legal[0]}, the linear "
                "interpolant with velocity prediction"
            )
    direction: Literal["data_to_noise", "noise_to_data"] = "data_to_noise" if kind == "repa" else "noise_to_data"
    unwrapped.notes.append(f"flow matching in the convention of {kind} (--hints.process says otherwise)")
    return DiffusionConfig(process="flow", direction=direction, **drop)


def _refuse_relatives(state: Mapping[str, Tensor], where: str) -> None:
    """Raise `ArtifactError` for a transformer with DiT's names but other blocks, such as LightningDiT."""
    parts = {
        "SwiGLU MLPs (mlp.w12, mlp.w3)": any(".mlp.w12." in name or ".mlp.w3." in name for name in state),
        "affine norms in its blocks (RMSNorm)": any(re.match(r"blocks\.\d+\.norm\d\.weight", name) for name in state),
        "rotary positions (feat_rope)": any(name.startswith("feat_rope.") for name in state),
        "normalized queries and keys": any(".attn.q_norm." in name for name in state),
    }
    present = [part for part, is_present in parts.items() if is_present]
    # A single other part may be in a variant of DiT; `check_keys` then reports its tensors by name.
    if len(present) > 1 or (present and "SwiGLU" in present[0]):
        raise ArtifactError(
            f"{where} looks like a LightningDiT: it has {', '.join(present)}. Methods here share the five matrices of "
            "DiT's blocks, which those blocks do not have; take a model of DiT's, SiT's or REPA's layout"
        )


def _arch_of(
    state: Mapping[str, Tensor], hints: HintsConfig, arguments: Mapping[str, Any], where: str
) -> tuple[Arch, bool]:
    """Return the architecture that the shapes imply, and whether the label table has a null label."""
    layers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    # A damaged or malicious file could name block 10^9, and the list of expected names would fill the memory.
    if layers and max(layers) > 10_000:
        raise ArtifactError(f"{where} names a block {max(layers)}; that is no DiT")
    num_layers = max(layers, default=-1) + 1
    check_keys((theirs for _, theirs in names(num_layers or 1)), (k for k in state if k != _POSITION), where, "a DiT")
    for name, tensor in state.items():
        check_tensor(name, tensor, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    patch, out = "x_embedder.proj.weight", "final_layer.linear.weight"
    width = read_int(shapes[patch], 0, patch, where, 4)
    channels, side = shapes[patch][1], shapes[patch][2]
    out_channels = read_int(shapes[out], 0, out, where, 2) // (side * side)
    if out_channels not in (channels, 2 * channels):
        raise ArtifactError(f"{where}: {out_channels} channels come out and {channels} go in; a DiT has C or 2C")
    rows = read_int(shapes[_LABEL], 0, _LABEL, where, 2)
    # C classes without a null label (no label dropout) have the same table as C-1 with one; only the arguments differ.
    if arguments.get("num_classes") == rows and hints.num_classes is None:
        hints = hints.model_copy(update={"num_classes": rows})
    num_classes = hints.num_classes or rows - 1
    if num_classes not in (rows, rows - 1):
        raise ArtifactError(
            f"{where}: num_classes {num_classes}: the label table has {rows} rows; legal: {rows - 1}, {rows}"
        )
    try:
        arch = Arch(
            hidden_size=width,
            num_layers=num_layers,
            num_heads=heads_of(width, hints.num_heads, _named_heads(arguments), where),
            patch_size=side,
            in_channels=channels,
            input_size=_input_size(state.get(_POSITION), side, hints, where),
            num_classes=num_classes,
            learn_sigma=out_channels == 2 * channels,
            frequency_shift=hints.frequency_shift or 0,
        )
    except ValueError as error:
        raise ArtifactError(f"{where} is no DiT of a possible shape: {error}") from None
    return arch, rows == num_classes + 1


def _named_heads(arguments: Mapping[str, Any]) -> int | None:
    """Return the number of heads of the model name in the saved arguments, such as SiT-XL/2; None without one."""
    try:
        return int(parse_name(str(arguments.get("model", "")).replace("SiT", "DiT"))["num_heads"])
    except ValueError:
        return None


def _input_size(table: Tensor | None, patch: int, hints: HintsConfig, where: str) -> Sides:
    """Return the latent's side or sides, from the hint or from the grid of the position table [1, T, D]."""
    if table is None:
        if hints.input_size is None:
            raise ArtifactError(
                f"{where} has no position table ({_POSITION}); give the side of a latent with --hints.input-size"
            )
        return hints.input_size
    tokens = table.shape[-2] if table.ndim == 3 else 0
    side = math.isqrt(tokens)
    grid = _grid_of(table[0].float()) if tokens else None
    if side * side == tokens and (grid is None or grid[1] == 1):  # no sine-cosine table: `_with_positions` refuses it
        grid = (side, side)
    if not tokens or grid is None:
        raise ArtifactError(
            f"{where}: {_POSITION} is {list(table.shape)}, and a table [1, T, D] of a whole grid is needed"
        )
    if hints.input_size is not None:
        height, width = both(hints.input_size)
        if height * width != tokens * patch * patch:
            size = " x ".join(str(patch * n) for n in grid)
            raise ArtifactError(f"{where}: input_size {hints.input_size}: its position table is for {size}")
        return hints.input_size
    return sides(patch * grid[0], patch * grid[1])


def _grid_of(table: Tensor) -> tuple[int, int] | None:
    """Return (rows, columns) of the grid of a sine-cosine table [T, D], or None if T is no multiple of the columns."""
    tokens, width = table.shape
    row = table[:, width // 2 :]  # encodes the row of the grid, so it first changes where the second row begins
    columns = int(((row - row[0]).abs().amax(1) < 1e-5).int().cumprod(0).sum())
    return (tokens // columns, columns) if tokens % columns == 0 else None


def _with_positions(table: Tensor | None, arch: Arch, where: str) -> Arch:
    """Return the architecture, with `position_grid` if the position table [1, T, D] is rescaled as in DiffFit.

    The table is not kept, because the model computes it; any other table, such as a learned one, is an error. Values
    may differ by rounding in the dtype of the file: half a unit in the last place of 1.
    """
    if table is None:
        return arch
    candidates = [arch]
    if arch.num_tokens > 1 and table.shape[1:] == positions_of(arch).shape:
        # The first frequency is 1, so entry 0 of a half of D is the sine of the position itself. The first half
        # encodes the column and the second half the row.
        _, columns = arch.grid
        trained = (_trained(table[0, ::columns, table.shape[2] // 2]), _trained(table[0, :columns, 0]))
        if all(trained) and trained != arch.grid:
            candidates.append(arch.model_copy(update={"position_grid": sides(*trained)}))
    gaps = [_gap(table[0], positions_of(candidate)) for candidate in candidates]
    if min(gaps) <= max(1e-5, torch.finfo(table.dtype).eps / 2):
        return candidates[gaps.index(min(gaps))]
    difference = f"differs from that by up to {gaps[0]:.3g}" if math.isfinite(gaps[0]) else f"is {list(table.shape)}"
    raise ArtifactError(
        f"{where}: {_POSITION} is not DiT's fixed sine-cosine table (it {difference}); it cannot be kept"
    )


def _trained(sines: Tensor) -> int:
    """Return the side n of the trained grid, from the sines of N positions 0, n/N, 2n/N, ... along one side."""
    return 1 if len(sines) == 1 else round(len(sines) * math.asin(max(-1.0, min(1.0, float(sines[1])))))


def _gap(table: Tensor, ours: Tensor) -> float:
    """Return the largest difference of two tables; infinity if their shapes differ or a value is not finite."""
    gap = float((table.float() - ours).abs().max()) if table.shape == ours.shape else math.inf
    return gap if math.isfinite(gap) else math.inf


# --- writing ---------------------------------------------------------------------------------------------------------


def to_dit(arch: Arch, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a dense DiT's tensors, float32 on the CPU, under DiT's names, with the position table [1, T, D]."""
    p = arch.patch_size
    tensors = {name: state[ours].detach().cpu().float().contiguous() for ours, name in names(arch.num_layers)}
    tensors["x_embedder.proj.weight"] = tensors["x_embedder.proj.weight"].reshape(-1, arch.in_channels, p, p)
    tensors[_POSITION] = positions_of(arch)[None]
    return tensors


def write_dit(path: str | Path, arch: Arch, state: Mapping[str, Tensor]) -> float:
    """Write a dense DiT in DiT's format (`.pt` or `.safetensors`), and return `ExportComparison.error` of the file.

    Raises:
        ConfigError: The path has another suffix, or the model has diffusers' time frequencies.
        ArtifactError: Outputs of `dit_forward` with the written tensors differ from the model's by more than 1e-4.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise ConfigError(f"{path}: a state dict in DiT's layout ends in .pt or .safetensors")
    if arch.frequency_shift:
        raise ConfigError(
            "the model has diffusers' time frequencies (frequency_shift 1), and DiT's layout knows its own only"
        )
    # The draft gets its final name only if the comparison passes.
    with atomic_file(path, path.suffix) as draft:
        with library_write(draft):
            if path.suffix == ".pt":
                torch.save(to_dit(arch, state), draft)
            else:
                save_file(to_dit(arch, state), draft)
        # Read from the file, so that a wrong name, dtype or order on disk is found.
        written = read_tensor_file(draft)
        error = ExportComparison(arch, state).confirm(
            lambda z, t, y: dit_forward(written, arch.num_heads, z, t, y), str(path)
        )
    return error


def dit_forward(state: Mapping[str, Tensor], num_heads: int, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT's forward pass, with tensors under DiT's names: `z [B, C, H, W], t [B], y [B] -> [B, C or 2C, H, W]`.

    It shares no code with `fine_dist.model`, so that it detects a wrong name or order of tensors.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]

    kernel = state["x_embedder.proj.weight"]
    p, blocks = kernel.shape[-1], len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    x = F.conv2d(z, kernel, state["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2)  #         [B, T, D]
    x = x + state[_POSITION]
    # Cosines come first and i is divided by 128; diffusers divides by 127 (`frequency_shift` 1).
    angle = t.float()[:, None] * 10000.0 ** -(torch.arange(128) / 128)
    wave = torch.cat([angle.cos(), angle.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", wave))) + state[_LABEL][y]
    b, tokens, d = x.shape
    for i in range(blocks):
        at = f"blocks.{i}."
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(at + _BLOCK["adaln"], F.silu(c)).split(d, dim=1)
        h = linear(at + _BLOCK["qkv"], modulated_norm(x, shift_a, scale_a))  #                             [B, T, 3D]
        # Written out instead of fused attention, so that the layout of the heads is checked independently, too.
        q, k, v = (part.reshape(b, tokens, num_heads, -1).transpose(1, 2) for part in h.split(d, dim=2))
        attention = (q @ k.transpose(2, 3) / math.sqrt(d // num_heads)).softmax(dim=-1)
        x = x + gate_a[:, None] * linear(at + _BLOCK["o"], (attention @ v).transpose(1, 2).reshape(b, tokens, d))
        h = F.gelu(linear(at + _BLOCK["in"], modulated_norm(x, shift_m, scale_m)), approximate="tanh")
        x = x + gate_m[:, None] * linear(at + _BLOCK["out"], h)
    shift, scale = linear(_OUTSIDE["final.adaln"], F.silu(c)).split(d, dim=1)
    x = linear(_OUTSIDE["final.linear"], modulated_norm(x, shift, scale))  #                             [B, T, ppC]
    x = x.reshape(b, z.shape[2] // p, z.shape[3] // p, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(b, -1, *z.shape[2:])
